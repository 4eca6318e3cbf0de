"""Blobs by digest: `blobs/ALGORITHM/HEX`, complete and checked, and `partial/ALGORITHM-HEX`, on their way.

A blob gets its name by a rename after its digest was checked, so that what is there is whole. A download that was cut
off leaves its partial file, and the next one goes on from its end. flock(2) on the partial file makes two processes
that want the same blob do the work once: the second waits, and finds it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from types import TracebackType

from nagaya.errors import HostError, IntegrityError, NotFound
from nagaya.images.manifest import check_digest, compute_digest, verify_digest
from nagaya.static import BinaryIO, NoReturn, Self

READ_LIMIT = 8 << 20
CHUNK = 1 << 20


class Blobs:
    """The blobs below `root` (the store's images directory). Making one touches nothing."""

    def __init__(self, root: str) -> None:
        self.root = root

    def path(self, digest: str) -> str:
        """Where the blob is, or would be. Raises `IntegrityError` for what is no digest."""
        algorithm, _, text = check_digest(digest).partition(":")
        return f"{self.root}/blobs/{algorithm}/{text}"

    def has(self, digest: str) -> bool:
        return os.path.isfile(self.path(digest))

    def size(self, digest: str) -> int:
        """Its length in bytes. Raises `NotFound`."""
        try:
            return os.stat(self.path(digest), follow_symlinks=False).st_size
        except FileNotFoundError:
            raise _missing(digest) from None

    def open(self, digest: str) -> BinaryIO:
        """The blob for reading, unbuffered. It was checked when it came; unpacking checks again. Raises `NotFound`."""
        try:
            return os.fdopen(os.open(self.path(digest), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb", buffering=0)
        except FileNotFoundError:
            raise _missing(digest) from None

    def read(self, digest: str, *, limit: int = READ_LIMIT) -> bytes:
        """The whole blob, checked. Raises `NotFound`, or `IntegrityError` when it is damaged or beyond `limit`."""
        with self.open(digest) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > limit:
                raise IntegrityError(f"the blob {digest} of {size} bytes is beyond {limit}")
            data = b"".join(iter(lambda: stream.read(CHUNK), b""))
        verify_digest(data, digest, "a blob in the store")
        return data

    def put(self, data: bytes) -> str:
        """Store `data`; answers its digest."""
        digest = compute_digest(data)
        with self.writer(digest, len(data)) as writer:
            if writer.offset < len(data):
                writer.restart()
                writer.write(data)
        return digest

    def writer(self, digest: str, size: int) -> BlobWriter:
        """A context manager to write the blob with; see `BlobWriter`."""
        return BlobWriter(self, check_digest(digest), size)

    def new(self) -> NewBlob:
        """A context manager to write a blob with whose digest comes out only at its end; see `NewBlob`."""
        return NewBlob(self)

    def adopt(self, path: str, digest: str) -> None:
        """Move the complete file at `path` (same file system) in as a blob whose digest the caller has computed."""
        target = self.path(digest)
        try:
            os.makedirs(os.path.dirname(target), 0o700, exist_ok=True)
            os.chmod(path, 0o644)
            os.rename(path, target)
        except OSError as error:
            raise HostError.from_os(error, "cannot store a blob") from None

    def remove(self, digest: str) -> int:
        """Delete the blob, if it is there; answers the bytes that this frees."""
        path = self.path(digest)
        try:
            size = os.stat(path, follow_symlinks=False).st_size
            os.unlink(path)
        except FileNotFoundError:
            return 0
        return size

    def list(self) -> list[str]:
        """The digests of all blobs."""
        found = []
        for algorithm in ("sha256", "sha512"):
            for name in _names(f"{self.root}/blobs/{algorithm}"):
                try:
                    found.append(check_digest(f"{algorithm}:{name}"))
                except IntegrityError:
                    continue  # not ours: the collector removes it by its path
        return found

    @property
    def partial_directory(self) -> str:
        return f"{self.root}/partial"


class BlobWriter:
    """Writes one blob. A context manager.

    On entry it waits for another writer of the same blob. `offset` says how many bytes are there already: those of
    an interrupted download, or all `size` of them when the blob is complete (then nothing is to be written). On a
    clean exit size and digest are checked, and the blob gets its name; a blob that does not match is deleted
    (`IntegrityError`). After any other exception the partial file stays for the next attempt, but for a full disk,
    which is given its space back.
    """

    def __init__(self, blobs: Blobs, digest: str, size: int) -> None:
        if size < 0:
            raise IntegrityError(f"the blob {digest} has a negative size")
        self.digest = digest
        self.size = size
        self.offset = 0
        self._target = blobs.path(digest)
        self._partial = f"{blobs.partial_directory}/{digest.replace(':', '-')}"
        self._fd = -1

    @property
    def complete(self) -> bool:
        """Whether the blob is there already, so that nothing is to be written."""
        return self._fd < 0

    def __enter__(self) -> Self:
        import hashlib  # lazy: 3 ms

        self._hash = hashlib.new(self.digest.partition(":")[0])
        try:
            for directory in (os.path.dirname(self._partial), os.path.dirname(self._target)):
                os.makedirs(directory, 0o700, exist_ok=True)
            if self._lock():
                self._resume()
            else:
                self.offset = self.size
                self._check_present()
        except OSError as error:
            self._close()
            raise HostError.from_os(error, "cannot store a blob") from None
        except BaseException:
            self._close()
            raise
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Append. Raises `IntegrityError` when it is more than `size`, `HostError` when the disk refuses."""
        if self._fd < 0:
            raise IntegrityError(f"the blob {self.digest} is complete already")
        if self.offset + len(data) > self.size:
            self._discard()
            raise IntegrityError(f"the blob {self.digest} is longer than the {self.size} bytes that were promised")
        view = memoryview(data)
        try:
            while view:
                count = os.write(self._fd, view)
                self._hash.update(view[:count])
                self.offset += count
                view = view[count:]
        except OSError as error:
            self._refuse(error)

    def restart(self) -> None:
        """Forget what an interrupted download left: the source cannot go on from the middle."""
        if self._fd < 0 or not self.offset:
            return
        import hashlib

        self._hash = hashlib.new(self.digest.partition(":")[0])
        self.offset = 0
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None and self._fd >= 0:
                self._finish()
        finally:
            self._close()

    def _lock(self) -> bool:
        """Open and lock the partial file; False when the blob is complete."""
        while True:
            if os.path.isfile(self._target):
                return False
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(self._partial, flags, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            try:  # the writer that we waited for has renamed or deleted it
                same = os.path.samestat(os.fstat(self._fd), os.stat(self._partial, follow_symlinks=False))
            except FileNotFoundError:
                same = False
            if same and not os.path.isfile(self._target):
                return True
            if same:
                os.unlink(self._partial)
            self._close()

    def _resume(self) -> None:
        there = os.fstat(self._fd).st_size
        if there > self.size:
            os.ftruncate(self._fd, 0)
            return
        while chunk := os.read(self._fd, CHUNK):
            self._hash.update(chunk)
            self.offset += len(chunk)

    def _check_present(self) -> None:
        """A blob that is there with another length was damaged (a power cut): begin anew."""
        if os.stat(self._target, follow_symlinks=False).st_size == self.size:
            return
        os.unlink(self._target)
        self.offset = 0
        if self._lock():
            self._resume()

    def _finish(self) -> None:
        if self.offset != self.size:
            # Not deleted: the source's connection ended early, and the next attempt goes on from here.
            raise IntegrityError(
                f"the blob {self.digest} ended after {self.offset} of {self.size} bytes",
                hint="try again: it goes on from there",
            )
        found = self._hash.hexdigest()
        if found != self.digest.partition(":")[2]:
            self._discard()
            algorithm = self.digest.partition(":")[0]
            raise IntegrityError(f"a blob does not match its digest: expected {self.digest}, found {algorithm}:{found}")
        try:
            os.fchmod(self._fd, 0o644)
            os.fdatasync(self._fd)
            os.rename(self._partial, self._target)
        except OSError as error:
            self._refuse(error)

    def _refuse(self, error: OSError) -> NoReturn:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            self._discard()
        error.filename = error.filename or self._partial
        raise HostError.from_os(error, "cannot store a blob") from None

    def _discard(self) -> None:
        try:
            os.unlink(self._partial)
        except FileNotFoundError:
            pass
        self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class NewBlob:
    """Writes a blob that is just being made. A context manager; nothing stays after an exception.

    After a clean exit `digest` and `size` say what it is.
    """

    def __init__(self, blobs: Blobs) -> None:
        self.digest = ""
        self.size = 0
        self._blobs = blobs
        self._path = f"{blobs.partial_directory}/new-{os.getpid()}-{os.urandom(4).hex()}"
        self._fd = -1

    def __enter__(self) -> Self:
        import hashlib  # lazy: 3 ms

        self._hash = hashlib.sha256()
        try:
            os.makedirs(self._blobs.partial_directory, 0o700, exist_ok=True)
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise HostError.from_os(error, "cannot store a blob") from None
        except KeyboardInterrupt:  # raised as open returns: the file is there, and no one else will hear of it
            if os.path.lexists(self._path):
                os.unlink(self._path)
            raise
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Append. Raises `HostError` when the disk refuses."""
        self._hash.update(data)
        self.size += len(data)
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            error.filename = self._path
            raise HostError.from_os(error, "cannot store a blob") from None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                os.fdatasync(self._fd)
                self.digest = f"sha256:{self._hash.hexdigest()}"
                self._blobs.adopt(self._path, self.digest)
        except OSError as problem:
            raise HostError.from_os(problem, "cannot store a blob") from None
        finally:
            os.close(self._fd)
            if not self.digest or os.path.lexists(self._path):
                os.unlink(self._path)


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []


def _missing(digest: str) -> NotFound:
    return NotFound(f"the store has no blob {digest}", hint="bring it back by pulling the image again")
