"""One program's streams on this process's standard input and output: the loop behind run, exec, attach and start -a.

Everything waits in one poll(2): the machine, standard input, a blocked output, and a pipe that signals are written to
(`signal.set_wakeup_fd`). Nothing is read that cannot be passed on: a slow reader of our output, or a program that does
not read its input, holds back the other side and nothing else.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import stat
import struct
import sys
import termios
from collections import deque

from nagaya.errors import HostError, UsageError
from nagaya.manager.attachment import Exited, Output
from nagaya.static import NamedTuple, Protocol, Self

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType, TracebackType

DETACH_KEYS = b"\x10\x11"  # ctrl-p,ctrl-q
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
LAST_WORDS_MS = 2000
IMPATIENT = 3  # so many SIGINT or SIGTERM end us when the program ignores them
PIPE_BUF = 4096  # pipe(7): poll says writable when so much fits, so that a write of it does not block
# What a program may go on writing after it was told that nobody reads: more than what is in flight on the way here.
DEAF_BYTES = 1 << 20


class Streams(Protocol):
    """What the loop needs of `manager.attachment.Attachment`."""

    def fileno(self) -> int: ...
    def pending(self) -> bool: ...
    def wants_write(self) -> bool: ...
    def flush(self) -> None: ...
    def stdin_room(self) -> int: ...
    def send_stdin(self, data: bytes) -> None: ...
    def close_stdin(self) -> None: ...
    def resize(self, rows: int, columns: int) -> None: ...
    def signal(self, number: int) -> None: ...
    def receive(self) -> Sequence[Output | Exited]: ...
    def close(self) -> None: ...


class Ending(NamedTuple):
    """How a conversation ended. `status` is the program's, or ours when `detached`; `error` is the machine's."""

    status: int
    detached: bool = False
    error: str = ""


def require_terminal(*, stdin: bool, tty: bool) -> None:
    """`-it` needs a terminal to make raw. Raises `UsageError` otherwise, before anything is started."""
    if stdin and tty and not _is_terminal(0):
        raise UsageError("the input device is not a terminal", hint="leave out -t, or run it in a terminal")


def _is_terminal(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False


def window_size() -> tuple[int, int]:
    """Rows and columns of our terminal; (0, 0) when no standard stream is one."""
    for fd in (0, 1, 2):
        try:
            rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, b"\0" * 8))
        except OSError:
            continue
        return rows, columns
    return 0, 0


class Signals:
    """Signals as bytes in a pipe, from `with` on: those that come while a machine starts wait for its program.

    A second SIGINT before the conversation begins is a `KeyboardInterrupt`: whoever waits for a start that hangs can
    leave. The handlers and the wakeup descriptor are put back at the end.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = numbers
        self._before: dict[int, object] = {}
        self._old_wakeup = -1
        self._interrupts = 0
        self.conversing = False
        self.fd = -1
        self._write = -1

    def __enter__(self) -> Self:
        self.fd, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in self._numbers:
            self._before[number] = signal.getsignal(number)
            signal.signal(number, self._noticed)
        return self

    def _noticed(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and not self.conversing:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt

    def take(self) -> list[int]:
        """The signals that have come since last time, in order."""
        try:
            return list(os.read(self.fd, 512))
        except BlockingIOError:
            return []

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self.fd)
        os.close(self._write)


def watch_signals(*, stdin: bool, tty: bool, sig_proxy: bool) -> Signals:
    """The signals to take over for a conversation. In raw mode all of them: the terminal must be put right first."""
    if _raw(stdin=stdin, tty=tty):
        return Signals((*FORWARDED, signal.SIGWINCH, signal.SIGCONT))
    numbers: tuple[int, ...] = FORWARDED if sig_proxy else ()
    return Signals((*numbers, signal.SIGWINCH) if tty else numbers)


def _raw(*, stdin: bool, tty: bool) -> bool:
    return stdin and tty and _is_terminal(0)


class RawMode:
    """Standard input's terminal without line editing, echo and signal keys, as cfmakeraw(3); put back at the end."""

    def __init__(self, fd: int = 0) -> None:
        self._fd = fd
        self._saved: list[object] = []

    def __enter__(self) -> Self:
        self._saved = termios.tcgetattr(self._fd)
        self.enter()
        return self

    def enter(self) -> None:
        """Go raw; again after a SIGCONT, when a shell has put its own modes meanwhile."""
        iflag, oflag, cflag, lflag, ispeed, ospeed, cc = termios.tcgetattr(self._fd)
        iflag &= ~(
            termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR | termios.IGNCR
            | termios.ICRNL | termios.IXON
        )  # fmt: skip
        oflag &= ~termios.OPOST
        lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
        cflag = (cflag & ~(termios.CSIZE | termios.PARENB)) | termios.CS8
        cc = list(cc)
        cc[termios.VMIN], cc[termios.VTIME] = 1, 0
        # TCSADRAIN, not TCSAFLUSH: what was typed ahead is for the program.
        termios.tcsetattr(self._fd, termios.TCSADRAIN, [iflag, oflag, cflag, lflag, ispeed, ospeed, cc])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # TCSANOW: draining waits for ever on a terminal that somebody has stopped.
            termios.tcsetattr(self._fd, termios.TCSANOW, self._saved)  # type: ignore[arg-type]
        except termios.error:
            pass  # the terminal has gone: there is nothing to put right


class DetachScanner:
    """Finds the detach keys in what is typed. A begun sequence is held back until the next key decides."""

    def __init__(self, keys: bytes) -> None:
        self._keys = keys
        self._matched = 0

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """(what to pass on, whether the sequence is complete)."""
        keys = self._keys
        if not keys or (not self._matched and keys[0] not in data):
            return data, False
        out = bytearray()
        for byte in data:
            while True:
                if byte == keys[self._matched]:
                    self._matched += 1
                    break
                if not self._matched:
                    out.append(byte)
                    break
                out += self._fall_back()
            if self._matched == len(keys):
                self._matched = 0
                return bytes(out), True
        return bytes(out), False

    def _fall_back(self) -> bytes:
        """The held-back bytes that can no longer begin the sequence: shorten to the longest prefix that is a suffix."""
        held = self._keys[: self._matched]
        for length in range(self._matched - 1, -1, -1):
            if held.endswith(self._keys[:length]):
                self._matched = length
                return held[: len(held) - length]
        raise AssertionError("a sequence always ends with its empty prefix")

    @property
    def holding(self) -> int:
        """How many bytes are held back: they take room of the program's input once they are released."""
        return self._matched


def converse(
    streams: Streams,
    signals: Signals,
    *,
    stdin: bool,
    tty: bool,
    detach_keys: bytes = DETACH_KEYS,
    sig_proxy: bool = True,
) -> Ending:
    """Carry a program's streams until it ends or we are told to leave; answers how.

    `stdin`: pass our standard input on. `tty`: the program has a terminal, so ours goes raw when we pass input on.
    `sig_proxy`: signals to us are the program's. Raises what `streams.receive` raises, and `HostError` when our output
    cannot be written; the terminal has its modes back by then.
    """
    conversation = _Conversation(streams, signals, stdin=stdin, tty=tty, detach_keys=detach_keys, sig_proxy=sig_proxy)
    sys.stdout.flush()
    signals.conversing = True
    if not _raw(stdin=stdin, tty=tty):
        return conversation.run(None)
    with RawMode() as raw:
        return conversation.run(raw)


class _Conversation:
    def __init__(
        self, streams: Streams, signals: Signals, *, stdin: bool, tty: bool, detach_keys: bytes, sig_proxy: bool
    ) -> None:
        self._streams = streams
        self._signals = signals
        self._tty = tty
        self._sig_proxy = sig_proxy
        self._scanner = DetachScanner(detach_keys if tty else b"")
        self._reading = stdin
        self._output = _Outputs()
        self._raw: RawMode | None = None
        self._impatience = 0
        self._deaf_bytes = -1  # -1: everything that we write is read
        self._ended: Exited | None = None
        self._leaving: Ending | None = None

    def run(self, raw: RawMode | None) -> Ending:
        self._raw = raw
        if self._tty:
            self._resize()
        if self._streams.pending():
            self._receive()
        while self._leaving is None:
            self._output.write()
            self._notice_deafness()
            if self._ended is not None and not self._output.blocked:
                return Ending(self._ended.status, error=self._ended.error)
            if self._leaving is None:
                self._step()
        self._say_last_words()
        return self._leaving

    def _say_last_words(self) -> None:
        """What was typed, or signalled, before we leave: a supervisor that is at work on something takes it in a moment."""
        poll = select.poll()
        poll.register(self._streams.fileno(), select.POLLOUT)
        self._streams.flush()
        while self._streams.wants_write() and poll.poll(LAST_WORDS_MS):
            self._streams.flush()

    def _step(self) -> None:
        streams, poll = self._streams, select.poll()
        poll.register(self._signals.fd, select.POLLIN)
        listening = self._ended is None and not self._output.blocked
        if listening or streams.wants_write():
            wanted = (select.POLLIN if listening else 0) | (select.POLLOUT if streams.wants_write() else 0)
            poll.register(streams.fileno(), wanted)
        if self._output.blocked:
            poll.register(self._output.blocked_fd, select.POLLOUT)
        if self._wants_input():
            poll.register(0, select.POLLIN)
        ready = dict(poll.poll())
        if self._signals.fd in ready:
            for number in self._signals.take():
                self._signal(number)
        events = ready.get(streams.fileno(), 0)
        if events and streams.wants_write():
            streams.flush()
        if listening and events & (select.POLLIN | select.POLLHUP | select.POLLERR):
            self._receive()
        if 0 in ready and self._wants_input():
            self._read_input()

    def _wants_input(self) -> bool:
        room = self._streams.stdin_room() - self._scanner.holding
        return self._reading and self._ended is None and room > 0 and not self._streams.wants_write()

    def _receive(self) -> None:
        for event in self._streams.receive():
            if isinstance(event, Exited):
                self._ended = event
            elif not self._output.put(event.stream, event.data) and self._deaf_bytes >= 0:
                self._deaf_bytes += len(event.data)

    def _read_input(self) -> None:
        room = self._streams.stdin_room() - self._scanner.holding
        try:
            data = os.read(0, min(room, 1 << 16))
        except BlockingIOError:
            return
        except OSError:
            data = b""  # closed, or a terminal that has hung up: no more input either way
        if not data:
            self._reading = False
            self._streams.close_stdin()
            return
        data, detach = self._scanner.feed(data)
        if data:
            self._streams.send_stdin(data)
        if detach:
            self._leaving = Ending(0, detached=True)

    def _signal(self, number: int) -> None:
        if number == signal.SIGWINCH:
            self._resize()
        elif number == signal.SIGCONT:
            if self._raw is not None:
                self._raw.enter()
            self._resize()
        elif self._raw is not None:
            # Keys reach the program as input; a signal is for us. A terminal that hangs up takes its program along.
            if number == signal.SIGHUP and self._sig_proxy:
                self._streams.signal(number)
            self._leaving = Ending(128 + number, detached=True)
        elif number in FORWARDED and self._sig_proxy and self._ended is None:
            self._streams.signal(number)
            if number in (signal.SIGINT, signal.SIGTERM):
                self._impatience += 1
            if self._impatience >= IMPATIENT:
                self._leaving = Ending(128 + number, detached=True)
        elif number in FORWARDED:
            self._leaving = Ending(128 + number, detached=True)

    def _resize(self) -> None:
        rows, columns = window_size()
        if rows and columns and self._tty and self._ended is None:
            self._streams.resize(rows, columns)

    def _notice_deafness(self) -> None:
        """Nobody reads our output any more (`… | head`): the program hears of it as it would in a pipe of its own."""
        if not self._output.broken:
            return
        if self._deaf_bytes < 0:
            self._deaf_bytes = 0
            if not self._sig_proxy:
                self._leaving = Ending(128 + signal.SIGPIPE, detached=True)
            elif self._ended is None:
                self._streams.signal(signal.SIGPIPE)
        elif self._deaf_bytes > DEAF_BYTES:
            self._leaving = Ending(128 + signal.SIGPIPE, detached=True)


class _Outputs:
    """What is still to be written to descriptors 1 and 2, in the order in which it came."""

    def __init__(self) -> None:
        self._queue: deque[tuple[int, memoryview]] = deque()
        self._broken: set[int] = set()
        self._largest = {1: _largest_write(1), 2: _largest_write(2)}

    @property
    def blocked(self) -> bool:
        return bool(self._queue)

    @property
    def blocked_fd(self) -> int:
        return self._queue[0][0]

    @property
    def broken(self) -> bool:
        """Whether the reader of one of them has gone."""
        return bool(self._broken)

    def put(self, stream: int, data: bytes) -> bool:
        """Queue `data`; False when nobody reads that stream any more."""
        if stream in self._broken:
            return False
        if data:
            self._queue.append((stream, memoryview(data)))
        return True

    def write(self) -> None:
        """Write as much as fits without blocking. Raises `HostError` for a full disk and its like."""
        while self._queue:
            fd, data = self._queue[0]
            if not _writable(fd):
                return
            try:
                written = os.write(fd, data[: self._largest[fd]])
            except BlockingIOError:
                return
            except BrokenPipeError:
                self._drop(fd)
                continue
            except OSError as error:
                raise HostError.from_os(error, f"cannot write standard {'output' if fd == 1 else 'error'}") from None
            if written == len(data):
                self._queue.popleft()
            else:
                self._queue[0] = (fd, data[written:])

    def _drop(self, fd: int) -> None:
        self._broken.add(fd)
        self._queue = deque(item for item in self._queue if item[0] != fd)


def _largest_write(fd: int) -> int:
    """A regular file or /dev/null never blocks; everything else gets no more than poll(2) has promised room for."""
    try:
        found = os.fstat(fd)
    except OSError:
        return PIPE_BUF
    null = stat.S_ISCHR(found.st_mode) and found.st_rdev == os.makedev(1, 3)
    return 1 << 20 if null or stat.S_ISREG(found.st_mode) else PIPE_BUF


def _writable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


def finish(ending: Ending) -> int:
    """The exit status of a command that has conversed; tells why the machine ended when its program did not end it."""
    if ending.detached and not ending.status:
        sys.stderr.write("\n")  # the shell's prompt begins a line of its own
    if ending.error and not ending.detached:
        from nagaya.cli.failures import say  # lazy: most programs just end

        say(ending.error)
    return ending.status
