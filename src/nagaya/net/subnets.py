"""IPv4 and IPv6 subnets as numbers. Not `ipaddress`: importing it takes 3 ms of a 50 ms `run`."""

from __future__ import annotations

import _socket
import os

from nagaya.static import NamedTuple

FAMILIES = {4: _socket.AF_INET, 6: _socket.AF_INET6}


class Subnet(NamedTuple):
    """`base` is the first address as a number; `version` is 4 or 6."""

    version: int
    base: int
    prefix: int

    @property
    def bits(self) -> int:
        return 32 if self.version == 4 else 128

    @property
    def size(self) -> int:
        """How many addresses there are."""
        return 1 << (self.bits - self.prefix)

    @property
    def text(self) -> str:
        return f"{format_address(self.base, self.version)}/{self.prefix}"

    def address(self, number: int) -> str:
        return format_address(self.base + number, self.version)

    def holds(self, address: str) -> bool:
        """Whether the address is in it. Raises `ValueError` for what is none of its version."""
        return 0 <= parse_address(address, self.version) - self.base < self.size

    def overlaps(self, other: Subnet) -> bool:
        if self.version != other.version:
            return False
        return self.base < other.base + other.size and other.base < self.base + self.size


def parse_address(text: str, version: int = 0) -> int:
    """An address as a number; `version` 4 or 6, 0 = by its looks. Raises `ValueError`."""
    try:
        return int.from_bytes(_socket.inet_pton(FAMILIES[version or (6 if ":" in text else 4)], text), "big")
    except (OSError, UnicodeError):
        raise ValueError(f"'{text}' is not an IP{f'v{version}' if version else ''} address") from None


def format_address(number: int, version: int) -> str:
    return _socket.inet_ntop(FAMILIES[version], number.to_bytes(4 if version == 4 else 16, "big"))


def parse_subnet(text: str) -> Subnet:
    """ "10.87.0.0/16" or "fd00::/64". Raises `ValueError` also when there is something behind the prefix."""
    address, slash, length = text.partition("/")
    version = 6 if ":" in address else 4
    number = parse_address(address, version)
    bits = 32 if version == 4 else 128
    if not slash or not (length.isascii() and length.isdigit() and 1 <= int(length) <= bits):
        raise ValueError(f"'{text}' is not a subnet")
    subnet = Subnet(version, number, int(length))
    if number % subnet.size:
        raise ValueError(f"'{text}' is not a subnet's first address")
    return subnet


def from_route(network: bytes, prefix: int) -> Subnet:
    return Subnet(4 if len(network) == 4 else 6, int.from_bytes(network, "big"), prefix)


def choose(candidates: list[Subnet], taken: list[Subnet]) -> Subnet | None:
    """The first candidate that touches nothing of `taken`. What covers all of 10/8 and the like takes nothing: it is a
    company's way to all its networks, and a longer prefix wins over it.
    """
    near = [subnet for subnet in taken if subnet.prefix > 8]
    return next((subnet for subnet in candidates if not any(subnet.overlaps(other) for other in near)), None)


def default_candidates() -> list[Subnet]:
    """For the default network: 10.87.0.0/16 to 10.127.0.0/16."""
    return [Subnet(4, 10 << 24 | second << 16, 16) for second in range(87, 128)]


def further_candidates() -> list[Subnet]:
    """For networks that users make: 10.64.0.0/24 to 10.86.255.0/24."""
    return [Subnet(4, 10 << 24 | number << 8, 24) for number in range(64 << 8, 87 << 8)]


def random_subnet6() -> Subnet:
    """A /64 of a unique local prefix of one's own (RFC 4193, 3.2: 40 random bits behind fd)."""
    prefix = b"\xfd" + os.urandom(7)
    return Subnet(6, int.from_bytes(prefix + bytes(8), "big"), 64)
