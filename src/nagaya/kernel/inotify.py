"""inotify(7)."""

from __future__ import annotations

import ctypes
import os

IN_MODIFY = 0x2
IN_ATTRIB = 0x4
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200

_libc = ctypes.CDLL(None, use_errno=True)


def inotify_init() -> int:
    """A new inotify descriptor, close-on-exec."""
    fd: int = _libc.inotify_init1(os.O_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), f"inotify_init1: {os.strerror(ctypes.get_errno())}")
    return fd


def add_watch(fd: int, path: str, mask: int) -> int:
    """Watch `path`; the answer is the watch's number."""
    number: int = _libc.inotify_add_watch(fd, os.fsencode(path), ctypes.c_uint32(mask))
    if number < 0:
        raise OSError(ctypes.get_errno(), f"inotify_add_watch: {os.strerror(ctypes.get_errno())}", path)
    return number
