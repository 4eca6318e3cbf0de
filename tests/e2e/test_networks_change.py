"""Networks that come and go while a machine runs: what it knows of them follows at once, whatever its walls are."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from nagaya.engines.vm.agent import agent_path
from tests.conformance.types import find_obstacle
from tests.e2e.command import Cli
from tests.e2e.test_networks import member

STARTED_WITHIN_S = 400.0
TYPES = ("container", "kvm", "emulated")


def start(net: Cli, name: str, type_: str, *flags: str) -> None:
    if obstacle := find_obstacle(type_):
        pytest.skip(f"needs machines of type {type_}: {obstacle}")
    words = ("run", "-d", "--type", type_, "--name", name, *flags, "busybox", "sleep", "3600")
    net.ok(*words, timeout_s=STARTED_WITHIN_S)


def read(net: Cli, name: str) -> str:
    return net.ok("exec", "web", "cat", f"/etc/{name}")


def routes(net: Cli, family: str) -> list[str]:
    found = net.ok("exec", "web", "ip", family, "route").splitlines()
    return [" ".join(line.split()[:5]) for line in found if line.startswith("default")]


def can_ping(net: Cli, where: str, family: str = "-4") -> bool:
    return net("exec", "web", "ping", family, "-c", "1", "-W", "10", where).code == 0


@pytest.mark.timeout(900)
@pytest.mark.parametrize("type_", TYPES)
def test_what_a_machine_knows_of_its_networks_follows_them(net: Cli, type_: str) -> None:
    net.ok("network", "create", "front", "--subnet", "172.30.6.0/24", "--subnet", "fd00:6::/64")
    net.ok("network", "create", "back", "--subnet", "172.30.7.0/24", "--opt", "mtu=1400")
    start(net, "web", type_, "--network", "nagaya0", "--network", "front:ip=172.30.6.77")
    start(net, "db", "container", "--network", "front")
    start(net, "far", "container", "--network", "back")
    (default,) = net.json("network", "inspect", "nagaya0")
    first = {name: read(net, name) for name in ("hosts", "resolv.conf")}
    assert "172.30.6.77\t" in first["hosts"] and default["gateway"] in first["resolv.conf"]
    assert routes(net, "-4") == [f"default via {default['gateway']} dev eth0"]

    # Its name server, and the way out, were on the network that it leaves.
    net.ok("network", "disconnect", "nagaya0", "web")
    assert read(net, "resolv.conf").endswith("nameserver 172.30.6.1\n") and "search" not in read(net, "resolv.conf")
    own = [
        line.split()[0] for line in read(net, "hosts").splitlines() if not line.startswith(("127.", "#", "ff", "fe"))
    ]
    assert "172.30.6.77" in own and not any(address.startswith("10.") for address in own)
    assert routes(net, "-4") == ["default via 172.30.6.1 dev eth1"]
    assert routes(net, "-6") == ["default via fd00:6::1 dev eth1"]
    assert can_ping(net, "db") and can_ping(net, "db", "-6") and can_ping(net, "198.51.100.2")

    # Another network on the card that is free.
    assert net("network", "connect", "--ip", "172.30.7.9", "--mac-address", "02:00:00:00:07:09", "back", "web") == (
        0,
        "",
        "",
    )
    assert "172.30.7.9\t" in read(net, "hosts")
    assert "search front.nagaya.internal back.nagaya.internal" in read(net, "resolv.conf")
    link = net.ok("exec", "web", "ip", "address", "show", "eth0")
    assert "172.30.7.9/24" in link and "02:00:00:00:07:09" in link and "mtu 1400" in link
    assert default["gateway"].rsplit(".", 2)[0] not in link, "nothing of the other network"
    assert routes(net, "-4") == ["default via 172.30.6.1 dev eth1"], "one way out"
    assert can_ping(net, "far") and can_ping(net, "far", "-6") and can_ping(net, "db")
    assert member(net, "back", "web")["address"] == "172.30.7.9"

    # And back, but for the links' order.
    net.ok("network", "disconnect", "back", "web")
    assert "172.30.7.9" not in read(net, "hosts")
    assert net("network", "connect", "nagaya0", "web") == (0, "", "")
    assert f"{member(net, 'nagaya0', 'web')['address']}\t" in read(net, "hosts") and "172.30.6.77\t" in read(
        net, "hosts"
    )
    assert can_ping(net, "198.51.100.2") and can_ping(net, "host.nagaya.internal")

    # What it has changed itself is its own.
    net.ok("exec", "web", "sh", "-c", "echo '# mine' >> /etc/hosts")
    mine = read(net, "hosts")
    net.ok("network", "disconnect", "front", "web")
    assert read(net, "hosts") == mine and read(net, "resolv.conf").endswith(f"nameserver {default['gateway']}\n")
    assert can_ping(net, "198.51.100.2") and not can_ping(net, "172.30.6.1")

    # One that stands is told when it goes on.
    net.ok("network", "connect", "front", "web")
    net.ok("pause", "web")
    net.ok("network", "disconnect", "front", "web")
    net.ok("unpause", "web")
    deadline = time.monotonic() + 30
    while "search" in read(net, "resolv.conf"):
        assert time.monotonic() < deadline
        time.sleep(0.2)

    # A start writes them anew.
    net.ok("restart", "-t", "0", "web", timeout_s=STARTED_WITHIN_S)
    assert "# mine" not in read(net, "hosts") and "172.30.6" not in read(net, "hosts")
    assert can_ping(net, "198.51.100.2")


@pytest.mark.timeout(900)
def test_copies_of_a_machine_follow_too(net: Cli) -> None:
    """A fork, one that goes on from a snapshot, and the next one of its image, which began from a template."""
    start(net, "web", "kvm")
    net.ok("fork", "--name", "copy", "web", timeout_s=STARTED_WITHIN_S)
    net.ok("snapshot", "create", "web", "s1")
    net.ok("snapshot", "restore", "web", "s1", timeout_s=STARTED_WITHIN_S)
    start(net, "next", "kvm")
    for name in ("web", "copy", "next"):
        address = member(net, "nagaya0", name)["address"]
        assert address in net.ok("exec", name, "cat", "/etc/hosts")
        assert net("network", "disconnect", "nagaya0", name) == (0, "", "")
        assert address not in net.ok("exec", name, "cat", "/etc/hosts")
        assert "default" not in net.ok("exec", name, "ip", "route")
        ran = net("snapshot", "create", name, "never")
        assert ran.code == 1 and "a network card that is on no network" in ran.err, "it could not go on from it"
        assert net("network", "connect", "nagaya0", name) == (0, "", "")
        assert member(net, "nagaya0", name)["address"] in net.ok("exec", name, "cat", "/etc/hosts")
        assert net("exec", name, "ping", "-c", "1", "-W", "10", "198.51.100.2").code == 0


@pytest.mark.timeout(900)
def test_an_older_agent_is_told_at_the_next_start(net: Cli, tmp_path: Path) -> None:
    with open(agent_path(), "rb") as file:
        program = file.read()
    assert program.count(b"\0renew\0") == 1
    (tmp_path / "agent").write_bytes(program.replace(b"\0renew\0", b"\0never\0"))
    (tmp_path / "agent").chmod(0o755)
    net.env["NAGAYA_AGENT"] = str(tmp_path / "agent")
    start(net, "web", "emulated")
    first = read(net, "hosts")
    address = member(net, "nagaya0", "web")["address"]
    assert net("network", "disconnect", "nagaya0", "web") == (0, "", "")
    assert read(net, "hosts") == first and not can_ping(net, "198.51.100.2")
    ran = net("network", "connect", "nagaya0", "web")
    assert ran.code == 0 and "from the next start" in ran.err and "older agent" in ran.err
    assert not member(net, "nagaya0", "web")["address"] and not can_ping(net, "198.51.100.2")
    net.ok("restart", "-t", "0", "web", timeout_s=STARTED_WITHIN_S)
    assert can_ping(net, "198.51.100.2") and address in read(net, "hosts")
