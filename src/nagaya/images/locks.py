"""The store's locks, by flock(2): a kill gives them back.

`lock` is shared while somebody adds to the store or reads what must not vanish, and exclusive while somebody deletes
content. `names.lock` is held for the moment in which names and records change.
"""

from __future__ import annotations

import errno
import fcntl
import os
from types import TracebackType

from nagaya.errors import HostError
from nagaya.static import Self


class Lock:
    """An flock on `path`, made when missing. A context manager. Not for more than one user of an instance at a time.

    With `remove`, the file goes when the lock is given back: for locks whose names are many.
    """

    def __init__(self, path: str, *, shared: bool = False, remove: bool = False) -> None:
        self.path = path
        self._kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._remove = remove
        self._fd = -1

    def acquire(self, *, wait: bool = True) -> bool:
        """Take it; False when `wait` is off and another holds it. Raises `HostError`."""
        try:
            return self._acquire(self._kind | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            raise HostError.from_os(error, "cannot lock the image store") from None

    def _acquire(self, operation: int) -> bool:
        while True:
            fd = self._open()
            try:
                fcntl.flock(fd, operation)
                # A remover may have unlinked the file that we waited on: then it no longer excludes anybody.
                if os.fstat(fd).st_nlink and os.path.samestat(os.fstat(fd), os.stat(self.path)):
                    self._fd, fd = fd, -1
                    return True
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    return False
                raise
            finally:
                if fd >= 0:
                    os.close(fd)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(self.path, flags, 0o600)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(self.path), 0o700, exist_ok=True)
            return os.open(self.path, flags, 0o600)

    def release(self) -> None:
        if self._fd >= 0:
            if self._remove:
                os.unlink(self.path)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()
