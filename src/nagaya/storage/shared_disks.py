"""Copies of a data disk that take no time where the file system shares no blocks: each stands on the one file.

    PLACE/data.backing   another name (link(2)) of a disk that nobody writes any more
    PLACE/data.img       what has been written since: sparse, its holes show the backing file (kernel/backing.py)

PLACE is a machine's directory or a snapshot's. The file goes with the last of its names: nothing counts them.
Our own VMM's disks can be such; `make_whole` makes one file of them for whoever cannot read two.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from nagaya.errors import Conflict, HostError
from nagaya.kernel import backing, reflink
from nagaya.storage.rootfs import BACKING_DISK, DATA_DISK

QUICK_BYTES = 8 << 20
"""What is no more is copied: in a few milliseconds, and for good."""
SECTOR = 512  # what st_blocks counts
_CANNOT_LINK = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EACCES, errno.EOPNOTSUPP)


def is_copied_slowly(place: str, target: str) -> bool:
    """Whether to copy the data disk in `place` would take a while: more than a few blocks have to be. Raises `OSError`."""
    try:
        allocated = os.lstat(f"{place}/{DATA_DISK}").st_blocks * SECTOR
    except FileNotFoundError:
        return False
    return allocated > QUICK_BYTES and not reflink.can_clone(target)


def is_worth_it(place: str, target: str) -> bool:
    """Whether a disk in `target` had better stand on that in `place` than be a copy of it. Raises `OSError`."""
    return not is_shared(place) and is_copied_slowly(place, target) and backing.keeps_holes(target)


def stand_on(place: str, target: str) -> bool:
    """Put a new disk into the directory `target` that stands on the one in `place`, which nobody will write from here on.

    False where that file can have no second name there; then there is nothing new. Raises `OSError`.
    """
    try:
        os.link(f"{place}/{DATA_DISK}", f"{target}/{BACKING_DISK}", follow_symlinks=False)
    except OSError as error:
        if error.errno in _CANNOT_LINK:
            return False
        raise
    below = os.open(f"{target}/{BACKING_DISK}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        found = os.fstat(below)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        disk = os.open(f"{target}/{DATA_DISK}", flags, stat.S_IMODE(found.st_mode))
        try:
            os.ftruncate(disk, found.st_size)
            reflink.copy_run(
                below, disk, 0, min(backing.BLOCK, found.st_size)
            )  # the superblock: it is not a blank disk
        finally:
            os.close(disk)
    finally:
        os.close(below)
    return True


def copy(place: str, target: str) -> None:
    """The backing file of the disk in `place`, if it has one, for the copy of that in the directory `target`. Raises `OSError`."""
    try:
        os.link(f"{place}/{BACKING_DISK}", f"{target}/{BACKING_DISK}", follow_symlinks=False)
    except FileNotFoundError:
        return


def is_shared(place: str) -> bool:
    return os.path.lexists(f"{place}/{BACKING_DISK}")


def make_whole(place: str) -> None:
    """Have the disk in `place`, which nobody uses, do without a backing file. Once cut off, it can be done again.

    Raises `Conflict` while a VMM has it, `HostError`.
    """
    if not is_shared(place):
        return
    try:
        disk = os.open(f"{place}/{DATA_DISK}", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(disk, fcntl.LOCK_EX | fcntl.LOCK_NB)
            below = os.open(f"{place}/{BACKING_DISK}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                backing.fill(disk, below)
            finally:
                os.close(below)
            os.fdatasync(disk)  # before the other one goes
        finally:
            os.close(disk)
        os.unlink(f"{place}/{BACKING_DISK}")
    except BlockingIOError:
        raise Conflict("the machine's disk is in use", hint="stop the machine first", state="in use") from None
    except OSError as error:
        raise HostError.from_os(error, "cannot make one file of the machine's disk") from None
