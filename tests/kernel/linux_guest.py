"""A whole Linux for whole machines: Debian's cloud kernel, busybox and QEMU's guest agent on a CD that boots by a BIOS.

Its shell is on the serial line; /dev/vda, if it has a file system, is mounted at /disk.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import require_program
from tests.packages import find_kernel_package, unpack_package

_MODULES = (
    "kernel/net/core/failover", "kernel/drivers/net/net_failover",
    "kernel/drivers/virtio/virtio_ring", "kernel/drivers/virtio/virtio", "kernel/drivers/virtio/virtio_pci_modern_dev",
    "kernel/drivers/virtio/virtio_pci_legacy_dev", "kernel/drivers/virtio/virtio_pci",
    "kernel/drivers/virtio/virtio_balloon", "kernel/drivers/block/virtio_blk", "kernel/drivers/net/virtio_net",
    "kernel/drivers/char/virtio_console",
)  # fmt: skip
_INIT = """#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in $(cat /modules); do insmod /$module; done
ip link set lo up; dmesg -n 1
[ ! -e /dev/vda ] || mount /dev/vda /disk
for port in /sys/class/virtio-ports/*; do
    [ "$(cat $port/name)" != org.qemu.guest_agent.0 ] || qemu-ga -d -m virtio-serial -p /dev/${port##*/} -t /run -f /run/ga.pid -l /run/ga.log
done
stty -F /dev/ttyS0 -echo
echo LINUX""-UP > /dev/ttyS0
exec setsid sh -c 'PS1= exec sh -i </dev/ttyS0 >/dev/ttyS0 2>&1'
"""
_GRUB = "serial --unit=0\nterminal_input serial\nterminal_output serial\nlinux /linux console=ttyS0 mitigations=off\ninitrd /initrd\nboot\n"


def find_kernel(place: Path) -> Path:
    """A directory with boot/ and lib/modules/: this host's own, or one unpacked from the package that apt brings."""
    if list(Path("/boot").glob("vmlinuz-*cloud-amd64")):
        return Path("/")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nagaya" / "test-linux"
    if not list(cache.glob("boot/vmlinuz-*")):
        fresh = cache.with_name(f"test-linux.{os.getpid()}")
        shutil.copytree(unpack_package(find_kernel_package("linux-image-cloud-amd64"), place), fresh, symlinks=True)
        shutil.rmtree(cache, ignore_errors=True)
        fresh.rename(cache)
    return cache


def make_disc(place: Path) -> Path:
    """The CD."""
    for program in ("grub-mkimage", "genisoimage", "busybox", "qemu-ga", "apt-get", "dpkg"):
        require_program(program)
    if not os.path.exists("/usr/lib/grub/i386-pc/cdboot.img"):
        pytest.skip("GRUB for BIOS is not installed (grub-pc-bin)")
    base = find_kernel(place)
    kernel = sorted((base / "boot").glob("vmlinuz-*cloud-amd64"))[-1]
    modules = base / "lib/modules" / kernel.name.removeprefix("vmlinuz-")
    root, disc = place / "root", place / "disc"
    for name in ("bin", "dev", "proc", "sys", "run", "disk", "modules.d", "usr/sbin", "lib64", "etc"):
        (root / name).mkdir(parents=True)
    shutil.copy("/usr/bin/busybox", root / "bin/busybox")
    applets = subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in applets:
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    agent = shutil.which("qemu-ga") or ""
    shutil.copy(agent, root / "usr/sbin/qemu-ga")
    for path in re.findall(r"(/\S+) \(0x", subprocess.run(["ldd", agent], capture_output=True, text=True).stdout):
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(os.path.realpath(path), target)
    for name in _MODULES:
        shutil.copy(modules / f"{name}.ko", root / "modules.d")
    (root / "modules").write_text("".join(f"modules.d/{Path(name).name}.ko\n" for name in _MODULES))
    (root / "init").write_text(_INIT)
    (root / "init").chmod(0o755)
    disc.mkdir()
    shutil.copy(kernel, disc / "linux")
    names = subprocess.run(["find", ".", "-print0"], cwd=root, capture_output=True, check=True).stdout
    packed = subprocess.run(["busybox", "cpio", "-0", "-o", "-H", "newc"], cwd=root, input=names, capture_output=True)
    (disc / "initrd").write_bytes(gzip.compress(packed.stdout, 6))  # a BIOS reads a CD slowly
    (place / "grub.cfg").write_text(_GRUB)
    subprocess.run(
        ["grub-mkimage", "-O", "i386-pc-eltorito", "-p", "/", "-c", place / "grub.cfg", "-o", disc / "grub.img",
         "biosdisk", "iso9660", "linux", "serial", "terminal"],
        check=True,
    )  # fmt: skip
    iso = place / "linux.iso"
    subprocess.run(
        ["genisoimage", "-quiet", "-R", "-b", "grub.img", "-no-emul-boot", "-boot-load-size", "4",
         "-boot-info-table", "-o", iso, disc],
        check=True,
    )  # fmt: skip
    return iso
