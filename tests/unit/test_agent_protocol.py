"""The host's end of the agent protocol: what it says, what it grants, and everything that it refuses."""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nagaya.errors import IntegrityError, RemoteError, UsageError
from nagaya.model.policy import ProcessPolicy
from nagaya.model.spec import Process
from nagaya.protocol import agent
from nagaya.protocol.agent import (
    WINDOW,
    AgentLink,
    Continued,
    Exited,
    Held,
    Hello,
    Output,
    SavedChannel,
    SavedLink,
    SpawnFailed,
    Started,
    StdinRoom,
)  # fmt: skip
from nagaya.protocol.frame import MAX_PAYLOAD, Decoder, Frame, encode

POLICY = ProcessPolicy(capabilities=0xA80425FB, no_new_privileges=True)
U32 = struct.Struct("<I")
HELLO = encode(agent.HELLO, 0, struct.pack("<II", agent.VERSION, 0))


def greeted() -> AgentLink:
    link = AgentLink()
    assert link.receive(HELLO) == [Hello(agent.VERSION, 0)]
    return link


def running(*, stdin: bool = True) -> tuple[AgentLink, int]:
    """A link with one program that has started, and nothing left to be sent."""
    link = greeted()
    channel = link.spawn(Process(argv=("cat",), stdin=stdin), POLICY)
    assert link.receive(encode(agent.STARTED, channel, U32.pack(7))) == [Started(channel, 7)]
    take(link)
    return link, channel


def take(link: AgentLink) -> list[Frame]:
    """What waits to be written, as frames."""
    data = link.outgoing()
    link.sent(len(data))
    assert link.outgoing() == b""
    decoder = Decoder()
    frames = decoder.feed(data)
    assert not decoder.pending
    return frames


def fields(payload: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at < len(payload):
        tag, zero, size = struct.unpack_from("<HHI", payload, at)
        assert zero == 0
        found.append((tag, payload[at + 8 : at + 8 + size]))
        at += 8 + size
    assert at == len(payload)
    return found


def test_both_ends_have_the_same_numbers() -> None:
    text = (Path(__file__).parents[2] / "guest" / "proto.h").read_text()
    header = {name: int(value) for name, value in re.findall(r"^\t([FT]_\w+|SF_\w+) = (\d+),$", text, re.M)}
    ours = {name: value for name, value in vars(agent).items() if isinstance(value, int)}
    frames = {name[2:]: value for name, value in header.items() if name.startswith("F_")}
    assert len(frames) == 24
    assert frames == {name: ours[name] for name in frames}
    assert {n[1:]: v for n, v in header.items() if n[:2] == "T_"} == {n: ours[n] for n in ours if f"T{n}" in header}
    flags = {name[2:]: value for name, value in header.items() if name.startswith("SF_")}
    assert len(flags) == 7
    assert flags == {name: ours[name] for name in flags}
    assert f"#define PROTOCOL_VERSION {agent.VERSION}\n" in text
    assert f"#define WINDOW ({agent.WINDOW >> 10}u << 10)\n" in text
    assert f"#define MAX_DATA ({agent.MAX_DATA >> 10}u << 10)\n" in text
    assert f"#define MAX_PAYLOAD ({MAX_PAYLOAD >> 20}u << 20)\n" in text


# -- what it says


def test_spawn_says_everything() -> None:
    process = Process(
        argv=("sh", "-c", "exit \udcff"), env=("A=1", "B="), workdir="/w", user="bob:staff", tty=True, stdin=True,
        rows=24, columns=80,
    )  # fmt: skip
    policy = ProcessPolicy(0x1FF, True, seccomp=b"\x06\0\0\0\0\0\xff\x7f", rlimits=((7, 1024, 2**64 - 1),))
    link = greeted()
    channel = link.spawn(process, policy, main=True)
    (frame,) = take(link)
    assert (frame.type, frame.channel) == (agent.SPAWN, channel)
    assert fields(frame.payload) == [
        (1, b"sh"), (1, b"-c"), (1, b"exit \xff"), (2, b"A=1"), (2, b"B="), (3, b"/w"), (4, b"bob:staff"),
        (5, U32.pack(1 | 2 | 4 | 16)), (6, struct.pack("<HH", 24, 80)), (7, struct.pack("<Q", 0x1FF)),
        (8, policy.seccomp), (9, struct.pack("<IIQQ", 7, 0, 1024, 2**64 - 1)),
    ]  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), [("main", 4), ("applet", 8), ("discard", 32)])
def test_spawn_flags(flag: str, value: int) -> None:
    payload = agent.spawn_payload(Process(argv=("ps",)), ProcessPolicy(0, False), **{flag: True})
    assert (5, U32.pack(value)) in fields(payload)


@pytest.mark.parametrize(
    ("process", "policy"),
    [
        (Process(argv=()), POLICY),
        (Process(argv=("a\0b",)), POLICY),
        (Process(argv=("a",), env=("NOVALUE",)), POLICY),
        (Process(argv=("a",), env=("A=\0",)), POLICY),
        (Process(argv=("a",), workdir=""), POLICY),
        (Process(argv=("a",), workdir="relative"), POLICY),
        (Process(argv=("a",), user="\0"), POLICY),
        (Process(argv=("a", "x" * (1 << 20))), POLICY),
        (Process(argv=("\ud800",)), POLICY),
        (Process(argv=("a",)), ProcessPolicy(0, False, seccomp=b"1234567")),
        (Process(argv=("a",)), ProcessPolicy(0, False, seccomp=bytes(8 * 4097))),
        (Process(argv=("a",)), ProcessPolicy(0, False, rlimits=((0, 0, 0),) * 33)),
    ],
)
def test_spawn_refuses_what_would_end_the_machine(process: Process, policy: ProcessPolicy) -> None:
    link = greeted()
    with pytest.raises(UsageError):
        link.spawn(process, policy)
    assert link.outgoing() == b""
    assert link.spawn(Process(argv=("true",)), POLICY) == 1, "a refused program takes no channel"


def test_channels_are_distinct_and_wrap_around_those_in_use() -> None:
    link = greeted()
    first = link.spawn(Process(argv=("a",)), POLICY)
    link._next = 0xFFFFFFFF  # four billion programs later
    assert [link.spawn(Process(argv=("a",)), POLICY) for _ in range(2)] == [0xFFFFFFFF, first + 1]


def test_control_frames() -> None:
    link, channel = running()
    link.signal(channel, 15)
    link.resize(channel, 50, 132)
    link.close_stdin(channel)
    link.close_stdin(channel)
    link.shutdown()
    assert take(link) == [
        Frame(agent.SIGNAL, channel, U32.pack(15)),
        Frame(agent.RESIZE, channel, struct.pack("<HH", 50, 132)),
        Frame(agent.STDIN_CLOSE, channel, b""),
        Frame(agent.SHUTDOWN, 0, b""),
    ]


def test_nothing_is_said_about_a_program_that_has_ended() -> None:
    link, channel = running()
    assert link.receive(encode(agent.EXITED, channel, U32.pack(137))) == [Exited(channel, 137)]
    link.signal(channel, 9)
    link.resize(channel, 1, 1)
    link.grant(channel, 5)
    link.close_stdin(channel)
    assert link.send_stdin(channel, b"late") == 4, "swallowed, as a pipe without a reader does to a program's writer"
    assert link.stdin_room(channel) == 0
    assert link.outgoing() == b""


def test_sent_keeps_the_rest() -> None:
    link, channel = running()
    link.send_stdin(channel, b"abc")
    whole = link.outgoing()
    link.sent(5)
    assert link.outgoing() == whole[5:]


# -- standard input


def test_stdin_is_cut_into_frames_and_stops_at_the_window() -> None:
    link, channel = running()
    data = bytes(range(256)) * 2048  # 512 KiB
    assert link.send_stdin(channel, data) == agent.WINDOW
    assert link.stdin_room(channel) == 0
    assert link.send_stdin(channel, data) == 0
    frames = take(link)
    assert {len(f.payload) for f in frames} == {agent.MAX_DATA}
    assert b"".join(f.payload for f in frames) == data[: agent.WINDOW]
    assert link.receive(encode(agent.CREDIT, channel, U32.pack(1000))) == [StdinRoom(channel, 1000)]
    assert link.send_stdin(channel, data) == 1000


def test_stdin_that_was_not_asked_for_is_swallowed() -> None:
    link, channel = running(stdin=False)
    assert link.stdin_room(channel) == 0
    assert link.send_stdin(channel, b"abc") == 3
    assert link.outgoing() == b""


# -- output and credit


def test_output_and_coalesced_credit() -> None:
    link, channel = running()
    assert link.receive(encode(agent.STDOUT, channel, b"out") + encode(agent.STDERR, channel, b"err")) == [
        Output(channel, 1, b"out"),
        Output(channel, 2, b"err"),
    ]
    link.grant(channel, 6)
    assert link.outgoing() == b"", "too little to be worth a frame"
    chunk = b"x" * agent.MAX_DATA
    link.receive(encode(agent.STDOUT, channel, chunk))
    link.grant(channel, len(chunk))
    assert take(link) == [Frame(agent.CREDIT, channel, U32.pack(6 + len(chunk)))]


def test_output_may_overtake_started() -> None:
    link = greeted()
    channel = link.spawn(Process(argv=("a",)), POLICY)
    assert link.receive(encode(agent.STDOUT, channel, b"early")) == [Output(channel, 1, b"early")]
    assert link.receive(encode(agent.STARTED, channel, U32.pack(2))) == [Started(channel, 2)]


def test_granting_what_never_came_is_a_mistake_of_ours() -> None:
    link, channel = running()
    link.receive(encode(agent.STDOUT, channel, b"abc"))
    link.grant(channel, 2)
    with pytest.raises(ValueError, match="were not there"):
        link.grant(channel, 2)


@given(st.lists(st.tuples(st.integers(1, agent.MAX_DATA), st.integers(0, 3)), max_size=200))
@settings(max_examples=60, deadline=None)
def test_credit_never_locks_up_and_never_exceeds_the_window(steps: list[tuple[int, int]]) -> None:
    """A model of the agent: it sends while it has window; a consumer takes some, then all: everything must pass."""
    link, channel = running()
    window, pending = agent.WINDOW, 0

    def credit() -> int:
        return sum(U32.unpack(f.payload)[0] for f in take(link) if f.type == agent.CREDIT)

    for size, takes in steps:
        part = min(size, window)
        if part:
            link.receive(encode(agent.STDOUT, channel, bytes(part)))
            window, pending = window - part, pending + part
        consumed = pending * takes // 3
        link.grant(channel, consumed)
        pending -= consumed
        window += credit()
        assert window <= agent.WINDOW
    link.grant(channel, pending)
    assert window + credit() > 0, "all is consumed, and the agent may still not send"


# -- what it refuses


def test_spawn_failed() -> None:
    link = greeted()
    channel = link.spawn(Process(argv=("nosuch",)), POLICY)
    text = b"nosuch: not found\x1b[2J\n" + b"\xff"
    (event,) = link.receive(encode(agent.SPAWN_FAILED, channel, struct.pack("<II", 127, 2) + text))
    assert event == SpawnFailed(channel, 127, 2, "nosuch: not found?[2J?\ufffd"), "nothing that a terminal would obey"
    assert link.stdin_room(channel) == 0


VIOLATIONS: dict[str, Callable[[int], bytes]] = {
    "unknown channel": lambda c: encode(agent.STDOUT, c + 1, b"x"),
    "channel 0": lambda c: encode(agent.STDOUT, 0, b"x"),
    "second hello": lambda c: HELLO,
    "started twice": lambda c: encode(agent.STARTED, c, U32.pack(8)),
    "failed after started": lambda c: encode(agent.SPAWN_FAILED, c, struct.pack("<II", 127, 2)),
    "exited twice": lambda c: encode(agent.EXITED, c, U32.pack(0)) * 2,
    "output after exited": lambda c: encode(agent.EXITED, c, U32.pack(0)) + encode(agent.STDOUT, c, b"x"),
    "status too great": lambda c: encode(agent.EXITED, c, U32.pack(256)),
    "exited too short": lambda c: encode(agent.EXITED, c, b"\0"),
    "exited too long": lambda c: encode(agent.EXITED, c, bytes(5)),
    "empty output": lambda c: encode(agent.STDOUT, c),
    "window overrun": lambda c: encode(agent.STDOUT, c, bytes(agent.MAX_DATA)) * 4 + encode(agent.STDERR, c, b"x"),
    "frame too long": lambda c: struct.pack("<IHHI", agent.MAX_DATA + 1, agent.STDOUT, 0, c),
    "credit for nothing": lambda c: encode(agent.CREDIT, c, U32.pack(1)),
    "credit malformed": lambda c: encode(agent.CREDIT, c, b""),
    "flags": lambda c: struct.pack("<IHHI", 0, agent.CREDIT, 1, c),
    **{
        f"host's own type {type_}": lambda c, type_=type_: encode(type_, c)  # type: ignore[misc]
        for type_ in (0, agent.SPAWN, agent.STDIN, agent.STDIN_CLOSE, agent.SIGNAL, agent.RESIZE, agent.SHUTDOWN, 99)
    },
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_violations(name: str) -> None:
    link, channel = running()
    with pytest.raises(RemoteError):
        link.receive(VIOLATIONS[name](channel))


@pytest.mark.parametrize(
    "first",
    [
        encode(agent.STDOUT, 1, b"x"),
        encode(agent.HELLO, 1, struct.pack("<II", agent.VERSION, 0)),
        encode(agent.HELLO, 0, U32.pack(1)),
        encode(agent.HELLO, 0, struct.pack("<II", agent.VERSION + 1, 0)),
    ],
)
def test_the_first_frame_must_be_our_hello(first: bytes) -> None:
    with pytest.raises(RemoteError):
        AgentLink().receive(first)


@pytest.mark.parametrize("payload", [b"", struct.pack("<I", 127), struct.pack("<II", 0, 2), struct.pack("<II", 128, 2)])
def test_malformed_spawn_failed(payload: bytes) -> None:
    link = greeted()
    channel = link.spawn(Process(argv=("a",)), POLICY)
    with pytest.raises(RemoteError):
        link.receive(encode(agent.SPAWN_FAILED, channel, payload))


def test_exited_before_started_is_refused() -> None:
    link = greeted()
    channel = link.spawn(Process(argv=("a",)), POLICY)
    with pytest.raises(RemoteError):
        link.receive(encode(agent.EXITED, channel, U32.pack(0)))


# -- properties


SESSION = [
    HELLO,
    encode(agent.STARTED, 1, U32.pack(7)),
    encode(agent.STDOUT, 1, b"hello"),
    encode(agent.STDERR, 1, bytes(3000)),
    encode(agent.SPAWN_FAILED, 2, struct.pack("<II", 126, 13) + b"no"),
    encode(agent.EXITED, 1, U32.pack(3)),
]


def session() -> AgentLink:
    link = AgentLink()
    for name in ("a", "b"):
        link.spawn(Process(argv=(name,), stdin=True), POLICY)
    return link


@given(st.lists(st.integers(0, sum(map(len, SESSION))), max_size=12))
@settings(max_examples=100, deadline=None)
def test_chunks_make_no_difference(cuts: list[int]) -> None:
    stream = b"".join(SESSION)
    edges = sorted({0, len(stream), *cuts})
    link = session()
    events = [e for a, b in itertools.pairwise(edges) for e in link.receive(stream[a:b])]
    assert events == session().receive(stream)
    assert len(events) == len(SESSION)


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=200, deadline=None)
def test_garbage_is_refused_and_nothing_else(data: bytes, after_hello: bool) -> None:
    link = session()
    if after_hello:
        link.receive(HELLO)
    try:
        link.receive(data)
    except RemoteError:
        pass  # the one thing that may come of it


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 3), st.binary(max_size=12)), max_size=20))
@settings(max_examples=200, deadline=None)
def test_well_framed_nonsense_is_refused_and_nothing_else(frames: list[tuple[int, int, bytes]]) -> None:
    link = session()
    link.receive(HELLO)
    try:
        for type_, channel, payload in frames:
            link.receive(encode(type_, channel, payload))
    except RemoteError:
        pass


# -- HOLD and CONTINUE

HELD = encode(agent.HELD, 0, U32.pack(0))
CONTINUED = encode(agent.CONTINUED, 0, U32.pack(0))


def held() -> tuple[AgentLink, int]:
    """A link with one program, whose agent is held."""
    link, channel = running()
    link.hold()
    assert [frame.type for frame in take(link)] == [agent.HOLD]
    assert link.receive(HELD) == [Held(0)]
    return link, channel


def test_what_is_asked_while_held_waits() -> None:
    link, channel = running()
    link.hold()
    link.signal(channel, 15)
    other = link.spawn(Process(argv=("true",)), POLICY)
    assert [frame.type for frame in take(link)] == [agent.HOLD]
    output = encode(agent.STDOUT, channel, b"x")
    assert link.receive(output + HELD) == [Output(channel, 1, b"x"), Held(0)]
    assert take(link) == []
    link.go_on(b"payload")
    frames = take(link)
    assert [(frame.type, frame.channel) for frame in frames] == [
        (agent.CONTINUE, 0), (agent.SIGNAL, channel), (agent.SPAWN, other),
    ]  # fmt: skip
    assert frames[0].payload == b"payload"
    warned = encode(agent.CONTINUED, 0, U32.pack(1) + b"no\x1blink\n")
    assert link.receive(warned + output) == [Continued(("no?link",)), Output(channel, 1, b"x")]
    link.hold()  # again


def test_shutdown_does_not_wait() -> None:
    link, _ = held()
    link.shutdown()
    assert [frame.type for frame in take(link)] == [agent.SHUTDOWN]


def test_a_hold_that_is_given_up() -> None:
    link, channel = running()
    link.hold()
    link.go_on(b"")
    assert [frame.type for frame in take(link)] == [agent.HOLD, agent.CONTINUE]
    late = encode(agent.STDOUT, channel, b"late")
    assert link.receive(late + HELD + CONTINUED) == [Output(channel, 1, b"late"), Continued(())]
    link.hold()


@pytest.mark.parametrize(
    "frame",
    [
        HELD,
        CONTINUED,
        encode(agent.STDOUT, 1, b"x"),
        encode(agent.EXITED, 1, U32.pack(0)),
        encode(agent.HELD, 1, U32.pack(0)),
    ],
)
def test_nothing_comes_while_held(frame: bytes) -> None:
    link, _ = held()
    with pytest.raises(RemoteError):
        link.receive(frame)


@pytest.mark.parametrize(
    "frame",
    [HELD, CONTINUED, encode(agent.HELD, 0, b""), encode(agent.CONTINUED, 0, U32.pack(2) + b"one\n")],
)
def test_nobody_had_asked(frame: bytes) -> None:
    link, _ = running()
    with pytest.raises(RemoteError):
        link.receive(frame)
    link, _ = held()
    link.go_on(b"")
    if frame != CONTINUED:
        with pytest.raises(RemoteError):
            link.receive(frame)


def test_another_link_goes_on() -> None:
    link, channel = running()
    link.receive(encode(agent.STDOUT, channel, bytes(1000)))
    link.grant(channel, 400)
    assert link.send_stdin(channel, bytes(3000)) == 3000
    link.hold()
    take(link)
    link.receive(HELD)
    saved = link.save()
    assert saved.channels == (SavedChannel(channel, True, True, WINDOW - 3000, WINDOW - 1000, 400),)
    other = AgentLink.resumed(saved)
    assert other.outgoing() == b""
    other.go_on(b"")
    take(other)
    room = WINDOW - 3000
    credit = encode(agent.CREDIT, channel, U32.pack(3000))
    assert other.receive(CONTINUED + credit) == [Continued(()), StdinRoom(channel, WINDOW)]
    assert other.stdin_room(channel) == room + 3000
    assert other.spawn(Process(argv=("true",)), POLICY) != channel
    assert other.receive(encode(agent.EXITED, channel, U32.pack(3))) == [Exited(channel, 3)]


def test_only_a_held_link_can_be_saved() -> None:
    link, _ = running()
    with pytest.raises(ValueError, match="held"):
        link.save()


GOOD = SavedChannel(1, True, False, 0, 0, 0)


@pytest.mark.parametrize(
    "saved",
    [
        SavedLink(agent.VERSION + 1, True, False, 2, ()),
        SavedLink(agent.VERSION, True, False, 0, ()),
        SavedLink(agent.VERSION, True, False, 1 << 32, ()),
        SavedLink(agent.VERSION, True, False, 2, (GOOD, GOOD)),
        SavedLink(agent.VERSION, True, False, 2, (GOOD._replace(channel=0),)),
        SavedLink(agent.VERSION, True, False, 2, (GOOD._replace(input_room=WINDOW + 1),)),
        SavedLink(agent.VERSION, True, False, 2, (GOOD._replace(output_room=-1),)),
        SavedLink(agent.VERSION, True, False, 2, (GOOD._replace(owed=1 << 40),)),
    ],
)
def test_a_damaged_link_is_refused(saved: SavedLink) -> None:
    with pytest.raises(IntegrityError):
        AgentLink.resumed(saved)
