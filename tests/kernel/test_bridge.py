"""The default bridge for real, in network namespaces that the test makes: a machine, a host, and a world beyond it.

machine ──veth── [bridge] host ──veth── world (TCP server)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys, socket, threading
from nagaya.net import attach, addresses, links, firewall
from nagaya.storage.paths import Paths
from nagaya.model.spec import MachineSpec, Process
from nagaya.kernel import namespaces, netlink, nftables
from nagaya.kernel.mount import mount, MS_REC, MS_PRIVATE

root = sys.argv[1]

def inside(code):
    # a child in a network namespace of its own, and a pipe to let it go
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            namespaces.unshare(namespaces.CLONE_NEWNET)
            os.write(ready[1], b"r")
            os.read(go[0], 1)
            code()
            status = 0
        except BaseException as error:
            print("child:", repr(error), file=sys.stderr)
        finally:
            os._exit(status)
    os.read(ready[0], 1)
    return pid, lambda: os.write(go[1], b"g")

namespaces.unshare(namespaces.CLONE_NEWNET | namespaces.CLONE_NEWNS)   # the "host": nothing of ours reaches the real one
mount("", "/", "", MS_REC | MS_PRIVATE)
mount("proc", "/proc", "proc")
with netlink.Netlink() as link:
    link.set_up(netlink.index_of("lo"))

seen = os.pipe()
def world():
    with netlink.Netlink() as link:
        link.set_up(netlink.index_of("lo"))
        link.add_address(netlink.index_of("eth0"), "203.0.113.9", 24)
        link.set_up(netlink.index_of("eth0"))
    server = socket.create_server(("203.0.113.9", 8080))
    os.write(seen[1], b"listening\\n")
    for _ in range(2):
        connection, address = server.accept()
        os.write(seen[1], address[0].encode() + b"\\n")
        connection.sendall(b"hello")
        connection.close()
world_pid, start_world = inside(world)
with netlink.Netlink() as link:
    link.add_bridge("outside")
    link.set_up(netlink.index_of("outside"))
    link.add_address(netlink.index_of("outside"), "203.0.113.1", 24)
    link.add_veth("wan", master=netlink.index_of("outside"), mtu=1500, peer="eth0", peer_mac="02:00:00:00:00:09", peer_pid=world_pid)
start_world()
assert os.read(seen[0], 100) == b"listening\\n"

ids = ["%032x" % number for number in (0xa << 112, 0xb << 112)]
specs = [MachineSpec(id=id_, name="m", type="container", image="", image_id="", platform="", process=Process(()), hostname="m", created_ns=0) for id_ in ids]
paths = Paths(root, f"{root}/run")
plans = [attach.plan_network(spec, paths) for spec in specs]
assert [attach.plan_network(spec, paths) for spec in specs] == plans      # twice: nothing more happens
bridge = plans[0].links[0].bridge
with nftables.Nftables() as nft:
    assert firewall.is_whole(root, nft)
assert open("/proc/sys/net/ipv4/ip_forward").read().strip() == "1"

def machine(plan):
    links.configure(plan)
    for address in ("203.0.113.9", ):
        with socket.create_connection((address, 8080), timeout=5) as connection:
            assert connection.recv(10) == b"hello"
for plan in plans:
    pid, start = inside(lambda: machine(plan))
    links.connect(plan, pid)
    assert netlink.index_of(plan.links[0].host_link)
    start()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    who = os.read(seen[0], 100).decode().strip()
    assert who == "203.0.113.1", who                                    # translated to the host's address
assert os.waitstatus_to_exitcode(os.waitpid(world_pid, 0)[1]) == 0

assert not attach.remove_idle(paths)                                     # two machines hold addresses
with nftables.Nftables() as nft:
    for machine_id in ids:
        attach.let_go(paths, machine_id, nft); attach.let_go(paths, machine_id, nft)
    assert firewall.has_exactly(root, [], nft)
    assert attach.remove_idle(paths)
    assert not firewall.is_whole(root, nft)
assert nftables.count_rules(nftables.NFPROTO_INET, firewall.table_name(root)) is None
assert sorted(os.listdir(f"{root}/network")) == []
print("OK")
"""


def _require() -> None:
    if os.geteuid():
        pytest.skip("needs root")
    if not shutil.which("nft"):
        pytest.skip("needs nft")


def test_machines_reach_the_world_with_the_host_s_address(tmp_path: Path) -> None:
    _require()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip().endswith("OK"), done.stderr


def test_missing_nft_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nagaya.errors import Unsupported
    from nagaya.net import firewall, programs

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(programs, "PATH", str(tmp_path))
    with pytest.raises(Unsupported, match="nft") as caught:
        firewall.rebuild(str(tmp_path), [])
    assert "apt install nftables" in caught.value.hint
