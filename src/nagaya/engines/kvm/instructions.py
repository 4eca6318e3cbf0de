"""Decoding the few x86 instructions that a software KVM does not emulate in kernel mode (Intel SDM, volume 2).

64-bit mode only, and only as far as completing one instruction takes: prefixes, opcode, ModRM, SIB, displacement.
"""

from __future__ import annotations

from nagaya.static import Callable, NamedTuple

REGISTERS = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
"""In the order of their encoding."""

_SEGMENTS = {0x26: "es", 0x2E: "cs", 0x36: "ss", 0x3E: "ds", 0x64: "fs", 0x65: "gs"}
_NO_MODRM = {b"\xcc", b"\xcd", b"\x9b", b"\x0f\x07"}
LONGEST = 15


class Operand(NamedTuple):
    """The r/m operand: `register`, or memory at base + scaled * scale + displacement in `segment`."""

    register: str = ""
    base: str = ""
    scaled: str = ""
    scale: int = 1
    displacement: int = 0
    segment: str = ""
    short: bool = False
    """An address of 32 bits: prefix 67."""


class Instruction(NamedTuple):
    """`opcode` without prefixes: one byte, or 0f and one more."""

    opcode: bytes
    length: int
    repeat: int
    """The mandatory prefix f2 or f3, or 0."""
    size: int
    """Of the operands: 2, 4 or 8 bytes."""
    modrm: int
    register: str
    """The reg field's register; `modrm >> 3 & 7` where that field is part of the opcode."""
    operand: Operand
    immediate: int


def decode(code: bytes) -> Instruction | None:
    """The instruction at the start of `code`, of at most 15 bytes; None when it is cut off."""
    try:
        return _decode(code)
    except IndexError:
        return None


def _decode(code: bytes) -> Instruction:
    at, repeat, segment, size, rex, short = 0, 0, "", 4, 0, False
    while True:
        byte = code[at]
        if byte in (0xF2, 0xF3):
            repeat = byte
        elif byte == 0x66:
            size = 2
        elif byte in _SEGMENTS:
            segment = _SEGMENTS[byte]
        elif byte == 0x67:
            short = True
        elif byte != 0xF0:
            break
        at += 1
    if byte & 0xF0 == 0x40:
        rex = byte
        at += 1
        size = 8 if rex & 8 else size
    opcode = code[at : at + 2] if code[at] == 0x0F else code[at : at + 1]
    at += len(opcode)
    if opcode == b"\x0f":
        raise IndexError
    if opcode in _NO_MODRM:
        immediate = code[at] if opcode == b"\xcd" else 0
        return Instruction(opcode, at + (opcode == b"\xcd"), repeat, size, 0, "", Operand(), immediate)
    modrm = code[at]
    operand, at = _decode_operand(code, at, rex, segment)
    operand = operand._replace(short=short and not operand.register)
    return Instruction(opcode, at, repeat, size, modrm, REGISTERS[modrm >> 3 & 7 | (rex & 4) << 1], operand, 0)


def _decode_operand(code: bytes, at: int, rex: int, segment: str) -> tuple[Operand, int]:
    modrm = code[at]
    mode, low = modrm >> 6, modrm & 7
    at += 1
    if mode == 3:
        return Operand(register=REGISTERS[low | (rex & 1) << 3]), at
    base, index, scale = REGISTERS[low | (rex & 1) << 3], "", 1
    width = (0, 1, 4)[mode]
    if low == 4:
        sib = code[at]
        at += 1
        number = sib >> 3 & 7 | (rex & 2) << 2
        if number != 4:  # rsp cannot be an index
            index, scale = REGISTERS[number], 1 << (sib >> 6)
        base = REGISTERS[sib & 7 | (rex & 1) << 3]
        if sib & 7 == 5 and mode == 0:
            base, width = "", 4
    elif low == 5 and mode == 0:
        base, width = "rip", 4
    if at + width > len(code):
        raise IndexError
    displacement = int.from_bytes(code[at : at + width], "little", signed=True)
    return Operand("", base, index, scale, displacement, segment), at + width


def measure(code: bytes) -> int:
    """The length of the instruction at the start of `code`, when it does the same wherever it stands; else 0.

    Of those that functions begin with; what is not known counts as one that cannot be moved.
    """
    try:
        return _measure(code)
    except IndexError:
        return 0


def _measure(code: bytes) -> int:
    at, size, rex = 0, 4, 0
    if code[at] == 0x66:
        at, size = 1, 2
    if code[at] & 0xF0 == 0x40:
        rex = code[at]
        at += 1
    opcode = code[at]
    at += 1
    if opcode & 0xF0 == 0x50:  # push, pop
        return at
    if opcode & 0xF8 == 0xB8:  # mov with an immediate
        return at + (8 if rex & 8 else size)
    if opcode == 0x0F:
        opcode = code[at] | 0x0F00
        at += 1
    if opcode not in _MOVABLE:
        return 0
    modrm = code[at]
    operand, at = _decode_operand(code, at, rex, "")
    if operand.base == "rip":
        return 0
    immediate = _MOVABLE[opcode]
    if opcode in (0xF6, 0xF7):
        immediate = immediate if modrm >> 3 & 7 < 2 else 0  # test has one, not and neg do not
    return at + (size if immediate == 4 else immediate)


# Arithmetic of registers and memory, moves, tests; and how many bytes their immediates have (4: as the operand, at most).
_MOVABLE = (
    {base | form: 0 for base in range(0x00, 0x40, 8) for form in range(4)}
    | dict.fromkeys((0x63, 0x84, 0x85, 0x88, 0x89, 0x8A, 0x8B, 0x8D), 0)
    | dict.fromkeys((0x6B, 0x80, 0x83, 0xC0, 0xC1, 0xC6, 0xF6), 1)
    | dict.fromkeys((0x69, 0x81, 0xC7, 0xF7), 4)
    | dict.fromkeys((0x0FAF, 0x0FB6, 0x0FB7, 0x0FBE, 0x0FBF, *range(0x0F40, 0x0F50)), 0)
)


def address_of(instruction: Instruction, value: Callable[[str], int], segment_base: Callable[[str], int]) -> int:
    """The linear address of a memory operand. `value` reads a register, "rip" being that of this instruction."""
    operand = instruction.operand
    address = operand.displacement
    if operand.base == "rip":
        address += value("rip") + instruction.length  # relative to the next one
    elif operand.base:
        address += value(operand.base)
    if operand.scaled:
        address += value(operand.scaled) * operand.scale
    if operand.short:
        address &= 0xFFFF_FFFF
    if operand.segment in ("fs", "gs"):  # in 64-bit mode the others have no base
        address += segment_base(operand.segment)
    return address & 0xFFFF_FFFF_FFFF_FFFF
