"""Where the parts of a disk are, from its partition table: GPT (UEFI 2.10, chapter 5.3), or the one of a PC's MBR (5.2).

The table is the guest's: every number is checked before anything is read by it.
"""

from __future__ import annotations

import os
import uuid
import zlib
from struct import Struct, unpack_from

from nagaya.errors import IntegrityError
from nagaya.static import NamedTuple

SECTOR = 512
_MBR_AT, _MBR_ENTRIES, _PROTECTIVE, _EXTENDED = 446, 4, 0xEE, (0x05, 0x0F, 0x85)
_MBR_ENTRY = Struct("<B3xB3xII")  # state, type, first sector, sectors
_GPT_SIGNATURE = b"EFI PART"
_GPT_HEADER = Struct("<8sIIIIQQQQ16sQIII")
_GPT_ENTRY = Struct("<16s16sQQQ")
_MOST_ENTRIES, _MOST_ENTRY_BYTES = 1024, 4096


class Partition(NamedTuple):
    """`kind`: a GPT type's UUID, upper case, or an MBR's type as two hex digits; "" = the whole disk, without a table."""

    number: int
    start_bytes: int
    size_bytes: int
    kind: str = ""
    uuid: str = ""  # lower case; GPT alone


def read_partitions(fd: int, size_bytes: int) -> tuple[Partition, ...]:
    """The partitions of the raw disk `fd`, in the table's order; of a disk without a table the disk itself.

    Raises `IntegrityError` for a table that cannot be true. Logical partitions of an MBR are not looked at.
    """
    first = os.pread(fd, SECTOR, 0)
    if len(first) < SECTOR or first[510:] != b"\x55\xaa":
        return (Partition(0, 0, size_bytes),)
    entries = [_MBR_ENTRY.unpack_from(first, _MBR_AT + 16 * number) for number in range(_MBR_ENTRIES)]
    if any(kind == _PROTECTIVE for _, kind, _, _ in entries):
        return _read_gpt(fd, size_bytes)
    if any(state not in (0, 0x80) for state, *_ in entries) or not any(kind for _, kind, _, _ in entries):
        return (Partition(0, 0, size_bytes),)  # the boot sector of a file system
    return tuple(
        _checked(Partition(number, start * SECTOR, sectors * SECTOR, f"{kind:02x}"), size_bytes)
        for number, (_, kind, start, sectors) in enumerate(entries, start=1)
        if kind and kind not in _EXTENDED
    )


def _read_gpt(fd: int, size_bytes: int) -> tuple[Partition, ...]:
    """By the first header, or the one at the disk's end where the first is damaged."""
    last = size_bytes // SECTOR - 1
    try:
        return _read_entries(fd, size_bytes, at_sector=1)
    except IntegrityError as problem:
        try:
            return _read_entries(fd, size_bytes, at_sector=last)
        except IntegrityError:
            raise problem from None


def _read_entries(fd: int, size_bytes: int, *, at_sector: int) -> tuple[Partition, ...]:
    raw = os.pread(fd, SECTOR, at_sector * SECTOR)
    if len(raw) < SECTOR or raw[:8] != _GPT_SIGNATURE:
        raise IntegrityError("the disk's partition table (GPT) is missing")
    _, _, length, checksum, _, here, _, _, _, _, table, count, step, table_checksum = _GPT_HEADER.unpack_from(raw)
    if not _GPT_HEADER.size <= length <= SECTOR or here != at_sector:
        raise IntegrityError("the header of the disk's partition table (GPT) is damaged")
    if zlib.crc32(raw[:16] + bytes(4) + raw[20:length]) != checksum:
        raise IntegrityError("the header of the disk's partition table (GPT) does not match its checksum")
    if not 0 < count <= _MOST_ENTRIES or step % 128 or not 0 < step <= _MOST_ENTRY_BYTES:
        raise IntegrityError(f"the disk's partition table (GPT) is to have {count} entries of {step} bytes")
    if table * SECTOR + count * step > size_bytes:
        raise IntegrityError("the disk's partition table (GPT) lies behind its end")
    content = os.pread(fd, count * step, table * SECTOR)
    if len(content) < count * step or zlib.crc32(content) != table_checksum:
        raise IntegrityError("the disk's partition table (GPT) does not match its checksum")
    found = []
    for number in range(count):
        kind, own, start, end, _ = _GPT_ENTRY.unpack_from(content, number * step)
        if any(kind):
            names = str(uuid.UUID(bytes_le=kind)).upper(), str(uuid.UUID(bytes_le=own))
            size = (end - start + 1) * SECTOR
            found.append(_checked(Partition(number + 1, start * SECTOR, size, *names), size_bytes))
    return tuple(found)


def _checked(partition: Partition, size_bytes: int) -> Partition:
    if partition.size_bytes <= 0 or partition.start_bytes + partition.size_bytes > size_bytes:
        raise IntegrityError(f"partition {partition.number} of the disk does not lie on it")
    return partition


_SUPERBLOCK_AT, _MAGIC, _UUID = 1024, 0x38, 0x68


def find_ext4(fd: int, partition: Partition) -> str:
    """The UUID of the ext2, ext3 or ext4 file system in a partition; "" where there is none."""
    block = os.pread(fd, 1024, partition.start_bytes + _SUPERBLOCK_AT)
    if len(block) < 1024 or unpack_from("<H", block, _MAGIC)[0] != 0xEF53:
        return ""
    return str(uuid.UUID(bytes=block[_UUID : _UUID + 16]))
