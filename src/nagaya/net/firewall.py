"""The firewall of a store, in two nftables tables of our own: nobody else's rules are read or touched.

The tables are loaded whole, in one transaction; after that machines come and go as elements of sets. What a rebuild
loads is what the elements added one by one would have come to: both are made of the same lines (`elements`).
"""

from __future__ import annotations

import os
import zlib

from nagaya.errors import LaunchError, NagayaError, Unsupported
from nagaya.kernel.nftables import NFPROTO_BRIDGE, NFPROTO_INET, Nftables
from nagaya.net import dns, elements, programs
from nagaya.net.elements import Elements
from nagaya.net.networks import NetworkRecord, bridge_mac, bridge_name, load
from nagaya.net.plan import WILDCARDS, LinkPlan, NetworkPlan, is_loopback
from nagaya.net.subnets import format_address, parse_address

_INET = """table inet {table} {{
{sets}	chain prerouting {{
		type nat hook prerouting priority dstnat; policy accept;
		iifname . ip daddr @gateways4 meta l4proto {{ tcp, udp }} th dport 53 dnat ip to iifname . ip saddr map @resolvers4
		iifname . ip6 daddr @gateways6 meta l4proto {{ tcp, udp }} th dport 53 dnat ip6 to iifname . ip6 saddr map @resolvers6
		dnat ip to meta l4proto . ip daddr . th dport map @ports4
		dnat ip6 to meta l4proto . ip6 daddr . th dport map @ports6
		fib daddr type local dnat ip to meta l4proto . th dport map @anyports4
		fib daddr type local dnat ip6 to meta l4proto . th dport map @anyports6
	}}
	chain forward {{
		type filter hook forward priority filter; policy accept;
		iifname . oifname @insides accept
		iifname != @bridges oifname != @bridges accept
		ct state established,related accept
		ct status dnat accept
		oifname @bridges reject with icmpx admin-prohibited
		iifname @closed reject with icmpx admin-prohibited
	}}
	chain input {{
		type filter hook input priority filter; policy accept;
		iifname != @bridges accept
		ct state established,related accept
		icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit }} accept
		icmpv6 type {{ mld-listener-query, mld-listener-report, mld2-listener-report }} accept
		udp sport 68 udp dport 67 accept
		ip6 saddr fe80::/10 udp sport 546 udp dport 547 accept
		iifname . ip daddr @gateways4 meta l4proto {{ tcp, udp }} th dport 53 accept
		iifname . ip6 daddr @gateways6 meta l4proto {{ tcp, udp }} th dport 53 accept
		ct status dnat meta l4proto {{ tcp, udp }} th dport {first}-{last} accept
		iifname . ip daddr @gateways4 icmp type echo-request accept
		iifname . ip6 daddr @gateways6 icmpv6 type echo-request accept
		iifname . ip saddr @trusted4 accept
		iifname . ip6 saddr @trusted6 accept
		reject with icmpx admin-prohibited
	}}
	chain postrouting {{
		type nat hook postrouting priority srcnat; policy accept;
		iifname . oifname @insides ct status dnat masquerade
		iifname @bridges oifname != @bridges masquerade
	}}
}}
"""
# By every machine's own link: who it says it is. In the bridge's first hook, so also on the way to its neighbours. And the
# host's router advertisements go to those alone that set themselves up: what we have set up needs no second default route.
#
# Those choose their link-local addresses, too (RFC 7217): who is the first to use one, or to ask whether it is anybody's
# (RFC 4862, 5.4), has it, on its bridge. In `claims6` it is its port's, in `claimed6` its bridge's, of which the packet's mark
# says the number here (for nft_meta_bridge is no module that every kernel has). A port claims a few a day: nobody can fill
# the sets. `fresh6` has those that their owner may be asking for still, whom a question of another's would have give up.
_CLAIM = """		meta mark set iifname map @claimers
		meta mark 0 drop
		meta mark . {at} @reserved6 drop
		iifname . {at} @claims6 update @claims6 {{ iifname . {at} }} update @claimed6 {{ meta mark . {at} }} meta mark set 0 accept
{taken}		add @claimants {{ iifname limit rate over 1/hour burst 16 packets }} drop
		add @claimed6 {{ meta mark . {at} }} add @claims6 {{ iifname . {at} }} add @fresh6 {{ meta mark . {at} }} meta mark set 0 accept
		drop
"""
_CLAIM_SOURCE = _CLAIM.format(at="@nh,64,128", taken="\t\tmeta mark . @nh,64,128 @claimed6 drop\n")
_CLAIM_TARGET = _CLAIM.format(
    at="@th,64,128",
    taken="\t\tmeta mark . @th,64,128 @fresh6 drop\n"
    "\t\tmeta mark . @th,64,128 @claimed6 meta mark set 0 accept\n",  # for its owner to answer
)
_BRIDGE = """table bridge {table} {{
{sets}	chain detection {{
		ip6 length != {{ 24, 32 }} drop
		ip6 length 32 @th,192,16 != 0x0e01 drop
		iifname . @th,64,128 @owned6 accept
		@th,64,64 != 0xfe80000000000000 drop
{claim_target}	}}
	chain solicitation {{
		ip6 saddr :: goto detection
		ip6 length 24 return
		ip6 length 32 @th,192,16 0x0101 iifname . @th,208,48 @hardware6 return
		drop
	}}
	chain advertisement {{
		ip6 length != {{ 24, 32 }} drop
		ip6 length 32 @th,192,16 != 0x0201 drop
		ip6 length 32 iifname . @th,208,48 != @hardware6 drop
		iifname . @th,64,128 @owned6 return
		meta mark set iifname map @claimers
		meta mark . @th,64,128 @reserved6 drop
		iifname . @th,64,128 @claims6 meta mark set 0 return
		drop
	}}
	chain discovery {{
		ip6 nexthdr != ipv6-icmp drop
		ip6 hoplimit != 255 drop
		icmpv6 type nd-neighbor-solicit goto solicitation
		icmpv6 type nd-neighbor-advert goto advertisement
		ip6 length 8 return
		ip6 length 16 @th,64,16 0x0101 iifname . @th,80,48 @hardware6 return
		drop
	}}
	chain claim {{
{claim_source}	}}
	chain prerouting {{
		type filter hook prerouting priority filter; policy accept;
		iifname != @ports accept
		iifname . ether saddr != @macs drop
		ether type ip iifname . ether saddr . ip saddr @senders4 accept
		ether type ip ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept
		ether type arp iifname . arp saddr ether . arp saddr ip @senders4 accept
		ether type arp iifname . arp saddr ether @macs arp saddr ip 0.0.0.0 arp operation request accept
		ether type ip6 icmpv6 type {{ nd-router-advert, nd-redirect }} drop
		ether type ip6 icmpv6 type {{ nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert }} jump discovery
		ether type ip6 iifname . ether saddr . ip6 saddr @senders6 accept
		ether type ip6 ip6 saddr :: icmpv6 type {{ nd-router-solicit, mld-listener-report, mld2-listener-report }} accept
		ether type ip6 ip6 saddr fe80::/64 goto claim
		drop
	}}
	chain output {{
		type filter hook output priority filter; policy accept;
		icmpv6 type nd-router-advert oifname != @advised drop
	}}
}}
"""


def table_name(root: str) -> str:
    """The store's tables, one of family inet and one of family bridge."""
    return bridge_name(root).replace("-", "_")


def rules_of(text: str) -> int:
    """How many rules a table's text has: the lines of its chains but for the first of each, which says its hook."""
    return sum(line.startswith("\t\t") and not line.startswith("\t\ttype ") for line in text.splitlines())


def tables(root: str) -> str:
    """The text of both tables, with the elements that mean nothing, in place of what there is."""
    table = table_name(root)
    return (
        f"add table inet {table}\ndelete table inet {table}\nadd table bridge {table}\ndelete table bridge {table}\n"
        + _INET.format(
            table=table, sets=elements.declare("inet"), first=dns.FIRST_PORT, last=dns.FIRST_PORT + dns.PORTS - 1
        )
        + _BRIDGE.format(
            table=table, sets=elements.declare("bridge"), claim_source=_CLAIM_SOURCE, claim_target=_CLAIM_TARGET
        )
        + elements.additions(table, elements.marks())
    )


# -- elements


def network_elements(root: str, record: NetworkRecord) -> Elements:
    """What the tables have of a network of the "bridge" driver."""
    bridge = bridge_name(root, record.name)
    found = [("inet", "bridges", f'"{bridge}"'), ("inet", "insides", f'"{bridge}" . "{bridge}"')]
    if record.internal:
        found.append(("inet", "closed", f'"{bridge}"'))
    for version, gateway in ((4, record.gateway), (6, record.gateway6)):
        if gateway:
            found.append(("inet", f"gateways{version}", f'"{bridge}" . {gateway}'))
    own = [address for address in (record.gateway6, link_local(bridge_mac(bridge))) if address]
    return found + [("bridge", "reserved6", f"{bridge_mark(bridge)} . {target(address)}") for address in own]


def bridge_mark(bridge: str) -> str:
    """The number that stands for a bridge, among addresses that are somebody's on it; never 0."""
    return f"{zlib.crc32(os.fsencode(bridge)) | 1:#010x}"


def target(address: str) -> str:
    """An IPv6 address as the sets of `elements.TARGET` have it."""
    return f"{parse_address(address, 6):#034x}"


def machine_elements(root: str, plan: NetworkPlan) -> Elements:
    """What the tables have of a machine."""
    found: Elements = []
    for link in plan.links:
        if link.driver == "bridge":
            found += link_elements(link, trusted=plan.allow_host) + resolver_elements(root, link)
    return found + port_elements(plan)


def port_elements(plan: NetworkPlan) -> Elements:
    """Published ports, for what comes from outside; this host itself uses the sockets that hold them (net/ports.py).

    What comes to an IPv6 address of the host's goes to the machine's, and where it has none to the sockets as well.
    """
    link = port_target(plan)
    found: Elements = []
    if link is None:
        return found
    for port in plan.ports:
        version = 6 if ":" in port.host_address else 4
        inside = link.address6 if version == 6 else link.address
        if is_loopback(port.host_address) or not inside:
            continue
        key = f"{port.protocol} . {port.host_port}"
        name = f"anyports{version}"
        if port.host_address not in WILDCARDS:
            key, name = f"{port.protocol} . {port.host_address} . {port.host_port}", f"ports{version}"
        found.append(("inet", name, f"{key} : {inside} . {port.guest_port}"))
    return found


def port_target(plan: NetworkPlan) -> LinkPlan | None:
    """The link by which a machine's published ports are reached."""
    return next((link for link in plan.links if link.driver == "bridge"), None)


def link_elements(link: LinkPlan, *, trusted: bool) -> Elements:
    port = f'"{link.host_link}"'
    local = link_local(link.mac)
    found = [("bridge", "ports", port), ("bridge", "macs", f"{port} . {link.mac}")]
    found.append(("bridge", "hardware6", f"{port} . 0x{link.mac.replace(':', '')}"))
    mark = bridge_mark(link.bridge)
    if link.sets_itself_up:
        found.append(("bridge", "advised", port))
        found.append(("bridge", "claimers", f"{port} : {mark}"))
    if link.address:
        found.append(("bridge", "senders4", f"{port} . {link.mac} . {link.address}"))
        if trusted:
            found.append(("inet", "trusted4", f'"{link.bridge}" . {link.address}'))
    for address in (link.address6, local):
        if address:
            found.append(("bridge", "senders6", f"{port} . {link.mac} . {address}"))
            found.append(("bridge", "owned6", f"{port} . {target(address)}"))
            found.append(("bridge", "reserved6", f"{mark} . {target(address)}"))
    if link.address6 and trusted:
        found.append(("inet", "trusted6", f'"{link.bridge}" . {link.address6}'))
    return found


def resolver_elements(root: str, link: LinkPlan) -> Elements:
    """Where the questions of a machine are led that has name servers of its own choice."""
    if not link.dns:
        return []
    try:
        record = load(root, link.network)
    except NagayaError:
        return []  # it is gone or damaged
    found: Elements = []
    for version, gateway, address in ((4, record.gateway, link.address), (6, record.gateway6, link.address6)):
        if gateway and address:
            key = f'"{link.bridge}" . {address}'
            found.append(("inet", f"resolvers{version}", f"{key} : {gateway} . {dns.port_of(link.dns)}"))
    return found


def link_local(mac: str) -> str:
    """The address that a link gives itself (RFC 4291, appendix A)."""
    raw = bytes.fromhex(mac.replace(":", ""))
    identifier = bytes([raw[0] ^ 2]) + raw[1:3] + b"\xff\xfe" + raw[3:]
    return format_address(int.from_bytes(b"\xfe\x80" + bytes(6) + identifier, "big"), 6)


# -- on the host


def is_whole(root: str, nftables: Nftables) -> bool:
    """Whether both tables are there with all their rules and sets that nobody has flushed. 0.5 ms, however many machines."""
    table = table_name(root)
    return (
        nftables.count_rules(NFPROTO_INET, table) == rules_of(_INET)
        and nftables.count_rules(NFPROTO_BRIDGE, table) == rules_of(_BRIDGE + _CLAIM_SOURCE + _CLAIM_TARGET)
        and nftables.has(table, elements.encode(elements.marks()))
    )


def has_exactly(root: str, wanted: Elements, nftables: Nftables) -> bool:
    """Whether both tables are whole, and have these elements and no others."""
    if not is_whole(root, nftables):
        return False
    expected: dict[tuple[int, str], dict[bytes, bytes]] = {}
    for element in elements.encode(wanted + elements.marks()):
        expected.setdefault((element.family, element.set), {})[element.key] = element.data
    try:
        return all(nftables.elements(table_name(root), *name) == found for name, found in expected.items())
    except OSError:
        return False


def change(root: str, nftables: Nftables, *, add: Elements | None = None, remove: Elements | None = None) -> bool:
    """Put elements into tables that are whole, and take others out, in one transaction; whether that went well.

    Where none are put in, damage is left to the next start, or command, that looks for it.
    """
    if add and not is_whole(root, nftables):
        return False
    try:
        nftables.change(table_name(root), add=elements.encode(add or []), remove=elements.encode(remove or []))
    except OSError:
        return False
    return True


def rebuild(root: str, wanted: Elements) -> None:
    """Load both tables anew with these elements, in one transaction. Raises `LaunchError`, `Unsupported`."""
    done = _load(tables(root) + elements.additions(table_name(root), wanted))
    if done.status:
        first = done.text.splitlines()[0] if done.text else "no reason given"
        raise LaunchError(
            f"nft could not load the firewall: {first}",
            hint="the kernel may lack nf_tables; use --network none or --network host",
            command="nft -f -",
            status=done.status,
            log_tail="\n".join(done.text.splitlines()[-5:]),
        )


def remove(root: str) -> None:
    """Take both tables away."""
    table = table_name(root)
    with Nftables() as nftables:
        found = [nftables.count_rules(family, table) for family in (NFPROTO_INET, NFPROTO_BRIDGE)]
    if found != [None, None]:
        _load("".join(f"add table {family} {table}\ndelete table {family} {table}\n" for family in ("inet", "bridge")))


def _load(text: str) -> programs.Ended:
    try:
        return programs.run(["nft", "-f", "-"], text)
    except FileNotFoundError:
        raise Unsupported(
            "networks need the program 'nft', which is not installed",
            hint="apt install nftables, or use --network none or --network host",
            finding=f"it was looked for in {os.environ.get('PATH', '')} and {programs.PATH}",
        ) from None
