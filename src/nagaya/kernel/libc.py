"""The C library and raw system calls through ctypes. A call costs 0.2 us; importing ctypes 2 ms."""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
_syscall = libc.syscall
_syscall.restype = ctypes.c_long

# x86-64 numbers. From 424 on they are the same on every architecture.
SYS_CAPGET = 125
SYS_CAPSET = 126
SYS_PIVOT_ROOT = 155
SYS_KEYCTL = 250
SYS_SECCOMP = 317
SYS_BPF = 321
SYS_EXECVEAT = 322
SYS_OPEN_TREE = 428
SYS_MOVE_MOUNT = 429
SYS_FSOPEN = 430
SYS_FSCONFIG = 431
SYS_FSMOUNT = 432
SYS_OPENAT2 = 437
SYS_MOUNT_SETATTR = 442


def fail(call: str, path: str = "") -> OSError:
    """The `OSError` for a call that has just set errno."""
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}", path or None)


def syscall(call: str, number: int, *arguments: object, path: str = "") -> int:
    """A raw system call; `call` and `path` name it in the `OSError` that it raises."""
    result: int = _syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise fail(call, path)
    return result
