"""Tars byte by byte, so that a test can make what no honest tar program would."""

from __future__ import annotations

from collections.abc import Iterator

BLOCK = 512
END = bytes(2 * BLOCK)


def header(
    name: bytes,
    *,
    kind: bytes = b"0",
    size: int | bytes = 0,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 1_700_000_000,
    link: bytes = b"",
    major: int = 0,
    minor: int = 0,
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    checksum: bytes | None = None,
) -> bytes:
    """One header block; `size` may be raw bytes for the field."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    parts = [
        name.ljust(100, b"\0"), b"%07o\0%07o\0%07o\0" % (mode, uid, gid), field.ljust(12, b"\0"), b"%011o\0" % mtime,
        b" " * 8, kind, link.ljust(100, b"\0"), magic, bytes(64), b"%07o\0%07o\0" % (major, minor),
        prefix.ljust(155, b"\0"), bytes(12),
    ]  # fmt: skip
    block = b"".join(parts)
    assert len(block) == BLOCK, len(block)
    told = b"%06o\0 " % sum(block) if checksum is None else checksum
    return block[:148] + told + block[156:]


def pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def file(name: bytes, data: bytes = b"x", **fields: object) -> bytes:
    return header(name, size=len(data), **fields) + pad(data)  # type: ignore[arg-type]


def directory(name: bytes, **fields: object) -> bytes:
    return header(name, kind=b"5", **{"mode": 0o755, **fields})  # type: ignore[arg-type]


def symlink(name: bytes, target: bytes) -> bytes:
    return header(name, kind=b"2", link=target, mode=0o777)


def hard_link(name: bytes, target: bytes) -> bytes:
    return header(name, kind=b"1", link=target)


def pax(records: dict[bytes, bytes] | bytes, kind: bytes = b"x") -> bytes:
    """A pax extension header; raw bytes are taken as its body."""
    body = records if isinstance(records, bytes) else b"".join(record(key, value) for key, value in records.items())
    return header(b"PaxHeaders/x", kind=kind, size=len(body)) + pad(body)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d" % length) + len(key) + len(value) + 3 != length:
        length = len(b"%d" % length) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


def long_name(name: bytes, kind: bytes = b"L") -> bytes:
    return header(b"././@LongLink", kind=kind, size=len(name) + 1) + pad(name + b"\0")


def chunks(data: bytes, size: int = 1000) -> Iterator[bytes]:
    """In pieces that fit no block."""
    return (data[at : at + size] for at in range(0, len(data), size))
