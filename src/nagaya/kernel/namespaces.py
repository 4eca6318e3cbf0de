"""unshare(2), setns(2), sethostname(2)."""

from __future__ import annotations

import ctypes
import os

from nagaya.kernel.libc import fail, libc

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000


def unshare(flags: int) -> None:
    """Leave the namespaces in `flags` for new ones. CLONE_NEWUSER fails in a process with threads."""
    if libc.unshare(ctypes.c_int(flags)):
        raise fail("unshare")


def setns(fd: int, flags: int) -> None:
    if libc.setns(ctypes.c_int(fd), ctypes.c_int(flags)):
        raise fail("setns")


def sethostname(name: str) -> None:
    raw = os.fsencode(name)
    if libc.sethostname(raw, ctypes.c_size_t(len(raw))):
        raise fail("sethostname")
