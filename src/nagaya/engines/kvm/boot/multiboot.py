"""The Multiboot way into a kernel: the Multiboot Specification, version 0.6.96. Small kernels, and test programs, have it.

The kernel starts in 32-bit protected mode without paging, EAX at a magic number and EBX at the boot information.
"""

from __future__ import annotations

from struct import Struct

from nagaya.engines.kvm import layout
from nagaya.engines.kvm.boot.elf import ElfKernel
from nagaya.engines.kvm.boot.image import (
    BootImage,
    Handover,
    Write,
    encode_command_line,
    place_initrd,
    plan_memory_map,
    plan_segments,
)
from nagaya.engines.kvm.boot.pvh import enter_protected_mode, plan_gdt
from nagaya.errors import Unsupported

HEADER_MAGIC = 0x1BAD_B002
_LOADED_MAGIC = 0x2BAD_B002
_HEADER = Struct("<III")  # magic, flags, checksum
_SEARCH_BYTES = 8192
_REQUIRED = (
    0xFFFF & ~0x3
)  # flags 0 and 1, alignment and memory information, are met; an unknown one refuses to be ignored

_INFO = Struct(
    "<IIIIIII16xII"
)  # flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, mmap_length, mmap_addr
_HAS_MEMORY, _HAS_COMMAND_LINE, _HAS_MODULES, _HAS_MEMORY_MAP = 1 << 0, 1 << 2, 1 << 3, 1 << 6
_MODULE = Struct("<IIII")
_MEMORY_MAP_ENTRY = Struct("<IQQI")  # the size, 20, does not count itself
_INFO_GPA = layout.PVH_START_INFO_GPA
_MODULE_GPA = _INFO_GPA + 0x80
_MEMORY_MAP_GPA = _INFO_GPA + 0xA0
_INITRD_LAST_GPA = 0x7FFF_FFFF


def find_header(content: memoryview) -> int | None:
    """The flags of a file's Multiboot header, which is in its first 8 KiB; None when it has none (section 3.1)."""
    for at in range(0, min(_SEARCH_BYTES, len(content)) - _HEADER.size + 1, 4):
        magic, flags, checksum = _HEADER.unpack_from(content, at)
        if magic == HEADER_MAGIC and not (magic + flags + checksum) & 0xFFFF_FFFF:
            found: int = flags
            return found
    return None


def plan_multiboot(kernel: ElfKernel, content: memoryview, handover: Handover) -> BootImage:
    """Start an ELF kernel by its Multiboot header. `handover.rng_seed` and `rsdp_gpa` have no place here.

    Raises `Unsupported` for what the header asks and we have not, `UsageError` when something does not fit into memory.
    """
    flags = find_header(content)
    if flags is None:
        raise Unsupported("the kernel has no Multiboot header", hint="start it by another protocol")
    if flags & _REQUIRED:
        raise Unsupported(f"the kernel's Multiboot header asks for more than there is: flags {flags:#x}")
    writes = plan_segments(kernel.segments, content, handover.memory)
    writes.append((layout.GDT_GPA, plan_gdt()))
    writes.append((layout.COMMAND_LINE_GPA, encode_command_line(handover.command_line, layout.COMMAND_LINE_BYTES - 1)))
    modules = 0
    if size_bytes := len(handover.initrd):
        gpa = place_initrd(size_bytes, above=kernel.end, last=_INITRD_LAST_GPA, memory=handover.memory)
        writes.append((gpa, handover.initrd))
        writes.append((_MODULE_GPA, _MODULE.pack(gpa, gpa + size_bytes, 0, 0)))
        modules = 1
    writes += _plan_info(handover, modules)
    state = enter_protected_mode(kernel.entry, rbx=_INFO_GPA)._replace(rax=_LOADED_MAGIC)
    return BootImage(tuple(writes), state)


def _plan_info(handover: Handover, modules: int) -> list[Write]:
    spans = plan_memory_map(handover.memory)
    memory_map = b"".join(_MEMORY_MAP_ENTRY.pack(_MEMORY_MAP_ENTRY.size - 4, *span) for span in spans)
    low = handover.memory[0]
    info = _INFO.pack(
        _HAS_MEMORY | _HAS_COMMAND_LINE | _HAS_MEMORY_MAP | (_HAS_MODULES if modules else 0),
        layout.LOW_RAM_END_GPA >> 10, (low.gpa + low.size_bytes - layout.HIGH_RAM_GPA) >> 10, 0, layout.COMMAND_LINE_GPA,
        modules, _MODULE_GPA if modules else 0, len(memory_map), _MEMORY_MAP_GPA,
    )  # fmt: skip
    return [(_INFO_GPA, info), (_MEMORY_MAP_GPA, memory_map)]
