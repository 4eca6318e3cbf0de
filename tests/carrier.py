"""A boot image as an ELF file that QEMU can load: our planner's bytes and registers in a machine that is not ours.

QEMU enters the file by PVH. A stub copies what belongs into the first megabyte, where QEMU's firmware worked until then,
and loads the planned registers in the processor's own way: so it also tells whether GDT and page tables are any good.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from nagaya.engines.kvm.boot.image import BootImage, EntryState
from tests.kernel_images import Load, make_elf, pvh_note

STUB_GPA = 0x6000000
_STAGING_GPA = 0x6100000
_PAGE = 4096
_EFER = 0xC000_0080
_EFER_ACTIVE = 1 << 10  # the processor sets it itself


def make_carrier(image: BootImage, tables: Sequence[tuple[int, bytes]]) -> bytes:
    """The image, and `tables` beside it (below 1 MiB). Between 96 and 112 MiB the image must have nothing."""
    writes = [(gpa, bytes(data)) for gpa, data in (*image.writes, *tables)]
    loads, copies, staging = [], b"", _STAGING_GPA
    for gpa, data in writes:
        if gpa >= 1 << 20:
            loads.append(Load(data, gpa))
            continue
        loads.append(Load(data, staging))
        # mov esi, staging; mov edi, gpa; mov ecx, size; rep movsb
        copies += struct.pack("<BIBIBI", 0xBE, staging, 0xBF, gpa, 0xB9, len(data)) + b"\xf3\xa4"
        staging += -(-len(data) // _PAGE) * _PAGE
    stub = b"\xfa\xfc" + copies + _load_state(image.state, STUB_GPA + 2 + len(copies))  # cli; cld
    return make_elf([Load(stub, STUB_GPA), *loads], entry=STUB_GPA, notes=pvh_note(STUB_GPA))


def _load_state(state: EntryState, gpa: int) -> bytes:
    def load(register: int, value: int) -> bytes:  # mov r32, imm32
        return struct.pack("<BI", 0xB8 + register, value)

    eax, ecx, ebx, esp, esi = 0, 1, 3, 4, 6
    code = b""
    if state.efer:
        code += load(eax, state.cr4) + b"\x0f\x22\xe0" + load(eax, state.cr3) + b"\x0f\x22\xd8"  # mov cr4, eax; mov cr3
        code += load(ecx, _EFER) + load(eax, state.efer & ~_EFER_ACTIVE) + b"\x31\xd2\x0f\x30"  # xor edx, edx; wrmsr
    code += load(eax, state.cr0) + b"\x0f\x22\xc0"
    jump = gpa + 7 + len(code) + 7
    far_jump = struct.pack("<BIH", 0xEA, jump, state.code.selector)
    after = load(eax, state.data.selector) + b"\x8e\xd8\x8e\xc0\x8e\xd0\x8e\xe0\x8e\xe8"  # mov ds, eax; es, ss, fs, gs
    after += load(esp, state.rsp) + load(esi, state.rsi) + load(ebx, state.rbx) + load(eax, state.rip) + b"\xff\xe0"
    lgdt = b"\x0f\x01\x15" + struct.pack("<I", jump + len(after))
    return lgdt + code + far_jump + after + struct.pack("<HI", state.gdt_limit, state.gdt_gpa)
