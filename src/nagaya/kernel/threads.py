"""Waking one thread out of a system call: a signal whose handler does nothing."""

from __future__ import annotations

import ctypes
import os
import signal

from nagaya.kernel.libc import libc, syscall

SYS_TGKILL = 234
INTERRUPT = signal.SIGRTMIN + 4
_SIG_ERR = ctypes.c_void_p(-1).value

_prepared = False


def make_thread_interruptible() -> None:
    """Let `interrupt_thread` wake the calling thread. The handler is the process's, and is set once."""
    global _prepared
    if not _prepared:
        # A function of the C library that takes an int and does nothing else: Python's own handlers can be set on the
        # main thread alone, and run there.
        libc.signal.restype = ctypes.c_void_p
        if libc.signal(ctypes.c_int(INTERRUPT), ctypes.cast(libc.abs, ctypes.c_void_p)) == _SIG_ERR:
            raise OSError(ctypes.get_errno(), "signal: the handler cannot be set")
        _prepared = True
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {INTERRUPT})


def interrupt_thread(thread_id: int) -> None:
    """Make the system call that a thread of this process is in return EINTR; one that has ended is no error.

    The handler restarts what can be restarted, as read(2): it is for KVM_RUN, poll(2) and others that never are.
    """
    try:
        syscall("tgkill", SYS_TGKILL, ctypes.c_int(os.getpid()), ctypes.c_int(thread_id), ctypes.c_int(INTERRUPT))
    except ProcessLookupError:
        pass
