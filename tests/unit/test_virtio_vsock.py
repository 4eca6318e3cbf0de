"""virtio-vsock: streams both ways, credit, half-closed connections, and packets that no driver should send."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from nagaya.errors import GuestFault
from nagaya.kernel import unix
from nagaya.virtio.vsock import FIRST_HOST_PORT, HOST_CID, RECEIVE, TRANSMIT, Vsock, parse_greeting
from nagaya.virtio.vsock_connection import (
    BUFFER_BYTES,
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
    SHUTDOWN_BOTH,
    SHUTDOWN_SEND,
)
from tests.virtio_rig import Rig

CID = 42
HEADER = struct.Struct("<QQIIIHHIII")


class Packet(NamedTuple):
    source_cid: int
    destination_cid: int
    source_port: int
    destination_port: int
    size: int
    kind: int
    operation: int
    flags: int
    buffer_bytes: int
    forwarded_bytes: int
    data: bytes


class Guest:
    """A driver, packet by packet."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        listener = unix.listen(str(directory), "vsock")
        self.device = Vsock(
            "vsock0", guest_cid=CID, listener_fd=listener, directory=str(directory), socket_name="vsock"
        )
        self.rig = Rig(self.device).start()
        self.give(40)

    def give(self, count: int, size: int = 4096) -> None:
        for _ in range(count):
            self.rig.add(RECEIVE, room=(HEADER.size, size))

    def send(
        self, source: int, destination: int, operation: int, data: bytes = b"", *, flags: int = 0, size: int = -1,
        credit: tuple[int, int] = (1 << 18, 0), kind: int = 1, cids: tuple[int, int] = (CID, HOST_CID),
    ) -> None:  # fmt: skip
        size = len(data) if size < 0 else size
        header = HEADER.pack(*cids, source, destination, size, kind, operation, flags, *credit)
        self.rig.add(TRANSMIT, header, *([data] if data else []))

    def got(self, count: int | None = None) -> list[Packet]:
        found = self.rig.taken_data(RECEIVE, count=count)
        return [Packet(*HEADER.unpack(data[: HEADER.size]), data[HEADER.size :]) for data in found]

    def one(self, operation: int) -> Packet:
        (packet,) = self.got(1)
        assert packet.operation == operation
        assert (packet.source_cid, packet.destination_cid) == (HOST_CID, CID)
        return packet

    def server(self, port: int) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.bind(str(self.directory / f"vsock_{port}"))
        made.listen()
        made.settimeout(3)
        return made

    def connect_out(self, port: int = 80, source: int = 1000, credit: int = 1 << 18) -> socket.socket:
        """The guest connects to a service of the host's; the service's end."""
        with self.server(port) as server:
            self.send(source, port, REQUEST, credit=(credit, 0))
            answer = self.one(RESPONSE)
            assert (answer.source_port, answer.destination_port) == (port, source)
            assert answer.buffer_bytes == BUFFER_BYTES
            peer, _ = server.accept()
        os.unlink(self.directory / f"vsock_{port}")
        peer.settimeout(3)
        return peer

    def host_connects(self, line: bytes = b"CONNECT 1024\n") -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(3)
        made.connect(str(self.directory / "vsock"))
        made.sendall(line)
        return made


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    made = Guest(tmp_path)
    yield made
    assert made.rig.faults == []
    made.rig.close()


def test_greeting() -> None:
    assert parse_greeting(b"CONNECT 1024\n") == 1024
    for wrong in (b"", b"CONNECT 1024", b"CONNECT \n", b"CONNECT -1\n", b"CONNECT 4294967296\n", b"connect 1\n"):
        assert parse_greeting(wrong) is None


def test_the_guest_connects(guest: Guest) -> None:
    assert guest.device.read_config(0, 8) == struct.pack("<Q", CID)
    peer = guest.connect_out()
    guest.send(1000, 80, RW, b"from the guest")
    assert peer.recv(100) == b"from the guest"
    peer.sendall(b"from the host")
    packet = guest.one(RW)
    assert (packet.data, packet.size, packet.forwarded_bytes) == (b"from the host", 13, 14)
    peer.close()
    assert guest.one(SHUTDOWN).flags == SHUTDOWN_BOTH
    guest.send(1000, 80, RST)
    guest.send(1000, 80, RW, b"x")
    guest.one(RST)


def test_the_host_connects(guest: Guest) -> None:
    peer = guest.host_connects(b"CONNECT 1024\nand the first words")
    request = guest.one(REQUEST)
    assert (request.source_port, request.destination_port) == (FIRST_HOST_PORT, 1024)
    guest.rig.settle()
    assert guest.got() == []
    guest.send(1024, FIRST_HOST_PORT, RESPONSE)
    assert peer.recv(100) == b"OK %d\n" % FIRST_HOST_PORT
    assert guest.one(RW).data == b"and the first words"
    guest.send(1024, FIRST_HOST_PORT, RW, b"hello")
    assert peer.recv(100) == b"hello"


def test_nobody_listens_in_the_guest(guest: Guest) -> None:
    peer = guest.host_connects()
    guest.one(REQUEST)
    guest.send(1024, FIRST_HOST_PORT, RST)
    assert peer.recv(100) == b""


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\n\r\n", b"CONNECT 99999999999\n", b"x" * 100, b"\n"])
def test_wrong_greetings(guest: Guest, line: bytes) -> None:
    peer = guest.host_connects(line)
    try:
        assert peer.recv(100) == b""
    except ConnectionResetError:
        pass
    assert guest.got() == []


def test_nobody_listens_on_the_host(guest: Guest) -> None:
    guest.send(1000, 81, REQUEST)
    packet = guest.one(RST)
    assert (packet.source_port, packet.destination_port) == (81, 1000)


def test_much_data_to_the_guest_by_its_credit(guest: Guest) -> None:
    data = os.urandom(300_000)
    peer = guest.connect_out(credit=10_000)
    peer.setblocking(False)
    sent, received, asked = 0, b"", 0
    while len(received) < len(data):
        try:
            sent += peer.send(data[sent:])
        except BlockingIOError:
            pass
        guest.rig.settle()
        for packet in guest.got():
            if packet.operation == RW:
                received += packet.data
                guest.give(1)
            elif packet.operation == CREDIT_REQUEST:
                guest.give(1)
                asked += 1
        guest.send(1000, 80, CREDIT_UPDATE, credit=(100_000, len(received)))
    assert received == data
    assert asked


def test_never_more_than_the_credit(guest: Guest) -> None:
    peer = guest.connect_out(credit=100)
    peer.sendall(bytes(1000))
    assert guest.one(RW).size == 100
    guest.one(CREDIT_REQUEST)
    guest.rig.settle()
    assert guest.got() == []
    guest.send(1000, 80, CREDIT_UPDATE, credit=(100, 50))
    assert guest.one(RW).size == 50


def test_much_data_to_a_slow_host(guest: Guest) -> None:
    peer = guest.connect_out()
    peer.setblocking(False)
    data = os.urandom(1_000_000)
    sent, forwarded, received = 0, 0, b""
    while len(received) < len(data):
        while sent < len(data) and sent - forwarded + 4096 <= BUFFER_BYTES:
            guest.send(1000, 80, RW, data[sent : sent + 4096])
            sent += len(data[sent : sent + 4096])
        try:
            received += peer.recv(65536)
        except BlockingIOError:
            guest.rig.settle()
        for packet in guest.got():
            assert packet.operation == CREDIT_UPDATE
            forwarded = packet.forwarded_bytes
            guest.give(1)
    assert received == data


def test_more_than_our_credit_ends_the_connection(guest: Guest) -> None:
    peer = guest.connect_out()
    while not (packets := [packet for packet in guest.got() if packet.operation != CREDIT_UPDATE]):
        guest.send(1000, 80, RW, bytes(65536))
        guest.give(1)
    assert [packet.operation for packet in packets] == [RST]
    peer.close()


def test_credit_is_told_on_request(guest: Guest) -> None:
    peer = guest.connect_out()
    guest.send(1000, 80, CREDIT_REQUEST)
    assert guest.one(CREDIT_UPDATE).buffer_bytes == BUFFER_BYTES
    peer.close()


def test_half_closed_by_the_guest(guest: Guest) -> None:
    peer = guest.connect_out()
    guest.send(1000, 80, RW, b"question")
    guest.send(1000, 80, SHUTDOWN, flags=SHUTDOWN_SEND)
    assert peer.recv(100) == b"question"
    assert peer.recv(100) == b""
    peer.sendall(b"answer")
    assert guest.one(RW).data == b"answer"


def test_half_closed_by_the_host(guest: Guest) -> None:
    peer = guest.connect_out()
    peer.sendall(b"question")
    peer.shutdown(socket.SHUT_WR)
    assert guest.one(RW).data == b"question"
    assert guest.one(SHUTDOWN).flags == SHUTDOWN_SEND
    guest.send(1000, 80, RW, b"answer")
    assert peer.recv(100) == b"answer"


def test_an_answer_and_gone(guest: Guest) -> None:
    """A service that answers and closes while the guest is still sending: the answer must arrive."""
    peer = guest.connect_out()
    guest.rig.call(lambda: peer.sendall(b"answer") or peer.close())  # type: ignore[func-returns-value]
    guest.send(1000, 80, RW, b"more")
    packets = []
    while not packets or packets[-1].flags != SHUTDOWN_BOTH:
        packets += guest.got(1)
    assert b"".join(packet.data for packet in packets) == b"answer"
    assert {packet.operation for packet in packets} == {RW, SHUTDOWN}


def test_closed_by_the_guest(guest: Guest) -> None:
    peer = guest.connect_out()
    guest.send(1000, 80, RW, b"last words")
    guest.send(1000, 80, SHUTDOWN, flags=SHUTDOWN_BOTH)
    guest.one(RST)
    assert peer.recv(100) == b"last words"
    assert peer.recv(100) == b""


def test_last_words_outlive_the_guests_patience(guest: Guest) -> None:
    peer = guest.connect_out()
    for _ in range(30):
        guest.send(1000, 80, RW, bytes(10_000))
    packets = guest.got()
    guest.send(1000, 80, SHUTDOWN, flags=SHUTDOWN_BOTH)
    assert RST not in [packet.operation for packet in packets + guest.got()]
    guest.send(1000, 80, RST)  # it has waited eight seconds for ours
    received = 0
    while part := peer.recv(65536):
        received += len(part)
    assert received == 300_000
    guest.rig.until(lambda: not guest.device._lingering)


def test_nothing_is_lost_without_buffers(guest: Guest) -> None:
    first, second = guest.connect_out(80, 1000), guest.connect_out(81, 1001)
    used = 2
    while used < 40:
        first.sendall(b"x")
        guest.one(RW)
        used += 1
    first.sendall(b"first")
    second.sendall(b"second")
    guest.send(1000, 80, CREDIT_REQUEST)
    guest.send(5, 5, RW, b"to nobody")
    guest.rig.settle()
    assert guest.got() == []
    guest.give(8)
    packets = guest.got(4)
    assert sorted(packet.operation for packet in packets) == [RST, RW, RW, CREDIT_UPDATE]
    assert {packet.data for packet in packets} == {b"first", b"second", b""}


def test_data_comes_after_the_answer(guest: Guest) -> None:
    """The service speaks at once, and the guest has no buffer for the response yet."""
    for _ in range(40):
        guest.send(1, 1, CREDIT_REQUEST)
    assert {packet.operation for packet in guest.got(40)} == {RST}
    with guest.server(80) as server:
        guest.send(1000, 80, REQUEST)
        peer, _ = server.accept()
        peer.sendall(b"banner")
        guest.rig.settle()
        guest.give(2)
        assert [packet.operation for packet in guest.got(2)] == [RESPONSE, RW]
        peer.close()


def test_refusals_are_bounded(guest: Guest) -> None:
    sent, got = 0, 0
    while not guest.rig.rings[TRANSMIT].is_full:
        guest.send(1, 1, RW)
        sent += 1
    assert len(guest.device._refusals) <= 128
    while got < sent:
        got += len(guest.got())
        guest.give(20)
    guest.rig.until(lambda: not guest.device._refusals)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": 2},
        {"kind": 77},
        {"cids": (CID, 3)},
        {"operation": RESPONSE},
        {"operation": 99},
        {"operation": SHUTDOWN},
    ],
)
def test_what_is_refused(guest: Guest, changes: dict[str, object]) -> None:
    settings = {"operation": RW, **changes}
    guest.send(1000, 80, **settings)  # type: ignore[arg-type]
    packet = guest.one(RST)
    assert packet.kind == changes.get("kind", 1)


def test_resets_are_not_answered_nor_strangers(guest: Guest) -> None:
    guest.send(1000, 80, RST)
    guest.send(1000, 80, RW, cids=(99, HOST_CID))
    assert guest.got() == []


@pytest.mark.parametrize("operation", [REQUEST, RESPONSE, 0, 99])
def test_nonsense_ends_the_connection(guest: Guest, operation: int) -> None:
    peer = guest.connect_out()
    guest.send(1000, 80, operation)
    guest.one(RST)
    assert peer.recv(1) == b""


def test_wrong_lengths_are_the_guests_fault(guest: Guest) -> None:
    with pytest.raises(GuestFault, match="has fewer"):
        guest.send(1000, 80, RW, b"short", size=6)
    guest.rig.restart()
    with pytest.raises(GuestFault, match="43 bytes"):
        guest.rig.add(TRANSMIT, bytes(43))
    guest.rig.restart()
    guest.rig.add(RECEIVE, room=(HEADER.size,))
    with pytest.raises(GuestFault, match="44 bytes"):
        guest.send(1000, 80, RW)


def test_reset_ends_everything(guest: Guest) -> None:
    peer = guest.connect_out()
    waiting = guest.host_connects(b"CONN")
    guest.rig.settle()
    guest.rig.restart()
    assert peer.recv(1) == b""
    assert waiting.recv(1) == b""
    guest.give(4)
    guest.connect_out().close()


def test_a_restored_guest_hears_of_it(guest: Guest) -> None:
    peer = guest.connect_out()
    guest.rig.add(2, room=(8,))
    guest.rig.call(guest.device.announce_reset)
    assert guest.rig.taken_data(2, count=1) == [bytes(4)]
    assert peer.recv(1) == b""
    guest.host_connects()
    guest.one(REQUEST)
