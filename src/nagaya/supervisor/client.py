"""One connection on the control socket (or the launcher's end of the launch socket), as the supervisor sees it."""

from __future__ import annotations

from collections.abc import Callable

from nagaya.errors import NagayaError, RemoteError
from nagaya.protocol import control
from nagaya.protocol.frame import Decoder, Frame, encode
from nagaya.supervisor.loop import Loop
from nagaya.supervisor.stream import Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.supervisor.programs import Program

HIGH_WATER = 256 << 10


class Client:
    """Frames in and out. `program` is the one whose streams it carries, once it asked for one."""

    def __init__(
        self,
        loop: Loop,
        fd: int,
        *,
        on_request: Callable[[Client, dict[str, object]], None],
        on_gone: Callable[[Client], None],
    ) -> None:
        self._decoder = Decoder(max_payload=1 << 20)
        self._on_request = on_request
        self._on_gone = on_gone
        self._stream = Stream(loop, fd, on_data=self._received, on_closed=self._closed, on_drained=self._drained)
        self.program: Program | None = None
        self.wants_stdin = False
        self.stdin_outstanding = 0

    @property
    def congested(self) -> bool:
        """Whether this client reads more slowly than its program writes."""
        return self._stream.queued > HIGH_WATER

    @property
    def open(self) -> bool:
        return self._stream.open

    def send(self, frame: bytes) -> None:
        self._stream.send(frame)

    def fail(self, problem: NagayaError) -> None:
        """Answer with an error and close."""
        self._stream.send(control.error(problem))
        self._stream.end()

    def finish(self, frame: bytes) -> None:
        """Send a last frame and close."""
        self._stream.send(frame)
        self._stream.end()

    def output(self, stream: int, data: bytes) -> None:
        self._stream.send(encode(control.STDOUT if stream == 1 else control.STDERR, 0, data))

    def consumed_stdin(self, count: int) -> None:
        """Give the client credit for input that went on to the program."""
        self.stdin_outstanding -= count
        self._stream.send(encode(control.CREDIT, 0, control.U32.pack(count)))

    def close(self) -> None:
        self._stream.close()

    def _received(self, data: bytes) -> None:
        try:
            for frame in self._decoder.feed(data):
                self._handle(frame)
        except RemoteError as problem:
            self.fail(problem)

    def _handle(self, frame: Frame) -> None:
        program = self.program
        if frame.type == control.REQUEST:
            if program is not None:
                raise RemoteError("control protocol: a request on a connection that carries a program")
            self._on_request(self, control.parse_json(frame))
        elif program is None:
            raise RemoteError(f"control protocol: frame {frame.type} before attach or exec")
        elif frame.type == control.STDIN:
            self.stdin_outstanding += len(frame.payload)
            if self.stdin_outstanding > control.WINDOW:
                raise RemoteError("control protocol: more standard input than the window")
            program.feed(self, frame.payload)
        elif frame.type == control.STDIN_CLOSE:
            program.end_stdin(self)
        elif frame.type == control.SIGNAL:
            program.signal(control.parse_u32(frame))
        elif frame.type == control.RESIZE:
            program.resize(*control.parse_size(frame))
        else:
            raise RemoteError(f"control protocol: unexpected frame {frame.type}")

    def _drained(self) -> None:
        if self.program is not None:
            self.program.grant()

    def _closed(self) -> None:
        program, self.program = self.program, None
        if program is not None:
            program.leave(self)
        self._on_gone(self)
