"""From a machine's record to its network plan: networks found, subnets settled, addresses claimed, bridges up.

Under one lock for the whole host: another store that chooses a subnet at the same time sees our bridge's route, or waits.
"""

from __future__ import annotations

import os
import time

from nagaya.errors import Conflict, HostError, NotFound, Unsupported
from nagaya.kernel.netlink import AF_INET, AF_INET6, Link, Netlink, index_of
from nagaya.model.spec import DEFAULT_NETWORK, Attachment, MachineSpec
from nagaya.net import addresses, networks, subnets
from nagaya.net.networks import NetworkRecord
from nagaya.net.plan import (
    USER_ADDRESS,
    USER_ADDRESS6,
    USER_GATEWAY,
    USER_GATEWAY6,
    USER_NAMESERVER,
    USER_PREFIX,
    USER_PREFIX6,
    LinkPlan,
    NetworkPlan,
)
from nagaya.net.subnets import Subnet
from nagaya.storage.lock import FileLock
from nagaya.storage.paths import make_directory

HOST_LOCK = "/run/nagaya/network.lock"
FORWARDING = "/proc/sys/net/ipv4/ip_forward"
FORWARDING6 = "/proc/sys/net/ipv6/conf/all/forwarding"
DEFAULT_MTU = 1500
LEAST_MTU6 = 1280  # RFC 8200, 5
MOST_LINKS = 16
PASST_PLACES = ("/usr/local/bin", "/usr/bin", "/bin")


def host_lock() -> FileLock:
    """Held by whoever chooses subnets, makes bridges or changes our firewall, in any store. For root."""
    make_directory(os.path.dirname(HOST_LOCK), 0o755)
    return FileLock(HOST_LOCK)


def attachments(spec: MachineSpec) -> tuple[Attachment, ...]:
    """What a machine is plugged into: its attachments, or the default network."""
    if spec.network != "bridge":
        return ()
    return spec.attachments or (Attachment(DEFAULT_NETWORK),)


def plan_user(spec: MachineSpec) -> NetworkPlan:
    """A plain user's network: a user can make no bridge, and needs none."""
    link = LinkPlan(
        driver="user", address=USER_ADDRESS, prefix=USER_PREFIX, gateway=USER_GATEWAY, mac=mac_address(spec.id, 0)
    )
    if find_passt() and _has_way_out6():
        link = link._replace(address6=USER_ADDRESS6, prefix6=USER_PREFIX6, gateway6=USER_GATEWAY6)
    return NetworkPlan("links", (link,), nameservers=(USER_NAMESERVER,), ports=spec.ports, rate_bits=spec.net_rate_bits)


def find_passt() -> str:
    """The path of passt, which makes user-mode networks; "" where it is not installed."""
    return next((path for place in PASST_PLACES if os.access(path := f"{place}/passt", os.X_OK)), "")


def _has_way_out6() -> bool:
    """passt does IPv6 where the host has a default route for it."""
    if not has_ipv6():
        return False
    with Netlink() as netlink:
        return any(not route.prefix for route in netlink.routes(AF_INET6))


def mac_address(machine_id: str, number: int) -> str:
    """Of a machine's link `number`. The first byte's two lowest bits, 10: locally administered, and one machine's."""
    return f"{2 + 4 * number:02x}:" + ":".join(machine_id[at : at + 2] for at in range(0, 10, 2))


def host_link(machine_id: str, number: int) -> str:
    """The host's end of a machine's link `number`."""
    return f"ngy{machine_id[:10]}" + (f"{number:x}" if number else "")


def host_links(machine_id: str) -> list[str]:
    """All that a machine can have."""
    return [host_link(machine_id, number) for number in range(MOST_LINKS)]


def names_of(spec: MachineSpec, attachment: Attachment) -> tuple[str, ...]:
    """What others on the network find a machine by; the first is what its address is turned into."""
    return tuple(dict.fromkeys((spec.name, spec.hostname, spec.id[:12], *attachment.aliases)))


def plan_link(root: str, spec: MachineSpec, attachment: Attachment, number: int, *, netlink: Netlink) -> LinkPlan:
    """Under `host_lock`: the network's bridge is up and the addresses are the machine's when this returns.

    Raises `NotFound`, `Conflict`, `UsageError`, `HostError`; what was claimed by then is the caller's to release.
    """
    machine_id = spec.id
    record = load_or_make(root, attachment.network, netlink=netlink)
    bridge = networks.bridge_name(root, record.name)
    found = netlink.find_link(bridge) if record.driver == "bridge" else netlink.find_link(record.parent)
    if record.driver == "bridge" and found is None:
        record = _settle_subnet(root, record, netlink=netlink)
    link = LinkPlan(
        driver=record.driver, network=record.name, bridge=bridge if record.driver == "bridge" else record.parent,
        host_link=host_link(machine_id, number), name=f"eth{number}",
        mac=attachment.mac or mac_address(machine_id, number), mtu=record.mtu or way_out_mtu(netlink),
        names=names_of(spec, attachment), rate_bits=spec.net_rate_bits, sets_itself_up=spec.hardware is not None,
        dns=() if record.internal or record.driver != "bridge" else spec.dns,
    )  # fmt: skip
    if record.driver == "macvlan" and spec.net_rate_bits:
        raise Unsupported(
            f"--net-rate works at a bridge, and network '{record.name}' is on the link '{record.parent}' itself",
            hint="leave --net-rate away, or use a network of the driver 'bridge'",
        )
    leases = networks.leases(root, record.name)
    # In an internal network there is nowhere to go; a further link's network gives no second way out.
    if record.subnet:
        subnet = subnets.parse_subnet(record.subnet)
        address = addresses.claim(leases, subnet, machine_id, gateway=record.gateway, wanted=attachment.address)
        link = link._replace(address=address, prefix=subnet.prefix, gateway="" if record.internal else record.gateway)
    if record.subnet6 and has_ipv6() and link.mtu >= LEAST_MTU6:
        subnet = subnets.parse_subnet(record.subnet6)
        address = addresses.claim(leases, subnet, machine_id, gateway=record.gateway6, wanted=attachment.address6)
        link = link._replace(
            address6=address, prefix6=subnet.prefix, gateway6="" if record.internal else record.gateway6
        )
    if record.driver == "bridge":
        raise_bridge(record, bridge, link, found, netlink=netlink)
    elif found is None:
        raise NotFound(
            f"network '{record.name}' is on the link '{record.parent}', and this host has none of that name",
            hint="'ip link' lists them",
        )
    return link


def without_second_gateways(links: list[LinkPlan]) -> tuple[LinkPlan, ...]:
    """One default route of each family: the first link's that has one."""
    kept, have4, have6 = [], False, False
    for link in links:
        kept.append(link._replace(gateway="" if have4 else link.gateway, gateway6="" if have6 else link.gateway6))
        have4, have6 = have4 or bool(link.gateway), have6 or bool(link.gateway6)
    return tuple(kept)


def with_gateways(root: str, links: list[LinkPlan]) -> tuple[LinkPlan, ...]:
    """Links that are left when another one has gone, which may have had the default routes: the next ones have them now."""
    found = []
    for link in links:
        record = networks.load(root, link.network)
        if not record.internal:
            link = link._replace(
                gateway=record.gateway if link.address else "", gateway6=record.gateway6 if link.address6 else ""
            )
        found.append(link)
    return without_second_gateways(found)


def load_or_make(root: str, name: str, *, netlink: Netlink) -> NetworkRecord:
    """A network's record; the default network's is made when it is first needed."""
    try:
        return networks.load(root, name)
    except NotFound:
        if name != DEFAULT_NETWORK:
            raise
    subnet = choose_subnet(subnets.default_candidates(), netlink=netlink)
    subnet6 = subnets.random_subnet6()
    record = NetworkRecord(
        name=DEFAULT_NETWORK, id=os.urandom(16).hex(), driver="bridge", created_ns=time.time_ns(),
        subnet=subnet.text, gateway=subnet.address(1), subnet6=subnet6.text, gateway6=subnet6.address(1), is_chosen=True,
    )  # fmt: skip
    networks.store(root, record)
    return record


def taken_subnets(netlink: Netlink) -> list[Subnet]:
    """What this host has a route to, of both families."""
    routes = netlink.routes(AF_INET) + (netlink.routes(AF_INET6) if has_ipv6() else [])
    return [subnets.from_route(route.network, route.prefix) for route in routes if route.prefix]


def choose_subnet(candidates: list[Subnet], *, netlink: Netlink, reserved: tuple[Subnet, ...] = ()) -> Subnet:
    """A free one, clear of the host's routes and of `reserved`. Raises `Conflict`."""
    subnet = subnets.choose(candidates, [*taken_subnets(netlink), *reserved])
    if subnet is None:
        raise Conflict(
            f"no free subnet was found from {candidates[0].text} to {candidates[-1].text}",
            hint="name one that this host has no route to: nagaya network create --subnet 172.30.0.0/24 NAME",
        )
    return subnet


def _settle_subnet(root: str, record: NetworkRecord, *, netlink: Netlink) -> NetworkRecord:
    """While a network's bridge was down somebody else may have come to use its subnet."""
    if not record.subnet:
        return record
    subnet = subnets.parse_subnet(record.subnet)
    near = [other for other in taken_subnets(netlink) if other.prefix > 8 and other.overlaps(subnet)]
    if not near:
        return record
    if not record.is_chosen or addresses.has_holders(networks.leases(root, record.name)):
        raise Conflict(
            f"network '{record.name}' has the subnet {subnet.text}, and this host has a route to {near[0].text} by now",
            hint="'ip route' shows whose it is; remove that, or make a network with another subnet",
        )
    candidates = subnets.default_candidates() if record.name == DEFAULT_NETWORK else subnets.further_candidates()
    subnet = choose_subnet(candidates, netlink=netlink)
    record = record._replace(subnet=subnet.text, gateway=subnet.address(1))
    networks.store(root, record)
    return record


def raise_bridge(record: NetworkRecord, bridge: str, link: LinkPlan, found: Link | None, *, netlink: Netlink) -> None:
    """The network's bridge with its gateway's addresses. Each step is fine when it is done already."""
    try:
        if found is None:
            netlink.add_bridge(bridge, networks.bridge_mac(bridge), link.mtu)
        index = index_of(bridge)
        if found is None or not found.is_up or not _has(netlink, index, record):
            if record.gateway:
                netlink.add_address(index, record.gateway, subnets.parse_subnet(record.subnet).prefix)
            if record.gateway6 and has_ipv6():
                _write(f"/proc/sys/net/ipv6/conf/{bridge}/disable_ipv6", "0")
                _write(f"/proc/sys/net/ipv6/conf/{bridge}/accept_ra", "0")
                _write(
                    f"/proc/sys/net/ipv6/conf/{bridge}/addr_gen_mode", "0"
                )  # by its MAC, as the firewall takes it to be
                netlink.add_address6(index, record.gateway6, subnets.parse_subnet(record.subnet6).prefix)
            netlink.set_up(index)
        if not record.internal:
            enable_forwarding(netlink, ipv6=bool(record.gateway6))
    except OSError as error:
        raise HostError.from_os(
            error, f"cannot set up the network bridge {bridge}", hint="use --network none or --network host"
        ) from None


def is_raised(record: NetworkRecord, found: Link | None, *, netlink: Netlink) -> bool:
    """Whether a network's bridge, as it was found, is as `raise_bridge` would leave it, with the host's forwarding."""
    if found is None or not found.is_up or not _has(netlink, found.number, record):
        return False
    return record.internal or (_read(FORWARDING) == "1" and not (record.gateway6 and _read(FORWARDING6) == "0"))


def _has(netlink: Netlink, index: int, record: NetworkRecord) -> bool:
    wanted = {record.gateway, record.gateway6 if has_ipv6() else ""} - {""}
    return wanted <= netlink.addresses(index)


def has_ipv6() -> bool:
    """Whether this host's kernel has IPv6, and has it on."""
    return os.path.exists(FORWARDING6)


def enable_forwarding(netlink: Netlink, *, ipv6: bool) -> None:
    """Switched on when the first bridged machine needs it, and left on: others may have come to rely on it."""
    if _read(FORWARDING) != "1":
        _write(FORWARDING, "1")
    if ipv6 and has_ipv6() and _read(FORWARDING6) == "0":
        _keep_advertised_routes(netlink)
        _write(FORWARDING6, "1")


def _keep_advertised_routes(netlink: Netlink) -> None:
    """A host that forwards takes no router's advertisements any more, unless it is told to by a 2 (ip-sysctl.rst):
    the host's own way out would be gone when the present one expires.
    """
    from nagaya.kernel.netlink import RTPROT_RA

    links = {route.link for route in netlink.routes(AF_INET6) if route.protocol == RTPROT_RA}
    for link in netlink.links():
        path = f"/proc/sys/net/ipv6/conf/{link.name}/accept_ra"
        if link.number in links and _read(path) == "1":
            _write(path, "2")


def way_out_mtu(netlink: Netlink) -> int:
    """The MTU of the link with the default route: packets of machines that are larger would not get through it."""
    indexes = {route.link for route in netlink.routes(AF_INET) if not route.prefix}
    mtus = [link.mtu for link in netlink.links() if link.number in indexes] if indexes else []
    return min([DEFAULT_MTU, *(mtu for mtu in mtus if mtu >= LEAST_MTU6)])


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
