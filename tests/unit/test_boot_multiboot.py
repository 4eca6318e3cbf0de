"""Multiboot as data: what is found in a file, and what a kernel is handed."""

from __future__ import annotations

import itertools
import struct

import pytest

from nagaya.engines.kvm import layout
from nagaya.engines.kvm.boot.elf import ElfKernel, Segment
from nagaya.engines.kvm.boot.image import Handover
from nagaya.engines.kvm.boot.multiboot import HEADER_MAGIC, find_header, plan_multiboot
from nagaya.errors import Unsupported, UsageError
from nagaya.memory import Region

KERNEL_GPA = 0x40_0000
MEMORY_BYTES = 32 << 20


def header(flags: int = 0, *, checksum: int | None = None) -> bytes:
    right = -(HEADER_MAGIC + flags) & 0xFFFF_FFFF
    return struct.pack("<III", HEADER_MAGIC, flags, right if checksum is None else checksum)


def handover(initrd: bytes = b"", command_line: str = "test a b") -> Handover:
    memory = (Region(0, MEMORY_BYTES, 0, 0, memoryview(bytearray(16))),)
    return Handover(memory, command_line, initrd, 0, b"")


def kernel(content: bytes) -> ElfKernel:
    return ElfKernel(KERNEL_GPA, None, False, (Segment(0, KERNEL_GPA, len(content), len(content)),))


@pytest.mark.parametrize(
    ("content", "flags"),
    [
        (header(), 0),
        (bytes(8180) + header(3), 3),
        (bytes(8184) + header(), None),  # not wholly within 8 KiB
        (bytes(2) + header(), None),  # not at a multiple of four
        (header(checksum=1), None),
        (header(checksum=1) + header(2), 2),
        (b"", None),
        (header()[:11], None),
    ],
)
def test_where_a_header_is(content: bytes, flags: int | None) -> None:
    assert find_header(memoryview(content)) == flags


def test_what_a_kernel_is_handed() -> None:
    content = header(3) + b"code"
    image = plan_multiboot(kernel(content), memoryview(content), handover(b"module" * 1000))
    state = image.state
    assert (state.rax, state.rip, state.cr0 & 1, state.cr0 >> 31, state.code.db) == (0x2BADB002, KERNEL_GPA, 1, 0, 1)
    writes = {gpa: bytes(data) for gpa, data in image.writes}
    assert writes[KERNEL_GPA] == content
    info = struct.unpack("<IIIIIII16xII", writes[state.rbx])
    flags, lower_kib, upper_kib, _, command_line, modules, modules_at, map_bytes, map_at = info
    assert flags == 0x4D  # memory, command line, modules, memory map
    assert (lower_kib, upper_kib) == (layout.LOW_RAM_END_GPA >> 10, (MEMORY_BYTES >> 10) - 1024)
    assert writes[command_line] == b"test a b\0"
    start, end, _, _ = struct.unpack("<IIII", writes[modules_at])
    assert modules == 1 and end - start == 6000 and writes[start] == b"module" * 1000
    entries = list(struct.iter_unpack("<IQQI", writes[map_at]))
    assert map_bytes == len(writes[map_at]) and all(entry[0] == 20 for entry in entries)
    assert [entry[1:] for entry in entries if entry[3] == 1][-1] == (1 << 20, MEMORY_BYTES - (1 << 20), 1)
    places = sorted((gpa, gpa + len(data)) for gpa, data in image.writes)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(places))


def test_without_a_module() -> None:
    content = header()
    image = plan_multiboot(kernel(content), memoryview(content), handover())
    info = {gpa: bytes(data) for gpa, data in image.writes}[image.state.rbx]
    assert struct.unpack_from("<I", info)[0] == 0x45


def test_refusals() -> None:
    plain = b"no header here"
    with pytest.raises(Unsupported, match="no Multiboot header"):
        plan_multiboot(kernel(plain), memoryview(plain), handover())
    wants_video = header(4)
    with pytest.raises(Unsupported, match="0x4"):
        plan_multiboot(kernel(wants_video), memoryview(wants_video), handover())
    content = header()
    with pytest.raises(UsageError, match="do not fit"):
        plan_multiboot(kernel(content), memoryview(content), handover(bytes(MEMORY_BYTES)))
