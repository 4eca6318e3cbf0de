"""Writing a tar file that appears under its name only when it is complete."""

from __future__ import annotations

import io
import os
import tarfile
from typing import BinaryIO

from nagaya.errors import HostError, UsageError


class TarOutput:
    """A tar at `path`, or on standard output for "-"."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._temporary = ""
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
        self._tar = tarfile.open(fileobj=self._file, mode="w|", format=tarfile.PAX_FORMAT)

    def add_bytes(self, name: str, data: bytes) -> None:
        self.add_stream(name, io.BytesIO(data), len(data))

    def add_stream(self, name: str, stream: BinaryIO, size: int) -> None:
        """Add `size` bytes as a file; dates and owners are nobody's, so that the same image makes the same archive."""
        member = tarfile.TarInfo(name)
        member.size, member.mode = size, 0o644
        try:
            self._tar.addfile(member, stream)
        except OSError as error:
            raise HostError.from_os(error, "cannot write the archive") from None

    def close(self, *, failed: bool) -> None:
        """Finish and name it, or remove it."""
        try:
            if not failed:
                self._tar.close()
                self._file.close()
                if self._temporary:
                    os.replace(self._temporary, self._path)
                    self._temporary = ""
        except OSError as error:
            raise HostError.from_os(error, "cannot write the archive") from None
        finally:
            if self._temporary:
                try:
                    os.unlink(self._temporary)
                except FileNotFoundError:
                    pass
