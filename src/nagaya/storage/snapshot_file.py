"""A snapshot as one file that another host can open. docs/using-snapshots.md has the format.

    nagaya-snapshot FORMAT LENGTH CRC32      then JSON of that length, `Head`
    a member after the other, in its order:  pieces, each 8 bytes of offset and 4 of length, then so much data;
                                             the last has no data, and the member's size for its offset
    SHA-256 of everything before it          32 bytes

Holes of a file are no pieces. A tree is a tar stream.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import zlib
from collections.abc import Callable

from nagaya.errors import HostError, IntegrityError, Unsupported
from nagaya.static import Any, NamedTuple, Protocol
from nagaya.storage import records
from nagaya.storage.snapshots import Snapshot, check

FORMAT = 1
_MAGIC = "nagaya-snapshot"
_PIECE = struct.Struct("<QI")
_PIECE_BYTES = 1 << 20
_MOST_HEAD_BYTES = 16 << 20
_MOST_LINE_BYTES = 128
_MOST_FILE_BYTES = 1 << 46
_HINT = "copy it anew, or save the snapshot again where it was taken"
_TAR = ("tar", "--numeric-owner", "--xattrs", "--xattrs-include=*")


class Member(NamedTuple):
    """`data_bytes` is about what its pieces hold; 0 = not known."""

    name: str
    kind: str  # "file" | "tree"
    mode: int
    data_bytes: int


class Head(NamedTuple):
    """What the file says of itself. `root_digest` is of the image's root, which virtual machines have as a disk."""

    snapshot: Snapshot
    members: tuple[Member, ...]
    root_digest: str = ""


class Stream(Protocol):
    """A file object of bytes."""

    def read(self, size: int, /) -> bytes: ...
    def write(self, data: bytes | memoryview, /) -> Any: ...


Report = Callable[[int], None]
"""Hears of bytes moved."""


def write(out: Stream, head: Head, open_member: Callable[[Member], str], report: Report) -> None:
    """Write the whole file; `open_member` says where each member is. Raises `OSError`, `HostError`."""
    total = hashlib.sha256()

    def put(data: bytes | memoryview) -> None:
        total.update(data)
        out.write(data)

    body = json.dumps(records.to_data(head), separators=(",", ":")).encode()
    put(f"{_MAGIC} {FORMAT} {len(body)} {zlib.crc32(body):08x}\n".encode() + body)
    for member in head.members:
        path = open_member(member)
        (_write_tree if member.kind == "tree" else _write_file)(path, put, report)
    out.write(total.digest())


def _write_file(path: str, put: Callable[[bytes | memoryview], None], report: Report) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        size, at = os.fstat(fd).st_size, 0
        while at < size:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:  # nothing but a hole follows
                break
            data = os.pread(fd, min(_PIECE_BYTES, os.lseek(fd, at, os.SEEK_HOLE) - at), at)
            if not data:
                break
            put(_PIECE.pack(at, len(data)))
            put(data)
            at += len(data)
            report(len(data))
        put(_PIECE.pack(size, 0))
    finally:
        os.close(fd)


def _write_tree(path: str, put: Callable[[bytes | memoryview], None], report: Report) -> None:
    argv = [*_TAR, "--format=posix", "--sparse", "--create", "--directory", path, "."]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as tar:
        assert tar.stdout is not None and tar.stderr is not None
        at = 0
        while data := tar.stdout.read(_PIECE_BYTES):
            put(_PIECE.pack(at, len(data)))
            put(data)
            at += len(data)
            report(len(data))
        said = tar.stderr.read(4096).decode(errors="replace").strip()
    if tar.returncode:
        raise HostError(f"cannot pack the machine's files: {said.splitlines()[0] if said else 'tar failed'}")
    put(_PIECE.pack(at, 0))


class Reader:
    """A file that is being read: `head` first, then `extract`. Both raise `IntegrityError`, `Unsupported`, `OSError`."""

    def __init__(self, source: Stream) -> None:
        self._source = source
        self._total = hashlib.sha256()

    def head(self) -> Head:
        line = b""
        while not line.endswith(b"\n"):
            letter = self._source.read(1)
            line += letter
            if not letter or len(line) > _MOST_LINE_BYTES or not line.startswith(_MAGIC.encode()[: len(line)]):
                raise IntegrityError(
                    "this is no file that 'nagaya snapshot save' has written", hint="'nagaya load' reads images"
                )
        self._total.update(line)
        words = line[:-1].split(b" ")
        if len(words) != 4 or words[0] != _MAGIC.encode():
            raise IntegrityError("the snapshot's file is damaged: its first line makes no sense", hint=_HINT)
        if words[1] != b"%d" % FORMAT:
            raise Unsupported(
                f"the snapshot's file is of format {words[1].decode('ascii', 'replace')}, and this Nagaya knows {FORMAT}",
                hint="use the version of Nagaya that wrote it",
            )
        length = int(words[2]) if words[2].isdigit() and len(words[2]) < 10 else _MOST_HEAD_BYTES + 1
        if length > _MOST_HEAD_BYTES:
            raise IntegrityError("the snapshot's file is damaged: its head is too long", hint=_HINT)
        body = self._read(length)
        if words[3] != b"%08x" % zlib.crc32(body):
            raise IntegrityError("the snapshot's file is damaged: the sum of its head is wrong", hint=_HINT)
        data = json.loads(body)
        head = records.from_data(Head, data, what="the snapshot's file")
        check(head.snapshot, data["snapshot"])
        for member in head.members:
            parts = member.name.split("/")
            if member.kind not in ("file", "tree") or not all(parts) or {".", ".."} & set(parts):
                raise IntegrityError(f"the snapshot's file names a part '{member.name}'", hint=_HINT)
        return head

    def extract(self, head: Head, place: str, report: Report) -> None:
        """Make all members below the directory `place`, and compare the file's sum."""
        for member in head.members:
            path = f"{place}/{member.name}"
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            (self._extract_tree if member.kind == "tree" else self._extract_file)(member, path, report)
        expected = self._total.digest()
        if self._source.read(len(expected)) != expected:
            raise IntegrityError("the snapshot's file is damaged: its sum is wrong", hint=_HINT)
        if self._source.read(1):
            raise IntegrityError("the snapshot's file is damaged: there is more behind its end", hint=_HINT)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._source.read(size - len(data))
            if not more:
                raise IntegrityError("the snapshot's file is cut off", hint=_HINT)
            data += more
        self._total.update(data)
        return data

    def _piece(self) -> tuple[int, bytes]:
        at, length = _PIECE.unpack(self._read(_PIECE.size))
        if length > _PIECE_BYTES or at + length > _MOST_FILE_BYTES:
            raise IntegrityError("the snapshot's file is damaged: it has a piece where none can be", hint=_HINT)
        return at, self._read(length)

    def _extract_file(self, member: Member, path: str, report: Report) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(path, flags, member.mode & 0o777)
        try:
            end = 0
            while True:
                at, data = self._piece()
                if at < end:
                    raise IntegrityError("the snapshot's file is damaged: its pieces overlap", hint=_HINT)
                if not data:
                    os.ftruncate(fd, at)
                    return
                view, end = memoryview(data), at + len(data)
                while view:
                    view = view[os.pwrite(fd, view, end - len(view)) :]
                report(len(data))
        finally:
            os.close(fd)

    def _extract_tree(self, member: Member, path: str, report: Report) -> None:
        os.mkdir(path, 0o700)
        argv = [*_TAR, "--same-owner", "--preserve-permissions", "--extract", "--directory", path]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as tar:
            assert tar.stdin is not None and tar.stderr is not None
            try:
                while True:
                    _, data = self._piece()
                    if not data:
                        break
                    tar.stdin.write(data)
                    report(len(data))
            except BrokenPipeError:
                pass  # it says why
            except BaseException:
                tar.kill()
                raise
            finally:
                try:
                    tar.stdin.close()
                except BrokenPipeError:
                    pass
            said = tar.stderr.read(4096).decode(errors="replace").strip()
        if tar.returncode:
            raise HostError(f"cannot unpack the machine's files: {said.splitlines()[0] if said else 'tar failed'}")
