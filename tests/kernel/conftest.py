"""What the tests that boot a Linux share."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nagaya.kernels import cache
from tests.conftest import require_program
from tests.kernel.guest_init import compile_init, pack_initramfs

MKFS = "/usr/sbin/mkfs.ext4"


@pytest.fixture(scope="session")
def vmlinux() -> str:
    """The shipped guest kernel, built."""
    kernel = next(
        (k for k in cache.list_kernels() if (k.record.fragment, k.record.architecture) == ("shipped", "x86_64")), None
    )
    if kernel is None:
        pytest.skip("needs a built guest kernel: nagaya kernel build")
    return kernel.path


@pytest.fixture(scope="session")
def initramfs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One with kernel_init.c as its first program."""
    require_program("gcc")
    place = tmp_path_factory.mktemp("init")
    return str(pack_initramfs(place / "initramfs", compile_init(place / "init")))


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An empty ext4 file system of 16 MiB."""
    if not Path(MKFS).exists():
        pytest.skip("needs mkfs.ext4")
    path = tmp_path_factory.mktemp("disk") / "disk.img"
    with path.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run([MKFS, "-q", str(path)], check=True)
    return str(path)
