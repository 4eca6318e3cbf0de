"""An overlay's upper directory through the agent's archive: what comes back means the same, whoever wrote it."""

from __future__ import annotations

import io
import os
import stat
import subprocess
from pathlib import Path

import pytest

from nagaya.engines.container.engine import agent_path
from nagaya.errors import IntegrityError
from nagaya.images.changes import diff
from nagaya.images.unpack import unpack_upper
from nagaya.kernel import mount as kernel
from nagaya.kernel import namespaces
from tests.kernel import unpack_tars as t
from tests.kernel.forked import in_child

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def change_through_overlay(lower: Path, upper: Path, work: Path) -> None:
    """What a machine might do to its root."""

    def change() -> None:
        namespaces.unshare(namespaces.CLONE_NEWNS)
        kernel.mount("", "/", "", kernel.MS_PRIVATE | kernel.MS_REC)
        root = lower.parent / "root"
        root.mkdir()
        options = f"lowerdir={lower},upperdir={upper},workdir={work},redirect_dir=off,metacopy=off,index=off"
        kernel.mount("overlay", str(root), "overlay", 0, options)
        (root / "gone").unlink()
        (root / "changed").write_text("changed")
        (root / "dir/inside").unlink()
        (root / "remade/old").unlink()
        (root / "remade").rmdir()
        (root / "remade").mkdir()
        (root / "remade/new").write_text("new")
        os.chown(root / "dir", 5, 6)
        os.mknod(root / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        os.mkfifo(root / "fifo")
        os.symlink("anywhere", root / "link")
        (root / "hard").write_text("hard")
        os.link(root / "hard", root / "dir/hard")
        os.chmod(root / "hard", 0o4755)
        os.setxattr(root / "hard", "user.k", b"v")
        with (root / "sparse").open("wb") as file:
            file.truncate(64 << 20)
            file.seek(32 << 20)
            file.write(b"middle")
        (root / ("n" * 255)).write_text("long")
        os.utime(root / "changed", ns=(0, 1_700_000_000_123_456_789))

    in_child(change)


def describe(top: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in [top, *sorted(top.rglob("*"))]:
        state = path.lstat()
        content: object = None
        if stat.S_ISREG(state.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(state.st_mode):
            content = os.readlink(path)
        elif not stat.S_ISDIR(state.st_mode):
            content = state.st_rdev
        marks = ("trusted.overlay.opaque", "user.k")
        xattrs = {
            name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)
        }
        links = state.st_nlink if stat.S_ISREG(state.st_mode) else 0
        # overlayfs keeps its deletions as links of one device with a time of its own
        times = 0 if stat.S_ISCHR(state.st_mode) and not state.st_rdev else state.st_mtime_ns
        found[str(path.relative_to(top))] = (
            state.st_mode, state.st_uid, state.st_gid, times, links, content,
            {name: value for name, value in xattrs.items() if name in marks},
        )  # fmt: skip
    return found


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    lower = tmp_path / "lower"
    for name in ("gone", "changed", "dir/inside", "remade/old"):
        (lower / name).parent.mkdir(parents=True, exist_ok=True)
        (lower / name).write_text(name)
    return lower


def test_an_upper_directory_comes_back_whole(tmp_path: Path, lower: Path) -> None:
    upper, work, back = tmp_path / "upper", tmp_path / "work", tmp_path / "back"
    for path in (upper, work, back):
        path.mkdir()
    change_through_overlay(lower, upper, work)
    done = subprocess.run([agent_path(), "--applet", "tar-out", f"{upper}/."], stdout=subprocess.PIPE, check=True)
    unpack_upper(io.BytesIO(done.stdout), str(back))
    assert describe(back) == describe(upper)
    assert diff(str(back), (str(lower),)) == diff(str(upper), (str(lower),))
    kinds = {(change.kind, change.path) for change in diff(str(back), (str(lower),))}
    assert {
        ("D", "/gone"),
        ("D", "/dir/inside"),
        ("D", "/remade/old"),
        ("A", "/remade/new"),
        ("C", "/changed"),
    } <= kinds
    assert os.stat(back / "sparse").st_blocks * 512 < 1 << 20
    own = {name for path in back.rglob("*") for name in os.listxattr(path, follow_symlinks=False) if "overlay" in name}
    assert own == {"trusted.overlay.opaque"}


def attribute(name: bytes, value: bytes) -> bytes:
    return t.pax({b"SCHILY.xattr." + name: value})


@pytest.mark.parametrize("mark", [b"trusted.overlay.redirect", b"trusted.overlay.metacopy"])
@pytest.mark.parametrize("entry", [t.file(b"a"), t.directory(b"a/")])
def test_a_mark_that_leads_elsewhere_is_refused(tmp_path: Path, mark: bytes, entry: bytes) -> None:
    with pytest.raises(IntegrityError, match="refers to another file"):
        unpack_upper(io.BytesIO(attribute(mark, b"/etc") + entry + t.END), str(tmp_path))


def test_other_marks_are_dropped(tmp_path: Path) -> None:
    names = (b"origin", b"impure", b"nlink", b"uuid", b"upper", b"opaque.x", b"overlay.opaque", b"whiteout")
    stream = b"".join(attribute(b"trusted.overlay." + name, b"y") + t.directory(name + b"/") for name in names)
    stream += attribute(b"trusted.overlay.opaque", b"x") + t.directory(b"half/")
    stream += attribute(b"trusted.overlay.opaque", b"y") + t.file(b"file")
    stream += attribute(b"trusted.overlay.opaque", b"y") + t.directory(b"opaque/")
    stream += attribute(b"security.selinux", b"label") + t.file(b"label")
    unpack_upper(io.BytesIO(stream + t.END), str(tmp_path))
    marked = {name: os.listxattr(tmp_path / name) for name in os.listdir(tmp_path)}
    assert {name: found for name, found in marked.items() if found} == {"opaque": ["trusted.overlay.opaque"]}


@pytest.mark.parametrize(
    "entry",
    [
        t.symlink(b"a", b"/etc") + t.file(b"a/passwd"),
        t.file(b"../out"),
        t.hard_link(b"a", b"../../etc/passwd"),
        t.header(b"a", kind=b"3") + t.file(b"a/below"),  # a deletion with something in it
    ],
)
def test_nothing_leaves_the_directory(tmp_path: Path, entry: bytes) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(IntegrityError):
        unpack_upper(io.BytesIO(entry + t.END), str(inside))
    assert os.listdir(tmp_path) == ["inside"]


def test_whiteout_names_of_layers_are_plain_files_here(tmp_path: Path) -> None:
    unpack_upper(io.BytesIO(t.file(b".wh.name") + t.header(b"gone", kind=b"3") + t.END), str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == [".wh.name", "gone"]
    assert os.lstat(tmp_path / "gone").st_rdev == 0 and stat.S_ISCHR(os.lstat(tmp_path / "gone").st_mode)
