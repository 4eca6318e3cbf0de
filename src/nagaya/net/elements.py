"""The sets and maps of our nftables tables: their types, and their elements as text for nft and as bytes for the kernel."""

from __future__ import annotations

import _socket
import sys

from nagaya.kernel.nftables import NFPROTO_BRIDGE, NFPROTO_INET, Element
from nagaya.static import NamedTuple

Elements = list[tuple[str, str, str]]  # (family, set, element in nft's words)

FAMILIES = {"inet": NFPROTO_INET, "bridge": NFPROTO_BRIDGE}
# Of Neighbour Discovery (RFC 4861, 4.3 and 4.4), for which nft has no names in the 1.0.6 of Debian 12: the target, and the MAC
# address of the option behind it. In a set of the first there may be sources as well (@nh,64,128), in one of the second what
# a router solicitation says (@th,80,48): only the lengths must be the same.
TARGET = "@th,64,128"
HARDWARE = "@th,208,48"

CLAIMED_S = 24 * 3600
MOST_CLAIMS = 65535  # of all machines


class Shape(NamedTuple):
    """The types of a key's fields, and of a map's data."""

    key: tuple[str, ...]
    data: tuple[str, ...] = ()
    timeout_s: int = 0  # not 0: rules put elements in, which go by themselves when they have not been used for so long


_LED4, _LED6 = ("ipv4_addr", "inet_service"), ("ipv6_addr", "inet_service")
SETS = {
    ("inet", "bridges"): Shape(("ifname",)),
    ("inet", "insides"): Shape(("ifname", "ifname")),
    ("inet", "closed"): Shape(("ifname",)),
    ("inet", "gateways4"): Shape(("ifname", "ipv4_addr")),
    ("inet", "gateways6"): Shape(("ifname", "ipv6_addr")),
    ("inet", "trusted4"): Shape(("ifname", "ipv4_addr")),
    ("inet", "trusted6"): Shape(("ifname", "ipv6_addr")),
    ("inet", "ports4"): Shape(("inet_proto", "ipv4_addr", "inet_service"), _LED4),
    ("inet", "ports6"): Shape(("inet_proto", "ipv6_addr", "inet_service"), _LED6),
    ("inet", "anyports4"): Shape(("inet_proto", "inet_service"), _LED4),
    ("inet", "anyports6"): Shape(("inet_proto", "inet_service"), _LED6),
    ("inet", "resolvers4"): Shape(("ifname", "ipv4_addr"), _LED4),
    ("inet", "resolvers6"): Shape(("ifname", "ipv6_addr"), _LED6),
    ("bridge", "ports"): Shape(("ifname",)),
    ("bridge", "macs"): Shape(("ifname", "ether_addr")),
    ("bridge", "senders4"): Shape(("ifname", "ether_addr", "ipv4_addr")),
    ("bridge", "senders6"): Shape(("ifname", "ether_addr", "ipv6_addr")),
    ("bridge", "owned6"): Shape(("ifname", TARGET)),
    ("bridge", "hardware6"): Shape(("ifname", HARDWARE)),
    ("bridge", "advised"): Shape(("ifname",)),
    ("bridge", "claimers"): Shape(("ifname",), ("mark",)),
    ("bridge", "reserved6"): Shape(("mark", TARGET)),
    ("bridge", "claims6"): Shape(("ifname", TARGET), timeout_s=CLAIMED_S),
    ("bridge", "claimed6"): Shape(("mark", TARGET), timeout_s=CLAIMED_S + 1),  # never free while it is somebody's
    ("bridge", "fresh6"): Shape(("mark", TARGET), timeout_s=3),
    ("bridge", "claimants"): Shape(("ifname",), timeout_s=CLAIMED_S),
}

# One in each set that means nothing, and whose being there says that nobody has flushed the set. No link has such a name
# (dev_valid_name()), no datagram that protocol, and what it would lead to is no address of anybody's.
_NOBODY = {
    "ifname": '"/"', "ipv4_addr": "0.0.0.0", "ipv6_addr": "::", "ether_addr": "00:00:00:00:00:00", "inet_proto": "255",
    "inet_service": "0", TARGET: "0x0", HARDWARE: "0x0", "mark": "0x0",
}  # fmt: skip
_PROTOCOLS = {"tcp": 6, "udp": 17}
_EXPRESSIONS = {"ifname": "meta iifname", "mark": "meta mark"}  # what nft takes these types from


def declare(family: str) -> str:
    """The lines that make a table's sets."""
    return "".join(f"\t{_declaration(name, shape)}\n" for (one, name), shape in SETS.items() if one == family)


def _declaration(name: str, shape: Shape) -> str:
    if shape.data:
        return f"map {name} {{ type {' . '.join(shape.key)} : {' . '.join(shape.data)}; }}"
    kind = f"type {' . '.join(shape.key)}"
    if any(field.startswith("@") for field in shape.key):
        kind = f"typeof {' . '.join(_EXPRESSIONS.get(field, field) for field in shape.key)}"
    if shape.timeout_s:
        kind += f"; size {MOST_CLAIMS}; flags dynamic,timeout; timeout {shape.timeout_s}s"
    return f"set {name} {{ {kind}; }}"


def marks() -> Elements:
    """The elements that mean nothing."""
    found = []
    for (family, name), shape in SETS.items():
        if shape.timeout_s:
            continue  # it would not stay
        key, data = (" . ".join(_NOBODY[field] for field in part) for part in (shape.key, shape.data))
        found.append((family, name, f"{key} : {data}" if data else key))
    return found


def additions(table: str, elements: Elements) -> str:
    """nft's commands for adding elements; those that are there already are fine. One for each set: it is what takes time."""
    by_set: dict[tuple[str, str], list[str]] = {}
    for family, name, element in elements:
        by_set.setdefault((family, name), []).append(element)
    return "".join(
        f"add element {family} {table} {name} {{ {', '.join(parts)} }}\n" for (family, name), parts in by_set.items()
    )


def encode(elements: Elements) -> list[Element]:
    """The same as the kernel has them."""
    found = []
    for family, name, element in elements:
        shape = SETS[family, name]
        key, _, data = element.partition(" : ")
        found.append(Element(FAMILIES[family], name, _encode(shape.key, key), _encode(shape.data, data)))
    return found


def _encode(types: tuple[str, ...], text: str) -> bytes:
    return b"".join(_field(type_, word) for type_, word in zip(types, text.split(" . "), strict=False))


def _field(type_: str, word: str) -> bytes:
    """One field, padded to registers of four bytes."""
    if type_ == "ifname":
        return word.strip('"').encode().ljust(16, b"\0")
    if type_ == "ether_addr":
        return bytes.fromhex(word.replace(":", "")) + bytes(2)
    if type_ == "ipv4_addr":
        return _socket.inet_pton(_socket.AF_INET, word)
    if type_ == "ipv6_addr":
        return _socket.inet_pton(_socket.AF_INET6, word)
    if type_ == "inet_proto":
        return bytes([_PROTOCOLS.get(word) or int(word), 0, 0, 0])
    if type_ == "inet_service":
        return int(word).to_bytes(2, "big") + bytes(2)
    if type_ == "mark":
        return int(word, 16).to_bytes(4, sys.byteorder)
    if type_ == HARDWARE:
        return int(word, 16).to_bytes(6, "big") + bytes(2)
    return int(word, 16).to_bytes(16, "big")
