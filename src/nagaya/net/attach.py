"""Connecting a machine to the default bridge: plan, prepare the host, connect, configure inside, disconnect."""

from __future__ import annotations

import os
import zlib

from nagaya.errors import HostError
from nagaya.kernel.netlink import Netlink, index_of
from nagaya.net import addresses, firewall
from nagaya.net.plan import USER_ADDRESS, USER_GATEWAY, USER_PREFIX, NetworkPlan
from nagaya.storage.lock import FileLock
from nagaya.storage.tree import remove_tree

DEFAULT_ROOT = "/var/lib/nagaya"
FORWARDING = "/proc/sys/net/ipv4/ip_forward"
INSIDE = "eth0"


def bridge_name(root: str) -> str:
    """The store's bridge: "nagaya0", or for another store than the default one of its own, so that they never meet."""
    return "nagaya0" if root == DEFAULT_ROOT else f"nagaya-{zlib.crc32(os.fsencode(root)):08x}"


def _directory(root: str) -> str:
    return f"{root}/network/default"


def plan_network(kind: str, machine_id: str, root: str) -> NetworkPlan:
    """Work out a machine's network and claim its address. Nothing on the host's network changes yet.

    A plain user can make no bridge: "bridge" is a user-mode network then.
    """
    if kind != "bridge":
        return NetworkPlan(kind)
    if os.geteuid():
        return NetworkPlan(
            kind="user", address=USER_ADDRESS, prefix=USER_PREFIX, gateway=USER_GATEWAY, mac=_mac(machine_id)
        )
    with FileLock(f"{root}/network.lock"):  # not between the two halves of `remove_idle`
        if not os.path.exists(f"/sys/class/net/{bridge_name(root)}"):
            addresses.drop_taken_subnet(_directory(root), addresses.read_routes())
        subnet = addresses.load_subnet(_directory(root))
        address = addresses.claim(_directory(root), subnet, machine_id)
    return NetworkPlan(
        kind="bridge",
        bridge=bridge_name(root),
        host_link=f"ngy{machine_id[:10]}",
        address=address,
        prefix=subnet.prefix,
        gateway=subnet.gateway,
        mac=_mac(machine_id),
    )


def _mac(machine_id: str) -> str:
    return "02:" + ":".join(machine_id[at : at + 2] for at in range(0, 10, 2))  # 02: locally administered


def prepare(plan: NetworkPlan) -> None:
    """Bring the bridge and its firewall up. Each step is fine when it is done already, by us or by another start."""
    if plan.kind != "bridge":
        return
    try:
        with Netlink() as netlink:
            netlink.add_bridge(plan.bridge)
            index = index_of(plan.bridge)
            netlink.add_address(index, plan.gateway, plan.prefix)
            netlink.set_up(index)
        _enable_forwarding()
        firewall.ensure(plan.bridge, f"{plan.gateway.rsplit('.', 2)[0]}.0.0/{plan.prefix}")
    except OSError as error:
        raise HostError.from_os(
            error, f"cannot set up the network bridge {plan.bridge}", hint="use --network none or --network host"
        ) from None


def _enable_forwarding() -> None:
    """Switched on when the first bridged machine needs it, and left on: others may have come to rely on it."""
    with open(FORWARDING, encoding="ascii") as file:
        if file.read().strip() == "1":
            return
    with open(FORWARDING, "w", encoding="ascii") as file:
        file.write("1")


def connect(plan: NetworkPlan, pid: int) -> None:
    """Make the veth pair between the bridge and the network namespace of process `pid`."""
    if plan.kind != "bridge":
        return
    try:
        with Netlink() as netlink:
            netlink.add_veth(
                plan.host_link, master=index_of(plan.bridge), mtu=plan.mtu, peer=INSIDE, peer_mac=plan.mac, peer_pid=pid
            )
    except OSError as error:
        raise HostError.from_os(error, "cannot connect the machine to its network") from None


def configure(plan: NetworkPlan) -> None:
    """Inside the machine's network namespace: loopback, and the link's address and route."""
    if plan.kind == "host":
        return
    with Netlink() as netlink:
        netlink.set_up(index_of("lo"))
        if plan.kind == "bridge":
            index = index_of(INSIDE)
            netlink.add_address(index, plan.address, plan.prefix)
            netlink.set_up(index)
            netlink.add_default_route(plan.gateway)


def disconnect(plan: NetworkPlan) -> None:
    """Delete the host's end of the pair, if the namespace's end has not taken it along yet."""
    if plan.kind == "bridge":
        _delete_link(plan.host_link)


def _delete_link(name: str) -> None:
    try:
        with Netlink() as netlink:
            netlink.delete_link(name)
    except OSError as error:
        raise HostError.from_os(error, f"cannot delete the link {name}") from None


def release(root: str, machine_id: str) -> None:
    """Give the machine's address back."""
    addresses.release(_directory(root), machine_id)


def reclaim_machine(root: str, machine_id: str) -> None:
    """What a killed supervisor left of a machine's network."""
    _delete_link(f"ngy{machine_id[:10]}")
    release(root, machine_id)


def remove_idle(root: str) -> bool:
    """Take the bridge and its firewall down when no machine holds an address; whether that was so."""
    directory = _directory(root)
    with FileLock(f"{root}/network.lock"):
        if addresses.holders(directory):
            return False
        bridge = bridge_name(root)
        firewall.remove(bridge)
        _delete_link(bridge)
        remove_tree(directory)
    return True


def link_bytes(name: str) -> tuple[int, int]:
    """(sent, received) by a host link; -1 for one that is gone."""
    counts = []
    for counter in ("tx_bytes", "rx_bytes"):
        try:
            with open(f"/sys/class/net/{name}/statistics/{counter}", encoding="ascii") as file:
                counts.append(int(file.read()))
        except OSError:
            counts.append(-1)
    return counts[0], counts[1]
