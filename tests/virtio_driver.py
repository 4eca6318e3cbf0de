"""The driver's side of virtio-mmio: what a guest's kernel does, by the transport's registers and rings in guest memory."""

from __future__ import annotations

import os
import struct

from nagaya.memory import GuestMemory
from nagaya.virtio import mmio
from nagaya.virtio.device import VERSION_1, Device
from nagaya.virtio.loop import Loop
from nagaya.virtio.mmio import MmioTransport
from nagaya.virtio.queue import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE

MEMORY_BYTES = 1 << 20
RINGS_GPA = 0x10000
RING_STEP = 0x4000
BUFFERS_GPA = 0x80000


class Driver:
    """One device behind a transport. Its loop has no thread: what a kick causes has happened when `kick` returns.

    Every byte that it writes to guest memory goes through `poke`.
    """

    def __init__(self, device: Device, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self.memory = GuestMemory.allocate(memory_bytes)
        self.loop = Loop()
        self.interrupt_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.transport = MmioTransport(device, self.memory, self.loop, interrupt_fd=self.interrupt_fd)
        self.device = device
        self.size = 0
        self._next_buffer = BUFFERS_GPA
        self._indices = dict.fromkeys(range(len(device.queue_sizes)), 0)

    def close(self) -> None:
        self.transport.close()
        self.device.close()
        self.loop.close()
        self.memory.close()
        os.close(self.interrupt_fd)

    # -- registers

    def read(self, offset: int) -> int:
        return int.from_bytes(self.transport.read(offset, 4), "little")

    def write(self, offset: int, value: int) -> None:
        self.transport.write(offset, value.to_bytes(4, "little"))

    @property
    def status(self) -> int:
        return self.read(mmio.STATUS)

    def offered(self) -> int:
        words = []
        for word in (0, 1):
            self.write(mmio.DEVICE_FEATURES_SEL, word)
            words.append(self.read(mmio.DEVICE_FEATURES))
        return words[0] | words[1] << 32

    def accept(self, features: int) -> bool:
        """Negotiate; whether the device agreed."""
        self.write(mmio.STATUS, 0)
        self.write(mmio.STATUS, mmio.ACKNOWLEDGE | mmio.DRIVER)
        for word in (0, 1):
            self.write(mmio.DRIVER_FEATURES_SEL, word)
            self.write(mmio.DRIVER_FEATURES, features >> 32 * word & 0xFFFF_FFFF)
        self.write(mmio.STATUS, mmio.ACKNOWLEDGE | mmio.DRIVER | mmio.FEATURES_OK)
        return bool(self.status & mmio.FEATURES_OK)

    def set_queue(self, number: int, *, size: int, descriptors: int, available: int, used: int) -> None:
        self.write(mmio.QUEUE_SEL, number)
        self.write(mmio.QUEUE_NUM, size)
        for low, gpa in (
            (mmio.QUEUE_DESC_LOW, descriptors), (mmio.QUEUE_DRIVER_LOW, available), (mmio.QUEUE_DEVICE_LOW, used),
        ):  # fmt: skip
            self.write(low, gpa & 0xFFFF_FFFF)
            self.write(low + 4, gpa >> 32)
        self.write(mmio.QUEUE_READY, 1)

    def start(self, *, features: int = VERSION_1, size: int = 64) -> None:
        """Everything up to DRIVER_OK, with every queue."""
        self.size = size
        assert self.accept(features)
        for number in self._indices:
            base = RINGS_GPA + number * RING_STEP
            self.poke(base, bytes(RING_STEP))
            self._indices[number] = 0
            self.set_queue(number, size=size, descriptors=base, available=base + 0x2000, used=base + 0x3000)
        self.write(mmio.STATUS, mmio.ACKNOWLEDGE | mmio.DRIVER | mmio.FEATURES_OK | mmio.DRIVER_OK)

    # -- rings

    def poke(self, gpa: int, data: bytes) -> None:
        self.memory.write(gpa, data)

    def place(self, data: bytes) -> int:
        """Put a buffer into guest memory; its gpa."""
        gpa = self._next_buffer
        self._next_buffer += -(-len(data) // 16) * 16
        self.poke(gpa, data)
        return gpa

    def put_descriptor(self, queue: int, number: int, gpa: int, size: int, flags: int = 0, following: int = 0) -> None:
        self.poke(RINGS_GPA + queue * RING_STEP + 16 * number, struct.pack("<QIHH", gpa, size, flags, following))

    def put_table(self, gpa: int, parts: list[tuple[int, int, int]]) -> None:
        """Chained descriptors, as (gpa, size, flags), one after the other from `gpa` on."""
        for number, (target, size, flags) in enumerate(parts):
            last = number == len(parts) - 1
            entry = struct.pack("<QIHH", target, size, flags | (0 if last else DESC_F_NEXT), 0 if last else number + 1)
            self.poke(gpa + 16 * number, entry)

    def put_indirect(self, queue: int, number: int, table: int, parts: list[tuple[int, int, int]]) -> None:
        """A descriptor of the queue's that stands for all of a table elsewhere."""
        self.put_table(table, parts)
        self.put_descriptor(queue, number, table, 16 * len(parts), DESC_F_INDIRECT)

    def offer(self, queue: int, head: int) -> None:
        """Make a chain available."""
        base = RINGS_GPA + queue * RING_STEP + 0x2000
        index = self._indices[queue]
        self.poke(base + 4 + 2 * (index % self.size), struct.pack("<H", head))
        self._indices[queue] = index + 1
        self.poke(base + 2, struct.pack("<H", index + 1 & 0xFFFF))

    def send(self, readable: list[bytes], writable: list[int], *, queue: int = 0) -> tuple[int, list[bytes]]:
        """One request, from descriptor 0 on: what the device says that it wrote, and the writable buffers after it."""
        parts = [(self.place(data), len(data), 0) for data in readable]
        parts += [(self.place(b"\xee" * size), size, DESC_F_WRITE) for size in writable]
        for number, (gpa, size, flags) in enumerate(parts):
            last = number == len(parts) - 1
            self.put_descriptor(queue, number, gpa, size, flags | (0 if last else DESC_F_NEXT), number + 1)
        before = self.used_index(queue)
        self.offer(queue, 0)
        self.kick(queue)
        assert self.used_index(queue) == before + 1 & 0xFFFF, "the device did not answer"
        _, written = self.used_element(queue, before % self.size)
        return written, [self.memory.read(gpa, size) for gpa, size, flags in parts if flags]

    def kick(self, queue: int = 0) -> None:
        """Notify by the register, and run what that causes."""
        self.write(mmio.QUEUE_NOTIFY, queue)
        self.transport._kicked(queue)

    def pump(self) -> None:
        """One round of the loop on this thread: kicks, back ends and turns. Raises whatever one of them raises."""
        for fd, _ in self.loop._epoll.poll(0):
            callback = self.loop._callbacks.get(fd)
            if callback is not None:
                callback()

    def used_index(self, queue: int = 0) -> int:
        return int.from_bytes(self.memory.read(RINGS_GPA + queue * RING_STEP + 0x3002, 2), "little")

    def used_element(self, queue: int, number: int) -> tuple[int, int]:
        data = self.memory.read(RINGS_GPA + queue * RING_STEP + 0x3004 + 8 * number, 8)
        head, written = struct.unpack("<II", data)
        return head, written

    def interrupts(self) -> int:
        """Edges since the last time."""
        try:
            return os.eventfd_read(self.interrupt_fd)
        except BlockingIOError:
            return 0


class ApartDriver(Driver):
    """A driver of a device in a process of its own: what a kick causes has happened when that process answers again."""

    ROUNDS = 4  # of its loop: the kick, and turns that it asked itself for

    def kick(self, queue: int = 0) -> None:
        self.write(mmio.QUEUE_NOTIFY, queue)
        for _ in range(self.ROUNDS):
            self.device.counters()
        self.pump()  # what it had to tell
