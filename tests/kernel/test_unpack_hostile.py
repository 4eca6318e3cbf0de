"""Layers that attack. Each must be refused (or made harmless), and nothing outside may change."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nagaya.errors import HostError, IntegrityError, NagayaError
from nagaya.images.content import Blobs
from nagaya.images.layers import Layers
from nagaya.images.progress import Silent
from nagaya.images.streams import Limits, TarStream
from nagaya.images.unpack import extract, unpack_layer
from nagaya.storage.tree import remove_tree
from tests.kernel import unpack_tars as t

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="layers have owners: needs root")


class Yard:
    """A directory to unpack in, and things around it that must stay as they are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.inside = root / "inside"
        self.outside = root / "outside"
        self.inside.mkdir()
        self.outside.mkdir()
        (self.outside / "secret").write_bytes(b"secret")
        os.chmod(self.outside / "secret", 0o600)
        self.before = self.look()

    def look(self) -> list[tuple[object, ...]]:
        found = []
        for path in sorted([self.root, *self.root.rglob("*")]):
            if path != self.root and self.inside not in (path, *path.parents):
                state = path.lstat()
                data = path.read_bytes() if path.is_file() else b""
                found.append((str(path), state.st_mode, state.st_uid, state.st_nlink, state.st_mtime_ns, data))
        return found

    def check(self) -> None:
        assert self.look() == self.before, "something outside has changed"
        assert {path.name for path in self.root.iterdir()} == {"inside", "outside"}


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    made = Yard(tmp_path)
    yield made
    made.check()


OUT = b"../outside/secret"
ATTACKS: dict[str, bytes] = {
    "dot dot": t.file(b"../outside/secret", b"evil"),
    "dot dot in the middle": t.file(b"a/../../outside/secret", b"evil"),
    "dot dot that stays inside": t.directory(b"a") + t.file(b"a/../b", b"evil"),
    "dot dot alone": t.directory(b".."),
    "dot dot at the end": t.directory(b"a/.."),
    "dot dot through pax": t.pax({b"path": b"../outside/new"}) + t.file(b"fine"),
    "dot dot through a long name": t.long_name(b"x/" * 60 + b"../" * 61 + b"outside/new") + t.file(b"fine"),
    "dot dot through a ustar prefix": t.file(b"outside/new", prefix=b".."),
    "dot dot through a sparse name": t.pax({b"GNU.sparse.name": b"../outside/new", b"GNU.sparse.size": b"1", b"GNU.sparse.map": b"0,1"})
    + t.file(b"fine"),
    "file through a link": t.symlink(b"d", b"../outside") + t.file(b"d/secret", b"evil"),
    "file through an absolute link": t.symlink(b"d", b"/etc") + t.file(b"d/nagaya-test-evil", b"evil"),
    "directory through a link": t.symlink(b"d", b"../outside") + t.directory(b"d/new"),
    "link through a link": t.symlink(b"d", b"../outside") + t.symlink(b"d/new", b"x"),
    "hard link through a link": t.symlink(b"d", b"../outside") + t.file(b"f") + t.hard_link(b"d/new", b"f"),
    "device through a link": t.symlink(b"d", b"../outside") + t.header(b"d/new", kind=b"3", major=1, minor=3),
    "whiteout through a link": t.symlink(b"d", b"../outside") + t.file(b"d/.wh.secret", b""),
    "opaque through a link": t.symlink(b"d", b"../outside") + t.file(b"d/.wh..wh..opq", b""),
    "deep through a link": t.directory(b"a") + t.symlink(b"a/b", b"../../outside") + t.file(b"a/b/c/d", b"evil"),
    "swap of an open directory": t.directory(b"d") + t.file(b"d/x") + t.symlink(b"d", b"../outside") + t.file(b"d/secret", b"evil"),
    "swap of a parent": t.directory(b"a") + t.directory(b"a/b") + t.file(b"a/b/x") + t.symlink(b"a", b"../outside")
    + t.file(b"a/b/secret", b"evil"),
    "hard link to what is outside": t.hard_link(b"l", OUT),
    "hard link to an absolute path": t.hard_link(b"l", b"/etc/passwd"),
    "hard link from behind a link": t.symlink(b"d", b"../outside") + t.hard_link(b"l", b"d/secret"),
    "hard link to a link, then written": t.symlink(b"s", OUT) + t.hard_link(b"l", b"s") + t.file(b"l/x", b"evil"),
    "hard link to itself": t.file(b"a") + t.hard_link(b"a", b"a"),
    "hard link over the directory that it points into": t.file(b"d/e/f") + t.hard_link(b"d", b"d/e/f"),
    "hard link to a directory": t.directory(b"d") + t.hard_link(b"l", b"d"),
    "hard link to nothing": t.hard_link(b"l", b"nothing"),
    "hard link to a whiteout": t.file(b".wh.a", b"") + t.hard_link(b"l", b"a"),
    "hard link to the root": t.hard_link(b"l", b"."),
    "file below a file": t.file(b"a") + t.file(b"a/b"),
    "file as the root": t.header(b".", kind=b"0"),
    "link as the root": t.symlink(b".", b"/etc"),
    "whiteout of dot dot": t.file(b".wh...", b""),
    "whiteout of dot": t.file(b".wh..", b""),
    "whiteout of nothing": t.file(b".wh.", b""),
    "whiteout that is a directory": t.directory(b".wh.x"),
    "overlay's own whiteout": t.header(b"x", kind=b"3", major=0, minor=0),
    "link to nothing": t.symlink(b"l", b""),
    "name too long": t.long_name(b"n" * 300) + t.file(b"x"),
    "path too long": t.long_name(b"d/" * 3000 + b"x") + t.file(b"x"),
    "link too long": t.long_name(b"t" * 5000, b"K") + t.symlink(b"l", b"x"),
    "sparse of eight exabytes": t.pax({b"GNU.sparse.size": b"%d" % ((1 << 63) - 1), b"GNU.sparse.map": b"0,1"}) + t.file(b"x"),
    "attribute malformed": t.pax({b"SCHILY.xattr.security.capability": b"junk"}) + t.file(b"x"),
    "size lies": t.header(b"a", size=10_000) + t.pad(b"short"),
    "garbage behind": t.file(b"a") + t.END + b"garbage",
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_layer(yard: Yard, attack: str) -> None:
    data = ATTACKS[attack] + (b"" if attack in ("size lies", "garbage behind") else t.END)
    with pytest.raises(IntegrityError):
        unpack_layer(t.chunks(data), str(yard.inside))


@pytest.mark.parametrize("attack", [name for name in ATTACKS if "whiteout" not in name and "opaque" not in name])
def test_extract(yard: Yard, attack: str) -> None:
    data = ATTACKS[attack] + (b"" if attack in ("size lies", "garbage behind") else t.END)
    try:
        extract(io.BytesIO(data), str(yard.inside), preserve_owner=False)
    except NagayaError:
        return
    assert attack in ("attribute malformed", "overlay's own whiteout"), "an attack that extract has to refuse"


@pytest.mark.parametrize("attack", ["dot dot", "swap of a parent", "garbage behind", "hard link to nothing"])
def test_nothing_is_left_in_the_store(tmp_path: Path, attack: str) -> None:
    blobs = Blobs(str(tmp_path))
    data = ATTACKS[attack] + (b"" if attack == "garbage behind" else t.END)
    blob = blobs.put(gzip.compress(data))
    layers = Layers(str(tmp_path))
    with pytest.raises(IntegrityError) as caught:
        layers.unpack(blobs, blob, f"sha256:{hashlib.sha256(data).hexdigest()}", Silent())
    assert caught.value.message.startswith("layer ")
    assert os.listdir(layers.directory) == []


def test_nothing_is_left_of_a_deep_tree(tmp_path: Path) -> None:
    blobs, layers = Blobs(str(tmp_path)), Layers(str(tmp_path))
    data = t.long_name(b"d/" * 2000 + b"f") + t.file(b"x") + ATTACKS["dot dot"] + t.END
    with pytest.raises(IntegrityError):
        layers.unpack(blobs, blobs.put(data), f"sha256:{hashlib.sha256(data).hexdigest()}", Silent())
    assert os.listdir(layers.directory) == []


def test_message_names_the_entry(yard: Yard) -> None:
    with pytest.raises(IntegrityError, match=r"entry '\.\./outside/secret'"):
        unpack_layer(t.chunks(ATTACKS["dot dot"]), str(yard.inside))


def test_later_entries_win_without_writing_through(yard: Yard) -> None:
    """A file over a link to outside replaces the link; a file over a hard link leaves the other name as it was."""
    data = (
        t.symlink(b"a", OUT)
        + t.file(b"a", b"mine")
        + t.file(b"b", b"old")
        + t.hard_link(b"c", b"b")
        + t.file(b"c", b"new")
    )
    data += (
        t.directory(b"d")
        + t.file(b"d/x")
        + t.file(b"d", b"was a directory")
        + t.header(b"a2", kind=b"6")
        + t.file(b"a2", b"no pipe")
    )
    unpack_layer(t.chunks(data + t.END), str(yard.inside))
    read = {name: (yard.inside / name).read_bytes() for name in ("a", "b", "c", "d", "a2")}
    assert read == {"a": b"mine", "b": b"old", "c": b"new", "d": b"was a directory", "a2": b"no pipe"}
    assert not (yard.inside / "a").is_symlink()


def test_link_contents_are_free(yard: Yard) -> None:
    data = t.symlink(b"abs", b"/etc/passwd") + t.symlink(b"up", b"../../../..") + t.hard_link(b"too", b"abs")
    unpack_layer(t.chunks(data + t.END), str(yard.inside))
    assert os.readlink(yard.inside / "abs") == "/etc/passwd" == os.readlink(yard.inside / "too")
    assert os.readlink(yard.inside / "up") == "../../../.."


def test_absolute_names_are_inside(yard: Yard) -> None:
    data = t.file(b"/etc/nagaya-test", b"inside") + t.hard_link(b"/l", b"/etc/nagaya-test")
    unpack_layer(t.chunks(data + t.END), str(yard.inside))
    assert (yard.inside / "etc/nagaya-test").read_bytes() == b"inside" == (yard.inside / "l").read_bytes()
    assert not os.path.exists("/etc/nagaya-test")


def test_overlay_attributes_from_the_image_are_dropped(yard: Yard) -> None:
    attributes = {b"SCHILY.xattr.trusted.overlay.redirect": b"/etc", b"SCHILY.xattr.trusted.overlay.opaque": b"y"}
    attributes |= {b"SCHILY.xattr.user.overlay.opaque": b"y", b"SCHILY.xattr.security.selinux": b"x:y:z:s0"}
    attributes |= {b"SCHILY.xattr.trusted.overlay.metacopy": b""}
    data = (
        t.pax(attributes)
        + t.directory(b"d")
        + t.pax(attributes)
        + t.file(b"f")
        + t.pax(attributes)
        + t.symlink(b"l", b"f")
    )
    unpack_layer(t.chunks(data + t.END), str(yard.inside))
    for name in ("d", "f", "l"):
        assert [
            x for x in os.listxattr(yard.inside / name, follow_symlinks=False) if "overlay" in x or "selinux" in x
        ] == []


def test_deep_trees_need_few_descriptors(yard: Yard) -> None:
    deep = b"d/" * 1900
    data = t.long_name(deep + b"f") + t.file(b"x", b"deep") + t.long_name(deep + b"g") + t.file(b"x", b"deep too")
    data += t.long_name(deep + b"f", b"K") + t.hard_link(b"up", b"x")
    unpack_layer(t.chunks(data + t.END), str(yard.inside))
    assert (yard.inside / "up").read_bytes() == b"deep"
    remove_tree(str(yard.inside / "d"))  # deeper than pytest's own remover can walk
    assert not (yard.inside / "d").exists()


def test_many_directories_need_few_descriptors(yard: Yard) -> None:
    data = b"".join(t.directory(b"d%d" % n) for n in range(1500))
    data += b"".join(t.file(b"d%d/f" % n) for n in range(1500))
    data += b"".join(t.hard_link(b"d%d/l" % (1499 - n), b"d%d/f" % n) for n in range(1500))
    before = len(os.listdir("/proc/self/fd"))
    unpacked = unpack_layer(t.chunks(data + t.END, 1 << 20), str(yard.inside))
    assert unpacked.entries == 4500 and len(os.listdir("/proc/self/fd")) == before
    assert all(os.stat(yard.inside / f"d{n}" / "f").st_nlink == 2 for n in range(0, 1500, 100))


# -- bombs and damaged compression


def run_stream(data: bytes, limits: Limits | None = None) -> int:
    with TarStream(io.BytesIO(data), limits=limits) as stream:
        return sum(len(chunk) for chunk in stream)


def test_bomb_by_ratio() -> None:
    bomb = gzip.compress(bytes(100 << 20), 9)
    with pytest.raises(IntegrityError, match="bomb"):
        run_stream(bomb)
    assert run_stream(bomb, Limits(1 << 30, 0)) == 100 << 20


def test_bomb_by_size() -> None:
    with pytest.raises(IntegrityError, match="more than 1000000 bytes"):
        run_stream(gzip.compress(os.urandom(2_000_000)), Limits(1_000_000, 0))


def test_limit_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAGAYA_MAX_LAYER_BYTES", "5000")
    with pytest.raises(IntegrityError, match="more than 5000"):
        run_stream(gzip.compress(os.urandom(6000)))
    monkeypatch.setenv("NAGAYA_MAX_LAYER_BYTES", "lots")
    with pytest.raises(NagayaError, match="no number"):
        run_stream(b"")


COMPRESSED = gzip.compress(t.file(b"a", os.urandom(50_000)) + t.END)


@pytest.mark.parametrize(
    "data",
    [COMPRESSED[:-1], COMPRESSED[:-9], COMPRESSED[:1000], COMPRESSED[:2], COMPRESSED + b"x", COMPRESSED + COMPRESSED[:9],
     COMPRESSED[:500] + b"\xff" * 20 + COMPRESSED[520:], COMPRESSED[:-8] + bytes(8)],
)  # fmt: skip
def test_damaged_gzip(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        run_stream(data)


def test_gzip_members_and_padding() -> None:
    assert run_stream(gzip.compress(b"a" * 1000) + gzip.compress(b"b" * 1000) + bytes(700)) == 2000


def test_other_compressions() -> None:
    import bz2
    import lzma

    data = os.urandom(600_000) + bytes(2_000_000)
    zstd = subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout
    for packed in (
        bz2.compress(data),
        lzma.compress(data),
        zstd,
        lzma.compress(data[:7]) + lzma.compress(data[7:]),
        data,
    ):
        with TarStream(io.BytesIO(packed)) as stream:
            assert b"".join(stream) == data
            assert stream.diff_id == f"sha256:{hashlib.sha256(data).hexdigest()}"
    for packed in (bz2.compress(data)[:-5], lzma.compress(data)[:-5], zstd[:-5], zstd[:99] + b"\0" * 50 + zstd[149:]):
        with pytest.raises(IntegrityError):
            run_stream(packed)


# -- what a machine sends to `cp`


def test_extract_drops_privileges(yard: Yard) -> None:
    data = t.pax({b"SCHILY.xattr.security.capability": bytes.fromhex("0100000200040000000000000000000000000000")})
    data += t.file(b"su", b"#!", mode=0o6755, uid=1234, gid=1234) + t.directory(b"d", mode=0o2777, uid=1234)
    extract(io.BytesIO(data + t.END), str(yard.inside), preserve_owner=False)
    su, d = (yard.inside / "su").stat(), (yard.inside / "d").stat()
    assert (stat.S_IMODE(su.st_mode), su.st_uid, su.st_gid) == (0o755, 0, 0)
    assert os.listxattr(yard.inside / "su") == []
    assert (stat.S_IMODE(d.st_mode), d.st_uid) == (0o777, 0)


def test_extract_keeps_owners_when_asked(yard: Yard) -> None:
    extract(io.BytesIO(t.file(b"su", mode=0o4755, uid=1234, gid=77) + t.END), str(yard.inside), preserve_owner=True)
    found = (yard.inside / "su").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o4755, 1234, 77)


@pytest.mark.parametrize("kind", [b"3", b"4"])
@pytest.mark.parametrize("preserve_owner", [True, False])
def test_extract_refuses_devices(yard: Yard, kind: bytes, preserve_owner: bool) -> None:
    with pytest.raises(IntegrityError, match="device node"):
        extract(
            io.BytesIO(t.header(b"sda", kind=kind, major=8) + t.END), str(yard.inside), preserve_owner=preserve_owner
        )
    assert os.listdir(yard.inside) == []


def test_extract_renames_the_top(yard: Yard) -> None:
    data = t.directory(b"etc") + t.file(b"etc/a", b"a") + t.hard_link(b"etc/b", b"etc/a")
    extract(io.BytesIO(data + t.END), str(yard.inside), preserve_owner=False, rename="copy")
    assert sorted(os.listdir(yard.inside)) == ["copy"] and sorted(os.listdir(yard.inside / "copy")) == ["a", "b"]


def test_extract_never_follows_the_hosts_links(yard: Yard) -> None:
    os.symlink("../outside", yard.inside / "d")
    with pytest.raises(IntegrityError):
        extract(io.BytesIO(t.file(b"d/secret", b"evil") + t.END), str(yard.inside), preserve_owner=False)
    os.symlink("../outside/secret", yard.inside / "s")
    extract(io.BytesIO(t.file(b"s", b"mine") + t.END), str(yard.inside), preserve_owner=False)
    assert not (yard.inside / "s").is_symlink() and (yard.inside / "s").read_bytes() == b"mine"


def test_extract_leaves_the_hosts_directories_as_they_are(yard: Yard) -> None:
    (yard.inside / "d").mkdir(mode=0o700)
    os.utime(yard.inside / "d", (5, 5))
    (yard.inside / "d" / "kept").write_bytes(b"kept")
    before = yard.inside.stat()
    data = (
        t.directory(b"./", mode=0o777, uid=9)
        + t.directory(b"d", mode=0o777, uid=9)
        + t.file(b"d/new")
        + t.directory(b"e", mode=0o711)
    )
    extract(io.BytesIO(data + t.END), str(yard.inside), preserve_owner=True)
    assert stat.S_IMODE((yard.inside / "d").stat().st_mode) == 0o700 and (yard.inside / "d").stat().st_uid == 0
    assert stat.S_IMODE(yard.inside.stat().st_mode) == stat.S_IMODE(before.st_mode)
    assert sorted(os.listdir(yard.inside / "d")) == ["kept", "new"]
    assert stat.S_IMODE((yard.inside / "e").stat().st_mode) == 0o711


def test_extract_does_not_replace_directories(yard: Yard) -> None:
    (yard.inside / "d").mkdir()
    (yard.inside / "d" / "kept").write_bytes(b"kept")
    with pytest.raises(HostError, match="cannot overwrite a directory"):
        extract(io.BytesIO(t.file(b"d", b"evil") + t.END), str(yard.inside), preserve_owner=False)
    assert (yard.inside / "d" / "kept").read_bytes() == b"kept"


def test_extract_needs_the_whole_archive(yard: Yard) -> None:
    with pytest.raises(IntegrityError, match="truncated"):
        extract(io.BytesIO(t.file(b"a")), str(yard.inside), preserve_owner=False)
