"""Machines on the local network itself (macvlan, macvtap), which another network namespace plays; and rates on bridges."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.conformance.types import find_obstacle
from tests.conftest import remove_all
from tests.e2e.command import Cli

Prefix = tuple[str, ...]
OUTSIDE = "198.51.100.2"


@pytest.fixture
def outside(network_namespace: Prefix) -> Prefix:
    other = network_namespace[1].rpartition("/")[2].replace("-in-", "-out-")
    subprocess.run(["ip", "-n", other, "link", "set", "lo", "up"], check=True)
    return ("nsenter", f"--net=/run/netns/{other}")


@pytest.fixture
def wired(cli: Cli, network_namespace: Prefix) -> Iterator[Cli]:
    made = Cli(cli.root, prefix=network_namespace)
    yield made
    remove_all(made)  # while its network namespace is there
    made("network", "rm", "lan")
    made("prune", "-f")


def answers(prefix: Prefix, address: str) -> bool:
    done = subprocess.run([*prefix, "busybox", "ping", "-c", "1", "-W", "5", address], capture_output=True, check=False)
    return done.returncode == 0


def test_machines_are_on_the_local_network(wired: Cli, network_namespace: Prefix, outside: Prefix) -> None:
    create = ("network", "create", "-d", "macvlan", "-o", "parent=inner")
    wired.ok(*create, "--subnet", "198.51.100.0/24", "--gateway", OUTSIDE, "lan")
    kinds = {"container": "198.51.100.50"}
    if not find_obstacle("emulated"):
        kinds["emulated"] = "198.51.100.51"
    for kind, address in kinds.items():
        flags = ("--type", kind, "--network", f"lan:ip={address}")
        wired.ok("run", "-d", "--name", kind, *flags, "busybox", "sleep", "600", timeout_s=120)
    for kind, address in kinds.items():
        assert answers(outside, address), kind
        for other in {OUTSIDE, *kinds.values()} - {address}:
            wired.ok("exec", kind, "ping", "-c", "1", "-W", "5", other)
        assert not answers(network_namespace, address), "a link and what hangs on it do not hear each other"
    links = subprocess.run([*network_namespace, "ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    assert links.count("ngy") == len(kinds) - 1  # a container's is in its own namespace
    wired.ok("rm", "-f", *kinds)
    links = subprocess.run([*network_namespace, "ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    assert "ngy" not in links


def test_the_local_network_while_a_container_runs(wired: Cli, outside: Prefix) -> None:
    wired.ok("network", "create", "-d", "macvlan", "-o", "parent=inner", "--subnet", "198.51.100.0/24", "lan")
    wired.ok("run", "-d", "--name", "web", "busybox", "sleep", "600")
    wired.ok("network", "connect", "--ip", "198.51.100.52", "lan", "web")
    assert answers(outside, "198.51.100.52")
    wired.ok("network", "disconnect", "lan", "web")
    assert wired("exec", "web", "ip", "link", "show", "eth1").code != 0
    assert not answers(outside, "198.51.100.52")
    wired.ok("network", "connect", "--ip", "198.51.100.53", "lan", "web")
    assert answers(outside, "198.51.100.53")


def test_a_rate_on_the_local_network_is_refused(wired: Cli) -> None:
    wired.ok("network", "create", "-d", "macvlan", "-o", "parent=inner", "--subnet", "198.51.100.0/24", "lan")
    ran = wired("run", "--rm", "--network", "lan", "--net-rate", "1mbit", "busybox", "true")
    assert ran.code == 125 and "--net-rate works at a bridge" in ran.err
    ran = wired("run", "--rm", "--type", "emulated", "--network", "user", "--net-rate", "1mbit", "busybox", "true")
    assert ran.code == 125 and "no meaning in a user-mode network" in ran.err


SEND = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 5300), timeout=60) as peer:
    began, data = time.monotonic(), bytes(1 << 16)
    for _ in range(int(sys.argv[2]) >> 16): peer.sendall(data)
    peer.shutdown(socket.SHUT_WR)
    peer.recv(1)
    print(time.monotonic() - began)
"""
SINK = """
import socket
with socket.create_server(("", 5300)) as server:
    print(flush=True)
    peer, _ = server.accept()
    while peer.recv(1 << 20): pass
    peer.close()
"""


def seconds(sender: Prefix, receiver: Prefix, address: str, size: int) -> float:
    sink = subprocess.Popen([*receiver, "/usr/bin/python3", "-c", SINK], stdout=subprocess.PIPE)
    assert sink.stdout is not None
    sink.stdout.readline()
    done = subprocess.run(
        [*sender, "/usr/bin/python3", "-c", SEND, address, str(size)], capture_output=True, text=True, check=True
    )
    sink.wait(10)
    sink.stdout.close()
    return float(done.stdout)


def test_a_rate_holds_in_both_directions_and_comes_back(wired: Cli, network_namespace: Prefix, outside: Prefix) -> None:
    """20 Mbit/s: 7.5 MB take 3 s, less what a full bucket has (some 50 ms to receive, a second to send)."""
    size = 15 << 19
    machine = wired.ok("run", "-d", "--net-rate", "20mbit", "busybox", "sleep", "600").strip()
    found = wired.json("inspect", machine)[0]
    assert found["net_rate_bits"] == 20_000_000
    inside = ("nsenter", "-t", str(found["state"]["pid"]), "-n")
    address = found["state"]["address"]
    assert 1.5 < seconds(inside, outside, OUTSIDE, size) < 8
    assert 2.5 < seconds(network_namespace, inside, address, size) < 8
    subprocess.run([*network_namespace, "nft", "flush", "ruleset"], check=True)
    deadline = time.monotonic() + 10
    while (
        "rate over"
        not in subprocess.run(
            [*network_namespace, "nft", "list", "ruleset"], capture_output=True, text=True, check=True
        ).stdout
    ):  # the next command finds out
        wired.ok("network", "ls")
        assert time.monotonic() < deadline
    wired.ok("rm", "-f", machine)
    tables = subprocess.run([*network_namespace, "nft", "list", "tables"], capture_output=True, text=True, check=True)
    assert "netdev" not in tables.stdout
