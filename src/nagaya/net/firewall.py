"""The firewall of a store, in two nftables tables of our own: nobody else's rules are read or touched.

The tables are loaded whole, in one transaction; after that machines come and go as elements of sets. What a rebuild
loads is what the elements added one by one would have come to: both are made of the same lines (`elements`).
"""

from __future__ import annotations

import os

from nagaya.errors import LaunchError, Unsupported
from nagaya.kernel.netlink import NFPROTO_BRIDGE, NFPROTO_INET, count_nft_rules
from nagaya.net import programs
from nagaya.net.networks import NetworkRecord, bridge_name
from nagaya.net.plan import WILDCARDS, LinkPlan, NetworkPlan, is_loopback
from nagaya.net.subnets import format_address, parse_address

Elements = list[tuple[str, str, str]]  # (family, set, element)

_INET = """table inet {table} {{
	set bridges {{ type ifname; }}
	set insides {{ type ifname . ifname; }}
	set closed {{ type ifname; }}
	set leaving4 {{ type ipv4_addr; flags interval; }}
	set leaving6 {{ type ipv6_addr; flags interval; }}
	set gateways4 {{ type ifname . ipv4_addr; }}
	set gateways6 {{ type ifname . ipv6_addr; }}
	set trusted4 {{ type ifname . ipv4_addr; }}
	set trusted6 {{ type ifname . ipv6_addr; }}
	map ports4 {{ type inet_proto . ipv4_addr . inet_service : ipv4_addr . inet_service; }}
	map ports6 {{ type inet_proto . ipv6_addr . inet_service : ipv6_addr . inet_service; }}
	map anyports4 {{ type inet_proto . inet_service : ipv4_addr . inet_service; }}
	map anyports6 {{ type inet_proto . inet_service : ipv6_addr . inet_service; }}
	chain prerouting {{
		type nat hook prerouting priority dstnat; policy accept;
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
		iifname . ip daddr @gateways4 meta l4proto {{ tcp, udp }} th dport 53 accept
		iifname . ip6 daddr @gateways6 meta l4proto {{ tcp, udp }} th dport 53 accept
		iifname . ip daddr @gateways4 icmp type echo-request accept
		iifname . ip6 daddr @gateways6 icmpv6 type echo-request accept
		iifname . ip saddr @trusted4 accept
		iifname . ip6 saddr @trusted6 accept
		reject with icmpx admin-prohibited
	}}
	chain postrouting {{
		type nat hook postrouting priority srcnat; policy accept;
		iifname . oifname @insides ct status dnat masquerade
		ip saddr @leaving4 oifname != @bridges masquerade
		ip6 saddr @leaving6 oifname != @bridges masquerade
	}}
}}
"""
# By every machine's own link: who it says it is. In the bridge's first hook, so also on the way to its neighbours.
# A neighbour advertisement's target (RFC 4861, 4.4) is 8 bytes into it; in the 1.0.6 of Debian 12 nft has no name for it.
_BRIDGE = """table bridge {table} {{
	set ports {{ type ifname; }}
	set macs {{ type ifname . ether_addr; }}
	set senders4 {{ type ifname . ether_addr . ipv4_addr; }}
	set senders6 {{ type ifname . ether_addr . ipv6_addr; }}
	set owned6 {{ typeof meta iifname . @th,64,128; }}
	chain prerouting {{
		type filter hook prerouting priority filter; policy accept;
		iifname != @ports accept
		iifname . ether saddr != @macs drop
		ether type ip iifname . ether saddr . ip saddr @senders4 accept
		ether type ip ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept
		ether type arp iifname . arp saddr ether . arp saddr ip @senders4 accept
		ether type arp iifname . arp saddr ether @macs arp saddr ip 0.0.0.0 arp operation request accept
		ether type ip6 icmpv6 type {{ nd-router-advert, nd-redirect }} drop
		ether type ip6 icmpv6 type nd-neighbor-advert iifname . @th,64,128 != @owned6 drop
		ether type ip6 iifname . ether saddr . ip6 saddr @senders6 accept
		ether type ip6 ip6 saddr :: icmpv6 type {{ nd-neighbor-solicit, mld-listener-report, mld2-listener-report }} accept
		drop
	}}
}}
"""


def table_name(root: str) -> str:
    """The store's tables, one of family inet and one of family bridge."""
    return bridge_name(root).replace("-", "_")


def rules_of(text: str) -> int:
    """How many rules a table's text has: the lines of its chains but for the first of each, which says its hook."""
    return sum(line.startswith("\t\t") and not line.startswith("\t\ttype ") for line in text.splitlines())


def is_whole(root: str) -> bool:
    """Whether both tables are there with all their rules: somebody may have flushed or deleted them. 0.2 ms."""
    table = table_name(root)
    return count_nft_rules(NFPROTO_INET, table) == rules_of(_INET) and count_nft_rules(
        NFPROTO_BRIDGE, table
    ) == rules_of(_BRIDGE)


def tables(root: str) -> str:
    """The text of both tables, without elements, in place of what there is."""
    table = table_name(root)
    return (
        f"add table inet {table}\ndelete table inet {table}\nadd table bridge {table}\ndelete table bridge {table}\n"
        + _INET.format(table=table)
        + _BRIDGE.format(table=table)
    )


# -- elements


def network_elements(root: str, record: NetworkRecord) -> Elements:
    """What the tables have of a network of the "bridge" driver."""
    bridge = bridge_name(root, record.name)
    found = [("inet", "bridges", f'"{bridge}"'), ("inet", "insides", f'"{bridge}" . "{bridge}"')]
    if record.internal:
        found.append(("inet", "closed", f'"{bridge}"'))
    for version, subnet, gateway in ((4, record.subnet, record.gateway), (6, record.subnet6, record.gateway6)):
        if subnet and not record.internal:
            found.append(("inet", f"leaving{version}", subnet))
        if gateway:
            found.append(("inet", f"gateways{version}", f'"{bridge}" . {gateway}'))
    return found


def machine_elements(plan: NetworkPlan) -> Elements:
    """What the tables have of a machine."""
    found: Elements = []
    for link in plan.links:
        if link.driver == "bridge":
            found += link_elements(link, trusted=plan.allow_host)
    return found + port_elements(plan)


def port_elements(plan: NetworkPlan) -> Elements:
    """Published ports, for what comes from outside; this host itself uses the sockets that hold them (net/ports.py).

    What comes to an IPv6 address of the host's goes to the machine's, and where it has none to the sockets as well.
    """
    target = port_target(plan)
    found: Elements = []
    if target is None:
        return found
    for port in plan.ports:
        version = 6 if ":" in port.host_address else 4
        inside = target.address6 if version == 6 else target.address
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
    if link.address:
        found.append(("bridge", "senders4", f"{port} . {link.mac} . {link.address}"))
        if trusted:
            found.append(("inet", "trusted4", f'"{link.bridge}" . {link.address}'))
    for address in (link.address6, local):
        if address:
            found.append(("bridge", "senders6", f"{port} . {link.mac} . {address}"))
            found.append(("bridge", "owned6", f"{port} . {parse_address(address, 6):#034x}"))
    if link.address6 and trusted:
        found.append(("inet", "trusted6", f'"{link.bridge}" . {link.address6}'))
    return found


def link_local(mac: str) -> str:
    """The address that a link gives itself (RFC 4291, appendix A)."""
    raw = bytes.fromhex(mac.replace(":", ""))
    identifier = bytes([raw[0] ^ 2]) + raw[1:3] + b"\xff\xfe" + raw[3:]
    return format_address(int.from_bytes(b"\xfe\x80" + bytes(6) + identifier, "big"), 6)


def additions(table: str, elements: Elements) -> str:
    """nft's commands for adding elements; those that are there already are fine. One for each set: it is what takes time."""
    by_set: dict[tuple[str, str], list[str]] = {}
    for family, name, element in elements:
        by_set.setdefault((family, name), []).append(element)
    return "".join(
        f"add element {family} {table} {name} {{ {', '.join(parts)} }}\n" for (family, name), parts in by_set.items()
    )


def removals(table: str, elements: Elements) -> str:
    """The same for taking them out; those that are not there any more are fine (nft 1.0.6 has no "destroy")."""
    return additions(table, elements) + additions(table, elements).replace("add element", "delete element")


# -- on the host


def add(root: str, elements: Elements) -> bool:
    """Add elements to tables that are whole; whether that went well."""
    return _load(additions(table_name(root), elements)).status == 0


def take_out(root: str, elements: Elements) -> bool:
    return _load(removals(table_name(root), elements)).status == 0


def rebuild(root: str, elements: Elements) -> None:
    """Load both tables anew with these elements, in one transaction. Raises `LaunchError`, `Unsupported`."""
    done = _load(tables(root) + additions(table_name(root), elements))
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
    if any(count_nft_rules(family, table) is not None for family in (NFPROTO_INET, NFPROTO_BRIDGE)):
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
