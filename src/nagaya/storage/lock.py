"""File locks. A supervisor's lock being held *is* its machine's liveness.

Open-file-description locks (fcntl(2), F_OFD_*): unlike POSIX locks they belong to the descriptor and not to the
process, and unlike flock(2) they can be *queried* without being taken, so that `ps` never makes a start fail.
"""

from __future__ import annotations

import errno
import fcntl
import os
from types import TracebackType

from nagaya.kernel.locks import lock_kind, pack_lock
from nagaya.static import Self


class FileLock:
    """An exclusive lock on `path`, which is made when missing. Use as a context manager or `acquire`/`release`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = -1

    def acquire(self, *, wait: bool = True) -> bool:
        """Take the lock; False when `wait` is off and another holds it.

        The file may be removed (with its machine) while we wait: then `FileNotFoundError`.
        """
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, pack_lock(fcntl.F_WRLCK))
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES) and not wait:
                return False
            raise
        except BaseException:
            os.close(fd)
            raise
        if os.fstat(fd).st_nlink == 0:
            os.close(fd)
            raise FileNotFoundError(errno.ENOENT, "lock file was removed", self.path)
        self.fd = fd
        return True

    @classmethod
    def inherited(cls, path: str, fd: int) -> Self:
        """A lock that whoever started this process took: the kernel gives it up when the last copy of `fd` closes."""
        lock = cls(path)
        lock.fd = fd
        return lock

    def release(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        if self.fd < 0:
            self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


def is_held(path: str) -> bool:
    """Whether anyone holds the lock on `path`; False when there is no such file. Takes nothing."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, pack_lock(fcntl.F_WRLCK))
    finally:
        os.close(fd)
    return lock_kind(answer) != fcntl.F_UNLCK
