"""Which machines the firewall lets through: told of each as it comes and goes, and loaded anew for all when it is damaged."""

from __future__ import annotations

from nagaya.errors import NagayaError
from nagaya.kernel.nftables import Nftables
from nagaya.net import firewall, live, networks
from nagaya.net.elements import Elements
from nagaya.net.plan import NetworkPlan
from nagaya.storage import machines
from nagaya.storage.paths import Paths


def admit(paths: Paths, plan: NetworkPlan) -> None:
    """Let the firewall know of a machine, whose plan has been stored."""
    elements: Elements = []
    for name in dict.fromkeys(link.network for link in plan.links if link.driver == "bridge"):
        elements += firewall.network_elements(paths.root, networks.load(paths.root, name))
    elements += firewall.machine_elements(paths.root, plan)
    with Nftables() as nftables:
        done = firewall.change(paths.root, nftables, add=elements)
    if not done:
        reload(paths)


def reload(paths: Paths) -> None:
    """Load it anew by the plans, if there are any."""
    elements = all_elements(paths)
    if elements:
        links = [link for plan in live.load_all(paths).values() for link in plan.links]
        if any(link.sets_itself_up for link in links):
            from nagaya.net import claims  # lazy: whole machines alone

            elements += claims.find(paths.root, links)
        firewall.rebuild(paths.root, elements)


def is_damaged(paths: Paths) -> bool:
    """Whether the firewall lacks anything of the machines that run, or has more."""
    with Nftables() as nftables:
        return not firewall.has_exactly(paths.root, all_elements(paths), nftables)


def all_elements(paths: Paths) -> Elements:
    """What the tables are to have, by the plans of the machines that run."""
    known = live.load_all(paths)
    plans = known.values()
    names = dict.fromkeys(link.network for plan in plans for link in plan.links if link.driver == "bridge")
    elements: Elements = []
    for name in names:
        try:
            elements += firewall.network_elements(paths.root, networks.load(paths.root, name))
        except NagayaError:
            continue  # its record is gone or damaged: its machines stay cut off from everything
    for plan in plans:
        elements += firewall.machine_elements(paths.root, plan._replace(ports=()))
    return list(dict.fromkeys(elements + _port_elements(paths, known)))


def _port_elements(paths: Paths, plans: dict[str, NetworkPlan]) -> Elements:
    """Published ports. One that a killed machine had, whose plan nobody has taken away yet, is its next holder's."""
    found: dict[tuple[str, str], tuple[str, str, str]] = {}
    for machine_id, plan in plans.items():
        for element in firewall.port_elements(plan):
            key = (element[1], element[2].partition(" : ")[0])
            if key not in found or machines.is_alive(paths, machine_id):
                found[key] = element
    return list(found.values())
