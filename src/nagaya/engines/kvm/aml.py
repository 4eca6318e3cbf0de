"""ACPI Machine Language, as far as a virtual machine's description needs it: each function is one term, as bytes.

ACPI 6.5, chapter 20 "ACPI Machine Language (AML) Specification" and section 6.4 "Resource Data Types for ACPI".
"""

from __future__ import annotations

import struct

ZERO, ONE = b"\x00", b"\x01"
ARG0 = b"\x68"
_EXTENDED = b"\x5b"
_MOST_PACKAGE_BYTES = 1 << 28
_MOST_SEGMENTS = 255


def name_string(path: str) -> bytes:
    r"""A path in the namespace: `\_SB.PWRB`, `^PWRB`, `_CRS`. Segments of less than four letters are filled up."""
    bare = path.lstrip("\\^")
    prefix = path[: len(path) - len(bare)].encode("ascii")
    segments = [_segment(segment) for segment in bare.split(".")] if bare else []
    if len(segments) > _MOST_SEGMENTS:
        raise ValueError(f"{path}: too long")
    match len(segments):
        case 0:
            return prefix + b"\x00"
        case 1:
            return prefix + segments[0]
        case 2:
            return prefix + b"\x2e" + b"".join(segments)
        case count:
            return prefix + b"\x2f" + bytes([count]) + b"".join(segments)


def integer(value: int) -> bytes:
    """A number from 0 to 2^64 - 1, in the shortest form."""
    if value < 2:
        return ONE if value == 1 else ZERO if value == 0 else _refuse(value)
    for prefix, form, bits in ((b"\x0a", "<B", 8), (b"\x0b", "<H", 16), (b"\x0c", "<I", 32), (b"\x0e", "<Q", 64)):
        if value < 1 << bits:
            return prefix + struct.pack(form, value)
    return _refuse(value)


def string(text: str) -> bytes:
    data = text.encode("ascii")
    if b"\0" in data:
        raise ValueError("a string ends at a zero byte")
    return b"\x0d" + data + b"\0"


def eisa_id(name: str) -> bytes:
    """A device's identity of seven characters, `PNP0C0C`, packed into a number. ACPI 6.5, section 6.1.5."""
    letters = [ord(letter) - 0x40 for letter in name[:3]]
    if len(name) != 7 or not all(0 < letter < 27 for letter in letters):
        raise ValueError(f"{name}: three capitals and four digits")
    packed = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(name[3:], 16)
    return b"\x0c" + struct.pack(">I", packed)


def name(path: str, value: bytes) -> bytes:
    return b"\x08" + name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    return b"\x10" + _package(name_string(path), *terms)


def device(path: str, *terms: bytes) -> bytes:
    return _EXTENDED + b"\x82" + _package(name_string(path), *terms)


def method(path: str, *terms: bytes, arguments: int, serialized: bool) -> bytes:
    return b"\x14" + _package(name_string(path), bytes([arguments | serialized << 3]), *terms)


def package(*elements: bytes) -> bytes:
    return b"\x12" + _package(bytes([len(elements)]), *elements)


def if_equal(left: bytes, right: bytes, *terms: bytes) -> bytes:
    return b"\xa0" + _package(b"\x93", left, right, *terms)


def notify(path: str, value: int) -> bytes:
    return b"\x86" + name_string(path) + integer(value)


def resource_template(*resources: bytes) -> bytes:
    """A buffer of resource descriptors, with the end tag, whose checksum 0 means that there is none."""
    content = b"".join(resources) + b"\x79\0"
    return b"\x11" + _package(integer(len(content)), content)


def memory32_fixed(gpa: int, size_bytes: int) -> bytes:
    """Read-write memory below 4 GiB."""
    return struct.pack("<BHBII", 0x86, 9, 1, gpa, size_bytes)


def interrupt(gsi: int) -> bytes:
    """Extended interrupt: consumed, rising edge, not shared."""
    consumer, edge = 1 << 0, 1 << 1
    return struct.pack("<BHBBI", 0x89, 6, consumer | edge, 1, gsi)


def io_ports(first: int, count: int) -> bytes:
    """Ports at an address that does not move, all 16 bits of it decoded."""
    return struct.pack("<BBHHBB", 0x47, 1, first, first, 1, count)


def _segment(text: str) -> bytes:
    if not 0 < len(text) <= 4 or not all(c == "_" or c.isupper() or c.isdigit() for c in text) or text[0].isdigit():
        raise ValueError(f"{text!r} is not a name of ACPI")
    return text.encode("ascii").ljust(4, b"_")


def _package(*parts: bytes) -> bytes:
    """The parts after their PkgLength, which counts itself: six bits in one byte, or four and eight in each of 1 to 3 more."""
    content = b"".join(parts)
    if len(content) + 1 < 1 << 6:
        return bytes([len(content) + 1]) + content
    for more in (1, 2, 3):
        total = len(content) + 1 + more
        if total < 1 << 4 + 8 * more:
            return bytes([more << 6 | total & 0xF]) + (total >> 4).to_bytes(more, "little") + content
    raise ValueError(f"{len(content)} bytes are more than {_MOST_PACKAGE_BYTES}")


def _refuse(value: int) -> bytes:
    raise ValueError(f"{value} is not a number of ACPI")
