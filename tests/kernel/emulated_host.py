"""A host with devices that this one has not got: QEMU's, with Debian's kernel, whose root is this host's, to be read only.

What is written there goes to memory: /tmp, /run and /root are its own.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from tests.conftest import require_program
from tests.packages import find_kernel_package, unpack_package

PACKAGE = "linux-image-amd64"  # the cloud kernel has no VFIO
_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin:/usr/sbin:/sbin HOME=/root LC_ALL=C.UTF-8
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in /modules/*; do insmod $module; done
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro root /root || poweroff -f
for place in tmp run root; do mount -t tmpfs tmpfs /root/$place; done
mount -t proc proc /root/proc; mount -t sysfs sys /root/sys; mount --bind /dev /root/dev
mkdir -p /root/dev/shm; mount -t tmpfs tmpfs /root/dev/shm; mount -t cgroup2 none /root/sys/fs/cgroup
cp /script /root/tmp/script
ip link set lo up
chroot /root /bin/sh /tmp/script
echo ended; sync; poweroff -f
"""


def find_modules(root: Path, *names: str) -> list[Path]:
    """The files of kernel modules and of all that they need, in the order in which they can be loaded."""
    there = {path.stem.replace("-", "_"): path for path in root.rglob("*.ko")}
    order: list[Path] = []

    def add(name: str) -> None:
        path = there.get(name.replace("-", "_"))
        if path is None or path in order:
            return  # built in, or there already
        needs = re.search(rb"\0depends=([^\0]+)\0", path.read_bytes())
        for needed in needs[1].decode().split(",") if needs else ():
            add(needed)
        order.append(path)

    for name in names:
        add(name)
    return order


def run_there(place: Path, script: str, *, modules: tuple[str, ...], devices: tuple[str, ...], within_s: float) -> str:
    """What a shell script says on a host with these devices (QEMU's words). It sees this host's files."""
    require_program("qemu-system-x86_64")
    require_program("busybox")
    kernel, tree = unpack_package(find_kernel_package(PACKAGE), place), place / "tree"
    for name in ("bin", "modules", "proc", "sys", "dev", "root"):
        (tree / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "", tree / "bin" / "busybox")
    needed = find_modules(kernel / "lib", "virtio_pci", "9pnet_virtio", "9p", *modules)
    for number, path in enumerate(needed):
        shutil.copy(path, tree / "modules" / f"{number:03}-{path.name}")
    (tree / "init").write_text(_INIT)
    (tree / "init").chmod(0o755)
    (tree / "script").write_text(script)
    initrd = place / "initrd"
    with initrd.open("wb") as file:
        names = b"\n".join(bytes(path.relative_to(tree)) for path in [tree, *sorted(tree.rglob("*"))])
        subprocess.run(["busybox", "cpio", "-o", "-H", "newc"], input=names, stdout=file, cwd=tree, check=True)
    # A timer that a busy host delays is none to a kernel that looks for one behind a remapping interrupt controller.
    words = "console=ttyS0 quiet intel_iommu=on mitigations=off panic=-1 no_timer_check"
    argv = [
        "qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1500", "-nodefaults",
        "-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", next(kernel.glob("boot/vmlinuz-*")), "-initrd", initrd,
        "-append", words, "-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap",
    ]  # fmt: skip
    for device in devices:
        argv += device.split(" ", 1)
    ran = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=within_s
    )
    return ran.stdout.replace("\r", "") + ran.stderr
