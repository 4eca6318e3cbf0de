"""The queue and the disk without a guest: a driver's side in this process, a file in memory, and where the time goes.

Beside each kind of request stands the same reading done bare, by `preadv` into the same memory.
"""

from __future__ import annotations

import os
import select
import struct
import tempfile
import time
from collections.abc import Callable

from benches.measure import Check, report, take_turns
from nagaya.memory import GuestMemory
from nagaya.virtio import blk
from nagaya.virtio.blk import Blk
from nagaya.virtio.device import RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1, Device
from nagaya.virtio.queue import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Queue
from tests.virtio_driver import BUFFERS_GPA, RINGS_GPA, Driver

CHAINS = 20_000
SIZE = 256
DISK_BYTES = 64 << 20
MEMORY_BYTES = 16 << 20
DATA_GPA = 4 << 20
TABLE_GPA = BUFFERS_GPA + 0x1000
FEATURES = VERSION_1 | RING_EVENT_IDX | RING_INDIRECT_DESC | blk.F_FLUSH
BATCH = 32


def main(rounds: int) -> bool:
    kept = _bench_queue(rounds)
    with tempfile.TemporaryDirectory(prefix="nagaya-bench-", dir="/dev/shm") as place:
        path = f"{place}/disk"
        with open(path, "wb") as file:
            for _ in range(DISK_BYTES >> 20):
                file.write(os.urandom(1 << 20))
        kept = _bench_disk(path, rounds, size_bytes=4096, requests=2048, limit=12) and kept
        return _bench_disk(path, rounds, size_bytes=1 << 20, requests=64, limit=2) and kept


# -- pop and publish


def _bench_queue(rounds: int) -> bool:
    contestants = {
        "1 descriptor": lambda: _run_queue(1, indirect=False),
        "3 descriptors": lambda: _run_queue(3, indirect=False),
        "3 descriptors in a table": lambda: _run_queue(3, indirect=True),
    }
    samples = take_turns(contestants, rounds=rounds)
    checks = [Check("pop and publish of a disk request, us", samples[2].median, 5)]
    return report("a thousand chains popped and published", samples, checks)


def _run_queue(length: int, *, indirect: bool) -> float:
    """Milliseconds for a thousand chains of this many descriptors, all of which are there when it begins."""
    memory = GuestMemory.allocate(1 << 20)
    queue = Queue(
        memory, index=0, size=SIZE, descriptors=0x10000, available=0x12000, used=0x13000,
        event_index=True, indirect=True, interrupt=lambda: None,
    )  # fmt: skip
    ring = memory.slice(0x12000, 4 + 2 * SIZE).cast("H")
    for slot in range(SIZE):
        head = slot if indirect else slot % (SIZE // length) * length
        ring[2 + slot] = head
        table = 0x20000 + 64 * slot if indirect else 0x10000 + 16 * head
        for number in range(length):
            last = number == length - 1
            flags = DESC_F_WRITE if last else DESC_F_NEXT
            following = 0 if last else number + 1 + (0 if indirect else head)
            memory.write(table + 16 * number, struct.pack("<QIHH", 0x80000 + 4096 * number, 512, flags, following))
        if indirect:
            memory.write(0x10000 + 16 * slot, struct.pack("<QIHH", table, 16 * length, DESC_F_INDIRECT, 0))
    done = 0
    start = time.perf_counter()
    while done < CHAINS:
        ring[1] = queue.next_available + SIZE & 0xFFFF
        while (chain := queue.pop()) is not None:
            queue.publish(chain, 1)
            done += 1
    took = time.perf_counter() - start
    del chain
    return took * 1e6 / done


# -- disk requests


class Reader:
    """A driver with `BATCH` requests ready in indirect tables, each for another part of the disk."""

    def __init__(self, path: str, *, size_bytes: int, device: Device | None = None) -> None:
        """`device`: the disk, if it is not to be one in this process."""
        self.size_bytes = size_bytes
        self.driver = Driver(device or Blk("blk0", path), memory_bytes=MEMORY_BYTES)
        self.driver.start(features=FEATURES, size=SIZE)
        pieces = max(1, size_bytes >> 16)  # a large request's memory is not in one piece
        for number in range(BATCH):
            header = BUFFERS_GPA + 32 * number
            at = DATA_GPA + number % 8 * size_bytes
            self.driver.poke(header, struct.pack("<IIQ", blk.T_IN, 0, number * size_bytes // 512))
            parts = [(header, 16, 0)]
            parts += [(at + (size_bytes // pieces) * n, size_bytes // pieces, DESC_F_WRITE) for n in range(pieces)]
            parts.append((header + 16, 1, DESC_F_WRITE))
            self.driver.put_indirect(0, number, TABLE_GPA + 0x400 * number, parts)
        self._ring = self.driver.memory.slice(RINGS_GPA + 0x2000, 4 + 2 * SIZE).cast("H")
        self._used_event = self.driver.memory.slice(RINGS_GPA + 0x2000 + 4 + 2 * SIZE, 2).cast("H")
        self._interrupt = select.poll()
        self._interrupt.register(self.driver.interrupt_fd, select.POLLIN)
        self._next = 0

    def offer(self, count: int) -> None:
        for _ in range(count):
            self._ring[2 + self._next % SIZE] = self._next % BATCH
            self._next = self._next + 1 & 0xFFFF
        self._ring[1] = self._next

    def serve(self, count: int) -> None:
        """So many requests, answered on this thread."""
        self.offer(count)
        self.driver.kick()
        while self.driver.used_index() != self._next:
            self.driver.pump()

    def ask(self, count: int) -> None:
        """So many requests, of a loop that runs: one kick, and one interrupt after the last of them."""
        self._used_event[0] = self._next + count - 1 & 0xFFFF
        self.offer(count)
        os.eventfd_write(self.driver.transport.kick_fds[0], 1)
        if not self._interrupt.poll(10_000):
            raise SystemExit("the disk did not answer")
        os.eventfd_read(self.driver.interrupt_fd)

    def check(self, requests: int) -> None:
        """Everything was read: a benchmark of errors would be quick."""
        counters = self.driver.device.counters()
        assert counters["read_bytes"] == requests * self.size_bytes and not counters["errors"]

    def close(self) -> None:
        self._ring.release()
        self._used_event.release()
        self.driver.close()


def _bench_disk(path: str, rounds: int, *, size_bytes: int, requests: int, limit: float) -> bool:
    def bare() -> float:
        return _run_bare(path, size_bytes=size_bytes, requests=requests)

    contestants: dict[str, Callable[[], float]] = {
        "preadv alone": bare,
        f"{BATCH} at a time": lambda: _run_disk(path, size_bytes=size_bytes, requests=requests, batch=BATCH),
        "one at a time": lambda: _run_disk(path, size_bytes=size_bytes, requests=requests, batch=1),
        "one at a time, from kick to interrupt": lambda: _run_loop(path, size_bytes=size_bytes, requests=requests),
    }
    samples = take_turns(contestants, rounds=rounds)
    name = f"{size_bytes >> 10} KiB"
    for sample in samples:
        print(f"- {name}, {sample.name}: {1e6 / sample.median:.0f} a second")
    checks = [Check(f"{name} read through the disk, of preadv's time", samples[1].median / samples[0].median, limit)]
    return report(f"a thousand reads of {name}", samples, checks)


def _run_bare(path: str, *, size_bytes: int, requests: int) -> float:
    """Milliseconds for a thousand."""
    memory = GuestMemory.allocate(MEMORY_BYTES)
    fd = os.open(path, os.O_RDONLY)
    pieces = max(1, size_bytes >> 16)
    views = [
        [
            memory.slice(DATA_GPA + n * size_bytes + (size_bytes // pieces) * p, size_bytes // pieces)
            for p in range(pieces)
        ]
        for n in range(8)
    ]
    for number in range(8):  # the guest's pages are there
        os.preadv(fd, views[number], 0)
    start = time.perf_counter()
    for number in range(requests):
        os.preadv(fd, views[number % 8], number % BATCH * size_bytes)
    took = time.perf_counter() - start
    os.close(fd)
    return took * 1e6 / requests


def _run_disk(path: str, *, size_bytes: int, requests: int, batch: int) -> float:
    """The same, through the queue, on this thread."""
    reader = Reader(path, size_bytes=size_bytes)
    try:
        reader.serve(BATCH)
        start = time.perf_counter()
        for _ in range(requests // batch):
            reader.serve(batch)
        took = time.perf_counter() - start
        reader.check(BATCH + requests // batch * batch)
    finally:
        reader.close()
    return took * 1e6 / requests


def _run_loop(path: str, *, size_bytes: int, requests: int) -> float:
    """As in a machine: the disk on a thread of its own, kicked and heard by eventfds; we wait as an idle guest does."""
    reader = Reader(path, size_bytes=size_bytes)
    loop = reader.driver.loop
    loop.start()
    try:
        reader.ask(BATCH)
        start = time.perf_counter()
        for _ in range(requests):
            reader.ask(1)
        took = time.perf_counter() - start
        reader.check(BATCH + requests)
    finally:
        loop.call(lambda: None)
        loop.close()
        reader.close()
    return took * 1e6 / requests
