"""Published ports of a whole machine, whose system sets itself up by DHCP: on our bridge, and by a user-mode network."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import remove_all, require_program
from tests.e2e.command import Cli
from tests.kernel.direct_disk import make_disk, require_kernel

AT_MOST_S = 300.0  # a software KVM on a busy host
MIB = 1 << 20
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
    kernel = require_kernel("busybox")
    place = tmp_path_factory.mktemp("ports")
    return make_disk(place, kernel, _pack(place / "root"))


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
def cli(nagaya_root: str, network_namespace: tuple[str, ...]) -> Iterator[Cli]:
    require_program("curl")
    made = Cli(nagaya_root, prefix=network_namespace)
    yield made
    remove_all(made)  # while its network namespace is there
    made("network", "prune", "-f")


@pytest.mark.timeout(2 * AT_MOST_S)
@pytest.mark.parametrize("network", ["bridge", "user"])
def test_a_port_leads_into_a_whole_machine(cli: Cli, disk: Path, network: str) -> None:
    require_program("dnsmasq" if network == "bridge" else "passt")
    flags = (
        "--firmware",
        "direct",
        "--disk",
        f"{disk},clone",
        "-m",
        "128m",
        "--stop-timeout",
        "1",
        "--network",
        network,
    )
    cli.ok("machine", "create", "m", *flags, "-p", "80")
    cli.ok("start", "m")
    (port,) = cli.json("port", "m", "--json")
    url = f"http://127.0.0.1:{port['host_port']}/"
    assert _fetch(cli, url) == cli.json("inspect", "m")[0]["state"]["address"]
    cli.ok("stop", "m")
    assert _ask(cli, url) == ""


def _ask(cli: Cli, url: str) -> str:
    asks = [*cli.prefix, "curl", "-s", "-m", "3", url]
    return subprocess.run(asks, capture_output=True, text=True, check=False).stdout.strip()


def _fetch(cli: Cli, url: str) -> str:
    """What it serves, once its system is up."""
    deadline = time.monotonic() + AT_MOST_S
    while not (found := _ask(cli, url)):
        assert time.monotonic() < deadline, "nobody answers"
        time.sleep(0.2)
    return found
