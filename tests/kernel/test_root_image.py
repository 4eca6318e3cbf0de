"""Root images as the kernel reads them, beside the overlay of the same layers; made twice at once, and killed."""

from __future__ import annotations

import importlib
import io
import os
import pkgutil
import random
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest

import nagaya.images
import nagaya.kernel
import nagaya.storage
from nagaya.errors import Unsupported
from nagaya.images import rootimage
from nagaya.images.image import Image
from nagaya.images.merged import Node
from nagaya.images.progress import Silent
from nagaya.images.store import ImageStore
from nagaya.images.unpack import unpack_upper
from nagaya.kernel import mount as kernel
from nagaya.kernel import namespaces
from tests.kernel import unpack_tars as t
from tests.kernel.forked import in_child

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(shutil.which("mkfs.erofs") is None, reason="needs erofs-utils"),
]
SOURCE = str(Path(__file__).parents[2] / "src")
Tree = dict[bytes, tuple[object, ...]]


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(str(tmp_path / "images"))


def make(store: ImageStore, image: Image) -> str:
    return rootimage.make_root_image(store, image, progress=Silent())


def nasty(root: Path) -> None:
    """Everything that a file can be, except what overlayfs gives a meaning to."""
    (root / "d/deep").mkdir(parents=True)
    (root / "empty").mkdir(mode=0o1777)
    (root / "a").write_text("hi")
    os.link(root / "a", root / "d/hard")
    os.setxattr(root / "a", "user.k", b"v" * 3000)
    os.setxattr(root / "d", "trusted.t", b"\0\1")
    os.setxattr(root / "d", "user.empty", b"")
    (root / "cap").write_text("c")
    os.setxattr(root / "cap", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    os.mknod(root / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(root / "block", 0o600 | stat.S_IFBLK, os.makedev(259, 1048575))
    os.mkfifo(root / "fifo")
    os.symlink("s" * 4000, root / "link")
    os.chown(root / "link", 70000, 80000, follow_symlinks=False)
    (root / "set").write_text("")
    os.chown(root / "set", 100000, 200000)
    os.chmod(root / "set", 0o6755)
    (root / ("n" * 254)).write_text("long")
    Path(os.fsdecode(os.fsencode(root) + b"/bad\xff\n\tname")).write_text("bytes")
    with (root / "sparse").open("wb") as file:
        file.truncate(8 << 20)
        file.seek(4 << 20)
        file.write(b"middle")
    (root / "large").write_bytes(random.Random(1).randbytes(300_001))
    for number in range(1500):
        (root / f"d/deep/{number}").write_bytes(b"x" * number)
    os.utime(root / "a", ns=(0, -315_619_199_876_543_211))
    os.utime(root / "cap", ns=(0, 1_714_979_289_987_654_321))


def base_image(store: ImageStore, tmp_path: Path) -> Image:
    root = tmp_path / "base"
    root.mkdir(mode=0o755)
    nasty(root)
    for path in ("gone/x", "kept/old", "opaque/hidden", "replaced/dir/x"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)
    return store.import_rootfs(str(root), "base")


def second_image(store: ImageStore, base: Image, tmp_path: Path, *, dangling: bool = True) -> Image:
    upper = tmp_path / "upper"
    for path in ("kept/new", "opaque/shown", "fresh/file"):
        (upper / path).parent.mkdir(parents=True, exist_ok=True)
        (upper / path).write_text(path)
    os.setxattr(upper / "opaque", "trusted.overlay.opaque", b"y")
    os.mknod(upper / "gone", stat.S_IFCHR, 0)
    if dangling:
        os.mknod(upper / "fresh/never-was", stat.S_IFCHR, 0)  # a deletion with nothing below it
    (upper / "replaced").write_text("a file now")
    os.chown(upper / "kept", 7, 8)
    os.setxattr(upper / "kept", "user.of", b"upper")
    return store.commit(base, str(upper), store.layer_directories(base), "second")


def read_tree(top: str) -> Tree:
    """Path -> all that can be known of it. Names of one file come as a group."""
    tree: Tree = {}
    names: dict[int, list[bytes]] = {}
    waiting = [b""]
    while waiting:
        path = waiting.pop()
        here = os.fsencode(top) + path
        try:
            found = os.lstat(here)
        except FileNotFoundError:
            continue  # overlayfs lists a deletion that has nothing below it
        content: object = None
        if stat.S_ISREG(found.st_mode):
            content = Path(os.fsdecode(here)).read_bytes()
        elif stat.S_ISLNK(found.st_mode):
            content = os.readlink(here)
        elif stat.S_ISDIR(found.st_mode):
            waiting += [path + b"/" + name for name in os.listdir(here)]
        else:
            content = found.st_rdev
        xattrs = {
            name: os.getxattr(here, name, follow_symlinks=False) for name in os.listxattr(here, follow_symlinks=False)
        }
        names.setdefault(found.st_ino, []).append(path)
        times = found.st_mtime_ns if path else 0
        tree[path] = (found.st_mode, found.st_uid, found.st_gid, times, xattrs, content)
    for group in names.values():
        for path in group:
            tree[path] += (tuple(sorted(group)),)
    return tree


def refuse_overlay(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    if fstype == "overlay":
        raise OSError(22, "mount: Invalid argument")


def mounted(fstype: str, source: str, options: str, target: Path) -> Tree:
    target.mkdir(exist_ok=True)

    def look() -> Tree:
        namespaces.unshare(namespaces.CLONE_NEWNS)
        kernel.mount("", "/", "", kernel.MS_PRIVATE | kernel.MS_REC)
        if fstype == "erofs":
            subprocess.run(["mount", "-t", "erofs", "-o", f"loop,{options}", source, str(target)], check=True)
        else:
            kernel.mount(source, str(target), fstype, kernel.MS_RDONLY, options)
        return read_tree(str(target))

    return in_child(look)


def test_one_layer_comes_out_as_it_is(store: ImageStore, tmp_path: Path) -> None:
    image = base_image(store, tmp_path)
    path = make(store, image)
    assert rootimage.find_root_image(store, image) == path == make(store, image)
    (layer,) = store.layer_directories(image)
    expected = read_tree(layer)
    assert len(expected) > 1500 and b"/d/hard" in expected[b"/a"][-1]  # type: ignore[operator]
    assert mounted("erofs", path, "ro", tmp_path / "m") == expected


@pytest.mark.parametrize(("dangling", "overlay"), [(False, True), (True, True), (False, False)])
def test_several_layers_come_out_as_an_overlay_shows_them(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dangling: bool, overlay: bool
) -> None:
    linked = []
    link_tree = rootimage._link_tree

    def note(nodes: list[Node], target: str) -> None:
        linked.append(target)
        link_tree(nodes, target)

    monkeypatch.setattr(rootimage, "_link_tree", note)
    if not overlay:
        monkeypatch.setattr(kernel, "mount", refuse_overlay)
    image = second_image(store, base_image(store, tmp_path), tmp_path, dangling=dangling)
    layers = store.layer_directories(image)
    assert len(layers) == 2
    path = make(store, image)
    monkeypatch.undo()
    shown = mounted("overlay", "overlay", f"lowerdir={layers[0]}:{layers[1]}", tmp_path / "o")
    found = mounted("erofs", path, "ro", tmp_path / "m")
    assert found == shown and bool(linked) == (dangling or not overlay)
    assert {b"/kept/old", b"/kept/new", b"/opaque/shown"} <= set(found)
    assert not {b"/gone", b"/gone/x", b"/opaque/hidden", b"/fresh/never-was", b"/replaced/dir"} & set(found)
    assert found[b"/opaque"][4] == {} and found[b"/kept"][1:3] == (7, 8)
    assert leftovers(store) == []


def test_marks_in_the_only_layer_stay_out(store: ImageStore, tmp_path: Path) -> None:
    image = base_image(store, tmp_path)
    (layer,) = store.layer_directories(image)
    os.mknod(f"{layer}/d/never-was", stat.S_IFCHR, 0)
    os.setxattr(f"{layer}/opaque", "trusted.overlay.opaque", b"y")
    found = mounted("erofs", make(store, image), "ro", tmp_path / "m")
    assert b"/d/never-was" not in found and found[b"/opaque"][4] == {} and b"/opaque/hidden" in found


def leftovers(store: ImageStore) -> list[str]:
    return [name for name in os.listdir(f"{store.root}/roots") if not name.endswith(".erofs")]


def test_a_plain_user_s_images_are_root_s_inside(tmp_path: Path) -> None:
    """A tar with owners, devices and unreadable files, imported and committed by a user who may have none of them."""
    with tarfile.open(tmp_path / "rootfs.tar", "w") as tar:
        for name, kind, mode, uid in (
            ("bin", tarfile.DIRTYPE, 0o555, 0), ("bin/su", tarfile.REGTYPE, 0o4755, 0), ("shadow", tarfile.REGTYPE, 0, 0),
            ("null", tarfile.CHRTYPE, 0o666, 0), ("fifo", tarfile.FIFOTYPE, 0o600, 0), ("mail", tarfile.DIRTYPE, 0o2775, 8),
            ("old", tarfile.REGTYPE, 0o644, 1000), ("etc", tarfile.DIRTYPE, 0o755, 0), ("etc/kept", tarfile.REGTYPE, 0o644, 0),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.uid, info.gid, info.mtime = kind, mode, uid, uid, 1_700_000_000
            info.devmajor, info.devminor = 1, 3
            tar.addfile(info, io.BytesIO())
    upper = t.header(b"old", kind=b"3") + t.pax({b"SCHILY.xattr.trusted.overlay.opaque": b"y"}) + t.directory(b"etc/")
    place = tempfile.mkdtemp(prefix="plain-")  # pytest's own directories are root's alone
    os.chown(place, 65534, 65534)
    rootfs = Path(place, "rootfs.tar")
    shutil.copy(tmp_path / "rootfs.tar", rootfs)
    rootfs.chmod(0o644)

    def as_plain_user() -> list[str]:
        # All modules now: the checkout may lie where a plain user cannot read, such as /root.
        for package in (nagaya.images, nagaya.kernel, nagaya.storage):
            for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                importlib.import_module(module.name)
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        store = ImageStore(f"{place}/images")
        base = store.import_rootfs(str(rootfs), "base")
        os.mkdir(f"{place}/upper")
        unpack_upper(io.BytesIO(upper + t.file(b"etc/new", uid=7) + t.END), f"{place}/upper")
        second = store.commit(base, f"{place}/upper", store.layer_directories(base), "second")
        paths = [make(store, base), make(store, second)]
        for number, path in enumerate(paths):
            shutil.copy(path, f"{place}/{number}.erofs")
        store.remove("second")
        store.remove("base")
        return os.listdir(f"{store.root}/layers") + os.listdir(f"{store.root}/roots")

    try:
        assert in_child(as_plain_user) == []
        first, second = (mounted("erofs", f"{place}/{number}.erofs", "ro", tmp_path / "m") for number in range(2))
    finally:
        shutil.rmtree(place)
    assert {entry[1:3] for entry in (*first.values(), *second.values())} == {(0, 0)}
    modes = {path: stat.S_IMODE(entry[0]) for path, entry in first.items()}  # type: ignore[arg-type]
    del modes[b""]
    assert modes == {
        b"/bin": 0o755, b"/bin/su": 0o4755, b"/shadow": 0o400, b"/fifo": 0o600, b"/mail": 0o2775, b"/old": 0o644,
        b"/etc": 0o755, b"/etc/kept": 0o644,
    }  # fmt: skip
    assert set(first) - set(second) == {b"/old", b"/etc/kept"} and set(second) - set(first) == {b"/etc/new"}


def test_a_name_beyond_the_program_s_is_refused(store: ImageStore, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / ("n" * 255)).write_text("")
    image = store.import_rootfs(str(root), "long")
    with pytest.raises(Unsupported, match="255 bytes"):
        make(store, image)
    assert leftovers(store) == []


def test_removing_the_image_removes_it(store: ImageStore, tmp_path: Path) -> None:
    base = base_image(store, tmp_path)
    second = second_image(store, base, tmp_path)
    first, other = make(store, base), make(store, second)
    Path(f"{first}.tmp").write_text("cut off")
    Path(f"{other.removesuffix('.erofs')}.merged.tmp/x").mkdir(parents=True)
    store.remove("second")
    assert os.listdir(f"{store.root}/roots") == [os.path.basename(first)]
    store.remove("base")
    assert os.listdir(f"{store.root}/roots") == []


COUNTING = '#!/bin/sh\necho run >> "$COUNT"\nexec "$REAL" "$@"\n'
MAKE = (
    "import sys; from nagaya.images.store import ImageStore; from nagaya.images.progress import Silent;"
    "from nagaya.images.rootimage import make_root_image; s = ImageStore(sys.argv[1]);"
    "make_root_image(s, s.get(sys.argv[2]), progress=Silent())"
)


def start_maker(store: ImageStore, name: str, **environment: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": SOURCE, **environment}
    return subprocess.Popen([sys.executable, "-c", MAKE, store.root, name], env=env)


def test_two_makers_do_the_work_once(store: ImageStore, tmp_path: Path) -> None:
    base_image(store, tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "mkfs.erofs").write_text(COUNTING)
    (programs / "mkfs.erofs").chmod(0o755)
    real = shutil.which("mkfs.erofs")
    assert real
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "COUNT": str(tmp_path / "count"), "REAL": real}
    makers = [start_maker(store, "base", **environment) for _ in range(4)]
    assert [maker.wait(timeout=30) for maker in makers] == [0, 0, 0, 0]
    assert (tmp_path / "count").read_text() == "run\n" and leftovers(store) == []


def test_a_killed_maker_leaves_nothing_that_is_used(store: ImageStore, tmp_path: Path) -> None:
    image = second_image(store, base_image(store, tmp_path), tmp_path)
    whole = make(store, image)
    expected = mounted("erofs", whole, "ro", tmp_path / "m")
    length = os.path.getsize(whole)
    chance = random.Random(4)
    for _ in range(8):
        Path(whole).unlink(missing_ok=True)
        maker = start_maker(store, "second")
        time.sleep(chance.uniform(0.05, 0.35))
        maker.send_signal(signal.SIGKILL)
        maker.wait()
        found = rootimage.find_root_image(store, image)
        assert found is None or os.path.getsize(found) == length
    assert mounted("erofs", make(store, image), "ro", tmp_path / "m") == expected
    store.prune()
    assert leftovers(store) == []
