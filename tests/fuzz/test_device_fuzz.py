"""What the guest says to each device, and what the host's side does meanwhile, made up at random.

The rings are well-formed here; their own fuzzing is elsewhere. The oracle: a device raises `GuestFault` or nothing,
and after a reset it works. NAGAYA_FUZZ_SECONDS makes each test longer (3 s); NAGAYA_FUZZ_SEED repeats a run.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nagaya.errors import GuestFault
from nagaya.kernel import unix
from nagaya.virtio.balloon import Balloon
from nagaya.virtio.console import Console, Port
from nagaya.virtio.device import Device
from nagaya.virtio.net import Net
from nagaya.virtio.net_link import Datagrams, Stream
from nagaya.virtio.vsock import Vsock
from tests.virtio_rig import Rig

SECONDS = float(os.environ.get("NAGAYA_FUZZ_SECONDS", "3"))
SEED = int(os.environ.get("NAGAYA_FUZZ_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
STEPS = 200
"""Operations between two looks at the back ends."""


class Play:
    """A device, its driver gone mad, and somebody at the other end of its wires."""

    features: int | None = None
    spoken: tuple[int, ...] = (1,)
    """The queues on which a sane driver has something to say; on the others it only lends room."""

    def __init__(self, dice: random.Random, directory: Path) -> None:
        self.dice = dice
        self.directory = directory
        self.sockets: list[socket.socket] = []
        self.device = self.make()
        self.rig = Rig(self.device, features=self.features, memory_bytes=32 << 20)
        self.operations = self.faults = 0

    def make(self) -> Device:
        raise AssertionError("every play makes its own")

    def message(self, queue: int) -> bytes:
        """Something that the driver might say on a queue."""
        return self.dice.randbytes(self.dice.choice((0, 1, 8, 44, 100)))

    def outside(self) -> None:
        """The other end does something."""
        for held in self.sockets:
            try:
                if self.dice.random() < 0.5:
                    held.send(self.dice.randbytes(self.dice.choice((1, 4, 100, 5000))))
                if self.dice.random() < 0.5:
                    held.recv(65536)
            except OSError:
                pass

    def pair(self, kind: int) -> int:
        """Our end, for the device; the other one stays here."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        for held in (ours, theirs):
            held.setblocking(False)
        self.sockets.append(theirs)
        return ours.detach()

    def step(self) -> None:
        dice = self.dice
        queue = dice.randrange(len(self.device.queue_sizes))
        choice = dice.random()
        if self.rig.rings[queue].is_full:
            self.rig.kick(queue)
        elif choice < 0.85 and (queue in self.spoken) == (dice.random() < 0.98):
            message = self.message(queue)
            cut = dice.randrange(len(message) + 1)
            parts = [part for part in (message[:cut], message[cut:]) if part] or [b"x"]
            self.rig.add(queue, *parts, kick=dice.random() < 0.7)
        elif choice < 0.85:
            room = tuple(dice.choice((1, 8, 12, 44, 100, 1600, 5000)) for _ in range(dice.choice((2, 3, 4))))
            self.rig.add(queue, room=room, kick=dice.random() < 0.7)
        elif choice < 0.95:
            self.rig.kick(queue)
        elif choice < 0.99:
            self.device.read_config(dice.randrange(100), dice.choice((1, 2, 4, 8)))
            self.device.write_config(dice.randrange(16), dice.randbytes(dice.choice((1, 2, 4, 8))))
        else:
            self.rig.restart()
        self.operations += 1

    def steps(self) -> None:
        for _ in range(STEPS):
            try:
                self.step()
            except GuestFault:
                self.faults += 1
                self.restart()

    def restart(self) -> None:
        while True:
            try:
                self.rig.restart()
                return
            except GuestFault:
                self.faults += 1

    def run(self, seconds: float) -> None:
        self.rig.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.rig.call(self.steps)
            self.outside()
            if self.rig.faults:
                self.faults += len(self.rig.faults)
                self.rig.faults.clear()
                self.rig.call(self.restart)
        self.rig.close()
        for held in self.sockets:
            held.close()


class ConsolePlay(Play):
    spoken = (1, 3, 5)

    def make(self) -> Device:
        first, second = self.pair(socket.SOCK_STREAM), self.pair(socket.SOCK_STREAM)
        self.console = Console(
            "console0",
            [Port("console", console=True, input_fd=first, output_fd=first), Port("agent", input_fd=second, output_fd=second)],
            columns=80,
            rows=25,
        )  # fmt: skip
        return self.console

    def message(self, queue: int) -> bytes:
        if queue == 3:
            return struct.pack(
                "<IHH", self.dice.choice((0, 0, 1, 1, 2, 1 << 31)), self.dice.randrange(9), self.dice.choice((0, 1, 1))
            )
        return super().message(queue)

    def outside(self) -> None:
        super().outside()
        if self.dice.random() < 0.1:
            self.rig.call(lambda: self.console.resize(self.dice.randrange(200), self.dice.randrange(200)))
        if self.dice.random() < 0.1:
            number = self.dice.randrange(2)
            self.sockets.pop(number).close()
            fd = self.pair(socket.SOCK_STREAM)
            self.sockets.insert(number, self.sockets.pop())
            self.rig.call(lambda: self.console.attach(number, input_fd=fd, output_fd=fd))


class StreamPlay(Play):
    def make(self) -> Device:
        return Net("net0", Stream(self.pair(socket.SOCK_STREAM)), mac=bytes(6))

    def message(self, queue: int) -> bytes:
        return bytes(12) + self.dice.randbytes(self.dice.choice((1, 60, 1514, 9000)))

    def outside(self) -> None:
        frame = self.dice.randbytes(self.dice.choice((60, 1514, 30000)))
        for held in self.sockets:
            try:
                held.sendall(len(frame).to_bytes(4, "big") + frame)
            except BlockingIOError:  # the stream is out of step now, as after a peer with a bug
                pass
            except OSError:
                pass
            try:
                held.recv(1 << 20)
            except OSError:
                pass


class DatagramPlay(Play):
    features = 1 << 16

    def make(self) -> Device:
        return Net("net0", Datagrams(self.pair(socket.SOCK_SEQPACKET)), mac=bytes(6), mtu=9000)


class MergingPlay(DatagramPlay):
    features = None


class VsockPlay(Play):
    def make(self) -> Device:
        listener = unix.listen(str(self.directory), "vsock")
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(self.directory / "vsock_1"))
        self.server.listen()
        self.server.setblocking(False)
        return Vsock("vsock0", guest_cid=3, listener_fd=listener, directory=str(self.directory), socket_name="vsock")

    def message(self, queue: int) -> bytes:
        dice = self.dice
        data = dice.randbytes(dice.choice((0, 0, 1, 100, 4000)))
        size = len(data) if dice.random() < 0.99 else dice.choice((0, 1 << 31, len(data) + 1))
        ports = dice.choice(((1, 1), (2, 1), (3, 1), (4, (1 << 30) + dice.randrange(8)), (5, 5)))
        operation = dice.choice((0, 1, 1, 1, 2, 2, 3, 4, 5, 5, 5, 5, 5, 5, 6, 7, 8))
        credit = dice.choice(((1 << 18, 0), (100, 50), (0, 0), (0xFFFF_FFFF, 0xFFFF_FFFF)))
        return struct.pack("<QQIIIHHIII", 3, 2, *ports, size, 1, operation, dice.randrange(4), *credit) + data

    def outside(self) -> None:
        try:
            held, _ = self.server.accept()
            held.setblocking(False)
            self.sockets.append(held)
        except BlockingIOError:
            pass
        if self.dice.random() < 0.3 and len(self.sockets) < 30:
            made = socket.socket(socket.AF_UNIX)
            made.setblocking(False)
            try:
                made.connect(str(self.directory / "vsock"))
                made.send(self.dice.choice((b"CONNECT 4\n", b"CONNECT 4\nmore", b"CONN", b"nonsense\n")))
                self.sockets.append(made)
            except OSError:
                made.close()
        super().outside()
        if self.sockets and self.dice.random() < 0.3:
            self.sockets.pop(self.dice.randrange(len(self.sockets))).close()


class BalloonPlay(Play):
    spoken = (0, 1, 2)

    def make(self) -> Device:
        self.balloon = Balloon("balloon0")
        return self.balloon

    def message(self, queue: int) -> bytes:
        if queue == 2:
            return b"".join(struct.pack("<HQ", self.dice.randrange(12), self.dice.getrandbits(64)) for _ in range(5))
        pages = [self.dice.randrange((24 << 20) // 4096, ((32 << 20) + 4096) // 4096) for _ in range(8)]
        return struct.pack("<8I", *pages)

    def outside(self) -> None:
        self.rig.call(lambda: self.balloon.set_target(self.dice.randrange(32 << 20)))
        self.rig.call(self.balloon.request_statistics)


@pytest.fixture
def surprises(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BaseException]]:
    """Exceptions that the loop met and survived: each is a bug."""
    found: list[BaseException] = []
    hook: Callable[..., None] = lambda kind, error, trace: found.append(error)  # noqa: E731
    monkeypatch.setattr(sys, "excepthook", hook)
    yield found
    assert found == []


@pytest.mark.parametrize("play", [ConsolePlay, StreamPlay, DatagramPlay, MergingPlay, VsockPlay, BalloonPlay])
def test_devices(play: type[Play], tmp_path: Path, surprises: list[BaseException]) -> None:
    print(f"NAGAYA_FUZZ_SEED={SEED}")
    made = play(random.Random(SEED), tmp_path)
    made.run(SECONDS)
    print(f"{made.operations} operations, {made.faults} faults of the guest")
    assert made.operations > 1000
