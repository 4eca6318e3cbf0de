"""Read a kernel in the Executable and Linkable Format (System V ABI, AMD64 supplement): a Linux `vmlinux`, or another.

The file may be anything. Every offset and size is checked before it is used; nothing is copied.
"""

from __future__ import annotations

from struct import Struct

from nagaya.errors import Unsupported, UsageError
from nagaya.static import NamedTuple

MAGIC = b"\x7fELF"
HEADER_BYTES = 64
XEN_PHYS32_ENTRY = 18
"""XEN_ELFNOTE_PHYS32_ENTRY: xen/include/public/elfnote.h."""

_IDENT = Struct("<4sBBBB8x")
_HEADER = Struct("<HHIQQQIHHHHHH")
_PROGRAM = Struct("<IIQQQQQQ")
_NOTE = Struct("<III")
_CLASS_64, _LITTLE_ENDIAN = 2, 1
_ET_EXEC, _ET_DYN = 2, 3
_EM_X86_64 = 62
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP, _PT_NOTE, _PT_TLS = 1, 2, 3, 4, 7
_MOST_PROGRAM_HEADERS = 128  # Linux has 5
_MOST_NOTES = 256
_MOST_GPA = 1 << 52
_MACHINES = {
    2: "sparc", 3: "i386", 8: "mips", 20: "ppc", 21: "ppc64", 22: "s390x", 40: "arm", 43: "sparc64", 50: "ia64",
    183: "aarch64", 243: "riscv", 258: "loongarch",
}  # fmt: skip
_TYPES = {1: "an object file", 4: "a core dump"}


class Segment(NamedTuple):
    """Bytes of the file and where they go; from `file_bytes` to `memory_bytes`, zeros."""

    offset: int
    gpa: int
    file_bytes: int
    memory_bytes: int


class ElfKernel(NamedTuple):
    """A kernel as a loader needs it."""

    entry: int
    """Where its 64-bit entry is: a gpa, as Linux says it."""
    pvh_entry: int | None
    """Its 32-bit PVH entry (a gpa), when it has one."""
    is_linux: bool
    segments: tuple[Segment, ...]

    @property
    def end(self) -> int:
        """The first gpa after all of it."""
        return max(segment.gpa + segment.memory_bytes for segment in self.segments)


def parse_elf(content: memoryview) -> ElfKernel:
    """Raises `UsageError` for what is not a kernel or not all of one, `Unsupported` for one of another CPU."""
    header_at, header_count = _parse_header(content)
    segments, notes = [], []
    for index in range(header_count):
        kind, _, offset, _, gpa, file_bytes, memory_bytes, align = _PROGRAM.unpack_from(
            content, header_at + index * _PROGRAM.size
        )
        if kind in (_PT_INTERP, _PT_DYNAMIC, _PT_TLS):
            raise UsageError("it is a program and not a kernel", hint="name a vmlinux or bzImage file")
        if kind not in (_PT_LOAD, _PT_NOTE) or not memory_bytes | file_bytes:
            continue
        if offset > len(content) or file_bytes > len(content) - offset:
            raise UsageError("the kernel's file is cut off: a segment lies beyond its end")
        if kind == _PT_NOTE:
            notes.append((offset, offset + file_bytes, align))
            continue
        if file_bytes > memory_bytes or gpa > _MOST_GPA or memory_bytes > _MOST_GPA:
            raise UsageError("the kernel's file is damaged: a segment's sizes cannot be")
        segments.append(Segment(offset, gpa, file_bytes, memory_bytes))
    if not segments:
        raise UsageError("the kernel's file is damaged: it has no segment to load")
    pvh_entry, is_linux = _scan_notes(content, notes)
    entry: int = _HEADER.unpack_from(content, _IDENT.size)[3]
    for address in (entry, pvh_entry):
        if address is not None and not any(s.gpa <= address < s.gpa + s.file_bytes for s in segments):
            raise UsageError(f"the kernel's entry point, {address:#x}, is in none of its segments")
    return ElfKernel(entry, pvh_entry, is_linux, tuple(segments))


def _parse_header(content: memoryview) -> tuple[int, int]:
    """Where the program headers are, and how many."""
    if len(content) < HEADER_BYTES:
        raise UsageError("the kernel's file is cut off: it ends in its header")
    magic, width, order, _, _ = _IDENT.unpack_from(content, 0)
    if magic != MAGIC:
        raise UsageError("it is not an ELF file")
    kind, machine, _, _, header_at, _, _, _, entry_bytes, count, _, _, _ = _HEADER.unpack_from(content, _IDENT.size)
    if order != _LITTLE_ENDIAN:
        machine = machine >> 8 | (machine & 0xFF) << 8
    if machine != _EM_X86_64 or width != _CLASS_64 or order != _LITTLE_ENDIAN:
        name = "x32" if machine == _EM_X86_64 else _MACHINES.get(machine, f"ELF machine {machine}")
        raise Unsupported(
            f"the kernel is for another CPU: {name}", hint="a machine of this type runs x86-64 kernels only"
        )
    if kind not in (_ET_EXEC, _ET_DYN):
        raise UsageError(
            f"it is {_TYPES.get(kind, f'of ELF type {kind}')} and not a kernel", hint="name a vmlinux file"
        )
    if entry_bytes != _PROGRAM.size or not 0 < count <= _MOST_PROGRAM_HEADERS:
        raise UsageError("the kernel's file is damaged: its program headers cannot be")
    if header_at > len(content) or count * _PROGRAM.size > len(content) - header_at:
        raise UsageError("the kernel's file is cut off: it ends before its program headers")
    return header_at, count


def _scan_notes(content: memoryview, notes: list[tuple[int, int, int]]) -> tuple[int | None, bool]:
    """The PVH entry, and whether Linux's build left its notes. A note that runs out of its segment ends the search."""
    pvh_entry, is_linux, seen = None, False, 0
    for start, end, align in notes:
        align = 8 if align == 8 else 4
        at = start
        while at + _NOTE.size <= end and seen < _MOST_NOTES:
            name_bytes, data_bytes, kind = _NOTE.unpack_from(content, at)
            name_at = at + _NOTE.size
            data_at = start + _round_up(name_at + name_bytes - start, align)
            if data_at + data_bytes > end:
                break
            name = bytes(content[name_at : name_at + min(name_bytes, 8)])
            if name == b"Xen\0" and kind == XEN_PHYS32_ENTRY and data_bytes in (4, 8):
                pvh_entry = int.from_bytes(content[data_at : data_at + data_bytes], "little")
            is_linux |= name == b"Linux\0"
            at = start + _round_up(data_at + data_bytes - start, align)
            seen += 1
    return pvh_entry, is_linux


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
