"""Published ports of a whole machine, whose system sets itself up by DHCP: on our bridge, and by a user-mode network."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from nagaya import Host
from nagaya.engines.kvm import vm
from nagaya.errors import NagayaError
from nagaya.kernels import cache
from nagaya.manager.hardware import DIRECT, DriveOptions, HardwareOptions
from nagaya.manager.options import CreateOptions
from nagaya.model.spec import Limits, PortMapping
from nagaya.storage.disk_images.assemble import plan_table
from tests.conftest import require_program

AT_MOST_S = 300.0  # a software KVM on a busy host
MIB = 1 << 20
SIZE, START, BLOCKS = 64 * MIB, MIB, "59392k"
ROOT = str(uuid.UUID(int=6))
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
INIT = """#!/bin/busybox sh
busybox mount -t proc proc /proc
busybox ip link set lo up
busybox ip link set eth0 up
busybox udhcpc -i eth0 -n -q -t 20 -s /set-up
exec busybox httpd -f -p 80 -h /www
"""
SET_UP = """#!/bin/busybox sh
[ "$1" = bound ] || exit 0
busybox ip address add "$ip/$mask" dev eth0
busybox ip route add default via "$router"
echo "$ip" > /www/index.html
"""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a partition of ext4, and on it our kernel and busybox."""
    for program in ("mke2fs", "debugfs", "qemu-img", "busybox"):
        require_program(program)
    try:
        os.close(vm.open_kvm())
        kernel = cache.get_kernel().path
    except NagayaError as missing:
        pytest.skip(f"needs /dev/kvm and a kernel: {missing.message}")
    place = tmp_path_factory.mktemp("ports")
    boot = place / "tree/boot"
    boot.mkdir(parents=True)
    (place / "tree/etc").mkdir()
    (boot / "initrd.img-6.1").write_bytes(_pack(place / "root"))
    (boot / "vmlinuz-6.1").write_bytes(Path(kernel).read_bytes())
    path = place / "disk.raw"
    path.touch()
    os.truncate(path, SIZE)
    options = ["-t", "ext4", "-U", ROOT, "-d", str(place / "tree"), "-E", f"offset={START}"]
    subprocess.run(["mke2fs", "-q", "-F", *options, path, BLOCKS], check=True, capture_output=True)
    first, last = plan_table(SIZE // 512, ((START // 512, 59392 * 2, LINUX, ROOT),), str(uuid.UUID(int=9)))
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), first, 0)
        os.pwrite(file.fileno(), last, SIZE - len(last))
    return path


def _pack(root: Path) -> bytes:
    for name in ("bin", "dev", "proc", "www"):
        (root / name).mkdir(parents=True)
    (root / "bin/busybox").write_bytes(Path("/usr/bin/busybox").read_bytes())
    for name, text in (("init", INIT), ("set-up", SET_UP)):
        (root / name).write_text(text)
    for name in ("bin/busybox", "init", "set-up"):
        (root / name).chmod(0o755)
    names = subprocess.run(["find", ".", "-print0"], cwd=root, capture_output=True, check=True).stdout
    pack = ["busybox", "cpio", "-0", "-o", "-H", "newc"]
    return subprocess.run(pack, cwd=root, input=names, capture_output=True, check=True).stdout


@pytest.fixture
def host(nagaya_root: str) -> Iterator[Host]:
    made = Host(root=nagaya_root)
    yield made
    for machine in made.machines.list():
        machine.remove(force=True)
    made.networks.prune()


@pytest.mark.timeout(2 * AT_MOST_S)
@pytest.mark.parametrize("network", ["bridge", "user"])
def test_a_port_leads_into_a_whole_machine(host: Host, disk: Path, network: str) -> None:
    require_program("dnsmasq" if network == "bridge" else "passt")
    common = CreateOptions(
        image="", network=network, ports=(PortMapping("", 0, 80),), stop_timeout_s=1,
        limits=Limits(memory_bytes=128 * MIB),
    )  # fmt: skip
    drives = (DriveOptions(str(disk), clone=True),)
    machine, _ = host.machines.create_whole(HardwareOptions(name="m", firmware=DIRECT, drives=drives, common=common))
    machine.start()
    (port,) = machine.settled().ports
    assert _fetch(f"http://127.0.0.1:{port.host_port}/") == f"{machine.settled().address}\n"
    machine.stop()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port.host_port}/", timeout=2)


def _fetch(url: str) -> str:
    deadline = time.monotonic() + AT_MOST_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                return bytes(answer.read()).decode()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
