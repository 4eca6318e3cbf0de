"""The host's end of the agent protocol, version 2 (docs/agent-protocol.md). No I/O: bytes in, events out, and back.

The agent is a guest's process and hostile: every frame is checked against what the link knows, and the first
violation raises `RemoteError`; the link must not be used after that.
"""

from __future__ import annotations

from struct import Struct

from nagaya.errors import IntegrityError, RemoteError, UsageError
from nagaya.model.policy import ProcessPolicy
from nagaya.model.spec import Process
from nagaya.protocol.frame import MAX_PAYLOAD, Decoder, Frame, encode
from nagaya.protocol.setup import with_time
from nagaya.static import NamedTuple

VERSION = 2
WINDOW = 256 << 10
MAX_DATA = 64 << 10
GRANT_AT = WINDOW // 4  # credit is returned in pieces of at least this
MAX_TEXT = 1024
MAX_WARNINGS = 64
MAX_RLIMITS = 32
MAX_FILTER = 4096 * 8  # BPF_MAXINSNS instructions of eight bytes

HELLO = 1
SPAWN = 2
STARTED = 3
SPAWN_FAILED = 4
STDIN = 5
STDIN_CLOSE = 6
STDOUT = 7
STDERR = 8
CREDIT = 9
SIGNAL = 10
RESIZE = 11
EXITED = 12
SHUTDOWN = 13
SETUP = 14
READY = 15
SETUP_FAILED = 16
CLOCK = 17
OUT_OF_MEMORY = 18
HOLD = 19
HELD = 20
CONTINUE = 21
CONTINUED = 22
PREPARE = 23
PREPARED = 24

_ARG, _ENV, _CWD, _USER, _FLAGS, _SIZE, _CAPS, _SECCOMP, _RLIMIT = range(1, 10)
_TTY, _STDIN, _MAIN, _APPLET, _NO_NEW_PRIVS, _DISCARD, _DATA_DISK = 1, 2, 4, 8, 16, 32, 64

_FIELD = Struct("<HHI")
_NOTHING = Struct("")
_U32 = Struct("<I")
_U64 = Struct("<Q")
_PAIR = Struct("<II")
_ROWS = Struct("<HH")
_LIMIT = Struct("<IIQQ")


class Hello(NamedTuple):
    version: int
    features: int


class Started(NamedTuple):
    channel: int
    pid: int


class SpawnFailed(NamedTuple):
    """`status` is 125, 126 or 127; `text` is for a person."""

    channel: int
    status: int
    errno: int
    text: str


class Output(NamedTuple):
    """`stream` is 1 (stdout, or the terminal) or 2 (stderr)."""

    channel: int
    stream: int
    data: bytes


class StdinRoom(NamedTuple):
    channel: int
    room: int


class Exited(NamedTuple):
    channel: int
    status: int


class SetUp(NamedTuple):
    """The machine's inside is made. The `warnings` are for a person."""

    warnings: tuple[str, ...]


class SetupFailed(NamedTuple):
    """It could not be made, and nothing will run in it: end the machine. `text` is for a person."""

    errno: int
    text: str


class OutOfMemory(NamedTuple):
    """The kernel of a virtual machine has killed a process for want of memory. Told once."""


class Held(NamedTuple):
    """Nothing is under way in either direction any more. `errno` is 0 when the machine's disk has been put to rest too."""

    errno: int


class Continued(NamedTuple):
    """Its programs go on. The `warnings` are for a person."""

    warnings: tuple[str, ...]


Event = (
    Hello | SetUp | SetupFailed | OutOfMemory | Started | SpawnFailed | Output | StdinRoom | Exited | Held | Continued
)


class SavedChannel(NamedTuple):
    """One program as the link knew it while the agent was held. Rooms and debts are bytes."""

    channel: int
    started: bool
    stdin_open: bool
    input_room: int
    output_room: int
    owed: int


class SavedLink(NamedTuple):
    """A link whose agent is held: `AgentLink.resumed` goes on with it, on another stream."""

    version: int
    set_up: bool
    starved: bool
    next: int
    channels: tuple[SavedChannel, ...]


class _Channel:
    __slots__ = ("input_room", "output_room", "owed", "started", "stdin_open")

    def __init__(self, *, stdin: bool) -> None:
        self.started = False
        self.stdin_open = stdin
        self.input_room = WINDOW  # bytes of standard input that we may still send
        self.output_room = WINDOW  # bytes of output that the agent may still send
        self.owed = 0  # consumed output whose credit has not been returned


class AgentLink:
    """The state of one connection. Methods queue frames; `outgoing` and `sent` move them to the stream."""

    def __init__(self) -> None:
        self._decoder = Decoder(max_payload=MAX_DATA)
        self._queue = bytearray()
        self._channels: dict[int, _Channel] = {}
        self._next = 1
        self._greeted = False
        self._held: bytes | None = None  # SETUP's payload until it can go
        self._starved = False
        self._setup = ""  # "asked" from SETUP to its answer, then "done" or "failed"
        self._hold = ""  # "asked" from HOLD to HELD, "held", "leaving" from CONTINUE to CONTINUED
        self._kept = bytearray()  # what is to go out behind CONTINUE

    @classmethod
    def resumed(cls, saved: SavedLink) -> AgentLink:
        """The link to an agent that was held when `saved` was made: `go_on` comes first. Raises `IntegrityError`."""
        link = cls()
        link._greeted, link._setup, link._hold = True, "done" if saved.set_up else "", "held"
        if saved.version != VERSION:
            raise IntegrityError(
                f"the saved machine's agent speaks protocol {saved.version}, and this Nagaya {VERSION}"
            )
        for one in saved.channels:
            rooms = (one.input_room, one.output_room, one.owed)
            if (
                not 0 < one.channel <= 0xFFFFFFFF
                or one.channel in link._channels
                or not all(0 <= room <= WINDOW for room in rooms)
            ):
                raise IntegrityError("the saved machine's programs are not in order")
            channel = link._channels[one.channel] = _Channel(stdin=one.stdin_open)
            channel.started = one.started
            channel.input_room, channel.output_room, channel.owed = rooms
        if not 0 < saved.next <= 0xFFFFFFFF:
            raise IntegrityError("the saved machine's programs are not in order")
        link._next, link._starved = saved.next, saved.starved
        return link

    def save(self) -> SavedLink:
        """What `resumed` goes on with. Only while the agent is held, and before anything else is asked of it."""
        if self._hold != "held":
            raise ValueError("the agent is not held")
        return SavedLink(
            VERSION, self._setup == "done", self._starved, self._next,
            tuple(
                SavedChannel(number, one.started, one.stdin_open, one.input_room, one.output_room, one.owed)
                for number, one in self._channels.items()
            ),
        )  # fmt: skip

    def carry(self) -> tuple[SavedLink, bytes, bytes]:
        """For `carried`, at any moment: (what is known, what has come of a frame, what has not been sent).

        Raises `ValueError` while the machine is not set up yet, or is held.
        """
        if self._hold or not self._greeted or self._held is not None or self._setup not in ("", "done"):
            raise ValueError("the agent is held, or has not been set up")
        self._hold = "held"
        try:
            saved = self.save()
        finally:
            self._hold = ""
        return saved, self._decoder.rest(), bytes(self._queue)

    @classmethod
    def carried(cls, saved: SavedLink, begun: bytes, unsent: bytes) -> AgentLink:
        """The link to an agent that has not noticed anything. Raises `IntegrityError`, `RemoteError`."""
        link = cls.resumed(saved)
        link._hold = ""
        if link._decoder.feed(begun):
            raise IntegrityError("the machine's agent is said to have begun what it has ended")
        link._queue += unsent
        return link

    def hold(self) -> None:
        """Have the agent put the disk to rest and say nothing more; `Held` follows. What is asked for later on waits."""
        if self._hold:
            raise ValueError("the agent is held already")
        self._send(HOLD, 0)
        self._hold = "asked"

    def go_on(self, payload: bytes) -> None:
        """After `hold`, be it answered or not: `payload` has SETUP's fields, of which those that may change count."""
        if self._hold not in ("asked", "held"):
            raise ValueError("the agent is not held")
        self._queue += encode(CONTINUE, 0, payload) + bytes(self._kept)
        self._kept.clear()
        self._hold = "leaving" if self._hold == "held" else "given up"

    def setup(self, payload: bytes, *, sent: bool = False) -> None:
        """Have a virtual machine's agent make the machine's inside; `payload` is `setup_payload`'s.

        Before anything else is asked for. It and what follows are sent when the agent has said HELLO, so that `stamp`
        can tell the time then; what follows need not wait for the answer. `sent`: somebody else has sent it, to an agent
        that waited for it.
        """
        if self._setup or self._next != 1:
            raise ValueError("SETUP is the first frame")
        self._setup = "asked"
        self._held = None if sent else payload

    def stamp(self, time_ns: int) -> None:
        """The time to start the machine's clock with, nanoseconds since the epoch: at HELLO, if there is a set-up."""
        if self._held is not None:
            self._held = with_time(self._held, time_ns)

    def set_clock(self, time_ns: int) -> None:
        """Put a virtual machine's clock right, which stood still while it was paused. Nanoseconds since the epoch."""
        self._send(CLOCK, 0, _U64.pack(time_ns))

    def spawn(
        self,
        process: Process,
        policy: ProcessPolicy,
        *,
        main: bool = False,
        applet: bool = False,
        discard: bool = False,
        data_disk: bool = False,
    ) -> int:
        """Ask for a program; answers its channel. Raises `UsageError` for a process that cannot be put into words.

        With `data_disk`, an applet of a virtual machine runs with the root of the data disk as its own: `/upper` is
        what overlay has written.
        """
        payload = spawn_payload(process, policy, main=main, applet=applet, discard=discard, data_disk=data_disk)
        channel = self._next
        while channel in self._channels:
            channel = channel % 0xFFFFFFFF + 1
        self._next = channel % 0xFFFFFFFF + 1
        self._channels[channel] = _Channel(stdin=process.stdin)
        self._send(SPAWN, channel, payload)
        return channel

    def stdin_room(self, channel: int) -> int:
        """Bytes that `send_stdin` takes now; 0 for a channel that has ended."""
        found = self._channels.get(channel)
        return found.input_room if found is not None and found.stdin_open else 0

    def send_stdin(self, channel: int, data: bytes) -> int:
        """Queue input; answers how many bytes were taken. A program that has ended takes, and drops, all."""
        found = self._channels.get(channel)
        if found is None or not found.stdin_open:
            return len(data)
        taken = min(len(data), found.input_room)
        for at in range(0, taken, MAX_DATA):
            self._send(STDIN, channel, data[at : min(at + MAX_DATA, taken)])
        found.input_room -= taken
        return taken

    def close_stdin(self, channel: int) -> None:
        found = self._channels.get(channel)
        if found is not None and found.stdin_open:
            found.stdin_open = False
            self._send(STDIN_CLOSE, channel)

    def signal(self, channel: int, number: int) -> None:
        if channel in self._channels:
            self._send(SIGNAL, channel, _U32.pack(number))

    def resize(self, channel: int, rows: int, columns: int) -> None:
        if channel in self._channels:
            self._send(RESIZE, channel, _ROWS.pack(rows & 0xFFFF, columns & 0xFFFF))

    def grant(self, channel: int, count: int) -> None:
        """The consumer is done with `count` bytes of output; never more than `Output` events have brought."""
        found = self._channels.get(channel)
        if found is None:
            return
        if not 0 <= count <= WINDOW - found.output_room - found.owed:
            raise ValueError(f"{count} bytes of channel {channel} were not there to be consumed")
        found.owed += count
        # Below GRANT_AT the agent still has most of its window: its next output brings the rest of the debt along.
        if found.owed >= GRANT_AT:
            self._send(CREDIT, channel, _U32.pack(found.owed))
            found.output_room += found.owed
            found.owed = 0

    def shutdown(self) -> None:
        """Ask the agent to end the machine."""
        self._send(SHUTDOWN, 0)

    def outgoing(self) -> bytes:
        """All that waits to be written."""
        if self._held is not None:
            if not self._greeted:
                return b""
            self._queue[:0] = encode(SETUP, 0, self._held)
            self._held = None
        return bytes(self._queue)

    def sent(self, count: int) -> None:
        """The first `count` bytes of `outgoing` were written."""
        del self._queue[:count]

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes from the agent. Raises `RemoteError` at a violation of the protocol."""
        return [event for frame in self._decoder.feed(data) if (event := self._event(frame)) is not None]

    def _send(self, type_: int, channel: int, payload: bytes = b"") -> None:
        queue = self._kept if self._hold in ("asked", "held") and type_ != SHUTDOWN else self._queue
        queue += encode(type_, channel, payload)

    def _event(self, frame: Frame) -> Event | None:
        if not self._greeted:
            return self._hello(frame)
        if frame.type in (READY, SETUP_FAILED):
            return self._set_up(frame)
        if self._setup in ("asked", "failed"):
            raise _violation(f"frame {frame.type} from a machine that is not set up")
        if frame.type == OUT_OF_MEMORY and self._setup == "done" and not self._starved and not frame.channel:
            self._starved = True
            _unpack(_NOTHING, frame)
            return OutOfMemory()
        if frame.type in (HELD, CONTINUED) and not frame.channel:
            return self._held_or_continued(frame)
        if self._hold in ("held", "leaving"):
            raise _violation(f"frame {frame.type} while it is held")
        channel = self._channels.get(frame.channel)
        if channel is None:
            raise _violation(f"frame {frame.type} on channel {frame.channel}, which is not in use")
        if frame.type in (STARTED, SPAWN_FAILED):
            if channel.started:
                raise _violation(f"frame {frame.type} for a program that runs")
            return self._started(frame, channel) if frame.type == STARTED else self._failed(frame)
        if frame.type == CREDIT:
            return self._credit(frame, channel)
        if frame.type in (STDOUT, STDERR):  # may overtake STARTED: the agent learns of both from different descriptors
            return self._output(frame, channel)
        if frame.type == EXITED and channel.started:
            (status,) = _unpack(_U32, frame)
            if status > 255:
                raise _violation(f"exit status {status}")
            del self._channels[frame.channel]
            return Exited(frame.channel, status)
        raise _violation(f"unexpected frame {frame.type}")

    def _held_or_continued(self, frame: Frame) -> Event | None:
        if frame.type == HELD and self._hold in ("asked", "given up"):
            (number,) = _unpack(_U32, frame)
            self._hold = "held" if self._hold == "asked" else "leaving"
            return Held(number) if self._hold == "held" else None
        if frame.type == CONTINUED and self._hold == "leaving":
            self._hold = ""
            return Continued(_warnings(frame))
        raise _violation(f"unexpected frame {frame.type}")

    def _hello(self, frame: Frame) -> Event:
        if frame.type != HELLO or frame.channel:
            raise _violation(f"frame {frame.type} instead of HELLO")
        version, features = _unpack(_PAIR, frame)
        if version != VERSION:
            raise RemoteError(f"the machine's agent speaks protocol {version}, and this Nagaya {VERSION}")
        self._greeted = True
        return Hello(version, features)

    def _set_up(self, frame: Frame) -> Event:
        if self._setup != "asked" or frame.channel or len(frame.payload) < _U32.size:
            raise _violation(f"unexpected frame {frame.type}")
        (number,) = _U32.unpack_from(frame.payload)
        text = frame.payload[_U32.size :].decode("utf-8", "replace")
        if frame.type == SETUP_FAILED:
            self._setup = "failed"
            return SetupFailed(number, _printable(text[:MAX_TEXT]))
        self._setup = "done"
        return SetUp(_warnings(frame))

    def _started(self, frame: Frame, channel: _Channel) -> Event:
        (pid,) = _unpack(_U32, frame)
        channel.started = True
        return Started(frame.channel, pid)

    def _failed(self, frame: Frame) -> Event:
        if len(frame.payload) < _PAIR.size:
            raise _violation("SPAWN_FAILED is too short")
        status, errno = _PAIR.unpack_from(frame.payload)
        if status not in (125, 126, 127):
            raise _violation(f"SPAWN_FAILED with status {status}")
        del self._channels[frame.channel]
        text = frame.payload[_PAIR.size :][:MAX_TEXT].decode("utf-8", "replace")
        return SpawnFailed(frame.channel, status, errno, _printable(text))

    def _credit(self, frame: Frame, channel: _Channel) -> Event:
        (count,) = _unpack(_U32, frame)
        if count > WINDOW - channel.input_room:
            raise _violation("credit for more input than was sent")
        channel.input_room += count
        return StdinRoom(frame.channel, channel.input_room)

    def _output(self, frame: Frame, channel: _Channel) -> Event:
        if not 0 < len(frame.payload) <= channel.output_room:  # empty ones would escape the flow control
            raise _violation("output that is empty, or more than the window")
        channel.output_room -= len(frame.payload)
        return Output(frame.channel, 1 if frame.type == STDOUT else 2, frame.payload)


def _warnings(frame: Frame) -> tuple[str, ...]:
    """READY's and CONTINUED's: a count, and so many lines."""
    if len(frame.payload) < _U32.size:
        raise _violation(f"frame {frame.type} is too short")
    (number,) = _U32.unpack_from(frame.payload)
    *lines, rest = frame.payload[_U32.size :].decode("utf-8", "replace").split("\n")
    if number != len(lines) or number > MAX_WARNINGS or rest:
        raise _violation(f"frame {frame.type} with another number of warnings than it says")
    return tuple(_printable(line[:MAX_TEXT]) for line in lines)


def spawn_payload(
    process: Process,
    policy: ProcessPolicy,
    *,
    main: bool = False,
    applet: bool = False,
    discard: bool = False,
    data_disk: bool = False,
) -> bytes:
    """SPAWN's fields. Raises `UsageError` for what the agent would take for a violation, and end the machine."""
    _check(process, policy)
    flags = (
        (_TTY if process.tty else 0)
        | (_STDIN if process.stdin else 0)
        | (_MAIN if main else 0)
        | (_APPLET if applet else 0)
        | (_NO_NEW_PRIVS if policy.no_new_privileges else 0)
        | (_DISCARD if discard else 0)
        | (_DATA_DISK if data_disk else 0)
    )
    fields = [_field(_ARG, _encode(argument)) for argument in process.argv]
    fields += [_field(_ENV, _encode(pair)) for pair in process.env]
    fields += [
        _field(_CWD, _encode(process.workdir)),
        _field(_USER, _encode(process.user)),
        _field(_FLAGS, _U32.pack(flags)),
        _field(_SIZE, _ROWS.pack(process.rows & 0xFFFF, process.columns & 0xFFFF)),
        _field(_CAPS, _U64.pack(policy.capabilities)),
    ]
    if policy.seccomp:
        fields.append(_field(_SECCOMP, policy.seccomp))
    fields += [_field(_RLIMIT, _LIMIT.pack(number, 0, soft, hard)) for number, soft, hard in policy.rlimits]
    payload = b"".join(fields)
    if len(payload) > MAX_PAYLOAD:
        raise UsageError(
            f"the command and its environment are too long ({len(payload)} bytes, at most {MAX_PAYLOAD})",
            hint="pass long data through a file or standard input",
        )
    return payload


def _check(process: Process, policy: ProcessPolicy) -> None:
    if not process.argv:
        raise UsageError("there is no command to run")
    for text in (*process.argv, *process.env, process.workdir, process.user):
        if "\0" in text:
            raise UsageError(f"{text!r} holds a NUL character, which no program can be passed")
    for pair in process.env:
        if "=" not in pair:
            raise UsageError(f"'{pair}' in the environment is not NAME=value")
    if not process.workdir.startswith("/"):
        raise UsageError(f"the working directory '{process.workdir}' is not an absolute path")
    if len(policy.rlimits) > MAX_RLIMITS:
        raise UsageError(f"there are more than {MAX_RLIMITS} resource limits")
    if len(policy.seccomp) % 8 or len(policy.seccomp) > MAX_FILTER:
        raise UsageError(
            f"the system call filter's size, {len(policy.seccomp)} bytes, is not that of 1 to 4096 instructions"
        )


def _encode(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        raise UsageError(f"{text!r} cannot be encoded") from None


def _field(tag: int, value: bytes) -> bytes:
    return _FIELD.pack(tag, 0, len(value)) + value


def _unpack(layout: Struct, frame: Frame) -> tuple[int, ...]:
    if len(frame.payload) != layout.size:
        raise _violation(f"frame {frame.type} has a length of {len(frame.payload)}")
    return layout.unpack(frame.payload)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def _violation(what: str) -> RemoteError:
    return RemoteError(f"the machine's agent broke its protocol: {what}")
