"""The decoder, against known bytes and against what binutils says of a corpus that it assembled itself."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nagaya.engines.kvm.instructions import LONGEST, REGISTERS, Instruction, Operand, address_of, decode, measure

NARROW = {
    **{f"e{name[1:]}": name for name in REGISTERS[:8]},
    **{f"{name}d": name for name in REGISTERS[8:]},
    **{name[1:]: name for name in REGISTERS[:8]},
    **{f"{name}w": name for name in REGISTERS[8:]},
    "eip": "rip",
}


def decoded(text: str) -> Instruction:
    found = decode(bytes.fromhex(text))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("code", "opcode", "length", "modrm"),
    [
        ("0f01ca", "0f01", 3, 0xCA),  # clac
        ("0f01cb", "0f01", 3, 0xCB),  # stac
        ("0f01f8", "0f01", 3, 0xF8),  # swapgs
        ("9b", "9b", 1, 0),  # fwait
        ("cc", "cc", 1, 0),  # int3
        ("480f07", "0f07", 3, 0),  # sysretq
        ("0f07", "0f07", 2, 0),  # sysretl
        ("0fae1425 00100000", "0fae", 8, 0x14),  # ldmxcsr 0x1000
    ],
)
def test_opcodes(code: str, opcode: str, length: int, modrm: int) -> None:
    found = decoded(code)
    assert (found.opcode.hex(), found.length, found.modrm) == (opcode, length, modrm)


def test_interrupts_number_is_part_of_the_instruction() -> None:
    assert decoded("cd80")[:2] == (b"\xcd", 2)
    assert decoded("cd80").immediate == 0x80


@pytest.mark.parametrize(
    ("code", "size", "register", "operand"),
    [
        ("f30fb8c8", 4, "rcx", Operand(register="rax")),
        ("66f30fb8c8", 2, "rcx", Operand(register="rax")),
        ("f3480fb8c8", 8, "rcx", Operand(register="rax")),
        ("66f3480fb8c8", 8, "rcx", Operand(register="rax")),  # REX.W wins over 66
        ("f3450fb8c8", 4, "r9", Operand(register="r8")),
        ("f30fb808", 4, "rcx", Operand(base="rax")),
        ("f30fb848f8", 4, "rcx", Operand(base="rax", displacement=-8)),
        ("f30fb88800010000", 4, "rcx", Operand(base="rax", displacement=256)),
        ("f30fb80d10000000", 4, "rcx", Operand(base="rip", displacement=16)),
        ("f3410fb80d10000000", 4, "rcx", Operand(base="rip", displacement=16)),  # REX.B does not make it r13
        ("f30fb80c24", 4, "rcx", Operand(base="rsp")),
        ("f3410fb80c24", 4, "rcx", Operand(base="r12")),
        ("f3420fb80c60", 4, "rcx", Operand(base="rax", scaled="r12", scale=2)),  # r12 is an index, rsp is none
        ("f30fb80c2500000080", 4, "rcx", Operand(displacement=-(1 << 31))),
        ("f30fb80ccd04000000", 4, "rcx", Operand(scaled="rcx", scale=8, displacement=4)),
        ("f30fb84c6500", 4, "rcx", Operand(base="rbp")),  # "no index" times 2
        ("65f30fb808", 4, "rcx", Operand(base="rax", segment="gs")),
        ("f0646567f30fb808", 4, "rcx", Operand(base="rax", segment="gs", short=True)),  # the last one counts
    ],
)
def test_operands(code: str, size: int, register: str, operand: Operand) -> None:
    found = decoded(code)
    assert (found.opcode, found.repeat, found.size, found.register) == (b"\x0f\xb8", 0xF3, size, register)
    assert found.operand == operand
    assert found.length == len(bytes.fromhex(code))


def test_reg_field_without_its_extension_is_in_the_modrm() -> None:
    assert decoded("0fae10").modrm >> 3 & 7 == 2


@pytest.mark.parametrize(
    "code", ["9b", "cd80", "480f07", "0f01f8", "65f3480fb88c6500010000", "67f30fb80c2500000080", "0fae55f8"]
)
def test_cut_off_anywhere_is_none(code: str) -> None:
    whole = bytes.fromhex(code)
    assert decode(whole) is not None
    for length in range(len(whole)):
        assert decode(whole[:length]) is None


def test_prefixes_without_an_end_are_cut_off() -> None:
    assert decode(b"\x66" * LONGEST) is None


@given(st.binary(max_size=LONGEST))
def test_any_bytes_are_an_instruction_inside_them_or_none(code: bytes) -> None:
    found = decode(code)
    if found is not None:
        assert 1 <= found.length <= len(code)
        assert decode(code[: found.length]) == found
        assert decode(code[: found.length - 1]) is None


# -- addresses


def address(code: str, **registers: int) -> int:
    return address_of(decoded(code), lambda name: registers[name], lambda name: {"fs": 0x1000, "gs": 1 << 40}[name])


@pytest.mark.parametrize(
    ("code", "registers", "expected"),
    [
        ("f30fb848f8", {"rax": 0x1000}, 0xFF8),
        ("f30fb848f8", {"rax": 0}, 0xFFFF_FFFF_FFFF_FFF8),
        ("f30fb80d10000000", {"rip": 0x1000}, 0x1018),  # from the next instruction on
        ("f3420fb80c60", {"rax": 5, "r12": 0x100}, 0x205),
        ("65f30fb80c2508000000", {}, (1 << 40) + 8),
        ("64f30fb808", {"rax": 1}, 0x1001),
        ("2ef30fb808", {"rax": 1}, 1),  # no base in 64-bit mode
        ("f30fb80c2500000080", {}, 0xFFFF_FFFF_8000_0000),
        ("67f30fb848f8", {"rax": 0x1_0000_0000}, 0xFFFF_FFF8),
        ("6567f30fb808", {"rax": 0x1_0000_0001}, (1 << 40) + 1),
    ],
)
def test_address_of_an_operand(code: str, registers: dict[str, int], expected: int) -> None:
    assert address(code, **registers) == expected


# -- against binutils


def corpus() -> list[str]:
    """AT&T syntax: every addressing mode, with registers from both halves, and the opcodes that are completed."""
    lines = ["clac", "stac", "swapgs", "fwait", "int3", "int $0x80", "sysretl", "sysretq"]
    bases = ("", "%rax", "%rbp", "%rsp", "%r8", "%r12", "%r13", "%r15")
    indices = ("", "%rcx", "%rbp", "%r12", "%r13")
    places = ["0x1000", "-0x8", "0x10(%rip)", "-0x1000(%rip)"]
    for base, index, displacement in product(bases, indices, ("", "-0x8", "0x7f", "0x12345678")):
        if base or index:
            places.append(f"{displacement}({base}" + (f",{index},{1 << len(places) % 4}" if index else "") + ")")
    narrow = [re.sub(r"%r(\d+)", r"%r\1d", re.sub(r"%r([a-z]\w)", r"%e\1", place)) for place in places[2::7]]
    for number, place in enumerate(places + narrow):
        segment = ("", "%gs:", "%fs:", "%es:")[number % 4]
        register = ("%ecx", "%r9d", "%rdx", "%r14", "%si", "%r11w")[number % 6]
        lines += [f"popcnt {segment}{place}, {register}", f"ldmxcsr {segment}{place}"]
    lines += [
        f"popcnt {a}, {b}"
        for names in (("%eax", "%r12d"), ("%r13", "%rsp"), ("%di", "%r8w"))
        for a in names
        for b in names
    ]
    return lines


def parse_operand(text: str) -> Operand:
    """objdump's AT&T syntax."""
    if re.fullmatch(r"%\w+", text):
        return Operand(register=NARROW.get(text[1:], text[1:]))
    match = re.fullmatch(r"(?:%(\w\w):)?(-?0x[0-9a-f]+)?(?:\((?:%(\w+))?(?:,%(\w+),(\d))?\))?", text)
    assert match, text
    segment, displacement, base, scaled, scale = (part or "" for part in match.groups())
    value = int(displacement or "0", 16)
    if value >= 1 << 63:
        value -= 1 << 64
    registers = [NARROW.get(name, name) for name in (base, scaled)]
    short = any(name in NARROW for name in (base, scaled))
    return Operand("", registers[0], registers[1], int(scale or 1), value, segment, short)


def test_binutils_agrees(tmp_path: Path) -> None:
    assembler, disassembler = shutil.which("as"), shutil.which("objdump")
    if assembler is None or disassembler is None:
        pytest.skip("needs binutils")
    lines = corpus()
    (tmp_path / "corpus.s").write_text("\n".join(lines) + "\n")
    made = str(tmp_path / "corpus.o")
    subprocess.run([assembler, "--64", "-o", made, str(tmp_path / "corpus.s")], check=True, timeout=10)
    ran = subprocess.run([disassembler, "-d", "-w", made], check=True, capture_output=True, text=True, timeout=10)
    listed = re.findall(r"^ +[0-9a-f]+:\t((?:[0-9a-f]{2} )+) *\t(.*)$", ran.stdout, re.MULTILINE)
    assert len(listed) == len(lines) > 250
    for code, text in listed:
        whole = bytes.fromhex(code)
        found = decode((whole + b"\x90" * LONGEST)[:LONGEST])
        assert found is not None, text
        assert found.length == len(whole), text
        words = re.match(r"(?:(es) )?(popcnt|ldmxcsr)\w? +(\S+?)(?:,%(\w+))?(?: +#.*)?$", text)
        if words:
            without_effect, operation, place, register = words.groups()
            operand = parse_operand(place)
            operand = operand._replace(segment=operand.segment or without_effect or "")
            assert found.operand == operand, (text, code)
            if operation == "popcnt":
                assert found.register == NARROW.get(register, register), text
                assert found.size == (
                    8 if register in REGISTERS and register not in NARROW else 2 if size_is_2(register) else 4
                )
    assert sum("popcnt" in text for _, text in listed) > 120


def size_is_2(register: str) -> bool:
    return register.endswith("w") or len(register) == 2


@pytest.mark.parametrize(
    "code",
    [
        "55", "4157", "53", "4889fb", "b901000000", "48b80102030405060708", "31c0", "488b4620", "488b442408", "f7c700000800",
        "c6873d04000000", "83e7fd", "48c7c600000000", "803f00", "4885f6", "668907", "66b80100", "66c7070100", "0fb607",
        "480faff7", "480f44c2", "488d6c2440", "488b84d800000000", "f7d8", "69c000010000", "6bc005", "4863c7",
    ],
)  # fmt: skip
def test_starts_of_functions_that_can_be_moved(code: str) -> None:
    whole = bytes.fromhex(code)
    assert measure(whole + b"\xcc" * 16) == len(whole)
    assert measure(whole[:-1]) == 0 or (len(whole) > 1 and measure(whole[:-1]) <= len(whole))


@pytest.mark.parametrize(
    "code",
    [
        "", "833d0000000000", "488b0500000000", "e800000000", "eb00", "7400", "0f8400000000", "9c", "9d", "fa", "fb", "c3",
        "cd80", "0f05", "cc", "f4", "e6b7", "f3ab", "ff25000000000000", "f0ff07", "658b0425", "48",
    ],
)  # fmt: skip
def test_what_cannot_be_moved_or_is_not_known(code: str) -> None:
    assert measure(bytes.fromhex(code)) == 0


def test_a_disassembler_agrees_on_the_lengths_of_whatever_is_moved(tmp_path: Path) -> None:
    disassembler = shutil.which("objdump")
    if disassembler is None:
        pytest.skip("needs binutils")
    dice = random.Random(11)
    codes = [c + b"\x90" * 16 for _ in range(20000) if 1 < measure(c := dice.randbytes(15)) <= 15]
    assert len(codes) > 1000
    (tmp_path / "codes").write_bytes(b"".join(code[:31].ljust(32, b"\x90") for code in codes))
    command = [disassembler, "-D", "-w", "-b", "binary", "-m", "i386:x86-64", str(tmp_path / "codes")]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    lengths = {
        int(at, 16): (len(bytes.fromhex(code)), text)
        for at, code, text in re.findall(r"^ +([0-9a-f]+):\t((?:[0-9a-f]{2} )+) *\t(.*)$", ran.stdout, re.MULTILINE)
    }
    seen = 0
    for number, code in enumerate(codes):
        if 32 * number in lengths and "(bad)" not in lengths[32 * number][1]:
            seen += 1
            assert lengths[32 * number][0] == measure(code), (code.hex(), lengths[32 * number])
    assert seen > len(codes) // 2
