"""virtio-net over sockets: frames one by one, none lost while either side is slow, none larger than the guest allows."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import pytest

from nagaya.errors import GuestFault
from nagaya.virtio.net import F_MAC, F_MRG_RXBUF, F_MTU, F_STATUS, Net
from nagaya.virtio.net_link import HEADER_BYTES, MOST_FRAME_BYTES, Datagrams, Link, Stream
from tests.virtio_rig import Rig

RECEIVE, TRANSMIT = 0, 1
MAC = bytes.fromhex("024e61676179")
HEADER = bytes(HEADER_BYTES)


class Wire:
    """A card whose cable ends in a socket of the test's."""

    def __init__(self, kind: str, *, features: int = F_MAC | F_STATUS | F_MRG_RXBUF, ring: int = 256) -> None:
        stream = kind == "stream"
        ours, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM if stream else socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self.peer.settimeout(3)
        self.stream = stream
        link: Link = Stream(ours.detach()) if stream else Datagrams(ours.detach())
        self.net = Net("net0", link, mac=MAC, mtu=1500)
        self.rig = Rig(self.net, features=features, sizes={RECEIVE: ring}).start()

    def put(self, frame: bytes) -> None:
        self.peer.sendall((len(frame).to_bytes(4, "big") if self.stream else b"") + frame)

    def get(self) -> bytes:
        if not self.stream:
            return self.peer.recv(1 << 17)
        size = int.from_bytes(self._exactly(4), "big")
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.peer.recv(size - len(data))
            assert part
            data += part
        return data

    def received(self, buffers: int = 1) -> bytes:
        """The guest's next frame, which must take this many buffers; without its header."""
        first, *rest = self.rig.taken_data(RECEIVE, count=buffers)
        assert first[:10] == bytes(10)
        assert struct.unpack("<H", first[10:12])[0] == buffers
        return b"".join([first[HEADER_BYTES:], *rest])

    def close(self) -> None:
        assert self.rig.faults == []
        self.rig.close()
        self.peer.close()


@pytest.fixture(params=["stream", "datagrams"])
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    made = Wire(request.param)
    yield made
    made.close()


def test_configuration(wire: Wire) -> None:
    assert wire.net.read_config(0, 64) == MAC + struct.pack("<HHH", 1, 1, 1500)
    assert wire.net.features == F_MAC | F_STATUS | F_MRG_RXBUF | F_MTU


def test_frames_both_ways(wire: Wire) -> None:
    frames = [os.urandom(60 + 97 * n) for n in range(12)]
    for frame in frames:
        wire.rig.add(TRANSMIT, HEADER + frame[:20], frame[20:])
        wire.rig.add(RECEIVE, room=(2000,))
    assert [wire.get() for _ in frames] == frames
    for frame in frames:
        wire.put(frame)
    assert [wire.received() for _ in frames] == frames
    counters = wire.net.counters()
    assert (counters["sent_frames"], counters["received_frames"]) == (12, 12)
    assert counters["sent_bytes"] == counters["received_bytes"] == sum(map(len, frames))


def test_buffers_cut_anywhere(wire: Wire) -> None:
    frame = os.urandom(300)
    wire.rig.add(TRANSMIT, HEADER[:5], HEADER[5:], frame[:1], frame[1:])
    assert wire.get() == frame
    wire.rig.add(RECEIVE, room=(1, 9, 1, 1, 3, 400))
    wire.put(frame)
    assert wire.received() == frame


def test_a_frame_over_several_buffers(wire: Wire) -> None:
    frame = os.urandom(1514)
    for _ in range(16):
        wire.rig.add(RECEIVE, room=(100,))
    wire.put(frame)
    assert wire.received(16) == frame  # 1526 bytes


def test_a_frame_waits_for_the_rest_of_its_buffers(wire: Wire) -> None:
    frame = os.urandom(500)
    wire.rig.add(RECEIVE, room=(200,))
    wire.put(frame)
    wire.rig.settle()
    assert wire.rig.taken(RECEIVE) == []
    wire.rig.add(RECEIVE, room=(200,))
    wire.rig.settle()
    assert wire.rig.taken(RECEIVE) == []
    wire.rig.add(RECEIVE, room=(200,))
    assert wire.received(3) == frame
    wire.rig.add(RECEIVE, room=(200,))
    wire.put(b"next one in order")
    assert wire.received() == b"next one in order"


def test_nothing_is_read_without_buffers(wire: Wire) -> None:
    for number in range(40):
        wire.put(bytes([number]) * 100)
    wire.rig.settle()
    for number in range(40):
        wire.rig.add(RECEIVE, room=(200,))
        assert wire.received() == bytes([number]) * 100


def test_frames_wait_for_a_slow_peer(wire: Wire) -> None:
    frames = [os.urandom(30_000) for _ in range(40)]
    for frame in frames:
        wire.rig.add(TRANSMIT, HEADER + frame)
    assert len(wire.rig.taken(TRANSMIT)) < 40
    assert [wire.get() for _ in frames] == frames
    wire.rig.until(lambda: wire.net.counters()["sent_frames"] == 40)


@pytest.mark.parametrize("kind", ["stream", "datagrams"])
def test_without_mergeable_buffers_a_frame_has_one(kind: str) -> None:
    wire = Wire(kind, features=F_MAC)
    for _ in range(3):
        wire.rig.add(RECEIVE, room=(1530,))
    wire.put(bytes(2000))
    wire.put(b"fits")
    assert wire.received() == b"fits"
    assert wire.net.counters()["received_dropped"] == 1
    wire.close()


def test_a_frame_for_which_the_whole_ring_is_too_small() -> None:
    for kind in ("stream", "datagrams"):
        wire = Wire(kind, ring=4)
        for _ in range(4):
            wire.rig.add(RECEIVE, room=(100,))
        wire.put(bytes(1000))
        wire.put(b"small")
        assert wire.received() == b"small"
        assert wire.net.counters()["received_dropped"] == 1
        wire.close()


def test_odd_sizes_are_dropped(wire: Wire) -> None:
    wire.rig.add(TRANSMIT, HEADER)
    wire.rig.add(TRANSMIT, HEADER, bytes(MOST_FRAME_BYTES + 1))
    wire.rig.add(TRANSMIT, HEADER, bytes(MOST_FRAME_BYTES))
    assert len(wire.get()) == MOST_FRAME_BYTES
    assert len(wire.rig.taken(TRANSMIT, count=3)) == 3
    assert wire.net.counters()["sent_dropped"] == 2


def test_more_than_a_turns_worth(wire: Wire) -> None:
    for _ in range(200):
        wire.rig.add(TRANSMIT, HEADER + b"frame", kick=False)
    wire.rig.kick(TRANSMIT)
    assert [wire.get() for _ in range(200)] == [b"frame"] * 200


def test_a_peer_that_goes_unplugs_the_cable(wire: Wire) -> None:
    wire.rig.add(RECEIVE, room=(100,))
    wire.peer.close()
    wire.rig.until(lambda: wire.rig.config_changes == 1)
    assert wire.net.read_config(6, 2) == b"\0\0"
    for _ in range(200):
        wire.rig.add(TRANSMIT, HEADER + b"x", kick=False)
    wire.rig.kick(TRANSMIT)
    assert len(wire.rig.taken(TRANSMIT, count=200)) == 200
    assert wire.net.counters()["sent_dropped"] == 200


def test_the_cable_can_be_pulled(wire: Wire) -> None:
    wire.rig.call(lambda: wire.net.plug(False))
    assert wire.net.read_config(6, 2) == b"\0\0"
    wire.rig.add(RECEIVE, room=(100,))
    wire.rig.add(TRANSMIT, HEADER + b"lost")
    wire.put(b"kept")
    wire.rig.settle()
    assert wire.rig.taken(RECEIVE) == []
    wire.rig.call(lambda: wire.net.plug(True))
    assert wire.received() == b"kept"
    assert wire.rig.config_changes == 2


def test_a_reset_does_not_cut_a_frame_of_the_stream() -> None:
    wire = Wire("stream")
    frames = [os.urandom(60_000) for _ in range(10)]
    for frame in frames:
        wire.rig.add(TRANSMIT, HEADER + frame)
    sent = wire.net.counters()["sent_frames"]
    assert 0 < sent < 10
    wire.rig.restart()
    wire.rig.add(TRANSMIT, HEADER + b"after the reset")
    assert [wire.get() for _ in range(sent)] == frames[:sent]
    assert wire.get() == b"after the reset"
    wire.close()


def test_a_stream_of_nonsense_ends_the_link() -> None:
    wire = Wire("stream")
    wire.rig.add(RECEIVE, room=(100,))
    wire.peer.sendall(b"\xff\xff\xff\xff")
    wire.rig.until(lambda: "4294967295" in wire.net.link_error)
    wire.close()


def test_a_frame_in_pieces() -> None:
    wire = Wire("stream")
    wire.rig.add(RECEIVE, room=(100,))
    for byte in (5).to_bytes(4, "big") + b"hello":
        wire.rig.settle()
        wire.peer.sendall(bytes([byte]))
    assert wire.received() == b"hello"
    wire.close()


def test_short_headers_and_buffers_are_the_guests_fault(wire: Wire) -> None:
    with pytest.raises(GuestFault, match="11 bytes"):
        wire.rig.add(TRANSMIT, HEADER[:11])
    wire.rig.restart()
    wire.put(b"frame")
    wire.rig.settle()
    with pytest.raises(GuestFault, match="12 bytes"):
        wire.rig.add(RECEIVE, room=(12,))


@pytest.mark.parametrize(("link", "kind"), [(Datagrams, socket.SOCK_SEQPACKET), (Stream, socket.SOCK_STREAM)])
def test_a_link_never_blocks(link: type[Datagrams | Stream], kind: int) -> None:
    """A socket that does would stop every device of the machine at the first look for a frame."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    assert os.get_blocking(theirs.fileno())
    made = link(theirs.detach())
    try:
        assert not os.get_blocking(made.fd)
    finally:
        os.close(made.fd)
        ours.close()
