"""A client's end of one program's streams, and the one-shot requests, over a supervisor's control socket."""

from __future__ import annotations

import os
import select
from collections.abc import Callable

from nagaya.errors import Conflict, NotFound, RemoteError
from nagaya.kernel import unix
from nagaya.protocol import control
from nagaya.protocol.frame import Decoder, Frame, encode
from nagaya.static import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.images.progress import Progress

CHUNK = 256 << 10


class Output(NamedTuple):
    """Bytes of stream 1 (stdout, or the terminal) or 2 (stderr)."""

    stream: int
    data: bytes


class Exited(NamedTuple):
    """The program's end: its status (128+n for signal n) and, when the machine itself failed, why."""

    status: int
    error: str


class Copies:
    """What a supervisor says of volumes that it copies, as `Progress`."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._begun: set[str] = set()

    def take(self, state: dict[str, object]) -> None:
        source, target, count = state.get("source"), state.get("target"), state.get("bytes")
        if not isinstance(source, str) or not isinstance(target, str) or not isinstance(count, int):
            return
        if target not in self._begun:
            self._begun.add(target)
            self._progress.start(target, f"copying {source} to {target}", 0)
        self._progress.advance(target, count)
        if state.get("done"):
            self._progress.finish(target)


class Connection:
    """A blocking control connection: send one request, read frames."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._decoder = Decoder()
        self._frames: list[Frame] = []

    def send(self, frame: bytes) -> None:
        view = memoryview(frame)
        while view:
            try:
                view = view[os.write(self.fd, view) :]
            except OSError:
                return  # the supervisor closed: reading tells why

    def answer(self, on_progress: Callable[[dict[str, object]], None] | None = None) -> dict[str, object]:
        """Wait for the REPLY. Raises the error that the supervisor sent, `RemoteError` when it died.

        `on_progress` gets what it says meanwhile of a start that takes its time.
        A quick program's first output may come before the word that it has started: it is kept for `rest`.
        """
        early: list[Frame] = []
        while True:
            frame = self._next_frame()
            if frame.type == control.PROGRESS:
                if on_progress is not None:
                    on_progress(control.parse_json(frame))
                continue
            if frame.type not in (control.STDOUT, control.STDERR):
                break
            early.append(frame)
        if frame.type == control.ERROR:
            raise control.parse_error(frame)
        if frame.type != control.REPLY:
            raise RemoteError(f"control protocol: frame {frame.type} instead of a reply")
        self._frames = early + self._frames
        return control.parse_json(frame)

    def _next_frame(self) -> Frame:
        while not self._frames:
            try:
                data = os.read(self.fd, CHUNK)
            except ConnectionResetError:
                data = b""
            if not data:
                raise RemoteError("the machine's supervisor ended without an answer", hint="see 'nagaya ps -a'")
            self._frames += self._decoder.feed(data)
        return self._frames.pop(0)

    def rest(self) -> tuple[Decoder, list[Frame]]:
        """The decoder and the frames that came behind the reply, for who goes on with the connection."""
        return self._decoder, self._frames

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def connect(runtime_dir: str, name: str) -> Connection:
    """Connect to a machine's supervisor. Raises `Conflict` when none listens."""
    try:
        return Connection(unix.connect(runtime_dir, "control.sock"))
    except (FileNotFoundError, ConnectionRefusedError):
        raise Conflict(f"machine '{name}' is not running", hint=f"start it with 'nagaya start {name}'") from None
    except PermissionError:
        raise NotFound(f"machine '{name}' belongs to another user", hint="run it as that user or as root") from None


def ask(runtime_dir: str, name: str, op: str, **arguments: object) -> dict[str, object]:
    """One request, one reply."""
    connection = connect(runtime_dir, name)
    try:
        connection.send(control.request(op, **arguments))
        return connection.answer()
    finally:
        connection.close()


class Attachment:
    """One program's streams. Non-blocking; drive it with poll(2), or with `communicate`. Context manager."""

    def __init__(self, connection: Connection, *, warnings: tuple[str, ...] = ()) -> None:
        self._fd = connection.fd
        self._decoder, self._frames = connection.rest()
        self._queue = bytearray()
        self._room = control.WINDOW
        self._ended = False
        self.warnings = warnings
        os.set_blocking(self._fd, False)

    def fileno(self) -> int:
        return self._fd

    def pending(self) -> bool:
        """Whether `receive` has something that came with the reply: call it once before the first poll."""
        return bool(self._frames)

    def wants_write(self) -> bool:
        return bool(self._queue)

    def flush(self) -> None:
        """Write what is queued, as far as the socket takes it."""
        while self._queue:
            try:
                with memoryview(self._queue) as view:
                    written = os.write(self._fd, view[:CHUNK])
            except BlockingIOError:
                return
            except OSError:
                self._queue.clear()  # the supervisor closed; `receive` reads its last words
                return
            del self._queue[:written]

    def stdin_room(self) -> int:
        """How many bytes of input `send_stdin` may take now."""
        return min(self._room, control.CHUNK)

    def send_stdin(self, data: bytes) -> None:
        if len(data) > self._room:
            raise ValueError("more input than stdin_room()")
        self._room -= len(data)
        self._send(control.STDIN, data)

    def close_stdin(self) -> None:
        self._send(control.STDIN_CLOSE)

    def resize(self, rows: int, columns: int) -> None:
        self._send(control.RESIZE, control.SIZE.pack(rows & 0xFFFF, columns & 0xFFFF))

    def signal(self, number: int) -> None:
        self._send(control.SIGNAL, control.U32.pack(number))

    def _send(self, type_: int, payload: bytes = b"") -> None:
        self._queue += encode(type_, 0, payload)
        self.flush()

    def receive(self) -> list[Output | Exited]:
        """What has arrived. `Exited` is the last. Raises the supervisor's error, `RemoteError` when it died."""
        frames, self._frames = self._frames, []
        if not frames and not self._ended:
            try:
                data = os.read(self._fd, CHUNK)
            except BlockingIOError:
                return []
            except ConnectionResetError:
                data = b""
            if not data:
                raise RemoteError(
                    "the machine's supervisor was killed, and the machine with it", hint="see 'nagaya ps -a'"
                )
            frames = self._decoder.feed(data)
        events: list[Output | Exited] = []
        for at, frame in enumerate(frames):
            if frame.type == control.ERROR and events:
                self._frames = frames[at:]  # raised by the next call: what came before it comes first
                break
            event = self._event(frame)
            if event is not None:
                events.append(event)
        return events

    def _event(self, frame: Frame) -> Output | Exited | None:
        if frame.type in (control.STDOUT, control.STDERR):
            return Output(1 if frame.type == control.STDOUT else 2, frame.payload)
        if frame.type == control.CREDIT:
            self._room += control.parse_u32(frame)
            return None
        if frame.type == control.EXITED:
            self._ended = True
            return Exited(control.parse_u32(frame), frame.payload[4:].decode("utf-8", "replace"))
        if frame.type == control.ERROR:
            raise control.parse_error(frame)
        if frame.type == control.REPLY:
            return None
        raise RemoteError(f"control protocol: unexpected frame {frame.type}")

    def communicate(self, stdin: bytes = b"", *, timeout_s: float | None = None) -> tuple[int, bytes, bytes]:
        """Feed `stdin`, collect everything: (status, stdout, stderr). Raises `RemoteError` after `timeout_s`."""
        import time  # lazy: the CLI never collects

        outputs = {1: bytearray(), 2: bytearray()}
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        sent, closed = 0, False
        while True:
            if not closed:
                while sent < len(stdin) and (room := self.stdin_room()):
                    self.send_stdin(stdin[sent : sent + room])
                    sent += room
                if sent >= len(stdin):
                    self.close_stdin()
                    closed = True
            if not self.pending():
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not self._wait(left):
                    raise RemoteError(f"the program did not end within {timeout_s} s")
            for event in self.receive():
                if isinstance(event, Exited):
                    return event.status, bytes(outputs[1]), bytes(outputs[2])
                outputs[event.stream] += event.data

    def _wait(self, timeout_s: float | None) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN | (select.POLLOUT if self._queue else 0))
        ready = poll.poll(None if timeout_s is None else int(timeout_s * 1000) + 1)
        if self._queue:
            self.flush()
        return bool(ready)

    def close(self) -> None:
        """Detach: the program goes on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
