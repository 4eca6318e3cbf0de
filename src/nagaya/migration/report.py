"""Between a machine's process that moves it and its supervisor: lines of JSON over a pair of sockets."""

from __future__ import annotations

import json
import os

from nagaya.errors import Conflict, NagayaError, RemoteError, to_wire
from nagaya.static import Any

_MOST_LINE_BYTES = 32 << 20


class Lines:
    """Cuts bytes into messages. Raises `RemoteError` for what is none."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        self._buffer += data
        if len(self._buffer) > _MOST_LINE_BYTES:
            raise RemoteError("the machine's process said too much at once")
        found = []
        while (end := self._buffer.find(b"\n")) >= 0:
            try:
                message = json.loads(self._buffer[:end])
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                raise RemoteError("the machine's process said what makes no sense")
            found.append(message)
            del self._buffer[: end + 1]
        return found


def encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Report:
    """The machine's end: it blocks. `fd` is the caller's."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._lines = Lines()
        self._waiting: list[dict[str, Any]] = []
        os.set_blocking(fd, True)

    def tell(self, what: str, **details: object) -> None:
        """Raises `OSError` when nobody is there any more."""
        view = memoryview(encode({"what": what, **details}))
        while view:
            view = view[os.write(self.fd, view) :]

    def fail(self, what: str, problem: NagayaError) -> None:
        self.tell(what, error=to_wire(problem))

    def hear(self) -> dict[str, Any]:
        """The next message; raises `Conflict` when it is that nothing shall come of it all, `RemoteError` at the end."""
        while not self._waiting:
            self._read()
        return _checked(self._waiting.pop(0))

    def look(self) -> None:
        """Something has come while another thing was waited for: raise when it is that nothing shall come of it."""
        self._read()
        for message in self._waiting:
            _checked(message)

    def _read(self) -> None:
        data = os.read(self.fd, 1 << 16)
        if not data:
            raise RemoteError("the machine's supervisor is gone")
        self._waiting += self._lines.feed(data)


def _checked(message: dict[str, Any]) -> dict[str, Any]:
    if message.get("what") == "abort":
        raise Conflict(str(message.get("why") or "the migration was called off"))
    return message
