"""The split virtqueue from the device's side: what is popped and published, who is told, and what no driver may do."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from nagaya.errors import GuestFault
from nagaya.memory import GuestMemory
from nagaya.virtio.queue import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, MOST_CHAIN_BYTES, Queue

SIZE = 8
DESCRIPTORS, AVAILABLE, USED, TABLE, DATA = 0x1000, 0x2000, 0x3000, 0x4000, 0x8000
MEMORY_BYTES = 64 << 20  # none of it is touched but the first pages


class Side:
    """A queue and the driver's words beside it."""

    def __init__(self, *, event_index: bool = True, indirect: bool = True, size: int = SIZE) -> None:
        self.memory = GuestMemory.allocate(MEMORY_BYTES)
        self.size = size
        self.interrupts = 0
        self.queue = Queue(
            self.memory, index=0, size=size, descriptors=DESCRIPTORS, available=AVAILABLE, used=USED,
            event_index=event_index, indirect=indirect, interrupt=self._interrupt,
        )  # fmt: skip
        self._index = 0

    def _interrupt(self) -> None:
        self.interrupts += 1

    def describe(self, number: int, gpa: int, size: int, flags: int = 0, following: int = 0, table: int = 0) -> None:
        data = struct.pack("<QIHH", gpa, size, flags, following)
        self.memory.write((table or DESCRIPTORS) + 16 * number, data)

    def offer(self, *heads: int) -> None:
        for head in heads:
            self.memory.write(AVAILABLE + 4 + 2 * (self._index % self.size), struct.pack("<H", head))
            self._index = self._index + 1 & 0xFFFF
        self.memory.write(AVAILABLE + 2, struct.pack("<H", self._index))

    def word(self, gpa: int) -> int:
        return int.from_bytes(self.memory.read(gpa, 2), "little")

    @property
    def used_index(self) -> int:
        return self.word(USED + 2)

    def used(self, number: int) -> tuple[int, int]:
        head, written = struct.unpack("<II", self.memory.read(USED + 4 + 8 * (number % self.size), 8))
        return head, written

    @property
    def available_event(self) -> int:
        return self.word(USED + 4 + 8 * self.size)

    def want_interrupt_after(self, index: int) -> None:
        self.memory.write(AVAILABLE + 4 + 2 * self.size, struct.pack("<H", index & 0xFFFF))


@pytest.fixture
def side() -> Iterator[Side]:
    made = Side()
    yield made
    made.memory.close()


def test_a_chain_is_the_memory_itself(side: Side) -> None:
    side.memory.write(DATA, b"question")
    side.describe(5, DATA, 8, DESC_F_NEXT, 2)
    side.describe(2, DATA + 100, 3, DESC_F_NEXT | DESC_F_WRITE, 7)
    side.describe(7, DATA + 200, 4, DESC_F_WRITE)
    assert side.queue.pop() is None
    side.offer(5)
    assert side.queue.peek_available() == 1
    chain = side.queue.pop()
    assert chain is not None
    assert (chain.head, chain.readable_bytes, chain.writable_bytes) == (5, 8, 7)
    assert [bytes(view) for view in chain.readable] == [b"question"]
    chain.writable[0][:], chain.writable[1][:] = b"yes", b"sure"
    assert side.memory.read(DATA + 100, 3) + side.memory.read(DATA + 200, 4) == b"yessure"
    assert side.queue.pop() is None
    side.queue.publish(chain, 7)
    assert (side.used_index, side.used(0)) == (1, (5, 7))


def test_an_indirect_table(side: Side) -> None:
    side.describe(0, TABLE, 48, DESC_F_INDIRECT | DESC_F_WRITE)  # section 2.7.5.3.2: the write flag means nothing here
    side.describe(0, DATA, 4, DESC_F_NEXT, 2, table=TABLE)
    side.describe(2, DATA + 4, 4, DESC_F_NEXT, 1, table=TABLE)
    side.describe(1, DATA + 8, 4, DESC_F_WRITE, table=TABLE)
    side.offer(0)
    chain = side.queue.pop()
    assert chain is not None
    assert (chain.head, len(chain.readable), len(chain.writable)) == (0, 2, 1)


def test_descriptors_of_the_queue_may_come_before_an_indirect_table(side: Side) -> None:
    """Section 2.7.5.3.2: the device must handle that."""
    side.describe(3, DATA, 4, DESC_F_NEXT, 1)
    side.describe(1, TABLE, 16, DESC_F_INDIRECT)
    side.describe(0, DATA + 8, 4, DESC_F_WRITE, table=TABLE)
    side.offer(3)
    chain = side.queue.pop()
    assert chain is not None
    assert (chain.head, chain.readable_bytes, chain.writable_bytes) == (3, 4, 4)


def test_the_longest_chain(side: Side) -> None:
    for number in range(SIZE):
        side.describe(number, DATA, 1, DESC_F_NEXT if number < SIZE - 1 else 0, number + 1)
    side.offer(0)
    chain = side.queue.pop()
    assert chain is not None and chain.readable_bytes == SIZE


def test_indices_come_round(side: Side) -> None:
    side.describe(0, DATA, 1)
    for number in range(0x10000 + 3):
        side.offer(0)
        chain = side.queue.pop()
        assert chain is not None
        side.queue.publish(chain, number & 0xFF)
    assert side.used_index == 3
    assert side.used(2) == (0, 2)
    assert side.queue.pop() is None
    assert side.queue.state() == (3, 3)


def test_undo_pop_goes_back_one_by_one(side: Side) -> None:
    for number in range(3):
        side.describe(number, DATA, number + 1)
    side.offer(0, 1, 2)
    assert [chain.head for chain in (side.queue.pop(), side.queue.pop()) if chain] == [0, 1]
    side.queue.undo_pop()
    side.queue.undo_pop()
    assert [chain.head for chain in side.queue.chains()] == [0, 1, 2]


def test_publish_all_is_seen_at_once(side: Side) -> None:
    for number in range(3):
        side.describe(number, DATA, 16, DESC_F_WRITE)
    side.offer(0, 1, 2)
    chains = list(side.queue.chains())
    side.queue.publish_all([(chain, 10 + chain.head) for chain in chains])
    assert side.used_index == 3
    assert [side.used(number) for number in range(3)] == [(0, 10), (1, 11), (2, 12)]
    side.queue.publish_all([])
    assert side.used_index == 3


def test_a_restored_queue_goes_on(side: Side) -> None:
    side.describe(1, DATA, 16, DESC_F_WRITE)
    side.offer(1, 1)
    chain = side.queue.pop()
    assert chain is not None
    side.queue.publish(chain, 1)
    other = Queue(
        side.memory, index=0, size=SIZE, descriptors=DESCRIPTORS, available=AVAILABLE, used=USED,
        event_index=True, indirect=True, interrupt=side._interrupt,
    )  # fmt: skip
    other.restore(side.queue.state())
    chain = other.pop()
    assert chain is not None and other.pop() is None
    other.publish(chain, 2)
    assert (side.used_index, side.used(1)) == (2, (1, 2))


# -- notifications


@pytest.mark.parametrize("start", [0, 0x7FFE, 0xFFFD])
@pytest.mark.parametrize("published", [1, 2, 5])
def test_an_interrupt_comes_when_the_wanted_index_is_passed(side: Side, start: int, published: int) -> None:
    """Section 2.7.7.2, and at the places where the index comes round."""
    for event in range(-2, 7):
        side.queue.restore((start, start))
        side.want_interrupt_after(start + event)
        before = side.interrupts
        for _ in range(published):
            side.queue.publish(0, 0)
        side.queue.signal()
        assert side.interrupts - before == (0 <= event < published), event
        side.queue.signal()  # nothing new
        assert side.interrupts - before <= 1


def test_flags_without_event_index() -> None:
    side = Side(event_index=False)
    side.queue.publish(0, 0)
    side.queue.signal()
    side.memory.write(AVAILABLE, b"\1\0")
    side.queue.publish(0, 0)
    side.queue.signal()
    assert side.interrupts == 1
    side.queue.disarm()
    assert side.word(USED) == 1
    assert not side.queue.rearm()
    assert side.word(USED) == 0
    side.memory.close()


def test_notifications_are_off_meanwhile_and_on_after() -> None:
    for event_index in (False, True):
        side = Side(event_index=event_index)
        side.describe(0, DATA, 1)
        side.offer(0, 0)
        for _ in side.queue.chains():
            if not event_index:
                assert side.word(USED) == 1
            else:
                assert side.available_event != side.queue.next_available
        assert side.word(USED) == 0
        assert not event_index or side.available_event == 2
        side.memory.close()


def test_what_comes_while_the_queue_is_rearmed_is_not_lost(side: Side) -> None:
    side.describe(0, DATA, 1)
    side.offer(0)
    seen = 0
    for _ in side.queue.chains():
        seen += 1
        if seen < 5:
            side.offer(0)
    assert seen == 5
    side.offer(0)
    assert side.queue.rearm()


# -- faults

N, W, I = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT  # noqa: E741
CHAINS: dict[str, list[tuple[int, int, int, int]]] = {
    "outside memory": [(MEMORY_BYTES, 1, 0, 0)],
    "across the end": [(MEMORY_BYTES - 1, 2, 0, 0)],
    "around the end of all addresses": [((1 << 64) - 1, 2, 0, 0)],
    "no bytes": [(DATA, 0, 0, 0)],
    "to itself": [(DATA, 1, N, 0)],
    "in a circle": [(DATA, 1, N, 1), (DATA, 1, N, 0)],
    "next outside the table": [(DATA, 1, N, SIZE)],
    "readable after writable": [(DATA, 1, W | N, 1), (DATA, 1, 0, 0)],
    "table outside memory": [(MEMORY_BYTES, 16, I, 0)],
    "table of no entries": [(TABLE, 0, I, 0)],
    "table of half an entry": [(TABLE, 24, I, 0)],
    "table of more than can be": [(TABLE, 16 << 16, I, 0)],
    "table and a next one": [(TABLE, 16, I | N, 1), (DATA, 1, 0, 0)],
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_that_cannot_be(side: Side, name: str) -> None:
    side.describe(0, DATA, 1, table=TABLE)
    for number, entry in enumerate(CHAINS[name]):
        side.describe(number, *entry)
    side.offer(0)
    with pytest.raises(GuestFault):
        side.queue.pop()
    assert side.used_index == 0


@pytest.mark.parametrize("flags", [I, I | N, I | W])
def test_a_table_within_a_table(side: Side, flags: int) -> None:
    side.describe(0, TABLE, 16, I)
    side.describe(0, TABLE, 16, flags, table=TABLE)
    side.offer(0)
    with pytest.raises(GuestFault, match="indirect"):
        side.queue.pop()


def test_a_next_outside_an_indirect_table(side: Side) -> None:
    side.describe(0, TABLE, 32, I)
    side.describe(0, DATA, 1, N, 2, table=TABLE)
    side.offer(0)
    with pytest.raises(GuestFault, match="descriptor 2 of 2"):
        side.queue.pop()


def test_a_long_chain_in_a_table_is_a_loop(side: Side) -> None:
    side.describe(0, TABLE, 16, I)
    side.describe(0, DATA, 1, N, 0, table=TABLE)
    side.offer(0)
    with pytest.raises(GuestFault, match=f"more than {SIZE}"):
        side.queue.pop()


def test_a_table_that_was_not_agreed_on() -> None:
    side = Side(indirect=False)
    side.describe(0, TABLE, 16, I)
    side.offer(0)
    with pytest.raises(GuestFault, match="indirect"):
        side.queue.pop()
    side.memory.close()


def test_a_head_outside_the_table(side: Side) -> None:
    side.offer(SIZE)
    with pytest.raises(GuestFault, match=f"descriptor {SIZE} of {SIZE}"):
        side.queue.pop()


def test_a_chain_whose_length_no_used_element_can_tell() -> None:
    """The same buffer again and again: more bytes than the guest has memory, and than fit into 32 bits."""
    side = Side(size=128)
    step = 1 << 25
    for number in range(128):
        side.describe(number, DATA, step, W | (N if number < 127 else 0), number + 1)
    side.describe(127, DATA, step - 1, W)
    side.offer(0)
    chain = side.queue.pop()
    assert chain is not None and chain.writable_bytes == MOST_CHAIN_BYTES
    side.queue.publish(chain, chain.writable_bytes)
    assert side.used(0) == (0, MOST_CHAIN_BYTES)
    side.describe(127, DATA, step, W)
    side.offer(0)
    with pytest.raises(GuestFault, match="4 GiB"):
        side.queue.pop()
    side.memory.close()


@pytest.mark.parametrize("ahead", [SIZE + 1, 0x8000, 0xFFFF])
def test_more_chains_than_there_can_be(side: Side, ahead: int) -> None:
    side.memory.write(AVAILABLE + 2, struct.pack("<H", ahead))
    for look in (side.queue.peek_available, side.queue.pop, side.queue.rearm):
        with pytest.raises(GuestFault, match=f"has {ahead} chains"):
            look()


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0}, {"size": 3}, {"size": 1 << 16}, {"descriptors": DESCRIPTORS + 8}, {"available": AVAILABLE + 1},
        {"used": USED + 2}, {"descriptors": MEMORY_BYTES - 16}, {"available": MEMORY_BYTES - 2},
        {"used": MEMORY_BYTES - 4}, {"used": (1 << 64) - 4}, {"descriptors": 1 << 63},
    ],
)  # fmt: skip
def test_rings_that_cannot_be(side: Side, wrong: dict[str, int]) -> None:
    places = {"size": SIZE, "descriptors": DESCRIPTORS, "available": AVAILABLE, "used": USED, **wrong}
    with pytest.raises(GuestFault):
        Queue(side.memory, index=0, event_index=True, indirect=True, interrupt=side._interrupt, **places)


@pytest.mark.parametrize("name", ["descriptors", "available", "used"])
def test_a_ring_may_end_with_memory(side: Side, name: str) -> None:
    sizes = {"descriptors": 16 * SIZE, "available": 6 + 2 * SIZE, "used": 6 + 8 * SIZE}
    places = {"descriptors": DESCRIPTORS, "available": AVAILABLE, "used": USED}
    places[name] = (MEMORY_BYTES - sizes[name]) & ~15
    Queue(side.memory, index=0, size=SIZE, event_index=True, indirect=True, interrupt=side._interrupt, **places)
    places[name] += 16
    with pytest.raises(GuestFault):
        Queue(side.memory, index=0, size=SIZE, event_index=True, indirect=True, interrupt=side._interrupt, **places)


# -- a driver on another CPU


def test_a_driver_in_another_process_sees_each_element_before_its_index() -> None:
    """A reader with no lock in common: an element behind the index is there, whole, whenever the index says so."""
    side = Side(size=256)
    count = 60_000
    child = os.fork()
    if child == 0:  # the driver: it takes every element as soon as it is there, and says how far it is in its index
        status = 1
        try:
            index = side.memory.slice(USED + 2, 2).cast("H")
            elements = side.memory.slice(USED + 4, 8 * side.size).cast("I")
            mine = side.memory.slice(AVAILABLE + 2, 2).cast("H")
            taken = wrong = 0
            while taken < count and not wrong:
                ready = (index[0] - taken) & 0xFFFF
                for _ in range(ready):
                    at = 2 * (taken % side.size)
                    wrong += elements[at] != taken % 251 or elements[at + 1] != taken
                    taken += 1
                mine[0] = taken & 0xFFFF
            status = int(wrong > 0)
        finally:
            os._exit(status)
    try:
        theirs = side.memory.slice(AVAILABLE + 2, 2).cast("H")
        for number in range(count):
            while (number - theirs[0]) & 0xFFFF >= side.size:
                if os.waitpid(child, os.WNOHANG)[0]:
                    pytest.fail("the driver found a wrong element")
            side.queue.publish(number % 251, number)
    except BaseException:
        os.kill(child, 9)
        raise
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    side.memory.close()
