"""Connecting a machine to its networks: plan, prepare the host, connect, configure inside, disconnect."""

from __future__ import annotations

import os

from nagaya.errors import HostError
from nagaya.kernel.netlink import Netlink, index_of
from nagaya.model.spec import DEFAULT_NETWORK, MachineSpec
from nagaya.net import addresses, firewall, networks, planning
from nagaya.net.plan import LinkPlan, NetworkPlan
from nagaya.storage.tree import remove_tree


def plan_network(spec: MachineSpec, root: str) -> NetworkPlan:
    """Work out a machine's network, claim its addresses and bring its bridges and their firewall up.

    A plain user can make no bridge: "bridge" is a user-mode network then. Nothing is left when it raises.
    """
    if spec.network in ("none", "host"):
        return NetworkPlan(spec.network)
    if spec.network == "user" or os.geteuid():
        return planning.plan_user(spec.id)
    links: list[LinkPlan] = []
    with planning.host_lock(), Netlink() as netlink:
        try:
            for number, attachment in enumerate(planning.attachments(spec)):
                links.append(planning.plan_link(root, spec.id, attachment, number, netlink=netlink))
            plan = NetworkPlan("links", planning.without_second_gateways(links))
            for link in links:
                if link.driver == "bridge" and link.address:
                    firewall.ensure(link.bridge, networks.load(root, link.network).subnet)
        except BaseException:
            release(root, spec.id)
            raise
    return plan


def connect(plan: NetworkPlan, pid: int) -> None:
    """Make the machine's links: pairs between their bridges and the network namespace of process `pid`."""
    try:
        with Netlink() as netlink:
            for link in plan.links:
                if link.driver == "bridge":
                    connect_link(netlink, link, pid)
    except OSError as error:
        raise HostError.from_os(error, "cannot connect the machine to its network") from None


def connect_link(netlink: Netlink, link: LinkPlan, pid: int) -> None:
    netlink.add_veth(
        link.host_link, master=index_of(link.bridge), mtu=link.mtu, peer=link.name, peer_mac=link.mac, peer_pid=pid
    )


def configure(plan: NetworkPlan) -> None:
    """Inside the machine's network namespace: loopback, and each link's addresses and routes."""
    if plan.kind == "host":
        return
    with Netlink() as netlink:
        netlink.set_up(index_of("lo"))
        for link in plan.links:
            configure_link(netlink, link)


def configure_link(netlink: Netlink, link: LinkPlan) -> None:
    index = index_of(link.name)
    if link.address:
        netlink.add_address(index, link.address, link.prefix)
    if link.address6:
        netlink.add_address6(index, link.address6, link.prefix6)
    netlink.set_up(index)
    for gateway in (link.gateway, link.gateway6):
        if gateway:
            netlink.add_default_route(gateway)


def disconnect(plan: NetworkPlan) -> None:
    """Delete the host's ends of the links, if the namespace's ends have not taken them along yet."""
    _delete_links([link.host_link for link in plan.links if link.host_link])


def _delete_links(names: list[str]) -> None:
    if not names:
        return
    try:
        with Netlink() as netlink:
            for name in names:
                netlink.delete_link(name)
    except OSError as error:
        raise HostError.from_os(error, f"cannot delete the link {names[0]}") from None


def release(root: str, machine_id: str) -> None:
    """Give the machine's addresses back."""
    for name in networks.names(root):
        addresses.release(networks.leases(root, name), machine_id)


def reclaim_machine(root: str, machine_id: str) -> None:
    """What a killed supervisor left of a machine's network."""
    _delete_links(planning.host_links(machine_id))
    release(root, machine_id)


def remove_idle(root: str) -> bool:
    """Take the default network's bridge and its firewall down when no machine holds an address; whether that was so."""
    name = DEFAULT_NETWORK
    with planning.host_lock():
        if addresses.has_holders(networks.leases(root, name)):
            return False
        bridge = networks.bridge_name(root)
        firewall.remove(bridge)
        _delete_links([bridge])
        remove_tree(networks.directory(root, name))
    return True


def link_bytes(names: tuple[str, ...]) -> tuple[int, int]:
    """(sent, received) by host links; -1 where none of them is there."""
    with Netlink() as netlink:
        found = [link for name in names if (link := netlink.find_link(name)) is not None]
    if not found:
        return -1, -1
    return sum(link.sent_bytes for link in found), sum(link.received_bytes for link in found)
