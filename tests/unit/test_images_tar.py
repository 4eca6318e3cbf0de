"""The tar reader: every dialect that it claims, made by GNU tar, by tarfile, and byte by byte."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from nagaya.errors import IntegrityError
from nagaya.images.tar import DIRECTORY, FILE, LINK, Entry, TarReader
from tests.kernel import unpack_tars as t


def read(data: bytes, *, require_end: bool = False, size: int = 1000) -> list[tuple[Entry, bytes]]:
    reader = TarReader(t.chunks(data, size), require_end=require_end)
    return [(entry, b"".join(bytes(piece) for piece in reader.data())) for entry in reader]


def names(data: bytes) -> list[bytes]:
    return [entry.name for entry, _ in read(data)]


@pytest.mark.parametrize("size", [1, 7, 511, 512, 513, 1 << 20])
def test_any_chunks(size: int) -> None:
    data = t.directory(b"d/") + t.file(b"d/a", b"hello" * 300, mode=0o4755, uid=12, gid=34) + t.hard_link(b"l", b"d/a")
    (d, _), (a, content), (link, _) = read(data + t.END, size=size)
    assert (d.kind, a.kind, link.kind, link.link) == (DIRECTORY, FILE, LINK, b"d/a")
    assert content == b"hello" * 300
    assert (a.mode, a.uid, a.gid, a.mtime_ns) == (0o4755, 12, 34, 1_700_000_000 * 10**9)


def test_data_left_unread_is_skipped() -> None:
    reader = TarReader(t.chunks(t.file(b"a", b"x" * 5000) + t.file(b"b", b"y") + t.END))
    assert [entry.name for entry in reader] == [b"a", b"b"]


def test_ustar_prefix_and_gnu_magic() -> None:
    data = t.file(b"name", prefix=b"some/prefix") + t.file(b"gnu", prefix=b"times", magic=b"ustar  \0")
    assert names(data + t.END) == [b"some/prefix/name", b"gnu"]


def test_gnu_long_names() -> None:
    name, link = b"n" * 300, b"t" * 400
    data = t.long_name(name) + t.long_name(link, b"K") + t.symlink(b"short", b"short") + t.file(b"next")
    (first, _), (second, _) = read(data + t.END)
    assert (first.name, first.link, second.name) == (name, link, b"next")


def test_pax_overrides_and_globals() -> None:
    data = t.pax({b"uid": b"70000", b"comment": b"x"}, b"g")
    data += (
        t.pax({b"path": "ü/x".encode(), b"mtime": b"1.5", b"gid": b"80000", b"size": b"3"})
        + t.header(b"a")
        + t.pad(b"abc")
    )
    data += t.file(b"b", gid=5)
    data += t.pax({b"uid": b""}) + t.file(b"c", uid=7)
    (a, content), (b, _), (c, _) = read(data + t.END)
    assert (a.name, a.uid, a.gid, a.mtime_ns, content) == ("ü/x".encode(), 70000, 80000, 1_500_000_000, b"abc")
    assert (b.uid, b.gid) == (70000, 5)
    assert c.uid == 7, "an empty value takes the global one back"


def test_pax_raw_bytes_and_xattrs() -> None:
    data = t.pax({b"hdrcharset": b"BINARY", b"path": b"\xff\xfe", b"SCHILY.xattr.user.a": b"\0\n=\xff"}) + t.file(b"x")
    ((entry, _),) = read(data + t.END)
    assert entry.name == b"\xff\xfe" and entry.xattrs == ((b"user.a", b"\0\n=\xff"),)


@pytest.mark.parametrize(
    ("text", "time_ns"),
    [(b"0", 0), (b"-1", -(10**9)), (b"-0.25", -250_000_000), (b"12.000000001", 12_000_000_001), (b"1.1234567899", 1_123_456_789)],
)  # fmt: skip
def test_pax_times(text: bytes, time_ns: int) -> None:
    ((entry, _),) = read(t.pax({b"mtime": text}) + t.file(b"x") + t.END)
    assert entry.mtime_ns == time_ns


def test_base_256() -> None:
    size = b"\x80" + (5).to_bytes(11, "big")
    ((entry, content),) = read(t.header(b"a", size=size) + t.pad(b"12345") + t.END)
    assert entry.size == 5 and content == b"12345"
    with pytest.raises(IntegrityError):
        read(t.header(b"a", size=b"\xff" * 12) + t.END)


def test_old_tar_without_directory_type() -> None:
    ((entry, _),) = read(t.header(b"d/", kind=b"\0", magic=bytes(8)) + t.END)
    assert entry.kind == DIRECTORY


def test_link_with_a_size_has_no_data() -> None:
    assert names(t.header(b"l", kind=b"2", link=b"x", size=100) + t.file(b"next") + t.END) == [b"l", b"next"]


def test_volume_label_is_skipped() -> None:
    assert names(t.header(b"label", kind=b"V") + t.file(b"a") + t.END) == [b"a"]


def test_end_marks() -> None:
    one = t.file(b"a")
    assert names(one) == [b"a"], "a digest vouches for its length"
    assert names(one + bytes(512)) == [b"a"]
    assert names(one + bytes(20 * 512)) == [b"a"], "blocking factor"
    with pytest.raises(IntegrityError, match="truncated"):
        read(one, require_end=True)
    with pytest.raises(IntegrityError, match="truncated"):
        read(b"", require_end=True)
    assert read(b"") == []
    with pytest.raises(IntegrityError, match="behind"):
        read(one + t.END + b"x")
    with pytest.raises(IntegrityError, match="behind"):
        read(one + bytes(512) + t.file(b"b") + t.END)


@pytest.mark.parametrize("cut", [1, 100, 511, 513, 1000, 1100])
def test_truncated(cut: int) -> None:
    with pytest.raises(IntegrityError, match="truncated"):
        read(t.file(b"a", b"y" * 700)[:cut])


BAD = {
    "checksum": t.header(b"a", checksum=b"000000\0 "),
    "checksum is no number": t.header(b"a", checksum=b"zzzzzz\0 "),
    "size no octal": t.header(b"a", size=b"00000000009\0"),
    "size with a sign": t.header(b"a", size=b"-0000000001\0"),
    "size with an underscore": t.header(b"a", size=b"0000000_001\0"),
    "size with a base": t.header(b"a", size=b"0o000000001\0"),
    "pax size negative": t.pax({b"size": b"-5"}) + t.file(b"a"),
    "pax size huge": t.pax({b"size": b"9" * 20}) + t.file(b"a"),
    "pax size beyond the stream": t.pax({b"size": b"1000000"}) + t.file(b"a"),
    "pax size lies shorter": t.pax({b"size": b"0"}) + t.file(b"a", b"data"),
    "pax uid no number": t.pax({b"uid": b"root"}) + t.file(b"a"),
    "pax mtime no number": t.pax({b"mtime": b"now"}) + t.file(b"a"),
    "pax mtime absurd": t.pax({b"mtime": b"9" * 19}) + t.file(b"a"),
    "pax length zero": t.pax(b"0 a=b\n") + t.file(b"a"),
    "pax length too long": t.pax(b"99 a=b\n") + t.file(b"a"),
    "pax length too short": t.pax(b"3 a=b\n") + t.file(b"a"),
    "pax length negative": t.pax(b"-6 a=b\n") + t.file(b"a"),
    "pax without equals": t.pax(b"5 ab\n") + t.file(b"a"),
    "pax without newline": t.pax(b"6 a=bc") + t.file(b"a"),
    "pax of a gigabyte": t.header(b"x", kind=b"x", size=1 << 30),
    "long name of a gigabyte": t.header(b"x", kind=b"L", size=1 << 30),
    "pax twice": t.pax({b"a": b"b"}) * 2 + t.file(b"a"),
    "pax before the end": t.pax({b"a": b"b"}),
    "NUL in a pax path": t.pax({b"path": b"a\0b"}) + t.file(b"a"),
    "NUL in a pax link": t.pax({b"linkpath": b"a\0b"}) + t.symlink(b"a", b"x"),
    "unknown type": t.header(b"a", kind=b"Q"),
    "multi-volume": t.header(b"a", kind=b"M"),
    "device number": t.header(b"a", kind=b"3", major=5000),
    "uid of nobody": t.pax({b"uid": b"4294967295"}) + t.file(b"a"),
    "sparse without map": t.pax({b"GNU.sparse.realsize": b"100", b"GNU.sparse.map": b"0,1,x"}) + t.file(b"a"),
    "sparse beyond its size": t.pax({b"GNU.sparse.size": b"10", b"GNU.sparse.map": b"20,1"}) + t.file(b"a"),
    "sparse backwards": t.pax({b"GNU.sparse.size": b"99", b"GNU.sparse.map": b"20,1,5,0"}) + t.file(b"a"),
    "sparse odd": t.pax({b"GNU.sparse.size": b"99", b"GNU.sparse.map": b"20"}) + t.file(b"a"),
    "sparse more than its data": t.pax({b"GNU.sparse.size": b"99", b"GNU.sparse.map": b"0,50"}) + t.file(b"a"),
    "sparse 1.0 map endless": t.pax({b"GNU.sparse.major": b"1", b"GNU.sparse.realsize": b"9"}) + t.file(b"a", b"9" * 2000),
    "sparse 1.0 too many": t.pax({b"GNU.sparse.major": b"1", b"GNU.sparse.realsize": b"9"}) + t.file(b"a", b"99999999\n"),
    "sparse 1.0 unknown minor": t.pax({b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"7", b"GNU.sparse.realsize": b"9"})
    + t.file(b"a"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_malformed(what: str) -> None:
    with pytest.raises(IntegrityError):
        read(BAD[what] + t.END)


def test_global_headers_do_not_pile_up() -> None:
    data = b"".join(t.pax({b"key%d" % number: b"v" * 60_000}, b"g") for number in range(40))
    with pytest.raises(IntegrityError, match="global headers"):
        read(data + t.file(b"a") + t.END)


def test_message_is_printable() -> None:
    with pytest.raises(IntegrityError) as caught:
        read(t.header(b"\x1b[31mevil\n", kind=b"Q"))
    assert caught.value.message.isprintable()


# -- other programs' archives


def make_tree(root: Path) -> None:
    (root / "sub").mkdir(parents=True)
    (root / "sub" / ("long" * 40)).mkdir()
    (root / "sub" / ("long" * 40) / ("name" * 50)).write_bytes(b"deep")
    (root / "plain").write_bytes(b"plain" * 1000)
    (root / "ünïcödé").write_bytes(b"u")
    os.symlink("t" * 150, root / "link")
    os.link(root / "plain", root / "sub" / "hard")
    with open(root / "sparse", "wb") as stream:
        for number in range(30):
            stream.seek(number * 200_000 + 4096)
            stream.write(b"%05d" % number * 1000)
        stream.truncate(8_000_000)


def restore(entry: Entry, data: bytes) -> bytes:
    if entry.sparse is None:
        return data
    out = bytearray(entry.real_size)
    at = 0
    for offset, length in entry.sparse:
        out[offset : offset + length] = data[at : at + length]
        at += length
    return bytes(out)


@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"], ["--format=pax"], ["--format=gnu", "--sparse"],
        ["--format=pax", "--sparse", "--sparse-version=0.0"], ["--format=pax", "--sparse", "--sparse-version=0.1"],
        ["--format=pax", "--sparse", "--sparse-version=1.0"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_gnu_tar(tmp_path: Path, options: list[str]) -> None:
    tree = tmp_path / "tree"
    make_tree(tree)
    out = subprocess.run(["tar", *options, "-C", tree, "-cf", "-", "."], check=True, capture_output=True).stdout
    found = {entry.name: (entry, data) for entry, data in read(out, require_end=True, size=50_000)}
    sparse = 0
    for name, (entry, data) in found.items():
        path = tree / os.fsdecode(name)
        if entry.kind == FILE:
            assert restore(entry, data) == path.read_bytes(), name
            assert entry.mtime_ns // 10**9 == path.stat().st_mtime_ns // 10**9
            sparse += entry.sparse is not None
        elif entry.kind == b"2":
            assert entry.link == os.fsencode(os.readlink(path))
    expected = {os.fsencode(path.relative_to(tree)) for path in tree.rglob("*")}
    assert {name.strip(b"/").removeprefix(b"./") for name in found} - {b"."} == expected
    assert sparse == ("--sparse" in options)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tarfile(format: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for number in range(20):
            info = tarfile.TarInfo(f"{'d' * 60}/{'f' * 60}{number}")
            info.size, info.mode, info.mtime = number * 100, 0o640, 1_600_000_000 + number
            tar.addfile(info, io.BytesIO(bytes(number * 100)))
    found = read(out.getvalue(), require_end=True)
    assert [(entry.name, entry.size, entry.mode) for entry, _ in found] == [
        (b"d" * 60 + b"/" + b"f" * 60 + b"%d" % number, number * 100, 0o640) for number in range(20)
    ]
