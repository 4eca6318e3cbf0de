"""Systems that are no Linux, out of Debian's packages: GNU's Mach, and a game that is a kernel of its own."""

from __future__ import annotations

import gzip
import os
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nagaya import Host, Machine
from nagaya.manager.hardware import DriveOptions, HardwareOptions
from nagaya.manager.options import CreateOptions
from nagaya.storage.disk_images.assemble import install_bios
from tests.conftest import require_program
from tests.packages import unpack_package

WITHIN_S = 300.0
GRUB = "/usr/lib/grub/i386-pc"
MODULES = ("biosdisk", "memdisk", "tar", "multiboot", "boot")
QUIET = CreateOptions(image="", network="none", stop_timeout_s=1)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What a package of Debian's has in it."""
    for program in ("qemu-system-x86_64", "qemu-img", "grub-mkimage", "dpkg-deb"):
        require_program(program)
    if not os.path.exists(f"{GRUB}/boot.img"):
        pytest.skip(f"needs {GRUB}: apt-get install grub-pc-bin")

    def fetch(name: str) -> Path:
        return unpack_package(name, tmp_path_factory.mktemp(name))

    return fetch


@pytest.fixture
def start(nagaya_root: str, tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    """A machine that GRUB starts one kernel on."""
    host = Host(root=nagaya_root)

    def create(kernel: bytes, arguments: str = "") -> Machine:
        (tmp_path / "kernel").write_bytes(kernel)
        with tarfile.open(tmp_path / "memdisk.tar", "w") as archive:
            archive.add(tmp_path / "kernel", "kernel")
        (tmp_path / "early.cfg").write_text(f"multiboot (memdisk)/kernel {arguments}\nboot\n")
        command = [
            "grub-mkimage",
            "-O",
            "i386-pc",
            "-o",
            "core.img",
            "-c",
            "early.cfg",
            "-m",
            "memdisk.tar",
            "-p",
            "(memdisk)",
        ]
        subprocess.run([*command, *MODULES], cwd=tmp_path, check=True)
        disk = tmp_path / "disk.raw"
        with open(disk, "wb") as file:
            file.truncate(4 << 20)
            install_bios(file.fileno(), f"{GRUB}/boot.img", (tmp_path / "core.img").read_bytes())
            os.pwrite(file.fileno(), b"\x55\xaa", 510)
        drives = (DriveOptions(str(disk), clone=True),)
        options = HardwareOptions(name="other", type="emulated", compat=True, drives=drives, common=QUIET)
        machine = host.machines.create_whole(options)[0]
        machine.start()
        return machine

    yield create
    for machine in host.machines.list():
        machine.remove(force=True)


def keep(machine: Machine, name: str) -> None:
    """For who wants to look at it."""
    place = os.environ.get("NAGAYA_KEEP_SCREENS", "")
    if place:
        Path(place, name).write_bytes(machine.front.take_picture())


def wait_for(found: Callable[[], bool], what: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + WITHIN_S
    while not found():
        assert time.monotonic() < deadline_s, what()
        time.sleep(0.3)


@pytest.mark.timeout(600)
def test_gnu_mach(packages: Callable[[str], Path], start: Callable[..., Machine]) -> None:
    """It boots on the screen and on the serial line, and says that it was given no servers to run."""
    packed = next((packages("gnumach-image-1.8-486") / "boot").glob("gnumach-*.gz"))
    kernel = gzip.decompress(packed.read_bytes())
    machine = start(kernel, "console=com0")

    def said() -> str:
        lines = (line.data + (b"" if line.partial else b"\n") for line in machine.logs())
        return b"".join(lines).decode(errors="replace")

    wait_for(lambda: "No bootstrap code loaded" in said(), said)
    assert "GNU Mach 1.8" in said()


@pytest.mark.timeout(600)
def test_a_game_that_is_a_kernel(packages: Callable[[str], Path], start: Callable[..., Machine]) -> None:
    """It draws, and is lost when nobody plays; a key begins it anew."""
    machine = start((packages("grub-invaders") / "boot" / "invaders.exec").read_bytes())

    def picture() -> bytes:
        return machine.front.take_picture(format="ppm")

    def colours() -> int:
        body = picture().split(b"\n", 3)[3]
        return len({body[at : at + 3] for at in range(0, len(body), 3)})

    wait_for(lambda: colours() > 4, colours)  # what comes before it is black and white
    keep(machine, "game.png")

    def has_changed() -> bool:
        before = picture()
        machine.front.press_keys(("esc",))
        time.sleep(0.5)
        return picture() != before

    wait_for(has_changed, lambda: "its picture stands still")
