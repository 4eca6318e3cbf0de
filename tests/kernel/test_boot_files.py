"""Kernels out of disks: real ext4 file systems, read without a mount."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from nagaya.errors import IntegrityError, NotFound
from nagaya.storage.disk_images.assemble import plan_table
from nagaya.storage.disk_images.boot_files import BootFiles, copy_out, find_boot_files
from tests.conftest import require_program

LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
MIB = 1 << 20
SIZE = 24 * MIB
ROOT, BOOT = (str(uuid.UUID(int=number)) for number in (1, 2))
Tree = dict[str, bytes]
DEBIAN: Tree = {
    "etc/fstab": b"",
    "boot/vmlinuz-6.9.0-1": b"old",
    "boot/initrd.img-6.9.0-1": b"its initramfs",
    "boot/vmlinuz-6.10.0-1": b"new" * 100_000,
    "boot/initrd.img-6.10.0-1": b"another" * 100_000,
    "boot/vmlinuz-6.11.0-1": b"without an initramfs",
    "boot/config-6.10.0-1": b"",
}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """A disk with one partition for each tree, in its order."""
    for program in ("mke2fs", "debugfs"):
        require_program(program)
    with ExitStack() as stack:

        def create(*trees: tuple[str, Tree]) -> int:
            path = tmp_path / "disk.raw"
            path.touch()
            os.truncate(path, SIZE)
            partitions = []
            for number, (name, tree) in enumerate(trees):
                place = tmp_path / f"tree{number}"
                for relative, content in tree.items():
                    (place / relative).parent.mkdir(parents=True, exist_ok=True)
                    (place / relative).write_bytes(content)
                start = (1 + 10 * number) * MIB
                partitions.append((start // 512, 10 * MIB // 512, LINUX, str(uuid.UUID(int=90 + number))))
                command = ["mke2fs", "-q", "-F", "-t", "ext4", "-U", name, "-d", place, "-E", f"offset={start}"]
                subprocess.run([*command, path, "10240k"], check=True, capture_output=True)
            first, last = plan_table(SIZE // 512, tuple(partitions), str(uuid.UUID(int=9)))
            fd = os.open(path, os.O_RDWR)
            stack.callback(os.close, fd)
            if trees:
                os.pwrite(fd, first, 0)
                os.pwrite(fd, last, SIZE - len(last))
            return fd

        yield create


def content(fd: int, found: BootFiles, path: str) -> bytes:
    copy = copy_out(fd, found.partition, path)
    try:
        return os.pread(copy, SIZE, 0)
    finally:
        os.close(copy)


def test_the_newest_kernel_that_has_an_initramfs(make: Callable[..., int]) -> None:
    fd = make((ROOT, DEBIAN))
    found = find_boot_files(fd, SIZE)
    assert (found.kernel, found.initramfs, found.root) == (
        "/boot/vmlinuz-6.10.0-1",
        "/boot/initrd.img-6.10.0-1",
        ROOT,
    )
    assert content(fd, found, found.kernel) == DEBIAN["boot/vmlinuz-6.10.0-1"]
    assert content(fd, found, found.initramfs) == DEBIAN["boot/initrd.img-6.10.0-1"]


def test_a_boot_partition_of_its_own(make: Callable[..., int]) -> None:
    boot = {name.removeprefix("boot/"): data for name, data in DEBIAN.items() if name.startswith("boot/")}
    fd = make((BOOT, boot), (ROOT, {"etc/fstab": b"", "boot/here": b""}))
    found = find_boot_files(fd, SIZE)
    assert (found.kernel, found.root, found.partition.number) == ("/vmlinuz-6.10.0-1", ROOT, 1)


@pytest.mark.parametrize(
    "trees",
    [
        (),
        ((ROOT, {"etc/fstab": b""}),),
        ((ROOT, {"etc/fstab": b"", "boot/vmlinuz-6.1": b"alone"}),),
        ((BOOT, {"vmlinuz-6.1": b"x", "initrd.img-6.1": b"x"}),),  # nothing that could be a root
    ],
)
def test_disks_that_boot_otherwise(make: Callable[..., int], trees: tuple[tuple[str, Tree], ...]) -> None:
    with pytest.raises(NotFound, match="kernel"):
        find_boot_files(make(*trees), SIZE)


def test_names_that_are_no_names(make: Callable[..., int]) -> None:
    """Of what a guest calls its files nothing reaches debugfs but plain words."""
    evil = {"etc/x": b"", "boot/vmlinuz-6.1 ; quit": b"x", "boot/vmlinuz-\n6.2": b"x", 'boot/vmlinuz-"6.3"': b"x"}
    fd = make((ROOT, {**evil, "boot/initrd.img-6.1 ; quit": b"x"}))
    with pytest.raises(NotFound):
        find_boot_files(fd, SIZE)


def test_a_link_is_no_kernel(make: Callable[..., int], tmp_path: Path) -> None:
    place = tmp_path / "tree0" / "boot"
    place.mkdir(parents=True)
    (place / "vmlinuz-6.1").symlink_to("/etc/passwd")
    fd = make((ROOT, {"etc/x": b"", "boot/initrd.img-6.1": b"x"}))
    found = find_boot_files(fd, SIZE)
    with pytest.raises(IntegrityError, match="no file that a machine could boot"):
        copy_out(fd, found.partition, found.kernel)


def test_damaged_file_systems(make: Callable[..., int]) -> None:
    """Whatever is destroyed: what is read is a whole file, or there is an error in words."""
    fd = make((ROOT, DEBIAN))
    sound = os.pread(fd, SIZE, 0)
    for start in range(MIB, MIB + 512 * 1024, 32 * 1024):
        os.pwrite(fd, sound, 0)
        os.pwrite(fd, os.urandom(8192), start)
        try:
            found = find_boot_files(fd, SIZE)
            copy = copy_out(fd, found.partition, found.kernel)
        except (IntegrityError, NotFound):
            continue
        os.close(copy)
