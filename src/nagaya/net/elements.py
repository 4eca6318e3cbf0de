"""The sets and maps of our nftables tables: their types, and their elements as text for nft and as bytes for the kernel."""

from __future__ import annotations

import _socket

from nagaya.kernel.nftables import NFPROTO_BRIDGE, NFPROTO_INET, Element
from nagaya.static import NamedTuple

Elements = list[tuple[str, str, str]]  # (family, set, element in nft's words)

FAMILIES = {"inet": NFPROTO_INET, "bridge": NFPROTO_BRIDGE}
TARGET = "@th,64,128"  # of a neighbour advertisement (RFC 4861, 4.4): in the 1.0.6 of Debian 12 nft has no name for it


class Shape(NamedTuple):
    """The types of a key's fields, and of a map's data."""

    key: tuple[str, ...]
    data: tuple[str, ...] = ()


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
    ("bridge", "advised"): Shape(("ifname",)),
}

# One in each set that means nothing, and whose being there says that nobody has flushed the set. No link has such a name
# (dev_valid_name()), no datagram that protocol, and what it would lead to is no address of anybody's.
_NOBODY = {
    "ifname": '"/"', "ipv4_addr": "0.0.0.0", "ipv6_addr": "::", "ether_addr": "00:00:00:00:00:00", "inet_proto": "255",
    "inet_service": "0", TARGET: "0x0",
}  # fmt: skip
_PROTOCOLS = {"tcp": 6, "udp": 17}


def declare(family: str) -> str:
    """The lines that make a table's sets."""
    return "".join(f"\t{_declaration(name, shape)}\n" for (one, name), shape in SETS.items() if one == family)


def _declaration(name: str, shape: Shape) -> str:
    if shape.data:
        return f"map {name} {{ type {' . '.join(shape.key)} : {' . '.join(shape.data)}; }}"
    if TARGET in shape.key:
        return f"set {name} {{ typeof meta iifname . {TARGET}; }}"
    return f"set {name} {{ type {' . '.join(shape.key)}; }}"


def marks() -> Elements:
    """The elements that mean nothing."""
    found = []
    for (family, name), shape in SETS.items():
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
    return int(word, 16).to_bytes(16, "big")
