"""Writing a tar file that appears under its name only when it is complete."""

from __future__ import annotations

import io
import os
import tarfile

from nagaya.errors import HostError, IntegrityError, UsageError
from nagaya.static import BinaryIO

BLOCK = 512
RECORD = 20 * BLOCK  # what tar(1) pads a whole archive to
CHUNK = 1 << 20


class TarOutput:
    """A tar at `path`, or on standard output for "-".

    Headers are tarfile's, the rest is not: what its stream mode holds back it would still write when it is collected.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._temporary = ""
        self._size = 0
        try:
            if path == "-":
                if os.isatty(1):
                    raise UsageError("refusing to write an archive to the terminal", hint="use -o FILE, or redirect it")
                self._file: BinaryIO = os.fdopen(os.dup(1), "wb")
            else:
                self._temporary = f"{path}.{os.getpid()}.tmp"
                self._file = open(self._temporary, "xb")
        except OSError as error:
            raise HostError.from_os(error, "cannot write the archive") from None

    def add_bytes(self, name: str, data: bytes) -> None:
        self.add_stream(name, io.BytesIO(data), len(data))

    def add_stream(self, name: str, stream: BinaryIO, size: int) -> None:
        """Add `size` bytes as a file; dates and owners are nobody's, so that the same image makes the same archive."""
        member = tarfile.TarInfo(name)
        member.size, member.mode = size, 0o644
        self._write(member.tobuf(tarfile.PAX_FORMAT))
        left = size
        while left:
            data = stream.read(min(CHUNK, left))
            if not data:
                raise IntegrityError(f"what is to be {name} in the archive has become shorter")
            self._write(data)
            left -= len(data)
        self._write(bytes(-size % BLOCK))

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise HostError.from_os(error, "cannot write the archive") from None
        self._size += len(data)

    def close(self, *, failed: bool) -> None:
        """Finish and name it, or remove it."""
        try:
            if not failed:
                self._write(bytes(2 * BLOCK))
                self._write(bytes(-self._size % RECORD))
                self._file.close()
                if self._temporary:
                    os.replace(self._temporary, self._path)
                    self._temporary = ""
        except OSError as error:
            raise HostError.from_os(error, "cannot write the archive") from None
        finally:
            self._abandon()

    def _abandon(self) -> None:
        try:
            self._file.close()
        except OSError:
            pass  # the disk is full: it was told when it was found, and the file goes away now
        if self._temporary:
            try:
                os.unlink(self._temporary)
            except FileNotFoundError:
                pass
