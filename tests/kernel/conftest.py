"""What the tests that boot a Linux share."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nagaya import Host, Machine
from nagaya.kernel import process
from nagaya.kernels import cache
from nagaya.manager.hardware import DriveOptions, HardwareOptions
from nagaya.manager.options import CreateOptions
from tests.conftest import require_program
from tests.kernel.guest_init import compile_init, pack_initramfs

MKFS = "/usr/sbin/mkfs.ext4"
SOURCE = os.path.join(os.path.dirname(__file__), "boot_sector.S")
QUIET = CreateOptions(image="", network="none", stop_timeout_s=30)


@pytest.fixture(scope="module", autouse=True)
def _no_orphans_later() -> Iterator[None]:
    """A supervisor adopts orphans, so a test that is one makes pytest do so: whoever a later test kills would stay as dead."""
    yield
    process.prctl(process.PR_SET_CHILD_SUBREAPER, 0)


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


@pytest.fixture(scope="session")
def boot_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk of 1 MiB with boot_sector.S at its beginning."""
    for program in ("qemu-system-x86_64", "qemu-img", "as", "ld"):
        require_program(program)
    place = tmp_path_factory.mktemp("boot")
    path = place / "boot.raw"
    subprocess.run(["as", "--32", SOURCE, "-o", place / "boot.o"], check=True)
    link = ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-o", path, place / "boot.o"]
    subprocess.run(link, check=True)
    os.truncate(path, 1 << 20)
    return path


@pytest.fixture
def host(nagaya_root: str) -> Iterator[Host]:
    made = Host(root=nagaya_root)
    yield made
    for machine in made.machines.list():
        machine.remove(force=True)


@pytest.fixture
def make(host: Host, boot_disk: Path) -> Callable[..., Machine]:
    """A machine with a clone of the boot disk."""

    def create(name: str = "m", common: CreateOptions = QUIET, **changes: object) -> Machine:
        options = HardwareOptions(
            name=name, type="emulated", drives=(DriveOptions(str(boot_disk), clone=True),), common=common
        )
        return host.machines.create_whole(options._replace(**changes))[0]  # type: ignore[arg-type]

    return create
