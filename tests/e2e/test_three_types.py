"""Show 1 of networks: a container, a kvm and an emulated machine on one network reach each other by name, both ways."""

from __future__ import annotations

import itertools
import subprocess
import time

import pytest

from tests.conformance.types import find_obstacle
from tests.e2e.command import Cli

TYPES = ("container", "kvm", "emulated")
STARTED_WITHIN_S = 400.0  # a software KVM on a busy host
SERVER = 'mkdir -p /srv/www; echo "hello from $(hostname)" > /srv/www/index.html; exec httpd -f -p 80 -h /srv/www'


@pytest.fixture
def net(net: Cli) -> Cli:
    """With machines of all types."""
    for type_ in TYPES:
        if obstacle := find_obstacle(type_):
            pytest.skip(f"needs machines of type {type_}: {obstacle}")
    return net


def _fetch(net: Cli, machine: str, url: str) -> str:
    return net("exec", machine, "timeout", "20", "wget", "-q", "-O", "-", url).out


def _fetch_from_host(net: Cli, url: str) -> str:
    argv = [*net.prefix, "busybox", "wget", "-q", "-O", "-", url]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False).stdout


@pytest.mark.timeout(900)
def test_three_types_on_one_network(net: Cli) -> None:
    net.ok("network", "create", "row")
    flags = ("--network", "row", "--network-alias")
    running = [
        net.popen("run", "-d", "--type", type_, "--name", f"my-{type_}", "--hostname", type_, "-p", "80", *flags, f"{type_}.row", "busybox", "sh", "-c", SERVER)
        for type_ in TYPES
    ]  # fmt: skip
    assert [process.wait(STARTED_WITHIN_S) for process in running] == [0, 0, 0], [
        process.stderr.read() for process in running if process.stderr
    ]
    (found,) = net.json("network", "inspect", "row")
    members = {member["type"]: member for member in found["machines"]}
    assert set(members) == set(TYPES) and len({member["address"] for member in members.values()}) == 3
    for one, other in itertools.permutations(TYPES, 2):
        for name in (f"my-{other}", f"{other}.row"):
            for family in ("-4", "-6"):
                ran = net("exec", f"my-{one}", "ping", family, "-c", "1", "-W", "10", name)
                assert ran.code == 0, (one, other, family, name, ran)
        deadline = time.monotonic() + 60  # the last one's server may be just starting
        for where in (f"my-{other}", members[other]["address"], f"[{members[other]['address6']}]"):
            while (text := _fetch(net, f"my-{one}", f"http://{where}/")) != f"hello from {other}\n":
                assert time.monotonic() < deadline, (one, other, where, text)
    # And the host reaches each, by its address and by its published port, and each the world beyond the host.
    for type_ in TYPES:
        url = f"http://{members[type_]['address']}/"
        assert _fetch_from_host(net, url) == f"hello from {type_}\n"
        (port,) = net.json("port", f"my-{type_}", "--json")
        for loopback in ("127.0.0.1", "[::1]"):
            assert _fetch_from_host(net, f"http://{loopback}:{port['host_port']}/") == f"hello from {type_}\n"
        assert net("exec", f"my-{type_}", "ping", "-c", "1", "-W", "10", "198.51.100.2").code == 0
    _pull_the_cable(net, "my-emulated")


def _pull_the_cable(net: Cli, name: str) -> None:
    """A virtual machine is cut off a network at once, and gets a card for another one at its next start."""
    ran = net("network", "connect", "bridge", name)
    assert ran.code == 0 and "from the next start" in ran.err and "next start only" in ran.err
    assert net("exec", "my-container", "ping", "-c", "1", "-W", "2", name).code == 0
    net.ok("network", "disconnect", "row", name)
    assert net("exec", "my-container", "ping", "-c", "1", "-W", "2", name).code != 0
    net.ok("restart", "-t", "1", name, timeout_s=STARTED_WITHIN_S)
    (found,) = net.json("network", "inspect", "nagaya0")
    assert [member["machine"] for member in found["machines"] if member["address"]] == [name]
    assert net("exec", name, "ping", "-c", "1", "-W", "10", "198.51.100.2").code == 0
