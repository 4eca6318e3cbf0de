"""Guest memory: slices, what is refused, and what is given back."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nagaya.errors import GuestFault, HostError, UsageError
from nagaya.memory import HIGH_START_GPA, HUGE_PAGE_BYTES, LOW_END_GPA, PAGE_BYTES, GuestMemory

SIZE = 1 << 20
HIGH_SIZE = 16 << 20


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory.allocate(SIZE)
    yield made
    made.close()


@pytest.fixture
def high_memory() -> Iterator[GuestMemory]:
    """More than fits below the hole. Pages that nobody touches cost nothing."""
    made = GuestMemory.allocate(LOW_END_GPA + HIGH_SIZE)
    yield made
    made.close()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def taken_bytes(memory: GuestMemory) -> int:
    return os.fstat(memory.fd).st_blocks * 512


def test_new_memory_is_zeros_in_one_region(memory: GuestMemory) -> None:
    assert memory.size_bytes == SIZE
    assert [region[:3] for region in memory.regions] == [(0, SIZE, 0)]
    assert memory.read(0, SIZE) == bytes(SIZE)


def test_what_is_written_is_read_and_is_in_the_file(memory: GuestMemory) -> None:
    memory.write(0x1234, b"hello")
    memory.write(0x1239, memoryview(b" you"))
    assert memory.read(0x1234, 9) == b"hello you"
    assert os.pread(memory.fd, 9, 0x1234) == b"hello you"
    os.pwrite(memory.fd, b"J", 0x1234)
    assert memory.read(0x1234, 5) == b"Jello"


def test_slices_are_the_memory_itself(memory: GuestMemory) -> None:
    one, two = memory.slice(0x1000, 16), memory.slice(0x1008, 16)
    one[8] = 7
    assert (two[0], len(one), one.format, one.readonly) == (7, 16, "B", False)
    one.cast("I")[3] = 0x01020304
    assert bytes(two[4:8]) == b"\x04\x03\x02\x01"


def test_slices_reach_to_the_last_byte(memory: GuestMemory) -> None:
    memory.slice(SIZE - 1, 1)[0] = 9
    assert memory.read(SIZE - 1, 1) == b"\x09"
    assert len(memory.slice(0, SIZE)) == SIZE
    assert len(memory.slice(0x500, 0)) == 0


@pytest.mark.parametrize(
    ("gpa", "size"),
    [(SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (-1, 1), (0, -1), (1 << 64, 1), (LOW_END_GPA, 1), (HIGH_START_GPA, 1)],
)
def test_what_is_not_inside_is_a_fault(memory: GuestMemory, gpa: int, size: int) -> None:
    for attempt in (memory.slice, memory.hva, memory.read):
        with pytest.raises(GuestFault, match="not in the guest's memory"):
            attempt(gpa, size)


def test_write_that_does_not_fit_writes_nothing(memory: GuestMemory) -> None:
    with pytest.raises(GuestFault):
        memory.write(SIZE - 4, b"12345")
    assert memory.read(SIZE - 4, 4) == bytes(4)


def test_addresses_are_where_this_process_has_it(memory: GuestMemory) -> None:
    memory.write(0x2000, b"seen")
    assert ctypes.string_at(memory.hva(0x2000, 4), 4) == b"seen"
    assert memory.hva(0x2000, 4) - memory.regions[0].hva == 0x2000


def test_hole_below_4_gib(high_memory: GuestMemory) -> None:
    low, high = high_memory.regions
    assert low[:3] == (0, LOW_END_GPA, 0)
    assert high[:3] == (HIGH_START_GPA, HIGH_SIZE, LOW_END_GPA)
    assert high.hva == low.hva + LOW_END_GPA
    high_memory.write(HIGH_START_GPA + 5, b"high")
    high_memory.write(LOW_END_GPA - 4, b"lowe")
    assert os.pread(high_memory.fd, 4, LOW_END_GPA + 5) == b"high"
    assert ctypes.string_at(high_memory.hva(HIGH_START_GPA + 5, 4), 4) == b"high"
    for gpa, size in (
        (LOW_END_GPA - 1, 2), (LOW_END_GPA, 1), (HIGH_START_GPA - 1, 1), (HIGH_START_GPA - 1, 2),
        (LOW_END_GPA - 8, HIGH_START_GPA - LOW_END_GPA + 16), (HIGH_START_GPA + HIGH_SIZE - 1, 2),
    ):  # fmt: skip
        with pytest.raises(GuestFault):
            high_memory.slice(gpa, size)


def test_memory_up_to_the_hole_is_one_region() -> None:
    made = GuestMemory.allocate(LOW_END_GPA)
    assert len(made.regions) == 1
    made.close()


def test_discard_gives_pages_back(memory: GuestMemory) -> None:
    memory.write(0, b"\x01" * SIZE)
    assert taken_bytes(memory) == SIZE
    view = memory.slice(0x4000, 0x8000)
    memory.discard(0x4000, 0x8000)
    assert taken_bytes(memory) == SIZE - 0x8000
    assert bytes(view) == bytes(0x8000)
    assert memory.read(0x3FFF, 1) == memory.read(0xC000, 1) == b"\x01"


def test_discard_above_the_hole(high_memory: GuestMemory) -> None:
    high_memory.write(HIGH_START_GPA, b"\x01" * 0x2000)
    high_memory.write(LOW_END_GPA - 0x1000, b"\x02" * 0x1000)
    high_memory.discard(HIGH_START_GPA, 0x1000)
    assert high_memory.read(HIGH_START_GPA, 0x2000) == bytes(0x1000) + b"\x01" * 0x1000
    assert high_memory.read(LOW_END_GPA - 0x1000, 0x1000) == b"\x02" * 0x1000


@pytest.mark.parametrize(("gpa", "size"), [(1, PAGE_BYTES), (0, 5), (SIZE, PAGE_BYTES), (0, SIZE + PAGE_BYTES)])
def test_discard_of_anything_else_is_a_fault(memory: GuestMemory, gpa: int, size: int) -> None:
    memory.write(0, b"\x01" * SIZE)
    with pytest.raises(GuestFault):
        memory.discard(gpa, size)
    assert memory.read(0, SIZE) == b"\x01" * SIZE


@pytest.mark.parametrize(
    ("size", "hint"),
    [
        (0, "from 4096"), (-PAGE_BYTES, "from 4096"), (PAGE_BYTES + 1, "multiple"), (1 << 47, "to 65536 GiB"),
        (1 << 70, "to 65536 GiB"),
    ],
)  # fmt: skip
def test_size_that_no_guest_can_have(size: int, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        GuestMemory.allocate(size)
    assert hint in caught.value.hint


def test_huge_pages_are_all_there_or_refused() -> None:
    before = open_descriptors()
    with pytest.raises(UsageError):
        GuestMemory.allocate(PAGE_BYTES, huge=True)
    huge = 1 << 40  # no host has reserved that much
    with pytest.raises(HostError) as caught:
        GuestMemory.allocate(huge // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES, huge=True)
    assert "nr_hugepages" in caught.value.hint
    assert open_descriptors() == before


def test_close_gives_everything_back() -> None:
    before = open_descriptors()
    made = GuestMemory.allocate(SIZE)
    where = f"{made.regions[0].hva:x}-"
    assert any(line.startswith(where) for line in Path("/proc/self/maps").read_text().splitlines())
    made.close()
    assert open_descriptors() == before
    assert not any(line.startswith(where) for line in Path("/proc/self/maps").read_text().splitlines())
    made.close()
    assert open_descriptors() == before


def test_close_with_a_live_slice_leaves_it_alone() -> None:
    before = open_descriptors()
    made = GuestMemory.allocate(SIZE)
    kept = made.slice(0x1000, 4)
    hva = made.hva(0, 1)
    made.close()
    assert open_descriptors() - before <= 1  # Python's map has a descriptor of its own until it goes
    kept[:] = b"safe"  # and not a crash
    assert bytes(kept) == b"safe"
    del kept, made
    assert open_descriptors() == before
    assert not any(line.startswith(f"{hva:x}-") for line in Path("/proc/self/maps").read_text().splitlines())


def test_nothing_is_inside_after_close() -> None:
    made = GuestMemory.allocate(SIZE)
    made.close()
    with pytest.raises(GuestFault):
        made.slice(0, 1)


def test_file_is_shared_with_another_map_of_it(memory: GuestMemory) -> None:
    """As a vhost-user back end has it."""
    with mmap.mmap(memory.fd, SIZE) as other:
        other[0x100:0x105] = b"other"
        assert memory.read(0x100, 5) == b"other"
    assert not os.get_inheritable(memory.fd)
