"""fallocate(2), as far as the standard library has not got it."""

from __future__ import annotations

import ctypes

from nagaya.kernel.libc import fail, libc

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10


def fallocate(fd: int, mode: int, offset: int, size_bytes: int) -> None:
    """Raises `OSError`: EOPNOTSUPP where the file system cannot do it."""
    if libc.fallocate(ctypes.c_int(fd), ctypes.c_int(mode), ctypes.c_long(offset), ctypes.c_long(size_bytes)) < 0:
        raise fail("fallocate")
