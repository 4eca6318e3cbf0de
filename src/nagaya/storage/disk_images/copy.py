"""Copying a disk image: by reference where the file system can (FICLONE), else its data alone, leaving holes."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable

FICLONE = 0x40049409  # _IOW(0x94, 9, int): linux/fs.h
CHUNK = 16 << 20


def copy_sparse(source: int, target: str, progress: Callable[[float], None] | None) -> None:
    """Make the file `target`, which exists, a copy of the opened one. Raises `OSError`."""
    fd = os.open(target, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if not _share(source, fd):
            _copy(source, fd, progress)
    finally:
        os.close(fd)


def _share(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.EPERM, errno.ETXTBSY):
            raise
        return False
    return True


def _copy(source: int, target: int, progress: Callable[[float], None] | None) -> None:
    end = os.lseek(source, 0, os.SEEK_END)
    os.ftruncate(target, end)
    at = 0
    while at < end:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # nothing but a hole up to the end
            raise
        hole = os.lseek(source, at, os.SEEK_HOLE)
        while at < hole:
            count = os.copy_file_range(source, target, min(CHUNK, hole - at), at, at)
            if not count:
                raise OSError(errno.EIO, "the disk became shorter while it was copied")
            at += count
            if progress is not None:
                progress(at / end)
