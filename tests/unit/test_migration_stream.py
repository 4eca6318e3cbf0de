"""A migration's frames and their stream: what a wrong, hostile or vanished other side gets."""

from __future__ import annotations

import os
import random
import socket
import threading
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nagaya.errors import Conflict, IntegrityError, NagayaError, RemoteError, UsageError
from nagaya.migration import addresses, frames, report
from nagaya.migration.addresses import Address, parse_address
from nagaya.migration.frames import DATA_BYTES, HEADER, LENGTH, Frame
from nagaya.migration.offer import parse_offer
from nagaya.migration.stream import Stream


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    first, second = socket.socketpair()
    yield first, second
    first.close()
    second.close()


def stream(end: socket.socket) -> Stream:
    made = Stream(end.fileno(), end.fileno())
    made.patience_s = 5
    return made


def test_frames_come_as_they_went(ends: tuple[socket.socket, socket.socket]) -> None:
    data = os.urandom(DATA_BYTES)

    def send() -> None:
        out = stream(ends[0])
        out.send(frames.PAGES, 4096, data)
        out.send(frames.ROUND, 7)
        out.send_json(frames.READY, {"ready": True})

    thread = threading.Thread(target=send)
    thread.start()
    into = stream(ends[1])
    assert into.receive() == Frame(frames.PAGES, 4096, data)
    assert into.expect(frames.ROUND) == Frame(frames.ROUND, 7, b"")
    assert frames.parse_json(into.receive()) == {"ready": True}
    thread.join()


def test_nothing_beyond_a_frame_is_read(ends: tuple[socket.socket, socket.socket]) -> None:
    stream(ends[0]).send(frames.ROUND, 1)
    ends[0].sendall(b"the next process's")
    assert stream(ends[1]).receive().where == 1
    assert ends[1].recv(100) == b"the next process's"


@given(st.binary(min_size=HEADER.size, max_size=HEADER.size))
def test_any_header_is_parsed_or_refused(data: bytes) -> None:
    try:
        type_, length, where, _ = frames.parse_header(data)
    except RemoteError:
        return
    assert length <= 16 << 20 and where >= 0 and type_ in range(1, 40)


@given(st.binary(max_size=300), st.sampled_from((frames.OFFER, frames.STATE, frames.REFUSE, frames.QUESTION)))
def test_any_json_is_an_object_or_refused(data: bytes, type_: int) -> None:
    frame = Frame(type_, 0, data)
    for parse in (frames.parse_json, frames.parse_refusal):
        try:
            parse(frame)
        except RemoteError:
            continue


@given(st.integers(0, 1 << 64), st.integers(0, 1 << 64))
def test_a_place_is_inside(where: int, count: int) -> None:
    total = 1 << 30
    try:
        frames.check_place(Frame(frames.PAGES, where, b""), count, total, unit=4096)
    except RemoteError:
        return
    assert count > 0 and where + count <= total and where % 4096 == count % 4096 == 0


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (b"GET / HTTP/1.1\r\nHost:", "no Nagaya"),
        (frames.preface(2), "version 2"),
        (frames.preface()[:5], "ended"),
        (b"nagaya-migrate x   \n", "no Nagaya"),
    ],
)
def test_who_is_no_other_side_is_told(ends: tuple[socket.socket, socket.socket], what: bytes, says: str) -> None:
    ends[0].sendall(what.ljust(20, b"x") if says != "ended" else what)
    ends[0].shutdown(socket.SHUT_WR)
    with pytest.raises(RemoteError, match=says):
        stream(ends[1]).greet()


def damaged() -> list[tuple[bytes, str]]:
    good = frames.encode(frames.BLOCKS, 512, b"x" * 512)
    lie = HEADER.pack(frames.PAGES, bytes(3), DATA_BYTES + 1, 0, 0, bytes(4))
    return [
        (good + b"y" * 512, "its sum is wrong"),
        (good + b"x" * 511, "ended"),
        (lie, "1048577 bytes"),
        (HEADER.pack(99, bytes(3), 0, 0, 0, bytes(4)), "unknown type"),
        (HEADER.pack(frames.ROUND, b"\0\1\0", 0, 0, 0, bytes(4)), "damaged header"),
        (HEADER.pack(frames.COMMIT, bytes(3), 8, 0, 0, bytes(4)), "8 bytes"),
        (HEADER.pack(frames.ZEROS, bytes(3), 4, 0, zlib.crc32(bytes(4)), bytes(4)), "4 bytes"),
        (HEADER.pack(frames.STATE, bytes(3), 17 << 20, 0, 0, bytes(4)), "bytes"),
        (b"", "ended"),
    ]


@pytest.mark.parametrize(("data", "says"), damaged())
def test_what_is_damaged_is_refused(ends: tuple[socket.socket, socket.socket], data: bytes, says: str) -> None:
    ends[0].sendall(data)
    ends[0].shutdown(socket.SHUT_WR)
    with pytest.raises(RemoteError, match=says):
        stream(ends[1]).receive()


def test_random_bytes_never_do_more_than_be_refused() -> None:
    source = random.Random(6)
    for _ in range(200):
        first, second = socket.socketpair()
        header = bytearray(frames.encode(source.choice((*range(16), *range(30, 42))), source.getrandbits(40), b"z" * 8))
        header[source.randrange(len(header))] = source.getrandbits(8)
        first.sendall(bytes(header) + source.randbytes(64))
        first.shutdown(socket.SHUT_WR)
        into = stream(second)
        try:
            while True:
                into.receive()
        except RemoteError:
            pass
        first.close()
        second.close()


def test_a_refusal_is_what_was_said_and_one_line(ends: tuple[socket.socket, socket.socket]) -> None:
    stream(ends[0]).send_json(frames.REFUSE, frames.refusal(Conflict("no\nroom \x1b[31m", hint="make\tsome")))
    with pytest.raises(Conflict, match=r"^no\?room \?\[31m$") as caught:
        stream(ends[1]).expect(frames.READY)
    assert caught.value.hint == "make?some"


def test_another_frame_than_the_expected_one_is_refused(ends: tuple[socket.socket, socket.socket]) -> None:
    stream(ends[0]).send(frames.ROUND, 1)
    with pytest.raises(RemoteError, match="where none may be"):
        stream(ends[1]).expect(frames.READY)


def test_every_wait_ends(ends: tuple[socket.socket, socket.socket]) -> None:
    into = stream(ends[1])
    with pytest.raises(RemoteError, match="silent"):
        into.receive(patience_s=0.05)
    into.patience_s = 0.05
    with pytest.raises(RemoteError, match="silent"):
        while True:
            into.send(frames.BLOB, 0, bytes(DATA_BYTES))


def test_who_is_told_to_stop_stops_waiting(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        told = report.Report(theirs.fileno())
        into = Stream(ends[1].fileno(), ends[1].fileno(), alarm=theirs.fileno(), on_alarm=told.look)
        ours.sendall(report.encode({"what": "frozen"}) + report.encode({"what": "abort", "why": "enough"}))
        with pytest.raises(Conflict, match="enough"):
            into.receive()


def test_what_came_early_is_not_lost() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        told = report.Report(theirs.fileno())
        ours.sendall(report.encode({"what": "one"}) + report.encode({"what": "two"}))
        told.look()
        assert [told.hear()["what"], told.hear()["what"]] == ["one", "two"]
        ours.close()
        with pytest.raises(RemoteError, match="gone"):
            told.hear()


@pytest.mark.parametrize("data", [b"{\n", b"[]\n", b"[" * 100_000 + b"\n", b"\xff\n"])
def test_lines_that_are_none_are_refused(data: bytes) -> None:
    with pytest.raises(RemoteError):
        report.Lines().feed(data)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("-", Address("-")),
        ("unix:/run/a b", Address("unix", "/run/a b")),
        ("exec:ssh host nagaya migrate receive -", Address("exec", "ssh host nagaya migrate receive -")),
        ("tcp:192.0.2.1:7", Address("tcp", host="192.0.2.1", port=7)),
        ("tcp:[2001:db8::1]:65535", Address("tcp", host="2001:db8::1", port=65535)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert addresses.describe(address) == text


@pytest.mark.parametrize(
    "text", ["", "unix:", "exec:", "tcp:host", "tcp::1", "tcp:h:0", "tcp:h:65536", "tcp:h:x", "/run/x", "ssh:host"]
)
def test_what_is_no_address_is_said_so(text: str) -> None:
    with pytest.raises(UsageError):
        parse_address(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=6),
        max_leaves=20,
    )
)
def test_any_offer_is_one_or_refused(data: object) -> None:
    with pytest.raises(IntegrityError):
        parse_offer(data)


def test_lengths_are_eight_bytes() -> None:
    assert frames.parse_length(Frame(frames.HOLE, 0, LENGTH.pack(1 << 40))) == 1 << 40
    assert issubclass(RemoteError, NagayaError)
