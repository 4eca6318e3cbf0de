"""A live device without a transport: its loop, its guest's memory, and the driver's side of its rings.

The rings are those of a correct driver, with indirect descriptors; `tests/virtio_driver.py` has what hostile rings take.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from nagaya.errors import GuestFault
from nagaya.memory import GuestMemory
from nagaya.virtio.device import RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1, Activated, as_direct
from nagaya.virtio.loop import Loop
from nagaya.virtio.queue import Queue

T = TypeVar("T")
RINGS_GPA, RING_BYTES, BUFFERS_GPA = 0x10000, 0x4000, 1 << 20
AVAILABLE_OFFSET, USED_OFFSET = 0x1000, 0x2000  # behind up to 256 descriptors
F_NEXT, F_WRITE, F_INDIRECT = 1, 2, 4
DESCRIPTOR = struct.Struct("<QIHH")
PATIENCE_S = 3.0


class Buffers(NamedTuple):
    """What was lent to the device: a handle, and where the writable part is."""

    handle: int
    writable: tuple[tuple[int, int], ...]


class Ring:
    """The driver's side of one split virtqueue (virtio 1.2, section 2.7)."""

    def __init__(self, memory: GuestMemory, number: int, size: int) -> None:
        self.memory, self.size = memory, size
        self.descriptors = RINGS_GPA + number * RING_BYTES
        self.available, self.used = self.descriptors + AVAILABLE_OFFSET, self.descriptors + USED_OFFSET
        self.lent: dict[int, Buffers] = {}
        self.done: list[tuple[Buffers, int]] = []
        self.clear()

    def clear(self) -> None:
        """As after a reset of the device."""
        self.memory.write(self.descriptors, bytes(RING_BYTES))
        self.lent.clear()
        self.done.clear()
        self._free = list(range(self.size))
        self._next_available = self._next_used = 0

    def _words(self, gpa: int, count: int) -> memoryview:
        return self.memory.slice(gpa, 2 * count).cast("H")

    @property
    def is_full(self) -> bool:
        self.collect()
        return not self._free

    def lend(self, buffers: Buffers, table: int, count: int) -> None:
        """Make an indirect table of `count` descriptors available."""
        self.collect()
        head = self._free.pop()
        self.lent[head] = buffers
        self.memory.write(self.descriptors + head * DESCRIPTOR.size, DESCRIPTOR.pack(table, 16 * count, F_INDIRECT, 0))
        ring = self._words(self.available, 2 + self.size)
        ring[2 + self._next_available % self.size] = head
        self._next_available = (self._next_available + 1) & 0xFFFF
        ring[1] = self._next_available

    def collect(self) -> None:
        """Take what the device has used, and ask for an interrupt with the next."""
        index = self._words(self.used, 2)[1]
        while self._next_used != index:
            head, written = struct.unpack("<II", self.memory.read(self.used + 4 + self._next_used % self.size * 8, 8))
            self.done.append((self.lent.pop(head), written))
            self._free.append(head)
            self._next_used = (self._next_used + 1) & 0xFFFF
        self._words(self.available + 4 + 2 * self.size, 1)[0] = self._next_used


class Rig:
    """A device on a loop of its own, with a ring for each of its queues."""

    def __init__(
        self,
        device: Any,
        *,
        features: int | None = None,
        without: Sequence[int] = (),
        memory_bytes: int = 16 << 20,
        sizes: Mapping[int, int] | None = None,
    ) -> None:
        """`without` are queues that the driver leaves off; `sizes` are of rings smaller than the device's most."""
        self.device = device
        self.memory = GuestMemory.allocate(memory_bytes)
        self.loop = Loop()
        self.loop.start()
        self.faults: list[str] = []
        self.config_changes = 0
        self.interrupts = [0] * len(device.queue_sizes)
        limits = [min(size, (sizes or {}).get(number, size)) for number, size in enumerate(device.queue_sizes)]
        self.rings = [Ring(self.memory, number, size) for number, size in enumerate(limits)]
        self.queues: list[Queue | None] = []
        self._kick_fds = tuple(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in device.queue_sizes)
        self._interrupt_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._without = without
        self._features = device.features if features is None else features
        self._next_gpa = BUFFERS_GPA
        self._handle = 0

    def start(self) -> Rig:
        """The driver says DRIVER_OK."""
        self.queues = [None if number in self._without else self._queue(number) for number in range(len(self.rings))]
        features = self._features | VERSION_1 | RING_EVENT_IDX | RING_INDIRECT_DESC
        live = Activated(
            self.memory, tuple(self.queues), features, self.loop, self._config_changed, self._fault, self._kick_fds,
            self._interrupt_fd,
        )  # fmt: skip
        self.loop.call(lambda: self.device.activate(live))
        return self

    def restart(self) -> None:
        """The driver resets the device and begins anew."""
        self.loop.call(self.device.reset)
        for ring in self.rings:
            ring.clear()
        self.start()

    def close(self) -> None:
        self.loop.call(self.device.close)
        self.loop.close()
        self.queues.clear()
        self.memory.close()
        for fd in (*self._kick_fds, self._interrupt_fd):
            os.close(fd)

    def _queue(self, number: int) -> Queue:
        ring = self.rings[number]

        def interrupt() -> None:
            self.interrupts[number] += 1

        return Queue(
            self.memory,
            index=number,
            size=ring.size,
            descriptors=ring.descriptors,
            available=ring.available,
            used=ring.used,
            event_index=True,
            indirect=True,
            interrupt=interrupt,
        )

    def _config_changed(self) -> None:
        self.config_changes += 1

    def _fault(self, fault: GuestFault) -> None:
        self.faults.append(str(fault))

    def _allocate(self, size_bytes: int) -> int:
        """Memory for buffers, used again from the start when all of it has been."""
        if self._next_gpa + size_bytes > self.memory.size_bytes:
            self._next_gpa = BUFFERS_GPA
        gpa = self._next_gpa
        self._next_gpa += (size_bytes + 15) // 16 * 16
        return gpa

    def add(self, queue: int, *readable: bytes, room: Sequence[int] = (), kick: bool = True) -> int:
        """Lend the device a chain: `readable` to read, and buffers of `room` bytes to write; a handle for it."""
        pieces = []
        for data in readable:
            gpa = self._allocate(len(data))
            self.memory.write(gpa, data)
            pieces.append((gpa, len(data), 0))
        return self._add(queue, pieces + [(self._allocate(size), size, F_WRITE) for size in room], kick=kick)

    def add_at(self, queue: int, room: Sequence[tuple[int, int]]) -> int:
        """Lend the device this memory to write, by address and size, and kick."""
        return self._add(queue, [(gpa, size, F_WRITE) for gpa, size in room], kick=True)

    def _add(self, queue: int, pieces: Sequence[tuple[int, int, int]], *, kick: bool) -> int:
        self._handle += 1
        table = self._allocate(DESCRIPTOR.size * len(pieces))
        for number, (gpa, size, flags) in enumerate(pieces):
            more = F_NEXT if number + 1 < len(pieces) else 0
            self.memory.write(table + 16 * number, DESCRIPTOR.pack(gpa, size, flags | more, number + 1 if more else 0))
        buffers = Buffers(self._handle, tuple((gpa, size) for gpa, size, flags in pieces if flags))
        self.rings[queue].lend(buffers, table, len(pieces))
        if kick:
            self.kick(queue)
        return self._handle

    def kick(self, queue: int) -> None:
        """Tell the device. Raises the `GuestFault` that the transport would see."""
        if as_direct(self.device) is not None:
            os.eventfd_write(self._kick_fds[queue], 1)
        else:
            self.loop.call(lambda: self.device.kicked(queue))

    def taken(self, queue: int, *, count: int | None = None) -> list[tuple[Buffers, int]]:
        """Chains that the device has used, and how much it wrote; waits for `count` of them, or not at all."""
        ring = self.rings[queue]
        end = time.monotonic() + PATIENCE_S
        while True:
            ring.collect()
            if count is None or len(ring.done) >= count:
                break
            assert time.monotonic() < end, f"{len(ring.done)} of {count} chains were used"
            time.sleep(0.0005)
        found = ring.done[:count]
        del ring.done[:count]
        return found

    def taken_data(self, queue: int, *, count: int | None = None) -> list[bytes]:
        """The same: what the device wrote."""
        return [self.read(buffers, written) for buffers, written in self.taken(queue, count=count)]

    def read(self, buffers: Buffers, size_bytes: int) -> bytes:
        data = b""
        for gpa, size in buffers.writable:
            data += self.memory.read(gpa, min(size, size_bytes - len(data)))
        assert len(data) == size_bytes, "more was used than was lent"
        return data

    def call(self, function: Callable[[], T]) -> T:
        return self.loop.call(function)

    def settle(self) -> None:
        """Give the loop time for whatever it should, or should not, do."""
        for _ in range(4):
            time.sleep(0.004)
            self.loop.call(lambda: None)

    def until(self, condition: Callable[[], T]) -> T:
        """Wait for something to become true; it is asked on the loop's thread."""
        end = time.monotonic() + PATIENCE_S
        while not (value := self.loop.call(condition)):
            assert time.monotonic() < end, "it never happened"
            time.sleep(0.001)
        return value
