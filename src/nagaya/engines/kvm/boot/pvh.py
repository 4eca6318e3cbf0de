"""The PVH way into a kernel: Xen's docs/misc/pvh.pandoc, and `hvm_start_info` of xen/include/public/arch-x86/hvm/start_info.h.

The kernel starts in 32-bit protected mode without paging, EBX at the start info.
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
    Write,
    encode_command_line,
    place_initrd,
    plan_memory_map,
    plan_segments,
)
from nagaya.errors import Unsupported

_MAGIC = 0x336E_C578
_VERSION = 1  # with a memory map
_START_INFO = struct.Struct("<IIIIQQQQIxxxx")
_MODULE = struct.Struct("<QQQQ")
_MEMORY_MAP_ENTRY = struct.Struct("<QQIxxxx")
_MODULE_GPA = layout.PVH_START_INFO_GPA + 0x40
_MEMORY_MAP_GPA = layout.PVH_START_INFO_GPA + 0x80
_INITRD_LAST_GPA = 0x7FFF_FFFF

_CODE = SegmentRegister(0, 0xFFFF_FFFF, 0x08, type=0xB, present=1, dpl=0, db=1, s=1, l=0, g=1)
_DATA = SegmentRegister(0, 0xFFFF_FFFF, 0x10, type=0x3, present=1, dpl=0, db=1, s=1, l=0, g=1)
_TASK = SegmentRegister(0, 0x67, 0x18, type=0xB, present=1, dpl=0, db=0, s=0, l=0, g=0)
_GDT = struct.pack("<4Q", 0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x0000_8B00_0000_0067)


def plan_pvh(kernel: ElfKernel, content: memoryview, handover: Handover) -> BootImage:
    """Start an ELF kernel by its PVH entry. `handover.rng_seed` has no place here.

    Raises `Unsupported` when it has no such entry, `UsageError` when something does not fit into memory.
    """
    if kernel.pvh_entry is None:
        raise Unsupported(
            "the kernel has no PVH entry", hint="build it with CONFIG_PVH=y, or start it by Linux's own protocol"
        )
    writes = plan_segments(kernel.segments, content, handover.memory)
    writes.append((layout.GDT_GPA, _GDT))
    writes.append((layout.COMMAND_LINE_GPA, encode_command_line(handover.command_line, layout.COMMAND_LINE_BYTES - 1)))
    modules = 0
    if size_bytes := len(handover.initrd):
        gpa = place_initrd(size_bytes, above=kernel.end, last=_INITRD_LAST_GPA, memory=handover.memory)
        writes.append((gpa, handover.initrd))
        writes.append((_MODULE_GPA, _MODULE.pack(gpa, size_bytes, 0, 0)))
        modules = 1
    return BootImage(
        (*writes, *_plan_start_info(handover, modules)),
        enter_protected_mode(kernel.pvh_entry, rbx=layout.PVH_START_INFO_GPA),
    )


def _plan_start_info(handover: Handover, modules: int) -> list[Write]:
    spans = plan_memory_map(handover.memory)
    start_info = _START_INFO.pack(
        _MAGIC, _VERSION, 0, modules, _MODULE_GPA if modules else 0, layout.COMMAND_LINE_GPA, handover.rsdp_gpa,
        _MEMORY_MAP_GPA, len(spans),
    )  # fmt: skip
    memory_map = b"".join(_MEMORY_MAP_ENTRY.pack(*span) for span in spans)
    return [(layout.PVH_START_INFO_GPA, start_info), (_MEMORY_MAP_GPA, memory_map)]


def plan_gdt() -> bytes:
    """What belongs at `layout.GDT_GPA` for `enter_protected_mode`."""
    return _GDT


def enter_protected_mode(entry: int, *, rbx: int) -> EntryState:
    """32 bits, flat segments, no paging."""
    return EntryState(
        rip=entry,
        rsp=layout.BOOT_STACK_GPA,
        rsi=0,
        rbx=rbx,
        cr0=CR0_PROTECTED | CR0_EXTENSION_TYPE,
        cr3=0,
        cr4=0,
        efer=0,
        code=_CODE,
        data=_DATA,
        task=_TASK,
        gdt_gpa=layout.GDT_GPA,
        gdt_limit=len(_GDT) - 1,
    )
