"""The NBD server that QEMU copies a moving machine's disk to, against a client of a few lines (NBD, doc/proto.md)."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from nagaya.engines.qemu.mirror import MirrorServer
from nagaya.errors import NagayaError, RemoteError
from nagaya.migration import frames
from nagaya.migration.arrival import ArrivingDisk
from nagaya.migration.frames import Frame
from nagaya.migration.stream import Stream

SIZE = 4 << 20
REPLY, REQUEST_MAGIC = 0x3E889045565A9, 0x25609513
WRITE, DISCONNECT, FLUSH, TRIM, WRITE_ZEROES, READ, GO, LIST = 1, 2, 3, 4, 6, 0, 7, 3


class Client:
    """QEMU's side, and the frames that come of what it asks."""

    def __init__(self) -> None:
        self.end, theirs = socket.socketpair()
        here, there = socket.socketpair()
        self.end.settimeout(10)
        self.frames = Stream(there.fileno(), there.fileno())
        self.problem: Exception | None = None

        def serve() -> None:
            try:
                MirrorServer(theirs.fileno(), SIZE, Stream(here.fileno(), here.fileno())).serve()
            except (NagayaError, OSError) as problem:
                self.problem = problem
            finally:
                for one in (theirs, here):
                    one.close()

        self.there = there
        self.server = threading.Thread(target=serve, daemon=True)
        self.server.start()

    def take(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.end.recv(count - len(data))
            assert part, "the server has hung up"
            data += part
        return data

    def option(self, number: int, data: bytes = b"") -> tuple[int, bytes]:
        self.end.sendall(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data)
        return self.option_reply(number)

    def option_reply(self, number: int) -> tuple[int, bytes]:
        magic, option, kind, length = struct.unpack(">QIII", self.take(20))
        assert (magic, option) == (REPLY, number)
        return kind, self.take(length)

    def begin(self) -> int:
        """The disk's size, as the server has it."""
        assert self.take(18) == b"NBDMAGICIHAVEOPT" + b"\0\3"
        self.end.sendall(struct.pack(">I", 3))
        kind, info = self.option(GO, struct.pack(">IH", 0, 0))
        assert kind == 3
        assert self.option_reply(GO) == (1, b"")
        number, size, flags = struct.unpack(">HQH", info)
        assert number == 0 and flags & 1 and flags & 4 and flags & 64
        return int(size)

    def ask(self, kind: int, at: int = 0, count: int = 0, data: bytes = b"", *, magic: int = REQUEST_MAGIC) -> None:
        self.end.sendall(struct.pack(">IHHQQI", magic, 0, kind, 7, at, count) + data)

    def error(self) -> int:
        magic, error, cookie = struct.unpack(">IIQ", self.take(16))
        assert (magic, cookie) == (0x67446698, 7)
        return int(error)

    def frame(self) -> Frame:
        return self.frames.receive(patience_s=10)


@pytest.fixture
def client() -> Iterator[Client]:
    made = Client()
    yield made
    made.end.close()
    made.there.close()
    made.server.join(10)
    assert not made.server.is_alive()


def test_a_write_is_blocks_and_zeros_are_a_hole(client: Client) -> None:
    assert client.begin() == SIZE
    data = os.urandom(512)
    client.ask(WRITE, 4096, 512, data)
    assert client.error() == 0
    assert client.frame() == Frame(frames.BLOCKS, 4096, data)
    for kind in (WRITE_ZEROES, TRIM):
        client.ask(kind, 0, 65536)
        assert client.error() == 0
        hole = client.frame()
        assert (hole.type, hole.where, frames.parse_length(hole)) == (frames.HOLE, 0, 65536)
    client.ask(FLUSH)
    assert client.error() == 0
    client.ask(READ, 0, 512)
    assert client.error() == 95
    client.ask(DISCONNECT)
    client.server.join(10)
    assert client.problem is None


def test_a_large_write_is_several_frames(client: Client) -> None:
    client.begin()
    data = os.urandom(frames.DATA_BYTES + 1024)
    threading.Thread(target=client.ask, args=(WRITE, 0, len(data), data), daemon=True).start()
    first, second = client.frame(), client.frame()
    assert (first.where, second.where) == (0, frames.DATA_BYTES)
    assert first.payload + second.payload == data
    assert client.error() == 0


def test_an_option_that_it_does_not_know_is_refused(client: Client) -> None:
    assert client.take(18)
    client.end.sendall(struct.pack(">I", 3))
    assert client.option(LIST)[0] == 1 << 31 | 1
    assert client.option(8)[0] == 1 << 31 | 1
    assert client.option(2)[0] == 1
    client.server.join(10)
    assert client.problem is None


@pytest.mark.parametrize(
    "break_it",
    [
        lambda client: client.ask(WRITE, 0, 512, bytes(512), magic=1),
        lambda client: client.ask(WRITE, 0, 1 << 31),
        lambda client: client.end.shutdown(socket.SHUT_WR),
        lambda client: client.end.sendall(b"x"),
    ],
    ids=["magic", "endless", "end", "half"],
)
def test_what_makes_no_sense_ends_it(client: Client, break_it: Callable[[Client], None]) -> None:
    client.begin()
    break_it(client)
    client.end.shutdown(socket.SHUT_WR)
    client.server.join(10)
    assert isinstance(client.problem, RemoteError)


def test_the_target_has_what_was_written(client: Client, tmp_path: object) -> None:
    """Any writes, in any order: the disk at the far end is the one at the near end, and holes are holes."""
    dice = random.Random(7)
    expected = bytearray(SIZE)
    path = f"{tmp_path}/disk"
    with open(path, "wb") as file:
        file.truncate(SIZE)
    fd = os.open(path, os.O_RDWR)
    try:
        disk = ArrivingDisk(fd, SIZE)
        client.begin()
        for _ in range(100):
            at, count = dice.randrange(0, SIZE // 2, 512), dice.randrange(512, 65536, 512)
            if dice.random() < 0.7:
                data = dice.randbytes(count)
                client.ask(WRITE, at, count, data)
                expected[at : at + count] = data
            else:
                client.ask(WRITE_ZEROES, at, count)
                expected[at : at + count] = bytes(count)
            assert client.error() == 0
            assert disk.take(client.frame())
        disk.sync()
        with open(path, "rb") as file:
            assert file.read() == bytes(expected)
        with pytest.raises(RemoteError):
            disk.take(Frame(frames.BLOCKS, SIZE, bytes(512)))
        with pytest.raises(RemoteError):
            disk.take(Frame(frames.HOLE, 0, frames.LENGTH.pack(SIZE + 512)))
        assert not disk.take(Frame(frames.ROUND, 0, b""))
    finally:
        os.close(fd)
