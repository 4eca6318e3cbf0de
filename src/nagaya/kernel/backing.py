"""A sparse file on a backing file: what it has not written itself is read from there, and its holes say what that is.

So a disk can be another one's copy at once on file systems that share no blocks (ext4 above all). There is no table
beside the two: lseek(2) tells holes from data, with zeros that were written as data, and what is written is there for it
at once. `keeps_holes` looks whether a file system is that exact. The backing file is never written.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from nagaya.kernel.reflink import copy_run, data_runs

BLOCK = 4096
"""What is written is written in whole ones: half a block of a file would be data as a whole."""
_ZEROS = bytes(1 << 20)


def keeps_holes(directory: str) -> bool:
    """Whether files in `directory` have holes to the block, and no others than were left. Raises `OSError`.

    A file system of larger blocks, or one that makes holes of zeros, or that knows of none, is not for this.
    """
    fd = os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, 64 * BLOCK)
        os.pwrite(fd, bytes(BLOCK), 9 * BLOCK)
        return list(data_runs(fd, 0, 64 * BLOCK)) == [(9 * BLOCK, 10 * BLOCK)]
    except OSError as error:
        if error.errno == errno.EINVAL:  # no SEEK_DATA
            return False
        raise
    finally:
        os.close(fd)


def layers(fd: int, at: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """(start, end, whether it is the file's own) between these two places, in order and without gaps. Raises `OSError`."""
    for start, stop in data_runs(fd, at, end):
        if at < start:
            yield at, start, False
        yield start, stop, True
        at = stop
    if at < end:
        yield at, end, False


def read(fd: int, backing: int, at: int, end: int) -> bytes:
    """What there is between these two places. Raises `OSError`."""
    parts = []
    for start, stop, own in layers(fd, at, end):
        data = os.pread(fd if own else backing, stop - start, start)
        parts.append(data.ljust(stop - start, b"\0"))  # a file that was grown is larger than what it stands on
    return b"".join(parts)


def runs(fd: int, backing: int, at: int, end: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what either has outside of its holes. Raises `OSError`."""
    for start, stop, own in layers(fd, at, end):
        if own:
            yield start, stop
        else:
            yield from data_runs(backing, start, stop)


def lift(fd: int, backing: int, offset: int, size_bytes: int) -> None:
    """Before a write there: make the blocks that it will cover in part the file's own. Raises `OSError`."""
    end = offset + size_bytes
    for block in sorted({edge - edge % BLOCK for edge in (offset, end) if edge % BLOCK}):
        if any(data_runs(fd, block, block + BLOCK)) or not any(data_runs(backing, block, block + BLOCK)):
            continue
        os.pwrite(fd, os.pread(backing, BLOCK, block), block)


def holes(backing: int, at: int, end: int) -> Iterator[tuple[int, int]]:
    """(start, end) of where the backing file has nothing: there, and only there, a hole reads as zeros. Raises `OSError`."""
    for start, stop, has_data in layers(backing, at, end):
        if not has_data:
            yield start, stop


def write_zeros(fd: int, backing: int, at: int, end: int) -> None:
    """Write zeros over what the backing file has between these two places. Raises `OSError`."""
    for start, stop in data_runs(backing, at, end):
        lift(fd, backing, start, stop - start)
        while start < stop:
            start += os.pwrite(fd, memoryview(_ZEROS)[: stop - start], start)


def fill(fd: int, backing: int) -> None:
    """Copy all that the file has not of its own: it can do without the backing file then. Once cut off, it goes on. Raises `OSError`."""
    size = os.fstat(fd).st_size
    for start, stop, own in layers(fd, 0, size):
        if not own:
            for begin, end in data_runs(backing, start, stop):
                copy_run(backing, fd, begin, end)
