"""From a kernel's file to memory and registers: both protocols, where things lie, and what does not fit."""

from __future__ import annotations

import gc
import os
import random
import struct
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import pytest

from nagaya.engines.kvm import layout
from nagaya.engines.kvm.boot.image import BootImage, place_initrd, write_image
from nagaya.engines.kvm.boot.linux import enter_long_mode
from nagaya.engines.kvm.boot.load import extract_vmlinux, load_kernel
from nagaya.errors import GuestFault, IntegrityError, NagayaError, NotFound, Unsupported, UsageError
from nagaya.memory import GuestMemory, Region
from tests.kernel_images import (
    LINUX_NOTE,
    Load,
    make_bzimage,
    make_elf,
    make_payload,
    pvh_note,
    ram,
)

MIB = 1 << 20
LINUX = make_elf(
    [Load(b"\x90" * 4096, 0x1000000, 0x3000), Load(b"data", 0x2000000)], notes=LINUX_NOTE + pvh_note(0x1000040)
)


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinux"
    path.write_bytes(LINUX)
    return path


def load(
    path: Path, *, memory: tuple[Region, ...] = ram(128 * MIB), command_line: str = "console=hvc0", **more: object
) -> BootImage:
    return load_kernel(str(path), memory=memory, command_line=command_line, **more)  # type: ignore[arg-type]


def written(image: BootImage) -> dict[int, bytes]:
    return {gpa: bytes(data) for gpa, data in image.writes}


def boot_params(image: BootImage) -> bytes:
    return written(image)[layout.BOOT_PARAMS_GPA]


def field(params: bytes, at: int, form: str) -> int:
    value: int = struct.unpack_from(form, params, at)[0]
    return value


def memory_map(params: bytes) -> list[tuple[int, int, int]]:
    return [struct.unpack_from("<QQI", params, 0x2D0 + 20 * i) for i in range(params[0x1E8])]


def check_no_overlap(image: BootImage) -> None:
    spans = sorted((gpa, gpa + len(data)) for gpa, data in image.writes)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


# -- the 64-bit protocol


def test_a_vmlinux_starts_at_its_entry_with_its_boot_params(kernel: Path) -> None:
    image = load(kernel, rsdp_gpa=0xE0000)
    state, places = image.state, written(image)
    check_no_overlap(image)
    assert places[0x1000000] == b"\x90" * 4096 and places[0x2000000] == b"data"
    assert (state.rip, state.rsi, state.cr3) == (0x1000000, layout.BOOT_PARAMS_GPA, layout.PAGE_TABLES_GPA)
    assert (state.code.selector, state.data.selector, state.code.l) == (0x10, 0x18, 1)
    params = boot_params(image)
    assert len(params) == 4096 and params[0x202:0x206] == b"HdrS" and field(params, 0x1FE, "<H") == 0xAA55
    assert field(params, 0x206, "<H") == 0x020F and params[0x210] == 0xFF and params[0x211] & 1
    assert field(params, 0x070, "<Q") == 0xE0000
    assert places[field(params, 0x228, "<I")] == b"console=hvc0\0"
    assert field(params, 0x218, "<I") == field(params, 0x21C, "<I") == 0
    assert (
        field(params, 0x250, "<Q") == 0 and params[0x1EF] == 0
    )  # no setup_data; the sentinel says that this is all valid


def test_the_first_four_gib_are_mapped_one_to_one(kernel: Path) -> None:
    image = load(kernel)
    tables = written(image)[image.state.cr3]

    def entry(table_gpa: int, index: int) -> int:
        return field(tables, table_gpa - image.state.cr3 + 8 * index, "<Q")

    for address in (0, 0x7000, 0x1000000, 0x3FFFFFFF, 0x40000000, 0xFEE00000, 0xFFFFFFFF):
        level3 = entry(image.state.cr3, 0)
        level2 = entry(level3 & ~0xFFF, address >> 30)
        page = entry(level2 & ~0xFFF, address >> 21 & 511)
        assert level3 & level2 & page & 3 == 3 and page & 0x80
        assert (page & ~0x1FFFFF) + (address & 0x1FFFFF) == address
    assert entry(image.state.cr3, 1) == 0 and field(tables, 4096 + 8 * 4, "<Q") == 0


def test_the_gdt_agrees_with_the_hidden_segments(kernel: Path) -> None:
    for protocol in ("linux", "pvh"):
        image = load(kernel, protocol=protocol)
        state, gdt = image.state, written(image)[layout.GDT_GPA]
        assert state.gdt_limit == len(gdt) - 1
        for segment in (state.code, state.data, state.task):
            raw = field(gdt, segment.selector, "<Q")
            limit = raw & 0xFFFF | raw >> 32 & 0xF0000
            assert (limit << 12 | 0xFFF if raw >> 55 & 1 else limit) == segment.limit
            assert raw >> 40 & 0xF == segment.type and raw >> 44 & 1 == segment.s and raw >> 47 & 1 == segment.present
            assert (raw >> 53 & 1, raw >> 54 & 1, raw >> 55 & 1) == (segment.l, segment.db, segment.g)


def test_the_memory_map_has_a_hole_where_the_devices_are(kernel: Path) -> None:
    image = load(kernel, memory=ram(0xC0000000, high_bytes=1 << 30))
    assert memory_map(boot_params(image)) == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x60400, 2),
        (0x100000, 0xC0000000 - 0x100000, 1),
        (1 << 32, 1 << 30, 1),
    ]


def test_the_initial_ram_disk_lies_as_high_as_it_can(kernel: Path, tmp_path: Path) -> None:
    disk = tmp_path / "initrd"
    disk.write_bytes(b"070701" + bytes(9994))
    for memory_bytes, expected in ((128 * MIB, 128 * MIB - 12288), (3 << 30, 0x80000000 - 12288)):
        image = load(kernel, memory=ram(memory_bytes), initrd=str(disk))
        params = boot_params(image)
        assert (field(params, 0x218, "<I"), field(params, 0x21C, "<I")) == (expected, 10000)
        assert written(image)[expected] == disk.read_bytes()
        check_no_overlap(image)


def test_a_seed_is_handed_over_as_setup_data(kernel: Path) -> None:
    image = load(kernel, rng_seed=b"s" * 32)
    at = field(boot_params(image), 0x250, "<Q")
    assert written(image)[at] == struct.pack("<QII", 0, 9, 32) + b"s" * 32
    check_no_overlap(image)


def test_large_parts_are_views_of_the_files(kernel: Path, tmp_path: Path) -> None:
    disk = tmp_path / "initrd"
    disk.write_bytes(bytes(4096))
    views = [data for _, data in load(kernel, initrd=str(disk)).writes if isinstance(data, memoryview)]
    assert [len(view) for view in views] == [4096, 4, 4096] and all(view.readonly for view in views)


def test_everything_fits_into_real_memory(kernel: Path) -> None:
    memory = GuestMemory.allocate(64 * MIB)
    try:
        image = load(kernel, memory=memory.regions)
        write_image(image, memory)
        assert memory.read(0x2000000, 8) == b"data\0\0\0\0"
        for gpa, data in image.writes:
            assert memory.read(gpa, len(data)) == data
    finally:
        memory.close()


def test_a_file_that_is_cut_short_meanwhile_is_an_error(kernel: Path, tmp_path: Path) -> None:
    """Copied in this process, what is missing would be a SIGBUS, and the end of it."""
    disk = tmp_path / "initrd"
    memory = GuestMemory.allocate(64 * MIB)
    try:
        for left in (0, 4096, 3 * MIB):
            disk.write_bytes(b"i" * (4 * MIB))
            image = load(kernel, memory=memory.regions, initrd=str(disk))
            os.truncate(disk, left)
            with pytest.raises(IntegrityError, match="changed while it was read"):
                write_image(image, memory)
    finally:
        memory.close()


def test_memory_above_four_gib_is_another_part_of_the_file() -> None:
    memory = GuestMemory.allocate((3 << 30) + 2 * MIB)  # no page of it is taken
    try:
        state = enter_long_mode(0)
        write_image(BootImage((((1 << 32) + 4096, memoryview(b"high")), (0x1000, memoryview(b"low"))), state), memory)
        assert memory.read((1 << 32) + 4096, 4) == b"high" and memory.read(0x1000, 3) == b"low"
        with pytest.raises(GuestFault):
            write_image(BootImage(((0xC0000000 - 1, memoryview(b"over")),), state), memory)
    finally:
        memory.close()


# -- PVH


def test_the_pvh_entry_gets_its_start_info(kernel: Path, tmp_path: Path) -> None:
    disk = tmp_path / "initrd"
    disk.write_bytes(b"i" * 5000)
    image = load(kernel, protocol="pvh", initrd=str(disk), rsdp_gpa=0xE0000)
    check_no_overlap(image)
    places, state = written(image), image.state
    assert (state.rip, state.rbx, state.cr0 & 1, state.cr0 >> 31, state.efer) == (0x1000040, 0x8000, 1, 0, 0)
    assert (state.code.l, state.code.db) == (0, 1)
    info = struct.unpack("<IIIIQQQQIxxxx", places[state.rbx])
    magic, version, _, modules, module_list, command_line, rsdp, map_gpa, map_entries = info
    assert (magic, version, modules, rsdp, map_entries) == (0x336EC578, 1, 1, 0xE0000, 3)
    assert places[command_line] == b"console=hvc0\0"
    gpa, size, text, _ = struct.unpack("<4Q", places[module_list])
    assert (size, text, places[gpa]) == (5000, 0, b"i" * 5000)
    spans = list(struct.iter_unpack("<QQIxxxx", places[map_gpa]))
    assert spans == [(0, 0x9FC00, 1), (0x9FC00, 0x60400, 2), (0x100000, 127 * MIB, 1)]


@pytest.mark.parametrize(
    ("notes", "protocol", "entry"),
    [
        (LINUX_NOTE + pvh_note(0x1000040), "auto", 0x1000000),
        (LINUX_NOTE + pvh_note(0x1000040), "pvh", 0x1000040),
        (pvh_note(0x1000040), "auto", 0x1000040),
        (pvh_note(0x1000040), "linux", 0x1000000),
        (LINUX_NOTE, "auto", 0x1000000),
        (b"", "auto", 0x1000000),
    ],
)
def test_which_way_in(notes: bytes, protocol: str, entry: int, kernel: Path) -> None:
    kernel.write_bytes(make_elf(notes=notes))
    assert load(kernel, protocol=protocol).state.rip == entry


def test_pvh_needs_its_entry(kernel: Path) -> None:
    kernel.write_bytes(make_elf(notes=LINUX_NOTE))
    with pytest.raises(Unsupported, match=r"cannot start .*vmlinux: the kernel has no PVH entry"):
        load(kernel, protocol="pvh")


# -- bzImages


def test_a_bzimage_is_the_kernel_in_it(kernel: Path) -> None:
    direct = written(load(kernel)), load(kernel).state
    kernel.write_bytes(make_bzimage(make_payload(LINUX + b"relocations", "xz")))
    assert (written(load(kernel)), load(kernel).state) == direct
    assert load(kernel, protocol="pvh").state.rip == 0x1000040
    assert extract_vmlinux(str(kernel)) == LINUX + b"relocations"


def test_what_only_the_kernel_can_decompress_it_decompresses(kernel: Path, tmp_path: Path) -> None:
    disk = tmp_path / "initrd"
    disk.write_bytes(bytes(5000))
    content = make_bzimage(b"\x89LZO" + bytes(60) + struct.pack("<I", 4096), command_line_bytes=40)
    kernel.write_bytes(content)
    image = load(kernel, initrd=str(disk))
    check_no_overlap(image)
    assert image.state.rip == 0x1000000 + 0x200 and written(image)[0x1000000] == content[1536:]
    params = boot_params(image)
    assert (
        params[0x1F1:0x202] == content[0x1F1:0x202]
        and params[0x230:0x26C] == content[0x230:0x250] + params[0x250:0x258] + content[0x258:0x26C]
    )
    assert (params[0x210], field(params, 0x21C, "<I")) == (0xFF, 5000)
    with pytest.raises(UsageError, match="the kernel reads 40"):
        load(kernel, command_line="x" * 41)
    with pytest.raises(UsageError, match="needs memory from 0x1000000 to 0x1400000"):
        load(kernel, memory=ram(17 * MIB))
    with pytest.raises(Unsupported, match="LZO"):
        load(kernel, protocol="pvh")
    with pytest.raises(Unsupported, match="LZO"):
        extract_vmlinux(str(kernel))


def test_a_bzimage_with_something_else_in_it(kernel: Path) -> None:
    kernel.write_bytes(make_bzimage(make_payload(b"something else" * 100)))
    with pytest.raises(Unsupported, match="not an ELF file"):
        extract_vmlinux(str(kernel))
    kernel.write_bytes(make_bzimage(make_payload(make_elf(machine=183))))
    with pytest.raises(Unsupported, match="aarch64"):
        load(kernel)


# -- what does not fit


@pytest.mark.parametrize(
    ("memory_bytes", "message"),
    [(16 * MIB, "0x1000000 to 0x1003000"), (32 * MIB, "0x2000000 to 0x2000004"), (MIB, "has 1 MiB")],
)
def test_too_little_memory_is_said_with_numbers(memory_bytes: int, message: str, kernel: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load(kernel, memory=ram(memory_bytes))
    assert "more memory" in caught.value.hint


@pytest.mark.parametrize("gpa", [0, 0x7000, 0xFFFFF])
def test_a_kernel_must_not_lie_on_the_tables(gpa: int, kernel: Path) -> None:
    kernel.write_bytes(make_elf([Load(b"\x90" * 16, gpa)], entry=gpa))
    with pytest.raises(UsageError, match="machine's tables"):
        load(kernel)


@pytest.mark.parametrize("gpa", [0xBFFFF000, 0xC0000000, 0xD0000000, 0xFEE00000, (1 << 32) + MIB])
def test_a_kernel_must_not_lie_in_the_hole(gpa: int, kernel: Path) -> None:
    kernel.write_bytes(make_elf([Load(b"\x90" * 16, gpa, 8192)], entry=gpa))
    with pytest.raises(UsageError, match="needs memory"):
        load(kernel, memory=ram(0xC0000000, high_bytes=MIB))


def test_kernel_and_initial_ram_disk_must_both_fit(kernel: Path, tmp_path: Path) -> None:
    disk = tmp_path / "initrd"
    with open(disk, "wb") as file:
        file.truncate(8 * MIB)
    with pytest.raises(UsageError, match="of 8 MiB do not fit") as caught:
        load(kernel, memory=ram(36 * MIB), initrd=str(disk))
    assert "at least 41 MiB" in caught.value.hint
    load(kernel, memory=ram(41 * MIB), initrd=str(disk))


def test_initial_ram_disks_go_to_whole_pages() -> None:
    assert place_initrd(1, above=0, last=0xFFFF_FFFF, memory=ram(MIB)) == MIB - 4096
    assert place_initrd(4096, above=MIB - 4096, last=0xFFFF_FFFF, memory=ram(MIB)) == MIB - 4096
    with pytest.raises(UsageError):
        place_initrd(4097, above=MIB - 4096, last=0xFFFF_FFFF, memory=ram(MIB))


@pytest.mark.parametrize("protocol", ["linux", "pvh"])
def test_command_lines_have_a_limit(protocol: str, kernel: Path) -> None:
    most = 2047 if protocol == "linux" else layout.COMMAND_LINE_BYTES - 1
    assert b"x" * most + b"\0" in written(load(kernel, protocol=protocol, command_line="x" * most)).values()
    with pytest.raises(UsageError, match=f"has {most + 1} bytes; the kernel reads {most}"):
        load(kernel, protocol=protocol, command_line="x" * (most + 1))
    with pytest.raises(UsageError, match="zero byte"):
        load(kernel, protocol=protocol, command_line="a\0b")


def test_a_command_line_of_any_letters(kernel: Path) -> None:
    assert "name=長屋\0".encode() in written(load(kernel, command_line="name=長屋")).values()
    assert b"name=\xff\0" in written(load(kernel, command_line=os.fsdecode(b"name=\xff"))).values()


# -- what is no kernel


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", UsageError, "is empty"),
        (b"hello", UsageError, "not a kernel"),
        (bytes(100000), UsageError, "not a kernel"),
        (b"#!/bin/sh\n", UsageError, "a script"),
        (b"070701" + bytes(200), UsageError, "an initial RAM disk"),
        (b"\x1f\x8b" + bytes(200), UsageError, "compressed with gzip"),
        (b"MZ\0\0zimg" + bytes(200), UsageError, "an EFI program"),
        (b"QFI\xfb" + bytes(600), UsageError, "a qcow2 disk"),
        (bytes(510) + b"\x55\xaa" + bytes(512), UsageError, "a disk"),
        (bytes(0x38) + b"ARM\x64" + bytes(100), Unsupported, "aarch64"),
        (bytes(0x38) + b"RSC\x05" + bytes(100), Unsupported, "riscv"),
        (bytes(0x24) + b"\x18\x28\x6f\x01" + bytes(100), Unsupported, "arm"),
        (make_elf(machine=3, width=1), Unsupported, "i386"),
        (make_elf()[:2000], UsageError, "cut off"),
        (make_bzimage(make_payload(LINUX))[:1600], UsageError, "cut off"),
        (make_bzimage(make_payload(LINUX, "xz")[:-4] + b"\1\0\0\0"), IntegrityError, "damaged"),
    ],
)  # fmt: skip
def test_files_that_are_no_kernel(content: bytes, error: type[NagayaError], message: str, kernel: Path) -> None:
    kernel.write_bytes(content)
    for protocol in ("auto", "linux", "pvh"):
        with pytest.raises(error, match=message) as caught:
            load(kernel, protocol=protocol)
        assert str(kernel) in caught.value.message == str(caught.value)


def test_paths_that_are_no_files(kernel: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no kernel .*missing"):
        load(tmp_path / "missing")
    with pytest.raises(NotFound, match=r"no initial RAM disk .*missing"):
        load(kernel, initrd=str(tmp_path / "missing"))
    with pytest.raises(NagayaError, match=str(tmp_path)):
        load(tmp_path)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(UsageError):
        load(fifo)  # and does not wait for a writer
    with pytest.raises(NagayaError):
        load(Path("/dev/zero"))


def test_no_descriptor_stays_open(kernel: Path) -> None:
    gc.collect()  # what other tests have left to it
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        load(kernel)
        with pytest.raises(NotFound):
            load(kernel, initrd="/nonexistent")
    assert len(os.listdir("/proc/self/fd")) == before


def test_random_damage_is_an_image_inside_memory_or_an_error(kernel: Path) -> None:
    chance = random.Random(5)
    for good in (LINUX, make_bzimage(make_payload(LINUX, "lz4"))):
        spots = [*range(0x26C), *range(max(0, len(good) - 200), len(good))]
        for _ in range(600):
            content = bytearray(good)
            for _ in range(chance.randint(1, 6)):
                content[chance.choice(spots)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
            kernel.write_bytes(content)
            try:
                image = load(kernel, protocol=chance.choice(("auto", "linux", "pvh")))
            except (UsageError, Unsupported, IntegrityError):
                continue
            for gpa, data in image.writes:
                assert gpa >= 0 and gpa + len(data) <= 128 * MIB


def test_a_real_kernels_plan_takes_no_time(tmp_path: Path) -> None:
    """A vmlinux of 48 MiB: nothing of it is read but its headers."""
    big = tmp_path / "vmlinux"
    with open(big, "wb") as file:
        file.write(make_elf([Load(b"\x90" * 4096, 0x1000000, 0x3000)], notes=b""))
        file.truncate(48 * MIB)
    with open(big, "r+b") as file:  # the segment is all of it
        file.seek(64 + 32)
        file.write(struct.pack("<QQ", 47 * MIB, 47 * MIB))
    best = 1.0
    for _ in range(20):
        start = time.perf_counter()
        load(big)
        best = min(best, time.perf_counter() - start)
    assert best < 0.002


def test_a_program_of_this_host_is_refused() -> None:
    for program in ("/bin/sh", "/bin/busybox"):
        if os.path.exists(program):
            with pytest.raises(UsageError, match="is a program"):
                load(Path(program))


def test_an_object_file_is_refused(tmp_path: Path) -> None:
    try:
        subprocess.run(["gcc", "-c", "-xc", "/dev/null", "-o", str(tmp_path / "x.o")], check=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("gcc is not installed")
    with pytest.raises(UsageError, match="an object file"):
        load(tmp_path / "x.o")
