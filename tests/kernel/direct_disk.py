"""A disk that our own VMM starts without firmware: a table, a partition of ext4, and on that our kernel and an initramfs."""

from __future__ import annotations

import os
import subprocess
import uuid
from pathlib import Path

import pytest

from nagaya.engines.kvm import vm
from nagaya.errors import NagayaError
from nagaya.kernels import cache
from nagaya.storage.disk_images.assemble import plan_table
from tests.conftest import require_program

MIB = 1 << 20
SIZE = 64 * MIB
START = MIB
KIB = 59392
ROOT = str(uuid.UUID(int=5))
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"


def require_kernel(*programs: str) -> str:
    """The path of our kernel; skips without it, /dev/kvm, `programs`, or what makes the disk."""
    for program in ("mke2fs", "debugfs", "qemu-img", *programs):
        require_program(program)
    try:
        os.close(vm.open_kvm())
        return cache.get_kernel().path
    except NagayaError as missing:
        pytest.skip(f"needs /dev/kvm and a kernel: {missing.message}")


def make_disk(place: Path, kernel: str, initramfs: bytes) -> Path:
    """The disk, in the directory `place`."""
    tree = place / "tree"
    (tree / "boot").mkdir(parents=True)
    (tree / "etc").mkdir()
    (tree / "boot" / "initrd.img-6.1").write_bytes(initramfs)
    (tree / "boot" / "vmlinuz-6.1").write_bytes(Path(kernel).read_bytes())
    path = place / "disk.raw"
    path.touch()
    os.truncate(path, SIZE)
    options = ["-t", "ext4", "-U", ROOT, "-d", str(tree), "-E", f"offset={START}"]
    subprocess.run(["mke2fs", "-q", "-F", *options, path, f"{KIB}k"], check=True, capture_output=True)
    first, last = plan_table(SIZE // 512, ((START // 512, KIB * 2, LINUX, ROOT),), str(uuid.UUID(int=9)))
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), first, 0)
        os.pwrite(file.fileno(), last, SIZE - len(last))
    return path
