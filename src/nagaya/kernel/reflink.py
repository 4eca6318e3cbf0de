"""Copying a file as a whole: blocks shared where the file system can (FICLONE), holes kept where it cannot."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

# _IOW(0x94, 9, int), linux/fs.h
FICLONE = 1 << 30 | struct.calcsize("i") << 16 | 0x94 << 8 | 9
_CANNOT = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS)


def clone(source: int, target: int) -> bool:
    """Make the empty file `target` share all blocks of `source`; False where these file systems cannot. Raises `OSError`."""
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise
    return True


def copy_data(source: int, target: int) -> int:
    """Copy what `source` has outside of its holes into the empty file `target`; how many bytes. Raises `OSError`."""
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    copied = at = 0
    while at < size:
        try:
            start = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole follows
                break
            raise
        at = os.lseek(source, start, os.SEEK_HOLE)
        copied += at - start
        while start < at:
            done = os.copy_file_range(source, target, at - start, start, start)
            if not done:
                raise OSError(errno.EIO, "the file became shorter while it was copied")
            start += done
    return copied


def sync_file_system(path: str) -> None:
    """syncfs(2) of what holds the directory `path`. Raises `OSError`."""
    import ctypes

    from nagaya.kernel.libc import fail, libc  # lazy: 4 ms

    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if libc.syncfs(ctypes.c_int(fd)) < 0:
            raise fail("syncfs", path)
    finally:
        os.close(fd)
