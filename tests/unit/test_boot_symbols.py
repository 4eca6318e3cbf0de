"""Functions by name in a kernel's own table of symbols; the file may be anything."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

from nagaya.engines.kvm.boot.symbols import find_functions, list_functions

FUNCTION, OBJECT = 2, 1
Symbol = tuple[str, int, int, int]


def make(symbols: list[Symbol], *, strings: bytes = b"") -> bytes:
    """An ELF file of nothing but symbols: name, kind, section, address."""
    names, table = b"\0" + strings, bytes(24)
    for name, kind, section, address in symbols:
        table += struct.pack("<IBBHQQ", len(names), kind, 0, section, address, 0)
        names += name.encode() + b"\0"
    start = 64 + len(table) + len(names)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, 0, 0, start, 0, 64, 0, 0, 64, 3, 2
    )
    sections = bytes(64) + struct.pack("<IIQQQQIIQQ", 0, 2, 0, 0, 64, len(table), 2, 0, 8, 24)
    sections += struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, 64 + len(table), len(names), 0, 0, 1, 0)
    return header + table + names + sections


def find(tmp_path: Path, content: bytes, *names: str) -> dict[str, int]:
    path = tmp_path / "kernel"
    path.write_bytes(content)
    return find_functions(str(path), names)


SYMBOLS = [
    ("memmap_init", FUNCTION, 1, 0xFFFFFFFF81000100),
    ("init", FUNCTION, 1, 0xFFFFFFFF81000200),
    ("init", FUNCTION, 1, 0xFFFFFFFF81000300),
    ("counter", OBJECT, 1, 0xFFFFFFFF82000000),
    ("elsewhere", FUNCTION, 0, 0),
    ("once", FUNCTION, 1, 0xFFFFFFFF81000400),
]


def test_functions_that_there_is_one_of(tmp_path: Path) -> None:
    found = find(tmp_path, make(SYMBOLS), "memmap_init", "init", "counter", "elsewhere", "once", "nce", "missing")
    assert found == {"memmap_init": 0xFFFFFFFF81000100, "once": 0xFFFFFFFF81000400}
    assert [name for _, name in list_functions(str(tmp_path / "kernel"))] == ["memmap_init", "init", "init", "once"]


def test_a_name_may_be_the_end_of_another(tmp_path: Path) -> None:
    """As linkers have it, to save room."""
    content = bytearray(make([("free_initmem", FUNCTION, 1, 0x1000), ("x", FUNCTION, 1, 0x2000)]))
    at = content.index(struct.pack("<IBBHQ", 14, FUNCTION, 0, 1, 0x2000))
    struct.pack_into("<I", content, at, 1 + len("free_"))
    assert find(tmp_path, bytes(content), "initmem", "free_initmem") == {"initmem": 0x2000, "free_initmem": 0x1000}


def test_a_kernel_that_chooses_its_places_has_none(tmp_path: Path) -> None:
    assert find(tmp_path, make([*SYMBOLS, ("page_offset_base", OBJECT, 1, 0x5000)]), "once") == {}


def test_what_is_no_kernel_has_none(tmp_path: Path) -> None:
    whole = make(SYMBOLS)
    for content in (b"", b"\x7fELF", whole[:63], whole[:64], whole[:-1], b"MZ" + whole[2:], os.urandom(4096)):
        found = find(tmp_path, content, "missing")
        assert found == {}
    assert find_functions(str(tmp_path / "nowhere"), ("once",)) == {}
    assert find_functions(str(tmp_path), ("once",)) == {}
    os.mkfifo(tmp_path / "pipe")
    assert find_functions(str(tmp_path / "pipe"), ("once",)) == {}


def test_damage_is_never_an_error(tmp_path: Path) -> None:
    dice, whole = random.Random(5), make(SYMBOLS)
    for _ in range(2000):
        content = bytearray(whole)
        for _ in range(dice.randint(1, 6)):
            content[dice.choice((dice.randrange(len(content)), dice.randrange(40, 64), dice.randrange(-192, 0)))] = (
                dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
            )
        found = find(tmp_path, bytes(content), "memmap_init", "init", "once")
        assert set(found) <= {"memmap_init", "init", "once"}
