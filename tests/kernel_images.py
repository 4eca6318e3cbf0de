"""Kernels' files made by hand: small, and wrong in any way that a test asks for."""

from __future__ import annotations

import bz2
import ctypes
import gzip
import lzma
import struct
from collections.abc import Sequence
from typing import NamedTuple

from nagaya.engines.kvm.boot import elf
from nagaya.memory import Region

PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_NOTE, PT_TLS = 1, 2, 3, 4, 7


class Load(NamedTuple):
    """A program header and its bytes. `memory_bytes` -1: as many as the file has."""

    content: bytes
    gpa: int
    memory_bytes: int = -1
    kind: int = PT_LOAD
    align: int = 4


def ram(size_bytes: int, *, high_bytes: int = 0) -> tuple[Region, ...]:
    """Regions without memory behind them: planning never touches any."""
    low = Region(0, size_bytes, 0, 0, memoryview(b""))
    return (low, Region(1 << 32, high_bytes, size_bytes, 0, memoryview(b""))) if high_bytes else (low,)


def note(name: bytes, kind: int, data: bytes, align: int = 4) -> bytes:
    head = struct.pack("<III", len(name), len(data), kind) + name
    head += bytes(-len(head) % align)
    return head + data + bytes(-len(data) % align)


LINUX_NOTE = note(b"Linux\0", 0x101, b"\0")


def pvh_note(entry: int, width: int = 8) -> bytes:
    return note(b"Xen\0", elf.XEN_PHYS32_ENTRY, entry.to_bytes(width, "little"))


def make_elf(
    loads: Sequence[Load] = (Load(b"\x90" * 4096, 0x1000000, 0x3000),),
    *,
    entry: int = 0x1000000,
    notes: bytes = LINUX_NOTE,
    machine: int = 62,
    width: int = 2,
    order: int = 1,
    kind: int = 2,
) -> bytes:
    """An ELF file: its header, its program headers, and what they name, each on 64 bytes."""
    loads = [*loads, *([Load(notes, 0, kind=PT_NOTE)] if notes else [])]
    ident = b"\x7fELF" + bytes([width, order, 1, 0]) + bytes(8)
    swap = "<" if order == 1 else ">"
    header = struct.pack(swap + "HHIQQQIHHHHHH", kind, machine, 1, entry, 64, 0, 0, 64, 56, len(loads), 64, 0, 0)
    headers, body, at = b"", b"", 64 + 56 * len(loads)
    for load in loads:
        pad = -at % 64
        size = len(load.content) if load.memory_bytes < 0 else load.memory_bytes
        headers += struct.pack("<IIQQQQQQ", load.kind, 5, at + pad, 0, load.gpa, len(load.content), size, load.align)
        body += bytes(pad) + load.content
        at += pad + len(load.content)
    return ident + header + headers + body


def lz4_legacy(data: bytes) -> bytes:
    library = ctypes.CDLL("liblz4.so.1")
    packed = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 << 20):
        block = data[at : at + (8 << 20)]
        room = ctypes.create_string_buffer(len(block) + len(block) // 200 + 64)
        size = library.LZ4_compress_default(block, room, len(block), len(room))
        packed += struct.pack("<I", size) + room.raw[:size]
    return packed


def zstd(data: bytes) -> bytes:
    library = ctypes.CDLL("libzstd.so.1")
    library.ZSTD_compress.restype = ctypes.c_size_t
    library.ZSTD_compress.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
    room = ctypes.create_string_buffer(len(data) + 1024)
    size = library.ZSTD_compress(room, len(room), data, len(data), 3)
    return room.raw[:size]


COMPRESSORS = {
    "gzip": gzip.compress,
    "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32),
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "lz4": lz4_legacy,
    "zstd": zstd,
}


def make_payload(kernel: bytes, compression: str = "gzip") -> bytes:
    """As the kernel's build packs it: all but gzip have the size appended."""
    packed = COMPRESSORS[compression](kernel)
    return packed if compression == "gzip" else packed + struct.pack("<I", len(kernel))


def make_bzimage(
    payload: bytes,
    *,
    version: int = 0x020F,
    xloadflags: int = 1,
    loadflags: int = 1,
    setup_sectors: int = 2,
    load_gpa: int = 0x1000000,
    init_bytes: int = 0x400000,
    payload_at: int = 0x300,
    payload_bytes: int = -1,
    command_line_bytes: int = 2047,
) -> bytes:
    """A bzImage: a setup part of `setup_sectors`, then code with the payload in it."""
    size = len(payload) if payload_bytes < 0 else payload_bytes
    setup = bytearray(((setup_sectors or 4) + 1) * 512)
    struct.pack_into("<B", setup, 0x1F1, setup_sectors)
    struct.pack_into("<HBB4sH", setup, 0x1FE, 0xAA55, 0xEB, 0x6A, b"HdrS", version)
    struct.pack_into("<B", setup, 0x211, loadflags)
    struct.pack_into("<I", setup, 0x22C, 0x7FFFFFFF)
    struct.pack_into("<IBBHI", setup, 0x230, 0x200000, 1, 21, xloadflags, command_line_bytes)
    struct.pack_into("<II", setup, 0x248, payload_at, size)
    struct.pack_into("<QI", setup, 0x258, load_gpa, init_bytes)
    return bytes(setup) + bytes(payload_at) + payload + bytes(64)
