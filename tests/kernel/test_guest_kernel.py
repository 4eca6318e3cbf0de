"""The guest kernel that `nagaya kernel build` made, booted by QEMU's microvm without KVM."""

from __future__ import annotations

import statistics
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from nagaya.engines.kvm.boot.symbols import find_functions
from nagaya.kernels.arguments import DEPRIVILEGED_START
from tests.conftest import require_program

BOOT_S = 3.0  # the goal is one second on a machine with nothing else to do; the suite's machine has


class Guest(NamedTuple):
    """What the first program said: "name number" lines, and the sections behind them."""

    results: dict[str, int]
    sections: dict[str, list[str]]


@pytest.fixture(scope="module", autouse=True)
def _qemu() -> None:
    require_program("qemu-system-x86_64")


def boot(vmlinux: str, initramfs: str, *devices: str, append: str = "quiet") -> str:
    """Everything that the guest wrote on its console until it restarted."""
    words = [word for device in devices for word in device.split()]
    command = [
        "qemu-system-x86_64", "-M", "microvm,acpi=off,isa-serial=off", "-accel", "tcg", "-cpu", "max", "-m", "256",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-kernel", vmlinux, "-initrd", initramfs,
        "-device", "virtio-serial-device", "-chardev", "stdio,id=console", "-device", "virtconsole,chardev=console", *words,
        "-append", f"console=hvc0 reboot=t panic=-1 {append}",
    ]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace("\r", "")


def read_guest(text: str) -> Guest:
    results: dict[str, int] = {}
    sections: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in text.splitlines():
        name, _, number = line.rpartition(" ")
        if line.startswith("--"):
            lines = sections.setdefault(line[2:], [])
        elif lines is not None:
            lines.append(line.split("\t")[-1])
        elif name:
            results[name] = int(number)
    return Guest(results, sections)


@pytest.fixture(scope="module")
def guest(vmlinux: str, initramfs: str, disk: str) -> Guest:
    """A machine with one device of each kind."""
    text = boot(
        vmlinux,
        initramfs,
        f"-drive if=none,id=disk,format=raw,file={disk} -device virtio-blk-device,drive=disk",
        "-netdev hubport,hubid=0,id=net -device virtio-net-device,netdev=net",
        "-device virtio-rng-device",
        "-device virtio-balloon-device",
    )
    assert "INIT\n" in text and "--end\n" in text, text
    return read_guest(text.partition("INIT\n")[2])


def test_it_can_run_in_user_mode(vmlinux: str) -> None:
    assert find_functions(vmlinux, (DEPRIVILEGED_START,))


def test_it_is_what_qemu_loads(vmlinux: str) -> None:
    """An ELF file with a PVH note, and small: it is read at each start."""
    data = Path(vmlinux).read_bytes()
    assert data[:4] == b"\x7fELF"
    assert b"Xen\0" in data  # the note's owner: XEN_ELFNOTE_PHYS32_ENTRY
    assert len(data) < 32 << 20


@pytest.mark.parametrize(
    "type", ["devtmpfs", "proc", "sysfs", "cgroup2", "tmpfs", "devpts", "mqueue", "binfmt_misc", "overlay", "ext4"]
)
def test_mounts(guest: Guest, type: str) -> None:
    assert guest.results[f"mount-{type}"] == 0


@pytest.mark.parametrize(
    "path",
    [
        "/dev/hvc0", "/dev/hwrng", "/dev/vsock", "/dev/net/tun", "/dev/fuse", "/dev/loop-control", "/sys/class/net/eth0",
        "/sys/bus/virtio/drivers/virtio_balloon/virtio4", "/dev/vda", "/disk/made",
    ],
)  # fmt: skip
def test_devices(guest: Guest, path: str) -> None:
    assert guest.results[f"open-{path}"] == 0


def test_file_systems(guest: Guest) -> None:
    assert {"ext4", "erofs", "squashfs", "overlay", "virtiofs", "fuse", "tmpfs"} <= {
        line.strip() for line in guest.sections["filesystems"]
    }


def test_control_groups_have_their_controllers(guest: Guest) -> None:
    assert {"cpu", "cpuset", "io", "memory", "pids"} <= set(guest.sections["cgroups"][0].split())


@pytest.mark.parametrize("family", ["inet", "inet6", "packet", "vsock", "netfilter"])
def test_sockets(guest: Guest, family: str) -> None:
    assert guest.results[f"socket-{family}"] >= 0


def test_system_calls_that_programs_ask_for(guest: Guest) -> None:
    enosys = -38
    assert guest.results["unshare"] == 0  # all eight namespaces
    assert guest.results["fanotify"] >= 0 and guest.results["userfaultfd"] >= 0
    assert guest.results["io_uring"] == -14  # EFAULT for a missing argument: it is there
    assert guest.results["swapon"] == -2  # ENOENT: it is there too
    assert enosys not in guest.results.values()


def test_boot_is_quick(vmlinux: str, initramfs: str) -> None:
    """Process start to the end of a guest that restarts once it is in user space, all code translated by QEMU."""
    seconds = []
    for _ in range(5):
        began_s = time.monotonic()
        assert "INIT\n" in boot(vmlinux, initramfs)
        seconds.append(time.monotonic() - began_s)
    assert statistics.median(seconds) < BOOT_S, seconds


def test_a_panic_says_why_and_restarts(vmlinux: str, initramfs: str) -> None:
    """Not `quiet` alone: a panic is shown at every log level, and nobody waits for a reset button."""
    text = boot(vmlinux, initramfs, append="quiet rdinit=/missing root=/dev/missing")
    assert "Kernel panic - not syncing: VFS: Unable to mount root fs" in text
