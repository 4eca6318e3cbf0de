"""fallocate(2), statfs(2) and mmap(2), as far as the standard library has not got them."""

from __future__ import annotations

import ctypes
import mmap
import os

from nagaya.kernel.libc import fail, libc

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10
_TMPFS_MAGIC = 0x01021994  # linux/magic.h
_STATFS_LONGS = 16  # struct statfs is 120 bytes on 64-bit machines; the first long is the type
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_mmap = ctypes.CFUNCTYPE(
    ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    use_errno=True,
)(("mmap", libc))  # fmt: skip


def fallocate(fd: int, mode: int, offset: int, size_bytes: int) -> None:
    """Raises `OSError`: EOPNOTSUPP where the file system cannot do it."""
    if libc.fallocate(ctypes.c_int(fd), ctypes.c_int(mode), ctypes.c_long(offset), ctypes.c_long(size_bytes)) < 0:
        raise fail("fallocate")


def is_in_memory(path: str) -> bool:
    """Whether what is written there takes up memory: a tmpfs. Raises `OSError`."""
    found = (ctypes.c_long * _STATFS_LONGS)()
    if libc.statfs(os.fsencode(path), ctypes.byref(found)) < 0:
        raise fail("statfs", path)
    return found[0] == _TMPFS_MAGIC


def map_zeros(address: int, size_bytes: int) -> None:
    """Put fresh pages of zeros, taken when they are touched, in the place of those at `address`. Raises `OSError`.

    Nothing but what the caller has mapped itself may be there.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
    if _mmap(address, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != address:
        raise fail("mmap")


def map_copy_on_write(address: int, size_bytes: int, fd: int) -> None:
    """Put the file `fd` in the place of what is mapped at `address`, MAP_PRIVATE. As `map_zeros`."""
    flags = mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE
    if _mmap(address, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0) != address:
        raise fail("mmap")
