"""A machine's links: made between its bridges and its network namespace, and set up inside."""

from __future__ import annotations

from nagaya.errors import HostError
from nagaya.kernel.netlink import Netlink, index_of
from nagaya.net import rates
from nagaya.net.plan import LinkPlan, NetworkPlan


def connect(plan: NetworkPlan, pid: int) -> None:
    """Make the machine's links: pairs between their bridges and the network namespace of process `pid`."""
    try:
        with Netlink() as netlink:
            for link in plan.links:
                connect_link(netlink, link, pid)
    except OSError as error:
        raise HostError.from_os(error, "cannot connect the machine to its network") from None


def connect_link(netlink: Netlink, link: LinkPlan, pid: int) -> None:
    if link.driver == "bridge":
        netlink.add_veth(
            link.host_link, master=index_of(link.bridge), mtu=link.mtu, peer=link.name, peer_mac=link.mac, peer_pid=pid
        )
        rates.limit(link.host_link, link.rate_bits)
    elif link.driver == "macvlan":
        netlink.add_macvlan(link.name, parent=index_of(link.bridge), mac=link.mac, mtu=link.mtu, peer_pid=pid)


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


def add_default_routes(netlink: Netlink, link: LinkPlan) -> None:
    """By a link that is up, where the machine has no other."""
    for gateway in (link.gateway, link.gateway6):
        try:
            if gateway:
                netlink.add_default_route(gateway)
        except FileExistsError:
            continue


def link_bytes(names: tuple[str, ...]) -> tuple[int, int]:
    """(sent, received) by host links; -1 where none of them is there."""
    with Netlink() as netlink:
        found = [link for name in names if (link := netlink.find_link(name)) is not None]
    if not found:
        return -1, -1
    return sum(link.sent_bytes for link in found), sum(link.received_bytes for link in found)
