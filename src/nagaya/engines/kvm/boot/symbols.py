"""Where a kernel's functions are: its ELF file's own table of symbols (System V ABI, chapter 4)."""

from __future__ import annotations

import os
import stat
from struct import Struct

from nagaya.engines.kvm.boot.elf import HEADER_BYTES, MAGIC
from nagaya.static import Iterable, Iterator

_HEADER = Struct("<40xQ10xHHH")  # e_shoff, e_shentsize, e_shnum, e_shstrndx
_SECTION = Struct("<IIQQQQIIQQ")
_SYMBOL = Struct("<IBBHQQ")
_OFFSET = Struct("<I")
_SYMTAB = 2
_UNTYPED, _FUNCTION = 0, 2
_MOST_SECTIONS = 4096
_MOST_TABLE_BYTES = 32 << 20
_MOVES = b"\0page_offset_base\0"
"""A variable of Linux kernels that choose the places of their memory maps when they boot."""


def list_functions(path: str) -> list[tuple[int, str]]:
    """All of a kernel's functions, by linear address: for profiles. Raises `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        symbols, strings = _read_tables(fd)
    finally:
        os.close(fd)
    table = list(_SYMBOL.iter_unpack(symbols[: len(symbols) // _SYMBOL.size * _SYMBOL.size]))
    code = {section for _, kind, _, section, _, _ in table if kind & 0xF == _FUNCTION and section}
    return sorted(
        (address, strings[name : strings.find(b"\0", name)].decode(errors="replace"))
        for name, kind, _, section, address, _ in table
        if section in code and kind & 0xF in (_UNTYPED, _FUNCTION)  # what is written in assembly may have no type
    )


def find_functions(path: str, names: Iterable[str]) -> dict[str, int]:
    """The linear addresses of those functions of `names` that the kernel has exactly one of.

    A file that is no ELF file, has no such table, or a damaged one, has no functions; nor has a kernel that decides at
    its boot where it maps memory. Raises nothing: who loads the kernel says what is wrong with it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return {}
    try:
        symbols, strings = _read_tables(fd)
    except OSError:
        return {}
    finally:
        os.close(fd)
    if _MOVES in strings:
        return {}
    found = {}
    for name in names:
        wanted = name.encode() + b"\0"
        addresses: set[int] = set()
        at = strings.find(wanted)
        while at >= 0:  # names that end alike share their end
            addresses.update(_addresses(symbols, at))
            at = strings.find(wanted, at + 1)
        if len(addresses) == 1:
            found[name] = addresses.pop()
    return found


def _addresses(symbols: bytes, name: int) -> Iterator[int]:
    """Of the functions whose name is at this offset."""
    wanted = _OFFSET.pack(name)
    at = symbols.find(wanted)
    while at >= 0:
        if at % _SYMBOL.size == 0 and at + _SYMBOL.size <= len(symbols):
            _, kind, _, section, address, _ = _SYMBOL.unpack_from(symbols, at)
            if kind & 0xF == _FUNCTION and section:
                yield address
        at = symbols.find(wanted, at + 1)


def _read_tables(fd: int) -> tuple[bytes, bytes]:
    """Symbols, and their names; b"" for both when there are none."""
    header = os.pread(fd, HEADER_BYTES, 0) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    if len(header) < HEADER_BYTES or header[:4] != MAGIC:
        return b"", b""
    start, entry_bytes, count, _ = _HEADER.unpack(header)
    if entry_bytes != _SECTION.size or count > _MOST_SECTIONS:
        return b"", b""
    table = _read(fd, start, count * _SECTION.size)
    sections = list(_SECTION.iter_unpack(table[: len(table) // _SECTION.size * _SECTION.size]))
    for section in sections:
        if section[1] == _SYMTAB and section[6] < len(sections):
            names = sections[section[6]]
            return _read(fd, section[4], section[5]), _read(fd, names[4], names[5])
    return b"", b""


def _read(fd: int, offset: int, size_bytes: int) -> bytes:
    """As much as there is of it."""
    return os.pread(fd, size_bytes, offset) if size_bytes <= _MOST_TABLE_BYTES and offset < 1 << 62 else b""
