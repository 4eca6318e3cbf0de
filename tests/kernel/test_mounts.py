"""Mount plans carried out in mount namespaces of the tests' own."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from nagaya.engines.container import mounts, rootfs
from nagaya.engines.container.mounts import MountStep
from nagaya.errors import IntegrityError, UsageError
from nagaya.kernel import mount as kernel
from nagaya.kernel import namespaces
from nagaya.storage.plan import RootfsPlan
from tests.kernel.forked import in_child

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
T = TypeVar("T")


def apart(function: Callable[[], T]) -> T:
    """Run in a child with a mount namespace of its own."""

    def child() -> T:
        namespaces.unshare(namespaces.CLONE_NEWNS)
        kernel.mount("", "/", "", kernel.MS_PRIVATE | kernel.MS_REC)
        return function()

    return in_child(child)


def open_root(path: Path) -> int:
    return os.open(path, os.O_PATH | os.O_DIRECTORY)


def apply(root: Path, *steps: MountStep) -> None:
    mounts.apply(mounts.open_trees(steps, warn=lambda text: None), open_root(root))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "root"
    made.mkdir()
    return made


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    made = tmp_path / "outside"
    made.mkdir()
    (made / "secret").write_text("host")
    return made


# -- targets


def test_missing_targets_are_made(root: Path, outside: Path) -> None:
    def mount() -> tuple[str, str]:
        apply(
            root,
            MountStep("", str(outside), "/a/b/c"),
            MountStep("", str(outside / "secret"), "/etc/file", is_file=True),
        )
        return (root / "a/b/c/secret").read_text(), (root / "etc/file").read_text()

    assert apart(mount) == ("host", "host")
    assert (root / "a/b/c").is_dir() and (root / "etc/file").is_file()
    assert list((root / "a/b/c").iterdir()) == []  # the mount was the child's alone


@pytest.mark.parametrize("link", ["../outside", "../../../../../../etc", "/etc", "/"])
def test_links_lead_nowhere_but_inside(root: Path, outside: Path, link: str) -> None:
    (root / "link").symlink_to(link)

    def mount() -> list[str]:
        apply(root, MountStep("tmpfs", "tmpfs", "/link/made", 0, ""))
        return [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]

    place = str(root / link.replace("../", "").strip("/") / "made").replace("/./", "/")
    before = os.listdir("/etc"), sorted(os.listdir(outside))
    assert place in apart(mount)
    assert (os.listdir("/etc"), sorted(os.listdir(outside))) == before


def test_a_dangling_link_has_its_target_made(root: Path, outside: Path) -> None:
    """/etc/resolv.conf of an image made for systemd."""
    (root / "etc").mkdir()
    (root / "etc/resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    (root / "etc/absolute").symlink_to("/nowhere/yet")

    def mount() -> tuple[str, bool]:
        apply(
            root,
            MountStep("", str(outside / "secret"), "/etc/resolv.conf", is_file=True),
            MountStep("tmpfs", "tmpfs", "/etc/absolute"),
        )
        return (root / "run/systemd/resolve/stub-resolv.conf").read_text(), os.path.ismount(root / "nowhere/yet")

    assert apart(mount) == ("host", True)
    assert not os.path.exists("/run/systemd/resolve/stub-resolv.conf") or os.path.realpath("/run") not in str(root)


def test_links_in_a_circle_are_an_error(root: Path) -> None:
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    (root / "grow").symlink_to("grow/x")
    for target in ("/a", "/a/x", "/grow"):
        with pytest.raises(OSError) as caught:
            apart(lambda target=target: apply(root, MountStep("tmpfs", "tmpfs", target)))  # type: ignore[misc]
        assert caught.value.errno == errno.ELOOP and caught.value.filename == target


def test_our_own_mounts_follow_no_link(root: Path) -> None:
    """An image's /proc -> /elsewhere would leave the paths that we mask pointing past the real one."""
    (root / "elsewhere").mkdir()
    (root / "proc").symlink_to("elsewhere")
    with pytest.raises(IntegrityError, match="/proc"):
        apart(lambda: apply(root, MountStep("proc", "proc", "/proc", system=True)))
    assert not os.path.ismount(root / "elsewhere")


def test_a_link_into_proc_is_no_way_over_it(root: Path, outside: Path) -> None:
    (root / "proc").mkdir()
    (root / "trick").symlink_to("/proc/sys")

    def mount() -> None:
        apply(root, MountStep("proc", "proc", "/proc", system=True), MountStep("", str(outside), "/trick"))

    with pytest.raises(UsageError, match="/proc/sys"):
        apart(mount)


def test_files_go_on_files_and_directories_on_directories(root: Path, outside: Path) -> None:
    (root / "directory").mkdir()
    (root / "file").write_text("")
    on_directory = MountStep("", str(outside / "secret"), "/directory", is_file=True)
    on_file = MountStep("", str(outside), "/file")
    for step, number in ((on_directory, errno.EISDIR), (on_file, errno.ENOTDIR)):
        with pytest.raises(OSError) as caught:
            apart(lambda step=step: apply(root, step))  # type: ignore[misc]
        assert caught.value.errno == number and caught.value.filename == step.target


# -- binds


def test_read_only_reaches_mounts_below(root: Path, outside: Path) -> None:
    (outside / "sub").mkdir()

    def write() -> list[int]:
        kernel.mount("tmpfs", str(outside / "sub"), "tmpfs")
        apply(root, MountStep("", str(outside), "/data", kernel.MS_RDONLY | kernel.MS_NODEV))
        errors = []
        for path in ("data/new", "data/sub/new"):
            try:
                (root / path).write_text("")
            except OSError as error:
                errors.append(error.errno or 0)
        (outside / "sub/new").write_text("the host's own mount stays writable")
        return errors

    assert apart(write) == [errno.EROFS, errno.EROFS]


def test_nodev_and_noexec_hold(root: Path, outside: Path) -> None:
    os.mknod(outside / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))

    def use() -> int | None:
        apply(root, MountStep("", str(outside), "/data", kernel.MS_NODEV | kernel.MS_NOEXEC))
        try:
            (root / "data/null").read_bytes()
        except OSError as error:
            return error.errno
        return None

    assert apart(use) == errno.EACCES


@pytest.mark.parametrize(("propagation", "seen"), [("rprivate", False), ("rslave", True), ("rshared", True)])
def test_propagation_from_the_host(root: Path, outside: Path, propagation: str, seen: bool) -> None:
    (outside / "later").mkdir()

    def look() -> tuple[bool, bool]:
        kernel.mount(str(outside), str(outside), "", kernel.MS_BIND)
        kernel.mount("", str(outside), "", kernel.MS_SHARED)
        apply(root, MountStep("", str(outside), "/data", propagation=propagation))
        kernel.mount("tmpfs", str(outside / "later"), "tmpfs")
        forward = os.path.ismount(root / "data/later")
        (root / "data/back").mkdir()
        kernel.mount("tmpfs", str(root / "data/back"), "tmpfs")
        return forward, os.path.ismount(outside / "back")

    assert apart(look) == (seen, propagation == "rshared")


# -- masks


def test_masking_needs_the_real_null_device(root: Path) -> None:
    """CVE-2025-31133: a /dev/null of somebody else's would be bound over what is to be hidden."""

    def mask() -> None:
        (root / "dev").mkdir()
        (root / "dev/null").write_text("")
        (root / "proc").mkdir()
        kernel.mount("proc", str(root / "proc"), "proc")
        os.chroot(root)
        mounts.mask_paths()

    with pytest.raises(OSError, match="not the null device"):
        in_child(lambda: apart(mask))


# -- the root file system


def layers(tmp_path: Path, count: int) -> tuple[str, ...]:
    made = []
    for number in range(count):
        layer = tmp_path / "layers" / f"{number:064x}"  # as long as a digest
        layer.mkdir(parents=True)
        (layer / "which").write_text(str(number))
        (layer / f"only-{number}").write_text("")
        made.append(str(layer))
    return tuple(made)


def plan(directory: Path, lower: tuple[str, ...]) -> RootfsPlan:
    directory.mkdir()
    return RootfsPlan(lower, f"{directory}/upper", f"{directory}/work")


@pytest.mark.parametrize("count", [1, 2, 60, 200, 490])
def test_many_layers_in_order(tmp_path: Path, count: int) -> None:
    layout = plan(tmp_path / "machine", layers(tmp_path, count))
    (tmp_path / "target").mkdir()

    def look() -> tuple[str, int]:
        rootfs.prepare(layout)
        root = rootfs.mount_overlay(layout, str(tmp_path / "target"))
        return Path(f"/proc/self/fd/{root}/which").read_text(), len(os.listdir(f"/proc/self/fd/{root}/"))

    assert apart(look) == ("0", count + 1)


def test_names_with_every_separator(tmp_path: Path) -> None:
    odd = tmp_path / "a:b,c\\d e"
    layer = odd / "layer:1,2\\3"
    layer.mkdir(parents=True)
    (layer / "file").write_text("here")
    layout = plan(odd / "machine", (str(layer),))
    (odd / "target").mkdir()

    def look() -> str:
        rootfs.prepare(layout)
        rootfs.mount_overlay(layout, str(odd / "target"))
        (odd / "target/new").write_text("")
        return (odd / "target/file").read_text()

    assert apart(look) == "here"
    assert (odd / "machine/upper/new").exists()


def test_the_machines_root_begins_as_the_images(tmp_path: Path) -> None:
    layout = plan(tmp_path / "machine", layers(tmp_path, 1))
    os.chmod(layout.lower[0], 0o751)
    os.chown(layout.lower[0], 7, 8)

    def prepare() -> None:
        os.umask(0o077)
        rootfs.prepare(layout)

    in_child(prepare)
    found = os.stat(layout.upper)
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o751, 7, 8)
    os.chmod(layout.upper, 0o700)
    rootfs.prepare(layout)
    assert stat.S_IMODE(os.stat(layout.upper).st_mode) == 0o700  # as the machine's own root changed it


def test_a_copy_where_overlay_cannot_be(tmp_path: Path) -> None:
    """An upper directory on an overlay is what the kernel refuses."""
    lower = layers(tmp_path, 2)
    os.mknod(f"{lower[0]}/only-1", stat.S_IFCHR, 0)  # a whiteout
    os.link(f"{lower[0]}/which", f"{lower[0]}/hard")
    os.setxattr(f"{lower[0]}/which", "user.note", b"kept")
    for name in ("u", "w", "over", "target"):
        (tmp_path / name).mkdir()

    def look() -> tuple[bool, list[str], bool, bytes, bool]:
        kernel.mount(
            "overlay",
            str(tmp_path / "over"),
            "overlay",
            0,
            f"lowerdir={lower[1]},upperdir={tmp_path}/u,workdir={tmp_path}/w",
        )
        layout = plan(tmp_path / "over/machine", lower)
        rootfs.prepare(layout)
        try:
            rootfs.mount_overlay(layout, str(tmp_path / "target"))
            refused = False
        except OSError as error:
            refused = rootfs.cannot_overlay(error)
        assert not rootfs.has_copy(layout)
        fd = rootfs.mount_copy(layout, str(tmp_path / "target"))
        root = Path(f"/proc/self/fd/{fd}/")
        names = sorted(os.listdir(root))
        linked = os.path.samefile(root / "which", root / "hard")
        return refused, names, linked, os.getxattr(root / "which", "user.note"), rootfs.has_copy(layout)

    assert apart(look) == (True, ["hard", "only-0", "which"], True, b"kept", True)
