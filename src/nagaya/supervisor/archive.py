"""A directory of the host's as a tar stream, while others may be at work in it: what goes away meanwhile is left out."""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from collections.abc import Callable

from nagaya.engines.base import Copy
from nagaya.static import IO


def write_archive(copy: Copy, stream: IO[bytes]) -> str:
    """`copy.source` into `stream`. What is missing of it, as the end of a sentence; "" for nothing.

    Raises `OSError` for what is there and cannot be read, and for a stream that nobody reads any more.
    """
    archive = _Archive(stream)
    root = os.path.realpath(copy.source)
    os.stat(root)  # its own absence is no lack of something in it
    if copy.is_directory:
        archive.add_tree(root, ".")
    else:
        archive.add(root, os.path.basename(copy.target))
    archive.close()
    return archive.describe_lack()


class _Archive:
    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._tar = tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT)
        self._gone: list[str] = []
        self._shrunk: list[str] = []

    def close(self) -> None:
        self._tar.close()

    def add_tree(self, path: str, name: str) -> None:
        """A directory and all below it, without recursion: how deep it is is not ours to say."""
        waiting = [(path, name)]
        while waiting:
            path, name = waiting.pop()
            if not self.add(path, name):
                continue
            try:
                entries = sorted(os.listdir(path), reverse=True)
            except (FileNotFoundError, NotADirectoryError):
                self._gone.append(name)
                continue
            waiting += [(f"{path}/{entry}", f"{name}/{entry}") for entry in entries]

    def add(self, path: str, name: str) -> bool:
        """One file of any kind. Whether it is a directory."""
        tar = self._tar
        try:
            info = tar.gettarinfo(path, name)
        except FileNotFoundError:
            self._gone.append(name)
            return False
        tar.members = []  # type: ignore[attr-defined]  # else it keeps each: a million are 600 MB
        if info is None:  # a socket, which is its server's
            return False
        if not info.isreg():
            tar.addfile(info)
            return info.isdir()
        try:
            file = open(path, "rb", buffering=0, opener=_open_regular)
        except FileNotFoundError:  # it went away, or is another kind of file by now
            self._forget(info)
            self._gone.append(name)
            return False
        with file:
            status = os.fstat(file.fileno())
            tar.addfile(info, _Padded(file, lambda: self._shrunk.append(name)))  # type: ignore[arg-type]
        if status.st_nlink == 1:
            self._inodes.pop((status.st_ino, status.st_dev), None)  # of a million files it would keep each
        return False

    @property
    def _inodes(self) -> dict[object, str]:
        """What tarfile knows of files with several names."""
        inodes: dict[object, str] = self._tar.inodes  # type: ignore[attr-defined]
        return inodes

    def _forget(self, info: tarfile.TarInfo) -> None:
        """Another name of the same file must not become a link to what is not there."""
        for key in [key for key, name in self._inodes.items() if name == info.name]:
            del self._inodes[key]

    def describe_lack(self) -> str:
        parts = [
            f"{len(names)} {'file' if len(names) == 1 else 'files'} {what} while it was made ({_first(names)})"
            for names, what in ((self._gone, "went away"), (self._shrunk, "became shorter"))
            if names
        ]
        return ", ".join(parts)


def _first(names: list[str]) -> str:
    return names[0].removeprefix("./") + (" first" if len(names) > 1 else "")


def _open_regular(path: str, flags: int) -> int:
    """Nothing that would block, or that a link leads to. Raises `FileNotFoundError` for what is no regular file any more."""
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.ENOTDIR):
            raise FileNotFoundError(errno.ENOENT, "no regular file any more", path) from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileNotFoundError(errno.ENOENT, "no regular file any more", path)
    return fd


class _Padded:
    """A file for tarfile, which wants as much as the head says: zeros stand for what has been cut off since."""

    def __init__(self, file: IO[bytes], on_short: Callable[[], None]) -> None:
        self._file, self._on_short, self._is_short = file, on_short, False

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count and (more := self._file.read(count - len(data))):
            data += more
        if len(data) < count and not self._is_short:
            self._is_short = True
            self._on_short()
        return data + bytes(count - len(data))
