"""The host's side of a machine's networks: plan, prepare, plug in and out, let go.

What a machine has on the host is written down first (net/live.py), so whoever comes after a kill can take it away, and
whoever finds the firewall or a name server damaged (net/damage.py) can make it again.
"""

from __future__ import annotations

import os

from nagaya.errors import Conflict, HostError, NagayaError, Unsupported
from nagaya.kernel.inet import UDP
from nagaya.kernel.netlink import Netlink
from nagaya.kernel.nftables import Nftables
from nagaya.model.spec import DEFAULT_NETWORK, Attachment, MachineSpec
from nagaya.net import addresses, dns, firewall, live, networks, planning, programs, rates, rules
from nagaya.net.elements import Elements
from nagaya.net.networks import NetworkRecord
from nagaya.net.plan import LinkPlan, NetworkPlan
from nagaya.net.subnets import parse_subnet
from nagaya.storage.paths import Paths
from nagaya.storage.tree import remove_tree

NO_NAMES = "machines have no names for each other"


def plan_network(spec: MachineSpec, paths: Paths) -> NetworkPlan:
    """Work out a machine's network, claim its addresses and bring up bridges, firewall and name servers.

    A plain user can make no bridge: "bridge" is a user-mode network then. Nothing is left when it raises.
    """
    if spec.network in ("none", "host"):
        return NetworkPlan(spec.network)
    if spec.network == "user" or os.geteuid():
        return planning.plan_user(spec)
    links: list[LinkPlan] = []
    with planning.host_lock(), Netlink() as netlink:
        try:
            for number, attachment in enumerate(planning.attachments(spec)):
                links.append(planning.plan_link(paths.root, spec, attachment, number, netlink=netlink))
                _refuse_taken_mac(paths, spec.id, links[-1], attachment)
            plan = NetworkPlan(
                "links", planning.without_second_gateways(links), allow_host=spec.allow_host, ports=spec.ports,
                rate_bits=spec.net_rate_bits,
            )  # fmt: skip
            live.store(paths, spec.id, plan)
            return _prepare(paths, spec.id, plan)
        except BaseException:
            with Nftables() as nftables:
                _let_go(paths, spec.id, netlink, nftables)
            raise


def _refuse_taken_mac(paths: Paths, machine_id: str, link: LinkPlan, attachment: Attachment) -> None:
    """A chosen MAC address that a neighbour has would take its frames away. Those that we choose differ by the id."""
    if not attachment.mac:
        return
    for other, plan in live.load_all(paths).items():
        if other != machine_id and any(one.mac == link.mac and one.network == link.network for one in plan.links):
            raise Conflict(
                f"the MAC address {link.mac} is in use on network '{link.network}' by machine {other[:12]}",
                hint="give another one, or none: then Nagaya chooses",
            )


def _prepare(paths: Paths, machine_id: str, plan: NetworkPlan) -> NetworkPlan:
    """Firewall and names of a plan that has been stored; the plan with what the machine has to know of them."""
    warnings: list[str] = []
    starting: list[programs.Started] = []
    bridged = [link for link in plan.links if link.driver == "bridge"]
    for link in bridged:
        try:
            dns.write_names(machine_id, link)
            record = networks.load(paths.root, link.network)
            both = (dns.start(record, link.bridge, link.mtu), dns.start_further(record, link.bridge, link.dns))
            starting += [started for started in both if started is not None]
        except FileNotFoundError:
            warnings.append(f"{NO_NAMES} on network '{link.network}': dnsmasq is not installed (dnsmasq-base)")
            continue
    if bridged:
        rules.admit(paths, plan)
        if any(port.protocol == UDP for port in plan.ports):
            from nagaya.net import flows  # lazy: few publish such ports

            flows.forget_strays(plan)
    for started in starting:
        problem = dns.finish(started)
        if problem:
            warnings.append(f"{NO_NAMES}: {problem.removeprefix('dnsmasq: ')}")
    return _tell(paths, plan._replace(warnings=tuple(warnings)))


def _tell(paths: Paths, plan: NetworkPlan) -> NetworkPlan:
    """Who answers a machine's questions: one of its networks that leads out, which asks the others' name servers."""
    served = [
        networks.load(paths.root, link.network)
        for link in plan.links
        if link.driver == "bridge" and dns.is_running(link.bridge, dns.port_of(link.dns))
    ]
    if not served:
        return plan
    first = next((record for record in served if not record.internal), served[0])
    if len(served) > 1:
        others = [(record.name, record.gateway or record.gateway6) for record in served if record is not first]
        dns.add_servers(networks.bridge_name(paths.root, first.name), others)
    return plan._replace(
        nameservers=(first.gateway or first.gateway6,),
        search=tuple(dns.domain(record.name) for record in served) if len(served) > 1 else (),
        hosts=tuple((dns.HOST_NAME, gateway) for gateway in (first.gateway, first.gateway6) if gateway),
    )


# -- while it runs


def describe(paths: Paths, machine_id: str) -> NetworkPlan | None:
    """The plan of a machine that runs as it is by now, with what the machine has to know."""
    plan = live.load(paths, machine_id)
    return _tell(paths, plan) if plan is not None else None


def plug(paths: Paths, spec: MachineSpec, attachment: Attachment, *, has_card: bool = False) -> LinkPlan:
    """Plan one more link of a machine that runs, and let the host know of it. Nothing is left when it raises.

    `has_card`: it gets no new one, so it has to be one that was left on no network (`unplug`, `keep_device`).
    """
    with planning.host_lock(), Netlink() as netlink:
        plan = live.load(paths, spec.id)
        if plan is None:
            raise Unsupported(
                "a machine that was started without any network gets one at its next start only",
                hint=f"nagaya restart {spec.name}",
            )
        number = _find_number(paths, spec, plan, attachment, netlink, has_card=has_card)
        try:
            link = planning.plan_link(paths.root, spec, attachment, number, netlink=netlink)
        except BaseException:  # it may have had one address of two by then
            addresses.release(networks.leases(paths.root, attachment.network), spec.id)
            raise
        longer = plan._replace(links=planning.without_second_gateways([*plan.links, link]))
        try:
            _refuse_taken_mac(paths, spec.id, link, attachment)
            live.store(paths, spec.id, longer)
            target = firewall.port_target(longer)
            ports = longer.ports if target is longer.links[-1] else ()
            _prepare(paths, spec.id, longer._replace(links=longer.links[-1:], ports=ports))
        except BaseException:
            with Nftables() as nftables:
                _drop_links(paths, spec.id, plan, (link,), netlink, nftables, keep_device=has_card)
            raise
        return longer.links[-1]


def check_card(paths: Paths, spec: MachineSpec, attachment: Attachment) -> None:
    """Raise `Unsupported` where `plug` with `has_card` would find none."""
    with planning.host_lock(), Netlink() as netlink:
        plan = live.load(paths, spec.id) or NetworkPlan("none")
        _find_number(paths, spec, plan, attachment, netlink, has_card=True)


def has_free_card(paths: Paths, machine_id: str) -> bool:
    """Whether a machine that runs has a card that was left on no network."""
    plan = live.load(paths, machine_id)
    if plan is None or plan.is_user:
        return False
    with Netlink() as netlink:
        return any(_is_free(netlink, machine_id, plan, number) for number in range(planning.MOST_LINKS))


def _is_free(netlink: Netlink, machine_id: str, plan: NetworkPlan, number: int) -> bool:
    """Whether the machine's VMM has a tap device of that number open, on no bridge."""
    name = planning.host_link(machine_id, number)
    found = None if name in (link.host_link for link in plan.links) else netlink.find_link(name)
    return found is not None and found.kind == "tun" and not found.master


def _find_number(
    paths: Paths, spec: MachineSpec, plan: NetworkPlan, attachment: Attachment, netlink: Netlink, *, has_card: bool
) -> int:
    """The first one that no link has; with `has_card` that of a free card."""
    numbers = range(planning.MOST_LINKS + 1)
    if not has_card:
        used = {link.host_link for link in plan.links}
        return next(number for number in numbers if planning.host_link(spec.id, number) not in used)
    if networks.load(paths.root, attachment.network).driver == "bridge":
        for number in numbers:
            if _is_free(netlink, spec.id, plan, number):
                return number
    raise Unsupported(
        f"a machine of type '{spec.type}' gets a new network card at its next start only",
        hint=f"nagaya restart {spec.name}",
    )


def unplug(paths: Paths, machine_id: str, network: str, *, keep_device: bool) -> LinkPlan | None:
    """Cut a machine that runs off a network; the link that it had there. `keep_device`: somebody has it open."""
    with Nftables() as nftables, planning.host_lock(), Netlink() as netlink:
        plan = live.load(paths, machine_id)
        gone = tuple(link for link in plan.links if link.network == network) if plan is not None else ()
        if plan is None or not gone:
            return None
        links = [link for link in plan.links if link not in gone]
        rest = plan._replace(links=planning.with_gateways(paths.root, links))
        _drop_links(paths, machine_id, rest, gone, netlink, nftables, keep_device=keep_device)
        return gone[0]


def rename(paths: Paths, spec: MachineSpec) -> None:
    """Tell a running machine's names anew, after one of them has changed."""
    with planning.host_lock():
        plan = live.load(paths, spec.id)
        if plan is None:
            return
        known = {attachment.network: attachment for attachment in planning.attachments(spec)}
        links = tuple(
            link._replace(names=planning.names_of(spec, known[link.network])) if link.network in known else link
            for link in plan.links
        )
        live.store(paths, spec.id, plan._replace(links=links))
        for link in links:
            if link.driver == "bridge":
                dns.write_names(spec.id, link)


# -- letting go


def let_go(paths: Paths, machine_id: str, nftables: Nftables) -> None:
    """Take away all that a machine has on the host's network. Idempotent; for repairs too.

    `nftables`: see there for what closing it takes, which only who waits for nothing should.
    """
    with planning.host_lock(), Netlink() as netlink:
        _let_go(paths, machine_id, netlink, nftables)


def _let_go(paths: Paths, machine_id: str, netlink: Netlink, nftables: Nftables) -> None:
    plan = live.load(paths, machine_id)
    if plan is not None:
        _drop_links(paths, machine_id, None, plan.links, netlink, nftables)
        return
    # Its plan went with a reboot, or was never written: what is left is where it always is.
    try:
        for name in planning.host_links(machine_id):
            if netlink.delete_link(name):
                rates.lift(name)
    except OSError as error:
        raise HostError.from_os(error, "cannot delete a link of the machine") from None
    for name in networks.names(paths.root):
        addresses.release(networks.leases(paths.root, name), machine_id)
        if machine_id in dns.machines_of(networks.bridge_name(paths.root, name)):
            dns.remove_names(machine_id, networks.bridge_name(paths.root, name))
        _rest(paths, name)


def _drop_links(
    paths: Paths, machine_id: str, rest: NetworkPlan | None, links: tuple[LinkPlan, ...], netlink: Netlink,
    nftables: Nftables, *, keep_device: bool = False,
) -> None:  # fmt: skip
    """Take links away, and with `rest` keep the others. The record goes last: a kill in between is mended by it."""
    bridged = [link for link in links if link.driver == "bridge"]
    try:
        for link in links:
            found = netlink.find_link(link.host_link) if keep_device else None
            if found is not None:
                netlink.release(found.number)
            elif not keep_device:
                netlink.delete_link(link.host_link)
    except OSError as error:
        raise HostError.from_os(error, "cannot delete a link of the machine") from None
    trusted = rest is not None and rest.allow_host
    elements = [element for link in bridged for element in firewall.link_elements(link, trusted=True)]
    elements += [element for link in bridged for element in firewall.resolver_elements(paths.root, link)]
    if any(link.sets_itself_up for link in bridged):
        from nagaya.net import claims  # lazy: whole machines alone

        elements += claims.of_links(paths.root, links, nftables)
    for link in bridged:
        if link.rate_bits:
            rates.lift(link.host_link)
    before = live.load(paths, machine_id)
    ports = firewall.port_elements(rest) if rest is not None else []
    if before is not None:
        elements += [element for element in firewall.port_elements(before) if element not in ports]
    if rest is not None and trusted is False:
        elements = [element for element in elements if not element[1].startswith("trusted")]
    for link in links:
        addresses.release_addresses(
            networks.leases(paths.root, link.network), machine_id, (link.address, link.address6)
        )
        if link.driver == "bridge":
            dns.remove_names(machine_id, link.bridge)
    for name in dict.fromkeys(link.network for link in bridged):
        elements += _rest(paths, name)
    # Ports may lead to another of its links by now.
    forgotten = not elements or firewall.change(paths.root, nftables, add=ports, remove=elements)
    if rest is None:
        live.remove(paths, machine_id)
    else:
        live.store(paths, machine_id, rest)
    if not forgotten:
        rules.reload(paths)
    if before is not None and any(port.protocol == UDP for port in before.ports):
        from nagaya.net import flows  # lazy: few publish such ports

        flows.forget_led(before, rest)


def _rest(paths: Paths, name: str) -> Elements:
    """Stop the name server of a network that has no machine any more; what the firewall has to forget then."""
    if addresses.has_holders(networks.leases(paths.root, name)):
        return []
    dns.stop(networks.bridge_name(paths.root, name))
    try:
        return firewall.network_elements(paths.root, networks.load(paths.root, name))
    except NagayaError:
        return []  # there is nothing to tell by; the next rebuild leaves it out


# -- removing


def remove_network(paths: Paths, name: str) -> bool:
    """Take a network's bridge, name server and record away; False while a machine holds an address in it."""
    with planning.host_lock(), Netlink() as netlink:
        if addresses.has_holders(networks.leases(paths.root, name)):
            return False
        bridge = networks.bridge_name(paths.root, name)
        dns.stop(bridge)
        try:
            netlink.delete_link(bridge)
        except OSError as error:
            raise HostError.from_os(error, f"cannot delete the bridge {bridge}") from None
        if not any(plan.links for plan in live.load_all(paths).values()):
            firewall.remove(paths.root)
        remove_tree(networks.directory(paths.root, name))
    return True


def remove_idle(paths: Paths) -> bool:
    """Take the default network down, and every other one's bridge, where no machine runs; whether the first was so."""
    with planning.host_lock(), Netlink() as netlink:
        for name in networks.names(paths.root):
            if name != DEFAULT_NETWORK and not addresses.has_holders(networks.leases(paths.root, name)):
                dns.stop(networks.bridge_name(paths.root, name))
                netlink.delete_link(networks.bridge_name(paths.root, name))
    return remove_network(paths, DEFAULT_NETWORK)


def check_addresses(record: NetworkRecord, attachment: Attachment) -> None:
    """Raise `UsageError` for a fixed address that the network cannot give."""
    for subnet, gateway, wanted in (
        (record.subnet, record.gateway, attachment.address),
        (record.subnet6, record.gateway6, attachment.address6),
    ):
        if wanted and subnet:
            addresses.check_wanted(parse_subnet(subnet), wanted, gateway=gateway)
