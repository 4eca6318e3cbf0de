"""Drivers gone mad, at every device through its transport: descriptors, rings, registers and requests made up at random.

The oracle: a device goes on, or asks for a reset (`GuestFault`); nothing else is raised. It writes into buffers that a
chain gave it, and nowhere else in guest memory; what it says it used was given, and held as much. After a reset it works.

NAGAYA_FUZZ_OPERATIONS is for all devices together (40000); NAGAYA_FUZZ_SEED repeats a run.
"""

from __future__ import annotations

import mmap
import os
import random
import socket
import struct
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from nagaya.kernel import unix
from nagaya.virtio import blk, mmio
from nagaya.virtio.balloon import Balloon
from nagaya.virtio.blk import Blk
from nagaya.virtio.console import Console, Port
from nagaya.virtio.device import RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1, Device
from nagaya.virtio.fs import FileSystem
from nagaya.virtio.net import Net
from nagaya.virtio.net_link import Datagrams, Stream
from nagaya.virtio.queue import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE
from nagaya.virtio.rng import Rng
from nagaya.virtio.vsock import Vsock
from tests.unit.test_virtio_fs import Daemon
from tests.virtio_driver import BUFFERS_GPA, MEMORY_BYTES, RING_STEP, RINGS_GPA, Driver

OPERATIONS = int(os.environ.get("NAGAYA_FUZZ_OPERATIONS", "40000"))
SEED = int(os.environ.get("NAGAYA_FUZZ_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
TABLES_GPA = 0x60000
"""Indirect tables, from here to the buffers. Buffers go to the end of memory: what is too long leaves it."""
FINE = mmio.ACKNOWLEDGE | mmio.DRIVER | mmio.FEATURES_OK | mmio.DRIVER_OK
SIZES = (1, 4, 8, 16, 44, 512, 513, 1536, 4096)
Request = tuple[list[bytes], list[int]]


class Subject:
    """A device, and what is around it. This one: random numbers."""

    checked = True
    """Whether all that it may touch of guest memory are its buffers."""
    alignment = 1
    """Of its buffers."""

    def __init__(self, dice: random.Random, directory: Path) -> None:
        self.dice, self.directory = dice, directory
        self.sockets: list[socket.socket] = []
        self.device = self.make()

    def make(self) -> Device:
        return Rng()

    def request(self, queue: int) -> Request:
        """What a sane driver might ask."""
        return [], [self.dice.choice(SIZES)]

    def proof(self) -> tuple[int, Request] | None:
        """A queue, and what gets an answer on it at once."""
        return 0, ([], [16])

    def outside(self) -> None:
        """The other end does something: here, it reads and writes."""
        for held in self.sockets:
            self.drain(held)
            if self.dice.random() < 0.5:
                try:
                    held.send(self.dice.randbytes(self.dice.choice((1, 60, 1514, 5000))))
                except OSError:
                    pass

    def drain(self, held: socket.socket) -> None:
        try:
            while held.recv(1 << 16):
                pass
        except OSError:
            pass

    def look(self) -> None:
        """Assert what must be true of the host's side."""

    def pair(self, kind: int = socket.SOCK_STREAM) -> int:
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        for held in (ours, theirs):
            held.setblocking(False)
        self.sockets.append(theirs)
        return ours.detach()

    def close(self) -> None:
        for held in self.sockets:
            held.close()


class DiskSubject(Subject):
    SECTORS = 256
    read_only = False

    def make(self) -> Device:
        self.path = self.directory / "disk"
        self.content = self.dice.randbytes(self.SECTORS * 512)
        self.path.write_bytes(self.content)
        return Blk("blk0", str(self.path), read_only=self.read_only, queues=1 if self.read_only else 3)

    def request(self, queue: int) -> Request:
        dice = self.dice
        kind = dice.choice((0, 0, 0, 1, 1, 1, 4, 8, 11, 13, dice.getrandbits(32)))
        sector = dice.choice((0, 1, self.SECTORS - 1, self.SECTORS, dice.randrange(self.SECTORS), dice.getrandbits(64)))
        head = struct.pack("<IIQ", kind, 0, sector)
        if kind == blk.T_OUT:
            return [head, dice.randbytes(dice.choice((512, 512, 1024, 511)))], [1]
        if kind in (blk.T_DISCARD, blk.T_WRITE_ZEROES):
            ranges = [
                struct.pack(
                    "<QII",
                    dice.choice((0, dice.randrange(self.SECTORS))),
                    dice.choice((0, 1, 8, 1 << 31)),
                    dice.randrange(3),
                )
                for _ in range(dice.choice((1, 1, 2, 40)))
            ]
            return [head, b"".join(ranges)], [1]
        if kind == blk.T_FLUSH:
            return [head], [1]
        return [head], [dice.choice((512, 1024, 20, 511)), 1]

    def proof(self) -> tuple[int, Request] | None:
        return 0, ([struct.pack("<IIQ", blk.T_IN, 0, 3)], [512, 1])

    def look(self) -> None:
        assert self.path.stat().st_size == self.SECTORS * 512


class ReadOnlySubject(DiskSubject):
    read_only = True

    def look(self) -> None:
        assert self.path.read_bytes() == self.content


class ConsoleSubject(Subject):
    def make(self) -> Device:
        first, second = self.pair(), self.pair()
        ports = [
            Port("console", console=True, input_fd=first, output_fd=first),
            Port("agent", input_fd=second, output_fd=second),
        ]
        return Console("console0", ports, columns=80, rows=25)

    def request(self, queue: int) -> Request:
        dice = self.dice
        if queue == 3:
            return [struct.pack("<IHH", dice.choice((0, 0, 1, 1, 2)), dice.randrange(9), dice.choice((0, 1)))], []
        return ([dice.randbytes(dice.choice(SIZES))], []) if queue % 2 else ([], [dice.choice(SIZES)])

    def proof(self) -> tuple[int, Request] | None:
        return 1, ([b"hello"], [])


class StreamSubject(Subject):
    def make(self) -> Device:
        return Net("net0", Stream(self.pair()), mac=bytes(6))

    def request(self, queue: int) -> Request:
        dice = self.dice
        if queue:
            header = bytes(12) if dice.random() < 0.7 else dice.randbytes(12)
            return [header, dice.randbytes(dice.choice((1, 14, 60, 1514, 9000)))], []
        return [], [dice.choice((12, 44, 1526, 4096, 65562))]

    def outside(self) -> None:
        for held in self.sockets:
            self.drain(held)
            frame = self.dice.randbytes(self.dice.choice((14, 60, 1514, 30000)))
            try:
                held.send(len(frame).to_bytes(4, "big") + frame)
            except OSError:
                pass

    def proof(self) -> tuple[int, Request] | None:
        return 1, ([bytes(12), bytes(60)], [])


class DatagramSubject(StreamSubject):
    def make(self) -> Device:
        return Net("net0", Datagrams(self.pair(socket.SOCK_SEQPACKET)), mac=bytes(6), mtu=9000)

    outside = Subject.outside


class VsockSubject(Subject):
    def make(self) -> Device:
        listener = unix.listen(str(self.directory), "vsock")
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(self.directory / "vsock_1"))
        self.server.listen()
        self.server.setblocking(False)
        return Vsock("vsock0", guest_cid=3, listener_fd=listener, directory=str(self.directory), socket_name="vsock")

    def request(self, queue: int) -> Request:
        dice = self.dice
        if queue != 1:
            return [], [dice.choice((44, 45, 512, 4096))]
        data = dice.randbytes(dice.choice((0, 0, 1, 100, 4000)))
        size = len(data) if dice.random() < 0.95 else dice.getrandbits(32)
        ports = dice.choice(((1, 1), (1, 1), (1, 1), (2, 1), (4, (1 << 30) + dice.randrange(8)), (5, 5)))
        operation = dice.choice((0, 1, 1, 1, 2, 2, 3, 4, 5, 5, 5, 5, 5, 6, 7, 8))
        credit = dice.choice(((1 << 18, 0), (100, 50), (0, 0), (0xFFFF_FFFF, 0xFFFF_FFFF)))
        header = struct.pack("<QQIIIHHIII", 3, 2, *ports, size, 1, operation, dice.randrange(4), *credit)
        return [header + data], []

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
            self.sockets.append(made)
            try:
                made.connect(str(self.directory / "vsock"))
                made.send(self.dice.choice((b"CONNECT 4\n", b"CONNECT 4\nmore", b"CONN", b"nonsense\n")))
            except OSError:
                pass
        super().outside()
        if self.sockets and self.dice.random() < 0.3:
            self.sockets.pop(self.dice.randrange(len(self.sockets))).close()

    def proof(self) -> tuple[int, Request] | None:
        return 1, ([struct.pack("<QQIIIHHIII", 3, 2, 9, 9, 0, 1, 3, 0, 0, 0)], [])

    def close(self) -> None:
        super().close()
        self.server.close()


class BalloonSubject(Subject):
    alignment = 4096
    checked = False  # it empties pages that the driver names in words

    def make(self) -> Device:
        self.balloon = Balloon("balloon0")
        return self.balloon

    def request(self, queue: int) -> Request:
        dice = self.dice
        if queue == 2:
            return [b"".join(struct.pack("<HQ", dice.randrange(12), dice.getrandbits(64)) for _ in range(5))], []
        if queue > 2:
            return [], [dice.choice((4096, 8192, 100))]
        first = BUFFERS_GPA >> 12
        return [struct.pack("<8I", *(dice.randrange(first, (MEMORY_BYTES >> 12) + 8) for _ in range(8)))], []

    def outside(self) -> None:
        self.balloon.set_target(self.dice.randrange(1 << 20))
        self.balloon.request_statistics()

    def proof(self) -> tuple[int, Request] | None:
        return 0, ([struct.pack("<I", (MEMORY_BYTES >> 12) - 1)], [])


class FileSystemSubject(Subject):
    """Its requests are the daemon's; ours are the rings that are handed over, and the resets."""

    def make(self) -> Device:
        self.daemon = Daemon()
        self.daemon.front.greet()
        return FileSystem("fs0", self.daemon.front, tag="shared")

    def proof(self) -> tuple[int, Request] | None:
        return None

    def outside(self) -> None:
        for _, _, fds in self.daemon.requests:
            for fd in fds:
                os.close(fd)
        self.daemon.requests.clear()

    def close(self) -> None:
        self.daemon.thread.join(5)
        self.daemon.socket.close()
        self.outside()


class MadDriver(Driver):
    """A driver with a memory of what it gave away."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject.device)
        self.subject, self.dice = subject, subject.dice
        self.queues = range(len(subject.device.queue_sizes))
        self.operations = 0
        self.view = self.memory.regions[0].view
        self.canaries = self.dice.randbytes(MEMORY_BYTES)
        self.shadow = bytearray(self.canaries)
        """What memory holds, as far as the driver knows."""
        self.given: set[tuple[int, int]] = set()
        self.most: dict[tuple[int, int], int] = {}
        """By queue and head: how many bytes a chain had room for."""
        self.seen = [0] * len(self.queues)
        self.wild = False
        self.misplaced = self.taken = 0
        """Starts with hostile rings, and how many of them the transport took."""

    def poke(self, gpa: int, data: bytes) -> None:
        self.view[gpa : gpa + len(data)] = data
        self.shadow[gpa : gpa + len(data)] = data

    # -- what the standard says of it

    def follow(self, queue: int, head: int) -> list[tuple[int, int]]:
        """A chain's writable buffers after section 2.7.5; none when any part of it may not be."""
        table, entries, number = RINGS_GPA + queue * RING_STEP, self.size, head
        inside, count, total = False, 0, 0
        found: list[tuple[int, int]] = []
        while True:
            if number >= entries or table + 16 * entries > MEMORY_BYTES:
                return []
            gpa, size, flags, following = struct.unpack_from("<QIHH", self.view, table + 16 * number)
            if flags & DESC_F_INDIRECT:
                if inside or not self.features & RING_INDIRECT_DESC or flags & DESC_F_NEXT or not size or size % 16:
                    return []
                table, entries, number, inside = gpa, size // 16, 0, True
                continue
            count, total = count + 1, total + size
            writable = flags & DESC_F_WRITE
            if count > self.size or not size or gpa + size > MEMORY_BYTES or (found and not writable):
                return []
            if writable:
                found.append((gpa, gpa + size))
            if not flags & DESC_F_NEXT:
                return found if total < 1 << 32 else []
            number = following

    def learn(self) -> None:
        """Before the device has the processor: what the driver has given it by now."""
        if self.wild:
            return
        for queue in self.queues:
            base = RINGS_GPA + queue * RING_STEP
            (end,) = struct.unpack_from("<H", self.view, base + 0x2002)
            for back in range(1, min((end - self.used_index(queue)) & 0xFFFF, self.size) + 1):
                (head,) = struct.unpack_from("<H", self.view, base + 0x2004 + 2 * ((end - back) % self.size))
                buffers = self.follow(queue, head)
                room = sum(stop - start for start, stop in buffers)
                self.most[queue, head] = max(room, self.most.get((queue, head), 0))
                self.given.update(buffers)

    def check(self) -> None:
        """After it: only that has changed, and what came back was given."""
        self.subject.look()
        if self.wild:
            return
        now = bytes(self.view)
        for start, stop in self.given:
            self.shadow[start:stop] = now[start:stop]
        for queue in self.queues:
            used = RINGS_GPA + queue * RING_STEP + 0x3000
            stop = used + 6 + 8 * self.size
            self.shadow[used:stop] = now[used:stop]
        if self.shadow != now:
            first = next(gpa for gpa in range(MEMORY_BYTES) if self.shadow[gpa] != now[gpa])
            raise AssertionError(f"the device wrote to {first:#x}, which it was not given")

    def collect(self) -> None:
        if self.wild:
            return
        for queue in self.queues:
            end = self.used_index(queue)
            new = (end - self.seen[queue]) & 0xFFFF
            assert new <= 0x8000, "the used index went back"
            for back in range(1, min(new, self.size) + 1):
                head, written = self.used_element(queue, (end - back) % self.size)
                assert (queue, head) in self.most, f"queue {queue}: {head} was never given"
                assert written <= self.most[queue, head], f"queue {queue}: {written} bytes in {self.most[queue, head]}"
            self.seen[queue] = end

    def run(self, queue: int) -> None:
        """Let the device have its turn, by one way or another."""
        before = self.transport.faults
        self.learn()
        if self.dice.random() < 0.8:
            self.kick(queue)
        else:
            self.pump()
        self.collect()
        assert bool(self.status & mmio.DEVICE_NEEDS_RESET) >= (self.transport.faults > before)

    # -- what it does

    def begin(self) -> None:
        dice = self.dice
        features = (
            VERSION_1 | dice.choice((0, RING_EVENT_IDX)) | dice.choice((0, RING_INDIRECT_DESC, RING_INDIRECT_DESC))
        )
        features |= self.device.features & (dice.getrandbits(64) if dice.random() < 0.3 else -1)
        self.features = features
        self._next_buffer = BUFFERS_GPA
        self.given.clear()
        self.most.clear()
        self.seen = [0] * len(self.queues)
        self.wild = not self.subject.checked or dice.random() < 0.3
        # New ones each time: a stray write of an episode that is not checked would look like what belongs there.
        self.view[:] = self.canaries
        self.shadow[:] = self.canaries
        self.start(features=features, size=dice.choice((2, 4, 16, 64)))

    def episode(self) -> None:
        dice = self.dice
        self.begin()
        for _ in range(dice.choice((4, 16, 64))):
            self.operations += 1
            queue, choice = dice.choice(self.queues), dice.random()
            if choice < 0.75:
                self.give(queue)
            elif choice < 0.79:
                self.garble(queue)
            elif choice < 0.81:
                self.poke(RINGS_GPA + queue * RING_STEP + 0x2002, struct.pack("<H", self.index(queue)))
            elif choice < 0.86:
                self.poke(RINGS_GPA + queue * RING_STEP + 0x2000, struct.pack("<H", dice.randrange(2)))
                self.poke(RINGS_GPA + queue * RING_STEP + 0x2004 + 2 * self.size, dice.randbytes(2))
            elif choice < 0.91:
                self.look_around()
            elif choice < 0.985:
                self.learn()
                self.subject.outside()
                self.pump()
                self.collect()
            elif choice < 0.993:
                self.registers()
            else:
                self.misplace()
            if dice.random() < 0.5:
                self.run(queue)
            if self.status & mmio.DEVICE_NEEDS_RESET and dice.random() < 0.3:
                break
        self.check()
        self.prove()

    def index(self, queue: int) -> int:
        """An index of the available ring that no driver has."""
        now = self._indices[queue]
        return (now + self.dice.choice((-1, 1, self.size, self.size + 1, 0x7FFF, self.dice.getrandbits(16)))) & 0xFFFF

    def give(self, queue: int) -> None:
        """A request, well-formed or nearly."""
        dice = self.dice
        readable, writable = self.subject.request(queue)
        if dice.random() < 0.05:
            readable, writable = readable[1:], writable[: dice.randrange(3)]
        parts = []
        for data in self.cut(readable):
            gpa = dice.randrange(BUFFERS_GPA, MEMORY_BYTES - len(data))
            self.poke(gpa, data)
            parts.append((gpa, len(data), 0))
        lowest = 0 if self.wild else BUFFERS_GPA
        step = self.subject.alignment
        parts += [(dice.randrange(lowest, MEMORY_BYTES - size, step), size, DESC_F_WRITE) for size in writable]
        if dice.random() < 0.03:
            parts.append(
                (dice.randrange(BUFFERS_GPA, MEMORY_BYTES), dice.choice((1, 16, 0, 1 << 20)), dice.choice((0, 2)))
            )
        parts = parts or [(BUFFERS_GPA, 1, DESC_F_WRITE)]
        first = dice.randrange(self.size)
        if self.features & RING_INDIRECT_DESC and dice.random() < 0.5:
            table = dice.randrange(TABLES_GPA, BUFFERS_GPA - 16 * len(parts), 16)
            self.put_indirect(queue, first, table, parts)
        else:
            parts = parts[: self.size]
            numbers = [(first + step) % self.size for step in range(len(parts))]
            for at, (gpa, size, flags) in enumerate(parts):
                last = at == len(parts) - 1
                following = 0 if last else numbers[at + 1]
                self.put_descriptor(queue, numbers[at], gpa, size, flags | (0 if last else DESC_F_NEXT), following)
        if dice.random() < 0.03:
            self.garble(queue)
        self.offer(queue, first if dice.random() < 0.99 else dice.getrandbits(16))

    def cut(self, pieces: list[bytes]) -> list[bytes]:
        """A driver may frame its words as it likes."""
        if self.dice.random() < 0.8:
            return [piece for piece in pieces if piece]
        data = b"".join(pieces)
        at = self.dice.randrange(len(data) + 1)
        return [piece for piece in (data[:at], data[at:]) if piece]

    def garble(self, queue: int) -> None:
        """One field of one descriptor, of the queue's or of a table."""
        dice = self.dice
        base = RINGS_GPA + queue * RING_STEP + 16 * dice.randrange(self.size)
        entry = list(struct.unpack_from("<QIHH", self.view, base))
        if entry[2] & DESC_F_INDIRECT and TABLES_GPA <= entry[0] < BUFFERS_GPA - 16 and dice.random() < 0.7:
            base = entry[0]
            entry = list(struct.unpack_from("<QIHH", self.view, base))
        field = dice.randrange(4)
        entry[field] = (
            lambda: dice.choice((MEMORY_BYTES - 1, MEMORY_BYTES, (1 << 64) - 8, dice.getrandbits(64), TABLES_GPA)),
            lambda: dice.choice((0, 1, 16, 24, 0xFFFF_FFFF, 0x8000_0000, dice.getrandbits(20))),
            lambda: dice.choice((0, 1, 2, 3, 4, 5, 6, 7, dice.getrandbits(16))),
            lambda: dice.choice((0, self.size - 1, self.size, dice.getrandbits(16))),
        )[field]()
        if not self.wild and field == 0:
            entry[2] &= ~DESC_F_WRITE if entry[0] < BUFFERS_GPA else 0xFFFF
        self.poke(base, struct.pack("<QIHH", *entry))

    def look_around(self) -> None:
        """Registers and configuration, read in any way, and written where that does nothing to the rings."""
        dice = self.dice
        for _ in range(3):
            offset, size = dice.randrange(mmio.SIZE_BYTES), dice.choice((1, 2, 4, 8))
            assert len(self.transport.read(offset, size)) == size
        self.transport.write(mmio.CONFIG + dice.randrange(0x100), dice.randbytes(dice.choice((1, 2, 4, 8))))
        self.write(mmio.INTERRUPT_ACK, dice.getrandbits(32))
        self.write(mmio.QUEUE_NOTIFY, dice.choice((0, 1, 7, 0xFFFF_FFFF)))

    def registers(self) -> None:
        """Anything, anywhere: also rings where none can be, on a device that is running or has just been reset."""
        dice = self.dice
        self.check()
        self.wild = True
        if dice.random() < 0.5:
            self.write(mmio.STATUS, 0)
        for _ in range(dice.choice((1, 5, 40))):
            offset = dice.choice(
                (mmio.STATUS, mmio.QUEUE_SEL, mmio.QUEUE_NUM, mmio.QUEUE_READY, *range(0, 0x100, 4), 0x71)
            )
            value = dice.choice(
                (0, 1, 2, 3, 11, 15, FINE, self.size, dice.randrange(MEMORY_BYTES), dice.getrandbits(32))
            )
            self.transport.write(offset, value.to_bytes(4, "little") if dice.random() < 0.95 else bytes(2))
            self.read(offset & ~3)
        if dice.random() < 0.5:
            self.write(mmio.STATUS, FINE)
            for queue in self.queues:
                self.kick(queue)

    def misplace(self) -> None:
        """A proper start, but with rings that lie one upon the other, over buffers, across the end or outside of memory."""
        dice = self.dice
        self.check()
        self.wild = True
        assert self.accept(self.features)
        for queue in self.queues:
            if dice.random() < 0.95:
                size = dice.choice((0, 3, 4096, 1 << 15, 1 << 31)) if dice.random() < 0.03 else self.size
                descriptors, available, used = (self.somewhere() for _ in range(3))
                self.set_queue(queue, size=size, descriptors=descriptors, available=available, used=used)
                if available < MEMORY_BYTES - 4:
                    self.poke(available, struct.pack("<HH", dice.randrange(2), dice.choice((0, 1, 1, 2, self.size))))
        activate = self.device.activate
        with patch.object(self.device, "activate", side_effect=activate) as taken:
            self.write(mmio.STATUS, FINE)
        self.misplaced += 1
        self.taken += taken.called
        for queue in self.queues:
            self.kick(queue)

    def somewhere(self) -> int:
        """An address for a ring: mostly one that passes."""
        dice = self.dice
        if dice.random() < 0.05:
            return dice.choice(
                (MEMORY_BYTES - 16, MEMORY_BYTES - 4, MEMORY_BYTES, 1 << 32, (1 << 64) - 16, 1, 6, dice.getrandbits(64))
            )
        return dice.choice(
            (0, RINGS_GPA, RINGS_GPA + 0x2000, BUFFERS_GPA, dice.randrange(0, MEMORY_BYTES - 0x3000, 16))
        )

    def prove(self) -> None:
        """However it ended: after a reset everything is well."""
        self.wild = True
        self.subject.outside()
        self.write(mmio.STATUS, 0)
        assert self.status == 0
        for _ in range(2):
            self.pump()
        faults = self.transport.faults
        self._next_buffer = BUFFERS_GPA
        self.start(features=self.offered(), size=64)
        asked = self.subject.proof()
        if asked is not None:
            queue, request = asked
            self.send(*request, queue=queue)
        assert self.status == FINE, self.transport.fault
        assert self.transport.faults == faults


SUBJECTS = [
    Subject, DiskSubject, ReadOnlySubject, ConsoleSubject, StreamSubject, DatagramSubject, VsockSubject, BalloonSubject,
    FileSystemSubject,
]  # fmt: skip


@pytest.mark.timeout(0)
@pytest.mark.parametrize("make", SUBJECTS)
def test_devices(make: type[Subject], tmp_path: Path) -> None:
    dice = random.Random(SEED)
    print(f"NAGAYA_FUZZ_SEED={SEED}")
    subject = make(dice, tmp_path)
    driver = MadDriver(subject)
    wanted = OPERATIONS // len(SUBJECTS)
    began = time.monotonic()
    try:
        while driver.operations < wanted:
            driver.episode()
    finally:
        driver.view.release()
        driver.close()
        subject.close()
    took = time.monotonic() - began
    print(f"{driver.operations} operations in {took:.1f} s: {driver.transport.counters()}")
    print(f"{driver.misplaced} starts with hostile rings, {driver.taken} of them taken")
    assert driver.misplaced > driver.taken > 0
    assert driver.transport.faults < driver.operations / 7, "hardly any operation reached the device"
    assert driver.transport.faults or make is FileSystemSubject  # its daemon is the one who reads the rings


@pytest.mark.timeout(0)
@pytest.mark.parametrize("make", [Subject, DiskSubject, DatagramSubject, VsockSubject, ConsoleSubject])
def test_a_driver_that_writes_while_the_device_reads(make: type[Subject], tmp_path: Path) -> None:
    """A process with the guest's memory, as another CPU is: what was checked is not there any more when it is used."""
    dice = random.Random(SEED)
    print(f"NAGAYA_FUZZ_SEED={SEED}")
    subject = make(dice, tmp_path)
    driver = MadDriver(subject)
    rounds = max(50, OPERATIONS // 100)
    scribbler = os.fork()
    if scribbler == 0:
        _scribble(driver.memory.fd, len(driver.queues), random.Random(SEED + 1))
    try:
        for _ in range(rounds):
            driver.begin()
            driver.wild = True
            for queue in driver.queues:
                for _ in range(4):
                    driver.give(queue)
                driver.kick(queue)
            subject.outside()
            driver.pump()
            subject.look()
    finally:
        os.kill(scribbler, 9)
        os.waitpid(scribbler, 0)
    try:
        driver.prove()
    finally:
        driver.view.release()
        driver.close()
        subject.close()
    print(driver.transport.counters())


def _scribble(fd: int, queues: int, dice: random.Random) -> None:
    """Write over the rings until killed."""
    try:
        parent = os.getppid()
        memory = memoryview(mmap.mmap(fd, MEMORY_BYTES))
        lengths, flags, indices = memory.cast("I"), memory.cast("H"), memory.cast("H")
        while os.getppid() == parent:  # not for ever, should the test be killed
            for _ in range(100):
                for _ in range(dice.randrange(3000)):
                    pass  # not so much that no chain is ever whole
                base = RINGS_GPA + dice.randrange(queues) * RING_STEP
                descriptor = base + 16 * dice.randrange(64)
                lengths[descriptor // 4 + 2] = dice.choice((0, 1, 16, 512, 513, 1 << 31))
                flags[descriptor // 2 + 6] = dice.randrange(8)
                indices[base // 2 + 0x1001] = (indices[base // 2 + 0x1801] + dice.randrange(4)) & 0xFFFF
    finally:
        os._exit(0)
