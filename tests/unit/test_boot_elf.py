"""ELF kernels: what is read of them, and everything that is refused."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nagaya.engines.kvm.boot.elf import ElfKernel, Segment, parse_elf
from nagaya.errors import Unsupported, UsageError
from tests.kernel_images import (
    LINUX_NOTE,
    PT_DYNAMIC,
    PT_INTERP,
    PT_NOTE,
    PT_TLS,
    Load,
    make_elf,
    note,
    pvh_note,
)

CODE = Load(b"\x90" * 4096, 0x1000000, 0x3000)


def parse(content: bytes) -> ElfKernel:
    return parse_elf(memoryview(content))


def test_a_kernel_is_its_segments_and_entries() -> None:
    kernel = parse(make_elf([CODE, Load(b"data", 0x2000000)], notes=LINUX_NOTE + pvh_note(0x1000040), entry=0x1000010))
    assert (kernel.entry, kernel.pvh_entry, kernel.is_linux) == (0x1000010, 0x1000040, True)
    assert [segment[1:] for segment in kernel.segments] == [(0x1000000, 4096, 0x3000), (0x2000000, 4, 4)]
    assert kernel.end == 0x2000004


def test_segments_are_where_the_file_has_them() -> None:
    content = make_elf([CODE, Load(b"data", 0x2000000)])
    segment = parse(content).segments[1]
    assert isinstance(segment, Segment)
    assert content[segment.offset : segment.offset + segment.file_bytes] == b"data"


@pytest.mark.parametrize("width", [4, 8])
def test_the_pvh_entry_has_four_or_eight_bytes(width: int) -> None:
    kernel = parse(make_elf(notes=note(b"GNU\0", 3, bytes(20)) + pvh_note(0x1000080, width)))
    assert (kernel.pvh_entry, kernel.is_linux) == (0x1000080, False)


@pytest.mark.parametrize(
    "notes",
    [
        b"",
        note(b"Xen\0", 18, bytes(3)),
        note(b"Xen\0", 17, bytes(8)),
        note(b"Xeno\0", 18, bytes(8)),
        pvh_note(0x1000000)[:-1],
        pvh_note(0x1000000)[:13],
        struct.pack("<III", 0xFFFFFFFF, 8, 18) + b"Xen\0" + bytes(8),
        struct.pack("<III", 4, 0xFFFFFFFF, 18) + b"Xen\0" + bytes(8),
        bytes(4096),
    ],
    ids=["none", "short", "other-type", "other-name", "cut-off", "cut-in-name", "huge-name", "huge-data", "zeros"],
)
def test_notes_that_are_not_the_pvh_entry(notes: bytes) -> None:
    assert parse(make_elf(notes=notes)).pvh_entry is None


def test_notes_of_eight_byte_alignment_are_found() -> None:
    notes = note(b"GNU\0", 5, bytes(12), align=8) + note(b"Xen\0", 18, (0x1000004).to_bytes(8, "little"), align=8)
    kernel = parse(make_elf([CODE, Load(notes, 0, kind=PT_NOTE, align=8)], notes=b""))
    assert kernel.pvh_entry == 0x1000004


@pytest.mark.parametrize(
    ("machine", "width", "order", "name"),
    [
        (183, 2, 1, "aarch64"),
        (243, 2, 1, "riscv"),
        (3, 1, 1, "i386"),
        (22, 2, 2, "s390x"),
        (62, 1, 1, "x32"),
        (9999, 2, 1, "9999"),
    ],
)
def test_another_cpus_kernel_is_named(machine: int, width: int, order: int, name: str) -> None:
    with pytest.raises(Unsupported, match=f"another CPU: .*{name}") as caught:
        parse(make_elf(machine=machine, width=width, order=order))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut off"),
        (b"\x7fELF", "cut off"),
        (b"MZ" + bytes(100), "not an ELF file"),
        (make_elf()[:63], "cut off"),
        (make_elf()[:100], "before its program headers"),
        (make_elf()[:-1], "beyond its end"),
        (make_elf(kind=1), "an object file"),
        (make_elf(kind=4), "a core dump"),
        (make_elf(kind=77), "ELF type 77"),
        (make_elf([CODE, Load(b"/lib/ld.so\0", 0, kind=PT_INTERP)]), "is a program"),
        (make_elf([CODE, Load(bytes(16), 0, kind=PT_TLS)]), "is a program"),
        (make_elf([CODE, Load(bytes(16), 0, kind=PT_DYNAMIC)]), "is a program"),
        (make_elf([]), "no segment to load"),
        (make_elf([Load(b"", 0x1000000, 0)]), "no segment to load"),
        (make_elf([Load(b"\x90" * 64, 0x1000000, 10)]), "sizes cannot be"),
        (make_elf([CODE._replace(gpa=1 << 60)]), "sizes cannot be"),
        (make_elf([CODE._replace(memory_bytes=1 << 60)]), "sizes cannot be"),
        (make_elf(entry=0x1001000), "entry point, 0x1001000"),  # in the part of the segment that is zeros
        (make_elf(entry=0), "entry point, 0x0"),
        (make_elf(notes=pvh_note(0x5000)), "entry point, 0x5000"),
    ],
)
def test_what_is_no_kernel_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(content)


@pytest.mark.parametrize(
    ("at", "form", "value"), [(54, "<H", 55), (56, "<H", 0), (56, "<H", 0xFFFF), (32, "<Q", (1 << 64) - 1)]
)
def test_program_headers_that_cannot_be(at: int, form: str, value: int) -> None:
    content = bytearray(make_elf())
    struct.pack_into(form, content, at, value)
    with pytest.raises(UsageError):
        parse(bytes(content))


@pytest.mark.parametrize(
    ("field", "value"), [(8, (1 << 64) - 1), (8, 1 << 40), (32, (1 << 64) - 1), (24, (1 << 64) - 1)]
)
def test_a_segments_numbers_may_be_anything(field: int, value: int) -> None:
    content = bytearray(make_elf())
    struct.pack_into("<Q", content, 64 + field, value)
    with pytest.raises(UsageError):
        parse(bytes(content))


GOOD = make_elf([CODE, Load(b"data" * 8, 0x2000000)], notes=LINUX_NOTE + pvh_note(0x1000040))


def check_anything(content: bytes) -> None:
    """Either a kernel whose every segment is in the file, or one of the errors that a user is told."""
    try:
        kernel = parse(content)
    except (UsageError, Unsupported):
        return
    assert kernel.segments
    for segment in kernel.segments:
        assert 0 <= segment.offset <= segment.offset + segment.file_bytes <= len(content)
        assert segment.file_bytes <= segment.memory_bytes


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=9)), min_size=1, max_size=5))
def test_a_changed_file_is_a_kernel_or_an_error(changes: list[tuple[int, bytes]]) -> None:
    content = bytearray(GOOD)
    for at, data in changes:
        content[at : at + len(data)] = data
    check_anything(bytes(content))


def test_random_damage_in_the_headers_is_a_kernel_or_an_error() -> None:
    chance = random.Random(3)
    interesting = (0, 1, 0x7F, 0x80, 0xFF)
    notes_at = GOOD.index(LINUX_NOTE)
    spots = [*range(64 + 56 * 3), *range(notes_at, len(GOOD))]
    for _ in range(50_000):
        content = bytearray(GOOD)
        for _ in range(chance.randint(1, 8)):
            content[chance.choice(spots)] = chance.choice((*interesting, chance.randrange(256)))
        check_anything(bytes(content[: chance.choice((len(content), chance.randrange(len(content))))]))
