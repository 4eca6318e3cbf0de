"""Archives and directories with members to be read by name, in any order. Hostile: no name leads out, no link either."""

from __future__ import annotations

import os
import posixpath

from nagaya.errors import HostError, IntegrityError, NotFound, UsageError
from nagaya.images.manifest import DOCUMENT_MAX
from nagaya.images.references import parse_reference
from nagaya.static import BinaryIO, Protocol, cast

MEMBERS_MAX = 100_000
HEADER_MAX = 1 << 20  # bytes of one extended header: names, not content
LINKS_MAX = 8


class Archive(Protocol):
    """Members by name."""

    path: str

    def has(self, name: str) -> bool: ...
    def open(self, name: str) -> BinaryIO: ...


def read_document(archive: Archive, name: str) -> bytes:
    """A member that is a JSON document. Raises `IntegrityError` when it is missing or too long."""
    with archive.open(name) as stream:
        data = stream.read(DOCUMENT_MAX + 1)
    if len(data) > DOCUMENT_MAX:
        raise IntegrityError(f"{archive.path}: {name} is longer than {DOCUMENT_MAX} bytes")
    return data


def is_called(known: str, wanted: str) -> bool:
    """Whether an image that an archive calls `known` is the one that a user calls `wanted`: "docker.io/library/app:1"
    is "app:1", and "app" is "app:latest"."""
    if known == wanted:
        return True
    try:
        return parse_reference(known).canonical == parse_reference(wanted).canonical
    except UsageError:
        return False


def open_archive(path: str) -> Archive:
    """A directory, or a tar file (plain or compressed; "-" for standard input). Raises `NotFound`, `IntegrityError`."""
    if path != "-" and os.path.isdir(path):
        return Directory(path)
    return TarFile(path)


class Directory:
    """Files below a directory, opened as if it were the root: a link in it cannot show us the host's files."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise NotFound(f"cannot open the directory '{path}': {error.strerror}") from None

    def __del__(self) -> None:
        if hasattr(self, "_fd"):  # sources are opened long before they are read, and nothing ends their use
            os.close(self._fd)

    def has(self, name: str) -> bool:
        try:
            self.open(name).close()
        except IntegrityError:
            return False
        return True

    def open(self, name: str) -> BinaryIO:
        from nagaya.kernel.mount import open_in_root  # lazy: ctypes

        try:
            fd = open_in_root(self._fd, name, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise IntegrityError(
                f"{self.path}: cannot read {name}: {str(error.strerror).rpartition(': ')[2]}"
            ) from None
        stream = os.fdopen(fd, "rb")
        if not os.path.isfile(f"/proc/self/fd/{fd}"):
            stream.close()
            raise IntegrityError(f"{self.path}: {name} is not a file")
        return stream


class TarFile:
    """A tar file, indexed once; a compressed one, or a pipe, is unfolded into a temporary file first."""

    def __init__(self, path: str) -> None:
        self.path = "standard input" if path == "-" else path
        self._fd = self._open_plain(path)
        self._members: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        self._index()

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def _open_plain(self, path: str) -> int:
        from nagaya.images.streams import PLAIN, find_compression

        try:
            fd = os.dup(0) if path == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise NotFound(f"cannot open '{self.path}': {error.strerror}") from None
        if os.path.isfile(f"/proc/self/fd/{fd}") and find_compression(os.pread(fd, 16, 0)) == PLAIN:
            return fd
        with os.fdopen(fd, "rb", buffering=0) as stream:
            return self._unfold(cast(BinaryIO, stream))

    def _unfold(self, stream: BinaryIO) -> int:
        import tempfile  # lazy: 8 ms

        from nagaya.images.streams import TarStream

        try:
            with tempfile.TemporaryFile() as plain, TarStream(stream) as chunks:
                for chunk in chunks:
                    plain.write(chunk)
                plain.flush()
                return os.dup(plain.fileno())
        except OSError as error:
            raise HostError.from_os(error, f"cannot unfold {self.path}") from None

    def _index(self) -> None:
        import tarfile  # lazy: 8 ms; reads headers only, and extracts nothing

        try:
            end = os.fstat(self._fd).st_size
            with tarfile.open(fileobj=cast(BinaryIO, _Headers(self._fd)), mode="r:") as tar:
                for member in tar:
                    if len(self._members) + len(self._links) >= MEMBERS_MAX:
                        raise IntegrityError(f"{self.path}: more than {MEMBERS_MAX} members")
                    name = posixpath.normpath(member.name)
                    if name in self._members or name in self._links:
                        raise IntegrityError(f"{self.path}: the member {name[:200]} is there twice")
                    if not 0 <= member.size <= end - member.offset_data:
                        raise IntegrityError(f"{self.path}: it is damaged or cut off in {name[:200]}")
                    if member.isreg():
                        self._members[name] = (member.offset_data, member.size)
                    elif member.issym():
                        self._links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
                    elif member.islnk():
                        self._links[name] = posixpath.normpath(member.linkname)
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            raise IntegrityError(f"{self.path} is no image archive: {error}") from None
        except OSError as error:
            raise HostError.from_os(error, f"cannot read {self.path}") from None

    def _resolve(self, name: str) -> str:
        name = posixpath.normpath(name)
        for _ in range(LINKS_MAX):
            if name not in self._links:
                return name
            name = self._links[name]
        raise IntegrityError(f"{self.path}: links lead in a circle at {name[:200]}")

    def has(self, name: str) -> bool:
        return self._resolve(name) in self._members

    def open(self, name: str) -> BinaryIO:
        found = self._members.get(self._resolve(name))
        if found is None:
            raise IntegrityError(f"{self.path}: the member {name[:200]} is missing")
        return _Section(self, self._fd, *found)  # type: ignore[return-value]


class _Headers:
    """A tar file for `tarfile` to read headers from. It believes their sizes: an extended header of a gigabyte would be
    a gigabyte in memory, and a seek to 2**62 fails like a broken disk."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._at = 0

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= HEADER_MAX:
            raise ValueError(f"it has a header of {size} bytes")
        data = os.pread(self._fd, size, self._at)
        self._at += len(data)
        return data

    def seek(self, offset: int) -> int:
        if not 0 <= offset < 1 << 62:
            raise ValueError(f"it leads to the impossible place {offset}")
        self._at = offset
        return offset

    def tell(self) -> int:
        return self._at


class _Section:
    """Part of a file as a stream of its own. Reads by position, so that several may be open."""

    def __init__(self, keep: object, fd: int, offset: int, size: int) -> None:
        self._keep = keep  # closes the descriptor when it goes
        self._fd = fd
        self._at = offset
        self._left = size

    def read(self, size: int = -1) -> bytes:
        count = self._left if size < 0 else min(size, self._left)
        data = os.pread(self._fd, count, self._at) if count else b""
        if count and not data:
            raise IntegrityError("an archive ends in the middle of a member")
        self._at += len(data)
        self._left -= len(data)
        return data

    def close(self) -> None:
        return

    def __enter__(self) -> _Section:
        return self

    def __exit__(self, *exception: object) -> None:
        return
