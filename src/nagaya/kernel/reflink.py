"""Copying a file as a whole: blocks shared where the file system can (FICLONE), holes kept where it cannot."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator

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


def can_clone(directory: str) -> bool:
    """Whether files in `directory` can share blocks. Raises `OSError`."""
    flags = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC
    try:
        files = [os.open(directory, flags, 0o600) for _ in range(2)]
    except OSError as error:
        if (
            error.errno in _CANNOT or error.errno == errno.EISDIR
        ):  # a file system without O_TMPFILE: none of those that share
            return False
        raise
    try:
        return clone(*files)
    finally:
        for fd in files:
            os.close(fd)


def copy_data(source: int, target: int) -> int:
    """Copy what `source` has outside of its holes into the empty file `target`; how many bytes. Raises `OSError`."""
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    return sum(copy_run(source, target, start, end) for start, end in data_runs(source, 0, size))


def copy_again(source: int, target: int, runs: list[tuple[int, int]]) -> None:
    """Make `target`, a copy of `source` as it was, the same again in `runs`, (offset, bytes), holes too. Raises `OSError`."""
    from nagaya.kernel.files import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate  # lazy: ctypes, 4 ms

    def clear(start: int, end: int) -> None:
        if start < end:
            fallocate(target, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, end - start)

    for offset, size in runs:
        at = offset
        for start, end in data_runs(source, offset, offset + size):
            clear(at, start)
            copy_run(source, target, start, end)
            at = end
        clear(at, offset + size)


def data_runs(fd: int, at: int, end: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what a file has outside of its holes, between these two places. Raises `OSError`."""
    while at < end:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole follows
                return
            raise
        if start >= end:
            return
        at = min(end, os.lseek(fd, start, os.SEEK_HOLE))
        yield start, at


def copy_run(source: int, target: int, start: int, end: int) -> int:
    """Make `target` the same between these two places; how many bytes that were. Raises `OSError`."""
    at = start
    while at < end:
        done = os.copy_file_range(source, target, end - at, at, at)
        if not done:
            raise OSError(errno.EIO, "the file became shorter while it was copied")
        at += done
    return end - start


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
