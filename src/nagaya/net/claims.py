"""Link-local addresses that machines have claimed, which set themselves up: rules of the firewall's put them into its sets.

Nobody else knows of them. So they have to be taken over when the tables are loaded anew; and where these were gone by then,
there is what this host remembers of its neighbours, who got that into its memory while the tables were there.
"""

from __future__ import annotations

from nagaya.kernel.netlink import Netlink, index_of
from nagaya.kernel.nftables import NFPROTO_BRIDGE, Nftables
from nagaya.net import firewall
from nagaya.net.elements import Elements
from nagaya.net.plan import LinkPlan
from nagaya.net.subnets import format_address

_LINK_LOCAL = b"\xfe\x80" + bytes(6)
_NAME_BYTES = 16


def find(root: str, links: list[LinkPlan]) -> Elements:
    """What links that set themselves up have claimed, as elements."""
    own = {link.host_link: link for link in links if link.sets_itself_up and link.driver == "bridge"}
    if not own:
        return []
    found: dict[tuple[str, str], LinkPlan] = {}  # by bridge and address
    with Nftables() as nftables:
        for name, address in _read(root, nftables):
            if name in own:
                found.setdefault((own[name].bridge, address), own[name])
    for (bridge, address), link in _remembered(own).items():
        found.setdefault((bridge, address), link)
    return [element for (_, address), link in found.items() for element in _elements(link, address)]


def of_links(root: str, links: tuple[LinkPlan, ...], nftables: Nftables) -> Elements:
    """All that the sets have by rules of links that go."""
    own = {link.host_link: link for link in links if link.sets_itself_up and link.driver == "bridge"}
    if not own:
        return []
    gone = [
        element for name, address in _read(root, nftables) if name in own for element in _elements(own[name], address)
    ]
    return gone + [("bridge", "claimants", f'"{name}"') for name in own]


def _elements(link: LinkPlan, address: str) -> Elements:
    target = firewall.target(address)
    return [
        ("bridge", "claims6", f'"{link.host_link}" . {target}'),
        ("bridge", "claimed6", f"{firewall.bridge_mark(link.bridge)} . {target}"),
    ]


def _read(root: str, nftables: Nftables) -> list[tuple[str, str]]:
    """(host link, address) that the sets have."""
    try:
        keys = nftables.elements(firewall.table_name(root), NFPROTO_BRIDGE, "claims6")
    except OSError:
        return []  # there is no such table, or an older one
    return [
        (
            key[:_NAME_BYTES].rstrip(b"\0").decode(errors="replace"),
            format_address(int.from_bytes(key[_NAME_BYTES:], "big"), 6),
        )
        for key in keys
        if len(key) == 2 * _NAME_BYTES
    ]


def _remembered(own: dict[str, LinkPlan]) -> dict[tuple[str, str], LinkPlan]:
    """By bridge and address. What is another's from the beginning stays so: the rules look at that first."""
    found = {}
    with Netlink() as netlink:
        for bridge in {link.bridge for link in own.values()}:
            if netlink.find_link(bridge) is None:
                continue
            by_mac = {link.mac: link for link in own.values() if link.bridge == bridge}
            for raw, mac in netlink.neighbours6(index_of(bridge)):
                address = format_address(int.from_bytes(raw, "big"), 6)
                if raw.startswith(_LINK_LOCAL) and mac in by_mac and address != firewall.link_local(mac):
                    found[bridge, address] = by_mac[mac]
    return found
