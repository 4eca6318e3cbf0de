"""The supervisor's loop, streams and clients: back-pressure, order, and peers that break off or misbehave."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from nagaya.errors import ExecError, NotFound
from nagaya.kernel import unix
from nagaya.manager.attachment import Attachment, Connection, Exited, Output
from nagaya.protocol import control
from nagaya.protocol.frame import Decoder, encode
from nagaya.supervisor.client import Client
from nagaya.supervisor.loop import Loop
from nagaya.supervisor.programs import Program
from nagaya.supervisor.stream import Stream


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


def _spin(loop: Loop, seconds: float = 0.02) -> None:
    loop._running = True
    loop.after(seconds, loop.stop)
    loop.run()


def test_timers_in_order_and_cancelled(loop: Loop) -> None:
    seen: list[str] = []
    loop.after(0.02, lambda: seen.append("b"))
    loop.after(0.01, lambda: seen.append("a"))
    loop.after(0.015, lambda: seen.append("never")).cancel()
    loop.after(0.03, loop.stop)
    loop.run()
    assert seen == ["a", "b"]


def test_what_was_told_of_a_number_is_not_told_of_its_next_owner(loop: Loop) -> None:
    """Both are ready at once, and whoever is called first closes the other, and has another descriptor of that number."""
    pairs = [unix.socket_pair(), unix.socket_pair(), unix.socket_pair()]
    (first, _), (second, _), (_, third) = pairs
    told: list[str] = []

    def replace(own: int, other: int) -> None:
        loop.forget(own)
        loop.forget(other)
        os.dup2(third, other)
        loop.watch(other, lambda events: told.append("of its next owner"))

    loop.watch(first, lambda events: replace(first, second))
    loop.watch(second, lambda events: replace(second, first))
    for _, peer in pairs[:2]:
        os.write(peer, b"x")
    _spin(loop)
    assert told == []
    os.write(pairs[2][0], b"x")
    loop.after(0.01, loop.stop)
    loop._running = True
    loop.run()
    assert told
    for fd in (fd for pair in pairs for fd in pair):
        os.close(fd)


def test_a_stream_queues_for_a_slow_reader_and_ends_when_it_has_read(loop: Loop) -> None:
    ours, theirs = unix.socket_pair()
    closed: list[int] = []
    stream = Stream(loop, ours, on_data=lambda data: None, on_closed=lambda: closed.append(1))
    big = os.urandom(3 << 20)
    stream.send(big)
    stream.end()
    stream.send(b"after the end")
    assert stream.queued
    got = bytearray()
    os.set_blocking(theirs, False)
    while not closed:
        _spin(loop, 0.001)
        try:
            while data := os.read(theirs, 1 << 20):
                got += data
        except BlockingIOError:
            continue
    got += os.read(theirs, 1 << 20)
    assert bytes(got) == big
    os.close(theirs)


def test_a_peer_that_breaks_off_is_told_once(loop: Loop) -> None:
    ours, theirs = unix.socket_pair()
    closed: list[int] = []
    stream = Stream(loop, ours, on_data=lambda data: None, on_closed=lambda: closed.append(1))
    os.close(theirs)
    stream.send(b"x")
    stream.send(b"y")
    _spin(loop)
    stream.close()
    assert closed == [1]
    assert not stream.open


def test_what_a_peer_said_before_it_went_is_heard(loop: Loop) -> None:
    """It is found gone by a write, with its last words unread: somebody types and detaches while output comes."""
    ours, theirs = unix.socket_pair()
    told: list[bytes] = []
    stream = Stream(loop, ours, on_data=told.append, on_closed=lambda: told.append(b"closed"))
    stream.send(b"never read")
    os.write(theirs, b"last words")
    os.close(theirs)
    stream.send(b"x")
    stream.send(b"y")
    assert told == []
    assert stream.queued == 0
    _spin(loop)
    assert told == [b"last words", b"closed"]


def test_the_same_of_a_peer_that_had_not_taken_all(loop: Loop) -> None:
    ours, theirs = unix.socket_pair()
    told: list[bytes] = []
    stream = Stream(loop, ours, on_data=told.append, on_closed=lambda: told.append(b"closed"))
    stream.send(bytes(4 << 20))
    assert stream.queued
    os.write(theirs, b"last words")
    os.close(theirs)
    _spin(loop)
    assert told == [b"last words", b"closed"]


class _Program:
    """Stands in for a program: remembers what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def __getattr__(self, name: str) -> object:
        return lambda *arguments: self.calls.append((name, *(arguments[1:] if name == "feed" else arguments)))


def _client(loop: Loop) -> tuple[Client, int, list[dict[str, object]], list[Client]]:
    ours, theirs = unix.socket_pair()
    requests: list[dict[str, object]] = []
    gone: list[Client] = []
    client = Client(loop, ours, on_request=lambda _, request: requests.append(request), on_gone=gone.append)
    return client, theirs, requests, gone


def test_requests_arrive_whole_whatever_the_pieces(loop: Loop) -> None:
    _, theirs, requests, _ = _client(loop)
    for byte in control.request("kill", signal=9):
        os.write(theirs, bytes([byte]))
    _spin(loop)
    assert requests == [{"op": "kill", "signal": 9}]
    os.close(theirs)


@pytest.mark.parametrize(
    "bad",
    [
        b"\xff" * 12,
        encode(control.STDIN, 0, b"x"),
        encode(control.REQUEST, 0, b"[]"),
        encode(control.REQUEST, 0, b"\xff"),
        encode(99, 0, b""),
    ],
)
def test_a_client_that_misbehaves_is_told_and_closed(loop: Loop, bad: bytes) -> None:
    _, theirs, requests, gone = _client(loop)
    os.write(theirs, bad)
    _spin(loop)
    assert requests == []
    assert len(gone) == 1
    (frame,) = Decoder().feed(os.read(theirs, 65536))
    assert frame.type == control.ERROR
    assert os.read(theirs, 1) == b""
    os.close(theirs)


def test_more_input_than_the_window_is_a_violation(loop: Loop) -> None:
    client, theirs, _, gone = _client(loop)
    client.program = _Program()  # type: ignore[assignment]
    os.set_blocking(theirs, False)
    for _ in range(control.WINDOW // control.CHUNK + 1):
        os.write(theirs, encode(control.STDIN, 0, b"x" * control.CHUNK))
        _spin(loop, 0.002)
    assert len(gone) == 1
    os.close(theirs)


def test_streams_reach_the_program(loop: Loop) -> None:
    client, theirs, _, _ = _client(loop)
    program = _Program()
    client.program = program  # type: ignore[assignment]
    os.write(theirs, encode(control.STDIN, 0, b"in") + encode(control.STDIN_CLOSE))
    os.write(
        theirs, encode(control.RESIZE, 0, control.SIZE.pack(3, 4)) + encode(control.SIGNAL, 0, control.U32.pack(15))
    )
    _spin(loop)
    assert [call for call in program.calls if call[0] != "grant"] == [
        ("feed", b"in"),
        ("end_stdin", client),
        ("resize", 3, 4),
        ("signal", 15),
    ]
    os.close(theirs)


class _Link:
    """Stands in for the agent's: takes so much input, and remembers it."""

    def __init__(self, room: int = 1 << 20) -> None:
        self.room = room
        self.taken = b""
        self.closed = False

    def grant(self, channel: int, count: int) -> None: ...
    def signal(self, channel: int, number: int) -> None: ...
    def resize(self, channel: int, rows: int, columns: int) -> None: ...

    def send_stdin(self, channel: int, data: bytes) -> int:
        taken = data[: self.room]
        self.room -= len(taken)
        self.taken += taken
        return len(taken)

    def close_stdin(self, channel: int) -> None:
        self.closed = True


class _Owner:
    def __init__(self, link: _Link) -> None:
        self.link = link

    def flush(self) -> None: ...


def _program(link: _Link) -> Program:
    return Program(_Owner(link), 1, wants_stdin=True, tty=False, log=None)


def test_a_machine_that_is_restarted_gets_what_it_had_not_taken(loop: Loop) -> None:
    client, theirs, _, _ = _client(loop)
    first, second, third = _Link(room=4), _Link(), _Link()
    former, later, last = _program(first), _program(second), _program(third)
    former.join(client, stdin=True)
    client.stdin_outstanding = 10
    former.feed(client, b"abcdefg")
    former.feed(client, b"hij")
    assert (first.taken, client.stdin_outstanding) == (b"abcd", 6)
    later.succeed(former)
    assert (second.taken, second.closed, client.stdin_outstanding) == (b"efghij", False, 0)
    assert client.program is later
    later.end_stdin(client)
    last.succeed(later)
    assert (third.taken, third.closed) == (b"", True)
    os.close(theirs)


def test_input_of_which_there_is_none_holds_nothing_up(loop: Loop) -> None:
    client, theirs, _, _ = _client(loop)
    link = _Link()
    program = _program(link)
    program.join(client, stdin=True)
    os.write(theirs, encode(control.STDIN, 0, b"") + encode(control.STDIN, 0, b"x") + encode(control.STDIN_CLOSE))
    _spin(loop)
    assert (link.taken, link.closed) == (b"x", True)
    os.close(theirs)


def _attachment() -> tuple[Attachment, int]:
    ours, theirs = unix.socket_pair()
    return Attachment(Connection(ours)), theirs


def test_an_attachment_s_events_and_credit() -> None:
    attachment, theirs = _attachment()
    with attachment:
        assert attachment.receive() == []
        attachment.send_stdin(b"x" * 1000)
        assert attachment.stdin_room() == control.CHUNK
        os.write(theirs, encode(control.STDOUT, 0, b"o") + encode(control.STDERR, 0, b"e"))
        os.write(theirs, encode(control.CREDIT, 0, control.U32.pack(1000)) + control.exited(137, "why"))
        assert attachment.receive() == [Output(1, b"o"), Output(2, b"e"), Exited(137, "why")]
    os.close(theirs)


def test_an_error_and_a_death_raise() -> None:
    attachment, theirs = _attachment()
    os.write(theirs, control.error(ExecError("no such", status=127, hint="look")))
    with pytest.raises(ExecError) as caught:
        attachment.receive()
    assert (caught.value.status, caught.value.hint) == (127, "look")
    os.close(theirs)
    with pytest.raises(Exception, match="killed"):
        attachment.receive()
    attachment.close()


def test_output_before_an_error_is_seen_before_it() -> None:
    attachment, theirs = _attachment()
    os.write(theirs, encode(control.STDOUT, 0, b"last words") + control.error(NotFound("gone")))
    assert attachment.receive() == [Output(1, b"last words")]
    assert attachment.pending()
    with pytest.raises(NotFound):
        attachment.receive()
    attachment.close()
    os.close(theirs)


def test_output_that_overtakes_the_reply_is_kept_in_order() -> None:
    ours, theirs = unix.socket_pair()
    os.write(theirs, encode(control.STDOUT, 0, b"1") + encode(control.STDERR, 0, b"2"))
    os.write(theirs, control.reply(pid=7) + encode(control.STDOUT, 0, b"3") + control.exited(0))
    connection = Connection(ours)
    assert connection.answer() == {"pid": 7}
    with Attachment(connection) as attachment:
        assert attachment.pending()
        events = attachment.receive()
        while not isinstance(events[-1], Exited):
            events += attachment.receive()
    assert events == [Output(1, b"1"), Output(2, b"2"), Output(1, b"3"), Exited(0, "")]
    os.close(theirs)


def test_communicate_feeds_by_credit_and_collects() -> None:
    attachment, theirs = _attachment()
    payload = os.urandom(700_000)
    if os.fork() == 0:
        decoder, got, done = Decoder(), bytearray(), False
        while not done:
            for frame in decoder.feed(os.read(theirs, 65536)):
                if frame.type == control.STDIN:
                    got += frame.payload
                    os.write(theirs, encode(control.CREDIT, 0, control.U32.pack(len(frame.payload))))
                done = done or frame.type == control.STDIN_CLOSE
        for at in range(0, len(got), control.CHUNK):
            os.write(theirs, encode(control.STDOUT, 0, bytes(got[at : at + control.CHUNK])))
        os.write(theirs, control.exited(3))
        os._exit(0)
    assert attachment.communicate(payload, timeout_s=20) == (3, payload, b"")
    os.wait()
    os.close(theirs)


def test_errors_cross_the_wire() -> None:
    frame = Decoder().feed(control.error(NotFound("gone", hint="look elsewhere")))[0]
    error = control.parse_error(frame)
    assert type(error) is NotFound
    assert (error.message, error.hint) == ("gone", "look elsewhere")
    strange = Decoder().feed(encode(control.ERROR, 0, json.dumps({"kind": [], "message": 3}).encode()))[0]
    assert "malformed" in str(control.parse_error(strange))
