"""QEMU's monitor protocol, the client's end (QEMU, docs/interop/qmp-spec.txt). No I/O: bytes in, messages out, and back.

One JSON object a line, both ways. QEMU greets first; until `qmp_capabilities` has been answered it takes nothing else.
QEMU runs a hostile guest and may itself have been taken over: what it sends is checked, and bounded.
"""

from __future__ import annotations

import json

from nagaya.errors import RemoteError
from nagaya.static import Any, NamedTuple

MAX_LINE = 1 << 20
KEPT = 2048  # characters of what was sent and received that an error keeps


class QmpError(RemoteError):
    """QEMU refused a command, or broke the protocol. `sent` and `received` are the lines that led to it."""

    def __init__(self, message: str, *, hint: str = "", sent: str = "", received: str = "") -> None:
        super().__init__(message, hint=hint)
        self.sent = sent[:KEPT]
        self.received = received[:KEPT]


class Greeting(NamedTuple):
    """QEMU's first line. `version` is "7.2.22", `package` the distribution's name for it."""

    version: str
    package: str


class Answer(NamedTuple):
    """What a command returned: any JSON value; {} for one that returns nothing."""

    id: int
    value: Any


class Refusal(NamedTuple):
    """A command that failed. `kind` is QEMU's error class, most often "GenericError"; `text` is for a person."""

    id: int
    kind: str
    text: str
    sent: str
    received: str

    def error(self) -> QmpError:
        return QmpError(f"QEMU refused a command: {self.text}", sent=self.sent, received=self.received)


class Event(NamedTuple):
    """Something that happened, by its name (SHUTDOWN, RESET, STOP, ...) and with its data."""

    name: str
    data: dict[str, Any]


Message = Greeting | Answer | Refusal | Event


class QmpLink:
    """The state of one connection. `execute` queues; `outgoing` and `sent` move the queue to the stream."""

    def __init__(self) -> None:
        self._queue = bytearray()
        self._rest = b""
        self._greeted = False
        self._next = 1
        self._waiting: dict[int, str] = {}  # id -> the line that was sent

    def execute(self, command: str, **arguments: object) -> int:
        """Queue a command; answers the id that its `Answer` or `Refusal` will have."""
        id_, self._next = self._next, self._next + 1
        message: dict[str, object] = {"execute": command, "id": id_}
        if arguments:
            message["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        line = json.dumps(message)
        self._waiting[id_] = line
        self._queue += line.encode() + b"\n"
        return id_

    def outgoing(self) -> bytes:
        """All that waits to be written."""
        return bytes(self._queue)

    def sent(self, count: int) -> None:
        """The first `count` bytes of `outgoing` were written."""
        del self._queue[:count]

    def pending(self) -> str:
        """The oldest command that has not been answered, as it was sent; "" when there is none."""
        return next(iter(self._waiting.values()), "")

    def receive(self, data: bytes) -> list[Message]:
        """Take bytes from QEMU. Raises `QmpError` at a violation; the link must not be used after that."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE or any(len(line) > MAX_LINE for line in lines):
            raise self._violation("a line without end", self._rest[:KEPT])
        return [self._message(line) for line in lines if line.strip()]

    def _message(self, line: bytes) -> Message:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise self._violation("a line that is not JSON", line) from None
        if not isinstance(message, dict):
            raise self._violation("a line that is no object", line)
        if not self._greeted:
            return self._greeting(message, line)
        if "event" in message:
            name, data = message["event"], message.get("data", {})
            if isinstance(name, str) and isinstance(data, dict):
                return Event(name, data)
            raise self._violation("a malformed event", line)
        return self._reply(message, line)

    def _greeting(self, message: dict[str, Any], line: bytes) -> Greeting:
        try:
            version = message["QMP"]["version"]
            numbers, package = version["qemu"], version["package"]
            text = f"{int(numbers['major'])}.{int(numbers['minor'])}.{int(numbers['micro'])}"
        except (KeyError, TypeError, ValueError):
            raise self._violation("no greeting", line) from None
        self._greeted = True
        return Greeting(text, str(package))

    def _reply(self, message: dict[str, Any], line: bytes) -> Answer | Refusal:
        id_ = message.get("id")
        if type(id_) is not int or id_ not in self._waiting:
            raise self._violation("an answer to what was not asked", line)
        if "return" in message:
            del self._waiting[id_]
            return Answer(id_, message["return"])
        problem = message.get("error")
        if not isinstance(problem, dict) or not isinstance(problem.get("desc"), str):
            raise self._violation("an answer that is neither a result nor an error", line)
        sent = self._waiting.pop(id_)
        text = "".join(letter if letter.isprintable() else "?" for letter in problem["desc"][:KEPT])
        return Refusal(id_, str(problem.get("class", "")), text, sent, line.decode("utf-8", "replace"))

    def _violation(self, what: str, line: bytes) -> QmpError:
        return QmpError(
            f"QEMU broke its monitor's protocol: {what}", sent=self.pending(), received=line.decode("utf-8", "replace")
        )
