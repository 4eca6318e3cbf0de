"""Unpacked as GNU tar unpacks, attribute by attribute; whiteouts as overlayfs wants them; packed and unpacked again."""

from __future__ import annotations

import os
import random
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from nagaya.errors import Unsupported
from nagaya.images.changes import Change, diff
from nagaya.images.content import Blobs
from nagaya.images.pack import GzipWriter, pack_layer
from nagaya.images.streams import TarStream
from nagaya.images.unpack import unpack_layer
from tests.kernel import unpack_tars as t

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="layers have owners: needs root")

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service... as ping has


def make_everything(root: Path) -> None:
    """A tree with one of each thing that a layer can hold."""
    noise = random.Random(1)
    root.mkdir()
    (root / "empty").write_bytes(b"")
    (root / "small").write_bytes(b"hello")
    (root / "large").write_bytes(noise.randbytes(3_000_001))
    (root / "secret").write_bytes(b"x")
    os.chmod(root / "secret", 0o000)
    (root / "suid").write_bytes(b"x")
    os.chown(root / "suid", 12, 34)
    os.chmod(root / "suid", 0o6755)
    (root / "capable").write_bytes(b"x")
    os.setxattr(root / "capable", "security.capability", CAPABILITY)
    os.setxattr(root / "capable", "user.note", b"\0binary\n=\xff")
    (root / "owned").write_bytes(b"x")
    os.chown(root / "owned", 3_000_000_000, 3_000_000_001)
    os.link(root / "small", root / "hard")
    os.symlink("/absolute/target", root / "absolute")
    os.symlink("dangling-" + "x" * 200, root / "long-link")
    os.chown(root / "absolute", 5, 6, follow_symlinks=False)
    os.mkfifo(root / "pipe", 0o622)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.chmod(root / "null", 0o666)
    os.mknod(root / "disk", stat.S_IFBLK | 0o660, os.makedev(259, 70_000))
    (root / "sticky").mkdir()
    os.chmod(root / "sticky", 0o1777)
    (root / "setgid").mkdir()
    os.chown(root / "setgid", 0, 42)
    os.chmod(root / "setgid", 0o2755)
    (root / "setgid" / "child").write_bytes(b"not of the group 42")
    os.chown(root / "setgid" / "child", 0, 0)
    (root / "closed").mkdir()
    (root / "closed" / "inside").write_bytes(b"x")
    os.setxattr(root / "closed", "user.on-directory", b"y")
    os.chmod(root / "closed", 0o000)
    (root / "ünï\udcffcode".encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")).write_bytes(b"x")
    (root / "new\nline").write_bytes(b"x")
    deep = root / ("d" * 120) / ("e" * 120)
    deep.mkdir(parents=True)
    (deep / ("f" * 200)).write_bytes(b"deep")
    os.link(deep / ("f" * 200), root / "to-deep")
    with open(root / "sparse", "wb") as stream:
        for number in range(25):
            stream.seek(number * 300_000 + 8192)
            stream.write(b"%08d" % number * 1024)
        stream.truncate(9_000_000)
    for number, path in enumerate(sorted(root.rglob("*"))):
        os.utime(path, ns=(10**18, 1_500_000_000_123_456_789 + number * 10**9), follow_symlinks=False)
    os.utime(root / "small", ns=(0, 0))
    os.utime(root, ns=(10**18, 1_400_000_000_000_000_000))
    os.chmod(root, 0o751)


def look(root: Path, *, blocks: bool = True, nanoseconds: bool = True) -> dict[str, tuple[object, ...]]:
    """Everything that can be seen of a tree."""
    found: dict[str, tuple[object, ...]] = {}
    groups: dict[int, str] = {}
    for base, directories, files in os.walk(root):
        directories.sort()
        for name in [".", *sorted(directories), *sorted(files)]:
            path = os.path.join(base, name)
            state = os.lstat(path)
            kind = stat.S_IFMT(state.st_mode)
            content: object = b""
            if kind == stat.S_IFREG:
                with open(path, "rb") as stream:
                    content = hash(stream.read())
            elif kind == stat.S_IFLNK:
                content = os.readlink(path)
            xattrs = {x: os.getxattr(path, x, follow_symlinks=False) for x in os.listxattr(path, follow_symlinks=False)}
            key = os.path.relpath(path, root)
            group = groups.setdefault(state.st_ino, key) if kind != stat.S_IFDIR else ""
            time = state.st_mtime_ns if nanoseconds else state.st_mtime_ns // 10**9
            device = state.st_rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
            found[key] = (
                state.st_mode,
                state.st_uid,
                state.st_gid,
                device,
                time,
                content,
                group,
                tuple(sorted(xattrs.items())),
            )
            if blocks and name == "sparse":
                found[key] += (state.st_size, state.st_blocks < 2000)
    return found


def differences(one: dict[str, tuple[object, ...]], other: dict[str, tuple[object, ...]]) -> list[str]:
    return [
        f"{key!r}: {one.get(key)} != {other.get(key)}"
        for key in sorted({*one, *other})
        if one.get(key) != other.get(key)
    ]


@pytest.mark.parametrize(
    ("options", "nanoseconds"),
    [(["--format=pax", "--sparse"], True), (["--format=gnu", "--sparse"], False), (["--format=pax", "--sparse", "--sparse-version=0.1"], True)],
    ids=["pax", "gnu", "pax 0.1"],
)  # fmt: skip
def test_as_gnu_tar_does(tmp_path: Path, options: list[str], nanoseconds: bool) -> None:
    make_everything(tmp_path / "tree")
    archive = tmp_path / "archive.tar"
    xattrs = ["--xattrs", "--xattrs-include=*"] if "--format=pax" in options else []
    subprocess.run(["tar", *options, *xattrs, "-C", tmp_path / "tree", "-cf", archive, "."], check=True)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    subprocess.run(["tar", *xattrs, "--same-owner", "-C", theirs, "-xpf", archive], check=True)
    with open(archive, "rb") as source, TarStream(source) as stream:
        unpack_layer(iter(stream), str(ours))
    assert differences(look(ours), look(theirs)) == []
    if xattrs:
        assert differences(look(ours, nanoseconds=nanoseconds), look(tmp_path / "tree", nanoseconds=nanoseconds)) == []


def test_umask_does_not_matter(tmp_path: Path) -> None:
    make_everything(tmp_path / "tree")
    data = subprocess.run(
        ["tar", "--format=pax", "-C", tmp_path / "tree", "-c", "."], check=True, capture_output=True
    ).stdout
    found = []
    before = os.umask(0o077)
    try:
        for umask in (0o000, 0o022, 0o077, 0o777):
            os.umask(umask)
            target = tmp_path / f"{umask:o}"
            target.mkdir(mode=0o777)
            os.chmod(target, 0o700)
            unpack_layer(t.chunks(data, 1 << 20), str(target))
            found.append(look(target, blocks=False))
    finally:
        os.umask(before)
    assert differences(found[0], found[1]) == differences(found[0], found[2]) == differences(found[0], found[3]) == []


def test_set_gid_store_does_not_matter(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    os.chown(target, 0, 99)
    os.chmod(target, 0o2755)
    unpack_layer(
        t.chunks(t.file(b"a") + t.directory(b"d") + t.file(b"implied/b") + t.symlink(b"l", b"x") + t.END), str(target)
    )
    for name in ("a", "d", "implied", "implied/b", "l"):
        found = os.lstat(target / name)
        assert (found.st_gid, found.st_mode & stat.S_ISGID) == (0, 0), name


def test_pack_and_unpack(tmp_path: Path) -> None:
    make_everything(tmp_path / "tree")
    with socket.socket(socket.AF_UNIX) as listener:
        before = os.stat(tmp_path / "tree")
        listener.bind(str(tmp_path / "tree" / "socket"))
        os.utime(tmp_path / "tree", ns=(before.st_atime_ns, before.st_mtime_ns))
        blobs = Blobs(str(tmp_path / "store"))
        packed = pack_layer(blobs, str(tmp_path / "tree"), overlay=False)
        again = pack_layer(blobs, str(tmp_path / "tree"), overlay=False)
        os.unlink(tmp_path / "tree" / "socket")
        os.utime(tmp_path / "tree", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert packed == again, "the same files make the same bytes"
    target = tmp_path / "target"
    target.mkdir()
    with blobs.open(packed.descriptor.digest) as source, TarStream(source) as stream:
        unpack_layer(iter(stream), str(target))
        assert stream.diff_id == packed.diff_id
    assert differences(look(target, blocks=False), look(tmp_path / "tree", blocks=False)) == []
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    subprocess.run(
        [
            "tar",
            "--xattrs",
            "--xattrs-include=*",
            "--same-owner",
            "-C",
            theirs,
            "-xpzf",
            blobs.path(packed.descriptor.digest),
        ],
        check=True,
    )
    assert differences(look(theirs, blocks=False), look(tmp_path / "tree", blocks=False)) == [], "GNU tar reads it too"


@pytest.mark.parametrize("size", [0, 1, 32 << 10, 512 << 10, (512 << 10) + 1, 3_000_000])
def test_gzip_is_plain_gzip(size: int) -> None:
    data = random.Random(size).randbytes(size // 2) + bytes(size - size // 2)
    out = bytearray()
    with GzipWriter(out.extend) as writer:
        for at in range(0, size, 100_000):
            writer.write(data[at : at + 100_000])
        writer.close()
    assert subprocess.run(["gzip", "-dc"], input=out, capture_output=True, check=True).stdout == data


# -- whiteouts


def is_whiteout(path: Path) -> bool:
    state = path.lstat()
    return stat.S_ISCHR(state.st_mode) and state.st_rdev == 0


def is_opaque(path: Path) -> bool:
    return "trusted.overlay.opaque" in os.listxattr(path) and os.getxattr(path, "trusted.overlay.opaque") == b"y"


def test_whiteouts(tmp_path: Path) -> None:
    data = (
        t.directory(b"d")
        + t.file(b"d/.wh.gone", b"")
        + t.directory(b"o")
        + t.file(b"o/.wh..wh..opq", b"")
        + t.file(b"o/new")
    )
    data += t.file(b".wh..wh.plnk", b"") + t.directory(b".wh..wh.aufs/x")[:0] + t.file(b"implied/.wh.gone", b"")
    unpack_layer(t.chunks(data + t.END), str(tmp_path))
    assert is_whiteout(tmp_path / "d" / "gone") and not is_opaque(tmp_path / "d")
    assert is_opaque(tmp_path / "o") and (tmp_path / "o" / "new").read_bytes() == b"x"
    assert is_whiteout(tmp_path / "implied" / "gone")
    assert sorted(os.listdir(tmp_path)) == ["d", "implied", "o"]


@pytest.mark.parametrize("first", [True, False], ids=["whiteout first", "whiteout last"])
def test_entries_of_the_same_layer_win(tmp_path: Path, first: bool) -> None:
    """A layer that deletes and makes anew; a directory made anew must hide the old one's content."""
    marks = t.file(b".wh.f", b"") + t.file(b".wh.d", b"") + t.file(b".wh.i", b"") + t.file(b".wh.l", b"")
    things = t.file(b"f", b"new") + t.directory(b"d") + t.file(b"i/below") + t.symlink(b"l", b"f")
    unpack_layer(t.chunks((marks + things if first else things + marks) + t.END), str(tmp_path))
    assert (tmp_path / "f").read_bytes() == b"new" and os.readlink(tmp_path / "l") == "f"
    assert is_opaque(tmp_path / "d") and is_opaque(tmp_path / "i") and (tmp_path / "i" / "below").exists()


def test_root_made_opaque(tmp_path: Path) -> None:
    unpack_layer(t.chunks(t.file(b".wh..wh..opq", b"") + t.END), str(tmp_path))
    assert is_opaque(tmp_path)


def test_upper_directory_round_trip(tmp_path: Path) -> None:
    """What overlayfs leaves in an upper directory, packed as a layer, unpacks to the same."""
    upper = tmp_path / "upper"
    (upper / "etc").mkdir(parents=True)
    (upper / "etc" / "new").write_bytes(b"new")
    os.mknod(upper / "gone", stat.S_IFCHR, 0)
    (upper / "fresh").mkdir()
    os.setxattr(upper / "fresh", "trusted.overlay.opaque", b"y")
    os.setxattr(upper / "etc", "trusted.overlay.impure", b"y")
    os.mknod(upper / "etc" / "tty", stat.S_IFCHR | 0o620, os.makedev(5, 0))
    blobs = Blobs(str(tmp_path / "store"))
    packed = pack_layer(blobs, str(upper), overlay=True)
    listing = subprocess.run(
        ["tar", "-tzf", blobs.path(packed.descriptor.digest)], capture_output=True, check=True, text=True
    )
    assert listing.stdout.split() == ["./", "etc/", "etc/new", "etc/tty", "fresh/", "fresh/.wh..wh..opq", ".wh.gone"]
    target = tmp_path / "target"
    target.mkdir()
    with blobs.open(packed.descriptor.digest) as source, TarStream(source) as stream:
        unpack_layer(iter(stream), str(target))
    assert is_whiteout(target / "gone") and is_opaque(target / "fresh") and not os.listxattr(target / "etc")
    assert os.lstat(target / "etc" / "tty").st_rdev == os.makedev(5, 0)


def test_changes(tmp_path: Path) -> None:
    top, bottom, upper = (tmp_path / name for name in ("top", "bottom", "upper"))
    for path in (
        bottom / "etc",
        bottom / "usr/bin",
        bottom / "var/lib",
        top / "etc",
        top / "srv",
        upper / "etc",
        upper / "var",
    ):
        path.mkdir(parents=True)
    (bottom / "etc/a").write_bytes(b"")
    (bottom / "etc/b").write_bytes(b"")
    (bottom / "var/lib/x").write_bytes(b"")
    os.mknod(top / "etc/b", stat.S_IFCHR, 0)
    os.symlink("usr/bin", bottom / "bin")
    (bottom / "usr/bin/ls").write_bytes(b"")
    (upper / "etc/a").write_bytes(b"changed")
    (upper / "etc/b").write_bytes(b"was deleted by the image: new")
    os.mknod(upper / "etc/none", stat.S_IFCHR, 0)
    os.mknod(upper / "srv", stat.S_IFCHR, 0)
    (upper / "var/lib").mkdir()
    os.setxattr(upper / "var/lib", "trusted.overlay.opaque", b"y")
    (upper / "bin").mkdir()
    (upper / "bin/ls").write_bytes(b"no change of /usr/bin/ls")
    (upper / "usr").mkdir()
    os.utime(upper / "usr", ns=(0, (bottom / "usr").stat().st_mtime_ns))
    found = diff(str(upper), (str(top), str(bottom)))
    assert [(change.kind, change.path) for change in found] == [
        ("C", "/bin"), ("A", "/bin/ls"), ("C", "/etc"), ("C", "/etc/a"), ("A", "/etc/b"), ("D", "/srv"), ("C", "/var"),
        ("C", "/var/lib"), ("D", "/var/lib/x"),
    ]  # fmt: skip
    assert diff(str(tmp_path / "nothing"), (str(top),)) == []


@pytest.mark.parametrize(("name", "levels"), [("d", 1200), ("n" * 250, 400)])
def test_absurdly_deep_machines(tmp_path: Path, name: str, levels: int) -> None:
    """Deeper than a path can say, as a machine can make it: told about, not packed, and no crash."""
    upper = tmp_path / "upper"
    upper.mkdir()
    fd = os.open(upper, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    try:
        assert diff(str(upper), ())[0] == Change("A", f"/{name}")
        with pytest.raises(Unsupported, match="nested deeper"):
            pack_layer(Blobs(str(tmp_path / "store")), str(upper), overlay=True)
        assert os.listdir(tmp_path / "store" / "partial") == []
    finally:
        subprocess.run(["rm", "-rf", upper], check=True)


def test_redirected_directories_are_not_packed(tmp_path: Path) -> None:
    (tmp_path / "upper" / "moved").mkdir(parents=True)
    os.setxattr(tmp_path / "upper" / "moved", "trusted.overlay.redirect", b"/etc")
    with pytest.raises(Unsupported, match="redirected"):
        pack_layer(Blobs(str(tmp_path / "store")), str(tmp_path / "upper"), overlay=True)
