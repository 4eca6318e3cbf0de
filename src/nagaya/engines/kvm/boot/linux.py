"""Linux's 64-bit boot protocol: Documentation/arch/x86/boot.rst, "64-bit Boot Protocol", and zero-page.rst.

The kernel starts in long mode with the first 4 GiB mapped one to one, and RSI at its `boot_params`.
"""

from __future__ import annotations

import struct

from nagaya.engines.kvm import layout
from nagaya.engines.kvm.boot.elf import ElfKernel
from nagaya.engines.kvm.boot.image import (
    CR0_EXTENSION_TYPE,
    CR0_PROTECTED,
    BootImage,
    EntryState,
    Handover,
    SegmentRegister,
    Span,
    Write,
    encode_command_line,
    place_initrd,
    plan_memory_map,
    plan_segments,
)
from nagaya.static import Any, Sequence

BOOT_PARAMS_BYTES = 4096
SETUP_HEADER_AT = 0x1F1
SETUP_HEADER_END = 0x26C
"""Of protocol 2.15. An older kernel's ends before."""
_MADE_VERSION = 0x020F  # Linux 5.5 and later
_LOADER_UNDEFINED = 0xFF
_LOADED_HIGH = 1 << 0
_INITRD_LAST_GPA = 0x7FFF_FFFF  # what every bzImage says since Linux 3.9; a vmlinux has no header to say so

# Fields of boot_params, the setup header's among them: where, and what.
_ACPI_RSDP_ADDR = (0x070, "<Q")
_E820_ENTRIES = (0x1E8, "<B")
_BOOT_FLAG = (0x1FE, "<H")
_HEADER = (0x202, "<4s")
_VERSION = (0x206, "<H")
_TYPE_OF_LOADER = (0x210, "<B")
_LOADFLAGS = (0x211, "<B")
_RAMDISK_IMAGE = (0x218, "<I")
_RAMDISK_SIZE = (0x21C, "<I")
_CMD_LINE_PTR = (0x228, "<I")
_INITRD_ADDR_MAX = (0x22C, "<I")
_CMDLINE_SIZE = (0x238, "<I")
_SETUP_DATA = (0x250, "<Q")
_E820_TABLE_AT = 0x2D0
_E820_ENTRY = struct.Struct("<QQI")

_SETUP_DATA_HEAD = struct.Struct("<QII")
_SETUP_RNG_SEED = 9

# __BOOT_CS and __BOOT_DS of arch/x86/include/asm/segment.h. The processor looks at the GDT only when it loads a selector.
_CODE = SegmentRegister(0, 0xFFFF_FFFF, 0x10, type=0xB, present=1, dpl=0, db=0, s=1, l=1, g=1)
_DATA = SegmentRegister(0, 0xFFFF_FFFF, 0x18, type=0x3, present=1, dpl=0, db=1, s=1, l=0, g=1)
_TASK = SegmentRegister(0, 0x67, 0x20, type=0xB, present=1, dpl=0, db=0, s=0, l=0, g=0)
_GDT = struct.pack("<6Q", 0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x0000_8B00_0000_0067, 0)

_CR0_WRITE_PROTECT = 1 << 16
_CR0_PAGING = 1 << 31
_CR4_PHYSICAL_ADDRESS_EXTENSION = 1 << 5
_EFER_LONG_MODE = 1 << 8 | 1 << 10  # enabled, and active

_TABLE = 4096
_PRESENT_WRITABLE = 0b11
_LARGE_PAGE = 1 << 7
_DIRECTORIES = 4  # each maps 1 GiB


def plan_linux(kernel: ElfKernel, content: memoryview, handover: Handover) -> BootImage:
    """Start a `vmlinux`. Raises `UsageError` when something does not fit into memory."""
    writes = plan_segments(kernel.segments, content, handover.memory)
    writes += plan_handover(handover, header=_make_header(), kernel_end=kernel.end)
    return BootImage(tuple(writes), enter_long_mode(kernel.entry))


def plan_handover(handover: Handover, *, header: bytes, kernel_end: int) -> list[Write]:
    """Everything but the kernel: boot_params, command line, initial RAM disk, GDT and page tables.

    `header` is the setup header, from 0x1f1 on; `kernel_end` the first gpa that the kernel leaves alone. Raises `UsageError`.
    """
    params = bytearray(BOOT_PARAMS_BYTES)
    params[SETUP_HEADER_AT : SETUP_HEADER_AT + len(header)] = header
    most_bytes, initrd_last = _get(params, _CMDLINE_SIZE), _get(params, _INITRD_ADDR_MAX)
    _put(params, _TYPE_OF_LOADER, _LOADER_UNDEFINED)
    _put(params, _LOADFLAGS, params[_LOADFLAGS[0]] | _LOADED_HIGH)
    _put(params, _ACPI_RSDP_ADDR, handover.rsdp_gpa)
    _put(params, _CMD_LINE_PTR, layout.COMMAND_LINE_GPA)
    writes: list[Write] = [
        (layout.GDT_GPA, _GDT),
        (layout.PAGE_TABLES_GPA, plan_page_tables()),
        (layout.COMMAND_LINE_GPA, encode_command_line(handover.command_line, most_bytes)),
    ]
    if size_bytes := len(handover.initrd):
        gpa = place_initrd(size_bytes, above=kernel_end, last=initrd_last, memory=handover.memory)
        _put(params, _RAMDISK_IMAGE, gpa)
        _put(params, _RAMDISK_SIZE, size_bytes)
        writes.append((gpa, handover.initrd))
    if handover.rng_seed:
        _put(params, _SETUP_DATA, layout.SETUP_DATA_GPA)
        head = _SETUP_DATA_HEAD.pack(0, _SETUP_RNG_SEED, len(handover.rng_seed))
        writes.append((layout.SETUP_DATA_GPA, head + handover.rng_seed))
    _put_memory_map(params, plan_memory_map(handover.memory))
    writes.append((layout.BOOT_PARAMS_GPA, bytes(params)))
    return writes


def plan_page_tables() -> bytes:
    """The first 4 GiB one to one, in pages of 2 MiB, which every CPU has: PML4, PDPT, and four page directories."""
    first = layout.PAGE_TABLES_GPA
    directories = [first + (2 + index) * _TABLE | _PRESENT_WRITABLE for index in range(_DIRECTORIES)]
    pages = range(_LARGE_PAGE | _PRESENT_WRITABLE, _DIRECTORIES << 30, 2 << 20)
    return b"".join(
        struct.pack(f"<{len(entries)}Q", *entries).ljust(_TABLE, b"\0")
        for entries in ([first + _TABLE | _PRESENT_WRITABLE], directories, pages)
    )


def enter_long_mode(entry: int) -> EntryState:
    """The state that the protocol asks for: 64-bit code, flat segments, interrupts off."""
    return EntryState(
        rip=entry,
        rsp=layout.BOOT_STACK_GPA,
        rsi=layout.BOOT_PARAMS_GPA,
        rbx=0,
        cr0=CR0_PROTECTED | CR0_EXTENSION_TYPE | _CR0_WRITE_PROTECT | _CR0_PAGING,
        cr3=layout.PAGE_TABLES_GPA,
        cr4=_CR4_PHYSICAL_ADDRESS_EXTENSION,
        efer=_EFER_LONG_MODE,
        code=_CODE,
        data=_DATA,
        task=_TASK,
        gdt_gpa=layout.GDT_GPA,
        gdt_limit=len(_GDT) - 1,
    )


def _make_header() -> bytes:
    """The setup header that a vmlinux has lost: what the kernel itself reads of it."""
    params = bytearray(SETUP_HEADER_END)
    _put(params, _BOOT_FLAG, 0xAA55)
    _put(params, _HEADER, b"HdrS")
    _put(params, _VERSION, _MADE_VERSION)
    _put(params, _INITRD_ADDR_MAX, _INITRD_LAST_GPA)
    _put(params, _CMDLINE_SIZE, 2047)  # COMMAND_LINE_SIZE of arch/x86/include/asm/setup.h, less the zero that ends it
    return bytes(params[SETUP_HEADER_AT:])


def _put_memory_map(params: bytearray, spans: Sequence[Span]) -> None:
    _put(params, _E820_ENTRIES, len(spans))
    for index, span in enumerate(spans):
        _E820_ENTRY.pack_into(params, _E820_TABLE_AT + index * _E820_ENTRY.size, *span)


def _put(params: bytearray, field: tuple[int, str], value: int | bytes) -> None:
    struct.pack_into(field[1], params, field[0], value)


def _get(params: bytearray, field: tuple[int, str]) -> Any:
    return struct.unpack_from(field[1], params, field[0])[0]
