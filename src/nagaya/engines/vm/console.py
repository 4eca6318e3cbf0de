"""What a machine's kernel and its QEMU say: kept in files that cannot grow without end, and at hand for an error."""

from __future__ import annotations

import os

MAX_BYTES = 256 << 10
TAIL_BYTES = 4096
TAIL_LINES = 20
_PANIC = "Kernel panic - not syncing: "


class TextLog:
    """Moves what comes out of a non-blocking descriptor, which becomes ours, to `path`; at most twice MAX_BYTES."""

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self._path = path
        self._size = 0
        self._tail = b""
        self._file = self._open()

    def drain(self) -> bool:
        """Take all that is there; False when nothing will come any more.

        Never waits, and never fails: a full disk costs the log, not the machine.
        """
        for _ in range(64):  # a guest that writes without end is not the only one to be served
            try:
                data = os.read(self.fd, 65536)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            self._tail = (self._tail + data)[-TAIL_BYTES:]
            self._keep(data)
        return True

    def tail(self) -> str:
        """The last lines, without control characters."""
        text = self._tail.decode("utf-8", "replace").replace("\r", "")
        lines = ("".join(letter if letter.isprintable() else "?" for letter in line) for line in text.splitlines())
        return "\n".join([line for line in lines if line.strip()][-TAIL_LINES:])

    def panic(self) -> str:
        """What a Linux that gave up has said of why; "" when there is no such line."""
        for line in self.tail().splitlines():
            if _PANIC in line:
                return line.split(_PANIC, 1)[1].strip()
        return ""

    def close(self) -> None:
        os.close(self.fd)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _keep(self, data: bytes) -> None:
        if self._file < 0:
            return
        try:
            if self._size >= MAX_BYTES:
                os.close(self._file)
                self._file = -1
                os.replace(self._path, f"{self._path}.1")
                self._file, self._size = self._open(), 0
            self._size += os.write(self._file, data)
        except OSError:
            return

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
