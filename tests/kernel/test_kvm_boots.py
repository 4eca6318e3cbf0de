"""Boots in a row to a busybox shell on the console, with 1, 2 and 4 CPUs by turns, an ext4 root and a network card.

NAGAYA_BOOTS says how many (2). A second each.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from nagaya.engines.kvm.machine import Hardware, Machine
from nagaya.virtio.apart import DeviceProcess
from nagaya.virtio.blk import Blk
from nagaya.virtio.console import Console, Port
from nagaya.virtio.net import Net
from nagaya.virtio.net_link import Datagrams
from nagaya.virtio.rng import Rng

BOOTS = int(os.environ.get("NAGAYA_BOOTS", "2"))
CPUS = (4, 1, 2)
BOOT_S = 180.0
BUSYBOX = "/bin/busybox"
APPLETS = ("sh", "mount", "cat", "echo", "nproc", "touch", "ls", "ip", "poweroff", "reboot", "sync", "stty")


@pytest.fixture(scope="module")
def root_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ext4 file system with busybox on it; the kernel mounts it as the root and runs its shell."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/kvm")
    if not os.path.exists(BUSYBOX) or not shutil.which("mke2fs", path="/usr/sbin:/sbin:/usr/bin"):
        pytest.skip("needs busybox-static and mke2fs")
    place = tmp_path_factory.mktemp("boots")
    tree = place / "tree"
    for name in ("bin", "sbin", "dev", "proc", "sys", "root"):
        (tree / name).mkdir(parents=True)
    shutil.copy2(BUSYBOX, tree / "bin" / "busybox")
    for applet in APPLETS:
        os.link(tree / "bin" / "busybox", tree / "bin" / applet)
    script = "#!/bin/sh\nmount -t proc proc /proc\nexec sh </dev/hvc0 >/dev/hvc0 2>&1\n"
    (tree / "sbin" / "init").write_text(script)
    (tree / "sbin" / "init").chmod(0o755)
    disk = place / "disk"
    with disk.open("wb") as file:
        file.truncate(32 << 20)
    command = ["/usr/sbin/mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", str(tree), str(disk)]
    subprocess.run(command, check=True)
    return disk


@pytest.mark.timeout(2 * BOOT_S)
@pytest.mark.parametrize("number", range(BOOTS))
def test_a_shell_answers(vmlinux: str, root_disk: Path, number: int) -> None:
    cpus = CPUS[number % len(CPUS)]
    ours, theirs = socket.socketpair()
    far, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    theirs.setblocking(False)
    console = theirs.detach()
    drives = DeviceProcess((Blk("blk0", str(root_disk)),))
    devices = (
        Console("console0", (Port("console", console=True, input_fd=console, output_fd=console),)),
        Rng("rng0"),
        Net("net0", Datagrams(near.detach()), mac=b"\x02\0\0\0\0\x01"),
        *drives.devices,
    )
    hardware = Hardware(
        kernel=vmlinux, command_line="console=hvc0 panic=-1 root=/dev/vda rw init=/sbin/init", memory_bytes=128 << 20,
        cpus=cpus, acpi=bool(number % 2),
    )  # fmt: skip
    began = time.monotonic()
    with ours, far, Machine(hardware, devices, apart=drives) as machine:
        machine.start()
        text = b""
        ours.send(
            b"stty -echo; echo up-$(nproc)-$((6*7)); touch /root/boot-%d && sync; ls /sys/class/net /root; "
            b"ip link set eth0 up && echo linked; echo done\n" % number
        )
        poll = select.poll()
        poll.register(ours, select.POLLIN)
        while b"\ndone" not in text.replace(b"\r", b""):
            left = began + BOOT_S - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise AssertionError(f"no answer in {BOOT_S} s; {_describe(machine)}\n{text.decode(errors='replace')}")
            text += ours.recv(65536)
        took = time.monotonic() - began
        ours.send(b"poweroff -f\n" if hardware.acpi else b"reboot -f\n")
        ending = machine.wait(30)
        counters = machine.counters()
    said = text.decode(errors="replace").replace("\r", "")
    print(f"boot {number}: {cpus} CPUs, {took:.1f} s, {ending}, {counters.get('exits')}")
    assert f"\nup-{cpus}-42\n" in said and "\nlinked\n" in said and f"boot-{number}" in said, said
    assert ending is not None and ending.kind in ("power-off", "reset"), ending


def _describe(machine: Machine) -> str:
    machine.pause()
    parts = machine._parts
    return "; ".join(vcpu.describe() for vcpu in parts.vcpus) if parts is not None else "not running"
