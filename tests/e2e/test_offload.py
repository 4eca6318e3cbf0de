"""What leaves segmentation and checksums to others: large packets between container, virtual machine and host, both ways,
at each MTU, whole; and packets of the MTU's size that may not be cut."""

from __future__ import annotations

import hashlib
import json
import random
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from nagaya.engines import TYPES
from nagaya.kernel import namespaces
from tests.conformance.types import find_obstacle
from tests.conftest import remove_all
from tests.e2e.command import Cli
from tests.kernel.forked import in_child

Prefix = tuple[str, ...]
SIZE = 6 << 20
# Takes a file, tells its digest, and gives it out again, for as long as anybody asks.
SERVE = "nc -ll -p 5002 -e sh -c 'cat >/tmp/x; sha256sum </tmp/x' & nc -ll -p 5003 -e cat /tmp/x & wait"


@pytest.fixture
def wired(cli: Cli, network_namespace: Prefix) -> Iterator[Cli]:
    made = Cli(cli.root, prefix=network_namespace)
    yield made
    remove_all(made)  # while its network namespace is there
    made("network", "rm", "sized")
    made("prune", "-f")


def counters(prefix: Prefix, link: str) -> dict[str, tuple[int, int]]:
    """(packets, bytes) that the host's end has received of the machine ("out") and sent to it ("in")."""
    done = subprocess.run([*prefix, "ip", "-j", "-s", "link", "show", link], capture_output=True, check=True)
    stats = json.loads(done.stdout)[0]["stats64"]
    return {way: (stats[key]["packets"], stats[key]["bytes"]) for way, key in (("out", "rx"), ("in", "tx"))}


def connect(address: str, port: int) -> socket.socket:
    deadline = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection((address, port), timeout=60)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def exchange(namespace: str, address: str, data: bytes) -> tuple[str, bytes]:
    """From the host: the digest of what it was given, and what it gives back."""

    def run() -> tuple[str, bytes]:
        with open(namespace, "rb") as file:
            namespaces.setns(file.fileno(), namespaces.CLONE_NEWNET)
        with connect(address, 5002) as peer:
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            digest = peer.recv(64, socket.MSG_WAITALL).decode()
        with connect(address, 5003) as peer:
            parts = []
            while part := peer.recv(1 << 20):
                parts.append(part)
        return digest, b"".join(parts)

    return in_child(run)


@pytest.mark.parametrize("mtu", [1280, 1500, 9000])
def test_large_packets_arrive_whole(wired: Cli, network_namespace: Prefix, mtu: int) -> None:
    wired.ok("network", "create", "-o", f"mtu={mtu}", "sized")
    digests: dict[str, str] = {}
    machines: dict[str, tuple[str, str]] = {}
    for kind in [kind for kind in TYPES if kind == "container" or not find_obstacle(kind)]:
        flags = ("-d", "--name", kind, "--type", kind, "--network", "sized", "--tmpfs", "/tmp")
        machine = wired.ok("run", *flags, "busybox", "sh", "-c", SERVE, timeout_s=200).strip()
        machines[kind] = f"ngy{machine[:10]}", wired.json("inspect", machine)[0]["state"]["address"]
    namespace = network_namespace[1].removeprefix("--net=")
    for kind, (link, address) in machines.items():
        data = random.randbytes(SIZE)
        digests[kind] = digest = hashlib.sha256(data).hexdigest()
        before = counters(network_namespace, link)
        assert exchange(namespace, address, data) == (digest, data), kind
        for way, (packets, size) in counters(network_namespace, link).items():
            packets, size = packets - before[way][0], size - before[way][1]
            assert size >= len(data), (kind, way)
            # Acknowledgements of the other direction are among them, and still:
            assert size / packets > mtu or kind == "kvm", (kind, way, size, packets)
        assert wired.ok("exec", kind, "cat", "/sys/class/net/eth0/mtu").strip() == str(mtu)
        fits, too_long = str(mtu - 28), str(mtu - 27)  # IPv4's header and ICMP's
        assert wired("exec", kind, "ping", "-c", "1", "-W", "5", "-s", fits, gateway(address)).code == 0
        ping = [*network_namespace, "busybox", "ping", "-c", "1", "-W", "5", "-s"]
        subprocess.run([*ping, fits, address], check=True, capture_output=True)
        subprocess.run([*ping, too_long, address], check=True, capture_output=True)  # in two fragments
    for kind in machines:
        for other, (_, address) in machines.items():
            if other != kind:
                said = wired.ok("exec", kind, "sh", "-c", f"nc {address} 5003 </dev/null | sha256sum", timeout_s=100)
                assert said.split()[0] == digests[other], (kind, other)


def gateway(address: str) -> str:
    return address.rpartition(".")[0] + ".1"
