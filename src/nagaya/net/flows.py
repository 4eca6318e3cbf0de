"""UDP flows to published ports, which connection tracking leads where the first datagram went: forgotten when that is over."""

from __future__ import annotations

from collections.abc import Iterable

from nagaya.kernel import conntrack
from nagaya.kernel.conntrack import Flow
from nagaya.kernel.inet import UDP
from nagaya.kernel.netlink import AF_INET6, Netlink
from nagaya.model.spec import PortMapping
from nagaya.net.firewall import port_target
from nagaya.net.plan import WILDCARDS, NetworkPlan, is_loopback


def forget_strays(plan: NetworkPlan) -> None:
    """Those from before the ports led to the machine, which has been admitted: they go to this host, or to another one."""
    ports = _ports(plan)
    if not ports:
        return
    with Netlink() as netlink:
        own = netlink.addresses()
    _forget(
        flow
        for port in ports
        for flow in conntrack.list_udp_flows(port.host_port)
        if flow.target in (own if port.host_address in WILDCARDS else (port.host_address,))
        and flow.answers != _inside(plan, flow)
        and _inside(plan, flow)
    )


def forget_led(before: NetworkPlan, after: NetworkPlan | None) -> None:
    """Those that lead to where the machine is no more."""
    _forget(
        flow
        for port in _ports(before)
        for flow in conntrack.list_udp_flows(port.host_port)
        if flow.answers == _inside(before, flow) and (after is None or flow.answers != _inside(after, flow))
    )


def _forget(flows: Iterable[Flow]) -> None:
    found = list(dict.fromkeys(flows))
    if found:
        conntrack.forget(found)


def _ports(plan: NetworkPlan) -> list[PortMapping]:
    """Those that the firewall leads; what is on loopback this host relays."""
    if port_target(plan) is None:
        return []
    return [port for port in plan.ports if port.protocol == UDP and not is_loopback(port.host_address)]


def _inside(plan: NetworkPlan, flow: Flow) -> str:
    target = port_target(plan)
    if target is None:
        return ""
    return target.address6 if flow.family == AF_INET6 else target.address
