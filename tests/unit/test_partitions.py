"""Partition tables: those that are true are read, and those that are not are refused."""

from __future__ import annotations

import os
import uuid
import zlib
from collections.abc import Iterator
from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nagaya.errors import IntegrityError
from nagaya.storage.disk_images.assemble import plan_table
from nagaya.storage.disk_images.partitions import Partition, find_ext4, read_partitions

SECTORS = 8192
SIZE = SECTORS * 512
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
OWN = "00000000-0000-0000-0000-000000000007"


@pytest.fixture
def disk() -> Iterator[int]:
    fd = os.memfd_create("disk")
    os.truncate(fd, SIZE)
    yield fd
    os.close(fd)


def put_gpt(fd: int) -> tuple[bytes, bytes]:
    first, last = plan_table(SECTORS, ((2048, 4096, LINUX, OWN),), str(uuid.UUID(int=9)))
    os.pwrite(fd, first, 0)
    os.pwrite(fd, last, SIZE - len(last))
    return first, last


def put_mbr(fd: int, *entries: tuple[int, int, int, int]) -> None:
    table = b"".join(pack("<B3xB3xII", *entry) for entry in entries).ljust(64, b"\0")
    os.pwrite(fd, bytes(446) + table + b"\x55\xaa", 0)


GPT = (Partition(1, 2048 * 512, 4096 * 512, LINUX, OWN),)


def test_a_gpt(disk: int) -> None:
    put_gpt(disk)
    assert read_partitions(disk, SIZE) == GPT


def test_a_gpt_whose_first_header_is_damaged_is_read_at_the_end(disk: int) -> None:
    put_gpt(disk)
    os.pwrite(disk, b"\xff", 512 + 60)
    assert read_partitions(disk, SIZE) == GPT
    os.pwrite(disk, b"\xff", SIZE - 512 + 60)
    with pytest.raises(IntegrityError, match="checksum"):
        read_partitions(disk, SIZE)


def test_an_mbr(disk: int) -> None:
    put_mbr(disk, (0x80, 0x83, 2048, 1000), (0, 0, 0, 0), (0, 0x05, 4000, 1000), (0, 0x0C, 3048, 10))
    assert read_partitions(disk, SIZE) == (
        Partition(1, 2048 * 512, 1000 * 512, "83"),
        Partition(4, 3048 * 512, 10 * 512, "0c"),
    )


def test_a_disk_without_a_table_is_one_part(disk: int) -> None:
    assert read_partitions(disk, SIZE) == (Partition(0, 0, SIZE),)
    put_mbr(disk, (0x41, 0x83, 1, 1))  # not a table: no such state
    assert read_partitions(disk, SIZE) == (Partition(0, 0, SIZE),)


@pytest.mark.parametrize("entry", [(0, 0x83, 8000, 1000), (0, 0x83, 0xFFFFFFFF, 1), (0, 0x83, 1, 0)])
def test_an_mbr_that_leaves_the_disk(disk: int, entry: tuple[int, int, int, int]) -> None:
    put_mbr(disk, entry)
    with pytest.raises(IntegrityError, match="does not lie on it"):
        read_partitions(disk, SIZE)


def forge(fd: int, at: int, value: bytes) -> None:
    """Change the first header, and make its checksum right again; the copy at the end is destroyed."""
    header = bytearray(os.pread(fd, 92, 512))
    header[at : at + len(value)] = value
    header[16:20] = bytes(4)
    header[16:20] = pack("<I", zlib.crc32(bytes(header)))
    os.pwrite(fd, bytes(header), 512)
    os.pwrite(fd, bytes(512), SIZE - 512)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (72, pack("<Q", 1 << 60)),  # where the entries are
        (72, pack("<Q", SECTORS - 1)),
        (80, pack("<I", 0)),  # how many
        (80, pack("<I", 0xFFFFFFFF)),
        (84, pack("<I", 0)),  # how long each
        (84, pack("<I", 129)),
        (84, pack("<I", 1 << 31)),
        (24, pack("<Q", 2)),  # where this header is
        (88, pack("<I", 0)),  # the entries' checksum
    ],
)
def test_a_gpt_that_lies(disk: int, at: int, value: bytes) -> None:
    put_gpt(disk)
    forge(disk, at, value)
    with pytest.raises(IntegrityError):
        read_partitions(disk, SIZE)


@pytest.mark.parametrize(("start", "end"), [(2048, SECTORS), (4000, 2048), (0, (1 << 64) - 1)])
def test_a_gpt_whose_partition_leaves_the_disk(disk: int, start: int, end: int) -> None:
    first, _ = put_gpt(disk)
    entries = bytearray(first[1024:])
    entries[32:48] = pack("<QQ", start, end)
    os.pwrite(disk, bytes(entries), 1024)
    forge(disk, 88, pack("<I", zlib.crc32(bytes(entries))))
    with pytest.raises(IntegrityError, match="does not lie on it"):
        read_partitions(disk, SIZE)


@given(st.lists(st.tuples(st.integers(0, 34 * 512 - 1), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_whatever_is_changed_is_read_or_refused(changes: list[tuple[int, int]]) -> None:
    fd = os.memfd_create("disk")
    try:
        os.truncate(fd, SIZE)
        put_gpt(fd)
        for at, value in changes:
            os.pwrite(fd, bytes([value]), at)
        try:
            found = read_partitions(fd, SIZE)
        except IntegrityError:
            return
        assert all(0 <= each.start_bytes < each.start_bytes + each.size_bytes <= SIZE for each in found)
    finally:
        os.close(fd)


def test_ext4_is_known_by_its_superblock(disk: int) -> None:
    partition = Partition(1, 1 << 20, 1 << 20)
    assert find_ext4(disk, partition) == ""
    os.pwrite(disk, b"\x53\xef", (1 << 20) + 1024 + 0x38)
    os.pwrite(disk, uuid.UUID(OWN).bytes, (1 << 20) + 1024 + 0x68)
    assert find_ext4(disk, partition) == OWN
    assert find_ext4(disk, Partition(1, SIZE - 512, 512)) == ""
