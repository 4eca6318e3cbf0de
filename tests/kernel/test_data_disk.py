"""Data disks as a guest's kernel has them: filled with a container's changes, below an overlay, grown, and killed at.

Each disk here is of our own making: what a guest wrote, the host never mounts.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from nagaya.errors import LaunchError
from nagaya.kernel import mount as kernel
from nagaya.kernel import namespaces
from nagaya.storage import disks
from tests.kernel.forked import in_child
from tests.kernel.test_root_image import Tree, nasty, read_tree

T = TypeVar("T")
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(
        shutil.which("debugfs", path=f"{os.environ['PATH']}:/usr/sbin") is None, reason="needs e2fsprogs"
    ),
]
SOURCE = str(Path(__file__).parents[2] / "src")


def with_disk(disk: Path, target: Path, look: Callable[[], T]) -> T:
    target.mkdir(exist_ok=True)

    def mounted() -> T:
        namespaces.unshare(namespaces.CLONE_NEWNS)
        kernel.mount("", "/", "", kernel.MS_PRIVATE | kernel.MS_REC)
        subprocess.run(["mount", "-t", "ext4", "-o", "loop", str(disk), str(target)], check=True)
        return look()

    return in_child(mounted)


def check(disk: Path) -> None:
    """e2fsck finds nothing to mend."""
    done = subprocess.run(
        ["e2fsck", "-fn", str(disk)], capture_output=True, env={**os.environ, "PATH": "/sbin:/usr/sbin"}
    )
    assert done.returncode == 0, done.stdout


def make_upper(upper: Path) -> None:
    nasty(upper)
    (upper / "opaque").mkdir()
    os.setxattr(upper / "opaque", "trusted.overlay.opaque", b"y")
    os.mknod(upper / "deleted", stat.S_IFCHR, 0)
    (upper / ("n" * 255)).write_text("longest")
    (upper / 'with "quotes" and spaces').write_text("")
    os.utime(upper / 'with "quotes" and spaces', ns=(1, 1_600_000_000_000_000_007))
    (upper / "later").write_text("")
    os.utime(upper / "later", ns=(5_000_000_000_999_999_999, 5_000_000_000_123_456_789))


def whole_seconds(tree: Tree, path: bytes) -> Tree:
    fields = list(tree[path])
    assert isinstance(fields[3], int)
    fields[3] = fields[3] // 1_000_000_000
    return {**tree, path: tuple(fields)}


def test_a_container_s_changes_come_whole(tmp_path: Path) -> None:
    upper, disk, here = tmp_path / "upper", tmp_path / "data.img", tmp_path / "m"
    upper.mkdir()
    make_upper(upper)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(upper / "socket"))
    disks.populate_data_disk(str(disk), 1 << 30, str(upper))
    found = with_disk(disk, here, lambda: read_tree(f"{here}/upper"))
    expected = read_tree(str(upper))
    odd = b"/bad\xff\n\tname"  # debugfs reads lines
    assert whole_seconds(found, odd) == whole_seconds(expected, odd)
    assert found[b"/opaque"][4] == {"trusted.overlay.opaque": b"y"} and found[b"/deleted"][5] == 0
    check(disk)
    assert sorted(os.listdir(tmp_path)) == ["data.img", "m", "upper"]
    assert disk.stat().st_blocks * 512 < 20 << 20  # holes stay holes


def test_an_overlay_shows_the_same_on_the_disk(tmp_path: Path) -> None:
    lower, upper, work, disk, here = (tmp_path / name for name in ("lower", "upper", "work", "data.img", "m"))
    for path in (lower / "dir", lower / "remade", upper, work):
        path.mkdir(parents=True)
    for name in ("gone", "changed", "dir/inside", "remade/old"):
        (lower / name).write_text(name)
    root = tmp_path / "root"
    root.mkdir()

    def overlay(upper: Path, work: Path) -> None:
        kernel.mount("overlay", str(root), "overlay", 0, f"lowerdir={lower},upperdir={upper},workdir={work}")

    def change() -> Tree:
        namespaces.unshare(namespaces.CLONE_NEWNS)
        kernel.mount("", "/", "", kernel.MS_PRIVATE | kernel.MS_REC)
        overlay(upper, work)
        (root / "gone").unlink()
        (root / "changed").write_text("changed")  # copied up, with trusted.overlay.origin
        (root / "dir/inside").unlink()
        (root / "remade/old").unlink()
        (root / "remade").rmdir()
        (root / "remade").mkdir()
        os.link(root / "changed", root / "dir/link")
        return read_tree(str(root))

    before = in_child(change)
    disks.populate_data_disk(str(disk), disks.LEAST_BYTES, str(upper))

    def look() -> Tree:
        (here / "work").mkdir()
        overlay(here / "upper", here / "work")
        return read_tree(str(root))

    assert with_disk(disk, here, look) == before
    assert b"/gone" not in before and b"/remade/old" not in before and b"/dir/link" in before


def test_an_empty_disk_is_sound_and_has_a_journal(tmp_path: Path) -> None:
    disk = tmp_path / "data.img"
    begun = time.monotonic()
    disks.create_data_disk(str(disk), disks.DEFAULT_BYTES)
    assert time.monotonic() - begun < 0.5  # 10 ms where nothing else runs
    check(disk)
    told = subprocess.run(
        ["dumpe2fs", "-h", str(disk)], capture_output=True, env={"PATH": "/sbin:/usr/sbin", "LC_ALL": "C"}
    )
    assert b"has_journal" in told.stdout and b"64M" in told.stdout
    # nothing left for the guest's kernel to write over the holes with
    groups = subprocess.run(
        ["dumpe2fs", str(disk)], capture_output=True, env={"PATH": "/sbin:/usr/sbin", "LC_ALL": "C"}
    )
    assert groups.stdout.count(b"ITABLE_ZEROED") == groups.stdout.count(b": (Blocks ") > 70


def test_what_does_not_fit_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    upper, disk = tmp_path / "upper", tmp_path / "data.img"
    upper.mkdir()
    (upper / "large").write_bytes(random.Random(2).randbytes(80 << 20))
    with pytest.raises(LaunchError) as refusal:
        disks.populate_data_disk(str(disk), disks.LEAST_BYTES, str(upper))
    assert "--storage" in refusal.value.hint and os.listdir(tmp_path) == ["upper"]


POPULATE = "import sys; from nagaya.storage.disks import populate_data_disk as p; p(sys.argv[1], 1 << 30, sys.argv[2])"


def test_a_killed_maker_leaves_no_disk(tmp_path: Path) -> None:
    upper, disk, here = tmp_path / "upper", tmp_path / "data.img", tmp_path / "m"
    upper.mkdir()
    make_upper(upper)
    chance = random.Random(3)
    for _ in range(5):
        argv = [sys.executable, "-c", POPULATE, str(disk), str(upper)]
        maker = subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": SOURCE})
        time.sleep(chance.uniform(0.05, 0.4))
        maker.send_signal(signal.SIGKILL)
        maker.wait()
        if disk.exists():
            check(disk)  # it was quicker
            disk.unlink()
    disks.populate_data_disk(str(disk), 1 << 30, str(upper))
    assert sorted(os.listdir(tmp_path)) == ["data.img", "upper"]
    assert len(with_disk(disk, here, lambda: read_tree(f"{here}/upper"))) == len(read_tree(str(upper)))
