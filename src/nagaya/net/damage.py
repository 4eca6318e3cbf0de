"""What somebody has damaged of the host's side of machines that run, and how it is made again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

from nagaya.errors import LaunchError, NagayaError
from nagaya.kernel.netlink import Netlink, index_of
from nagaya.net import dns, live, networks, planning, rates, rules
from nagaya.net.networks import NetworkRecord
from nagaya.net.plan import LinkPlan
from nagaya.static import NamedTuple
from nagaya.storage.paths import Paths


class Damage(NamedTuple):
    """A half of a sentence each for what is wrong and for what has been done about it."""

    what: str
    done: str
    mend: Callable[[], None]


def find(paths: Paths) -> list[str]:
    """What is damaged, for who only looks."""
    if not _has_bridges(paths):
        return []
    with planning.host_lock(), Netlink() as netlink:
        return [damage.what for damage in _find(paths, netlink)]


def mend(paths: Paths) -> list[str]:
    """Make it again; a sentence for each thing."""
    if not _has_bridges(paths):
        return []
    said = []
    with planning.host_lock(), Netlink() as netlink:
        for damage in _find(paths, netlink):
            try:
                damage.mend()
                said.append(f"{damage.what}, and {damage.done}")
            except (NagayaError, OSError) as error:
                said.append(f"{damage.what}, and cannot be mended: {error}")
    return said


def _has_bridges(paths: Paths) -> bool:
    if os.geteuid():
        return False
    return any(link.driver == "bridge" for plan in live.load_all(paths).values() for link in plan.links)


def _find(paths: Paths, netlink: Netlink) -> Iterator[Damage]:
    """Under the host's lock. What comes later is looked at when what came before has been mended, if it is to be."""
    plans = live.load_all(paths)
    names = dict.fromkeys(link.network for plan in plans.values() for link in plan.links if link.driver == "bridge")
    for name in names:
        try:
            record = networks.load(paths.root, name)
        except NagayaError:
            continue  # it is gone or damaged, and 'network ls' says so
        links = {id_: link for id_, plan in plans.items() for link in plan.links if link.network == name}
        yield from _find_in_network(record, networks.bridge_name(paths.root, name), links, netlink)
    if names and rules.is_damaged(paths):
        yield Damage("the firewall's tables were damaged", "have been loaded anew", partial(rules.reload, paths))


def _find_in_network(
    record: NetworkRecord, bridge: str, links: dict[str, LinkPlan], netlink: Netlink
) -> Iterator[Damage]:
    first = next(iter(links.values()))
    found = netlink.find_link(bridge)
    if not planning.is_raised(record, found, netlink=netlink):
        gone = "was gone" if found is None else "was not as it should be"

        def raise_again() -> None:
            planning.raise_bridge(record, bridge, first, found, netlink=netlink)
            for link in links.values():
                port = netlink.find_link(link.host_link)
                if port is not None and port.master != index_of(bridge):
                    netlink.enslave(port.number, master=index_of(bridge), mtu=link.mtu)

        yield Damage(f"the bridge of network '{record.name}' {gone}", "has been made anew", raise_again)
    for link in links.values():
        if link.rate_bits and not rates.is_limited(link.host_link) and netlink.find_link(link.host_link) is not None:
            limit = partial(rates.limit, link.host_link, link.rate_bits)
            yield Damage(f"the rate limit of link '{link.host_link}' was gone", "has been set anew", limit)
    if not dns.is_installed():
        return
    asked = dict.fromkeys(link.dns for link in links.values())
    if not dns.is_running(bridge) or not all(dns.is_running(bridge, dns.port_of(servers)) for servers in asked):
        yield Damage(
            f"the name server of network '{record.name}' was gone", "has been started anew",
            partial(_serve_names, record, bridge, links),
        )  # fmt: skip


def _serve_names(record: NetworkRecord, bridge: str, links: dict[str, LinkPlan]) -> None:
    for machine_id, link in links.items():
        dns.write_names(machine_id, link)
    starting = [dns.start(record, bridge, next(iter(links.values())).mtu)]
    starting += [dns.start_further(record, bridge, servers) for servers in {link.dns for link in links.values()}]
    problems = [problem for started in starting if started is not None and (problem := dns.finish(started))]
    if problems:
        raise LaunchError(problems[0])
