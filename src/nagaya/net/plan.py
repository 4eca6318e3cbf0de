"""A machine's network as data: what the manager has planned, the host prepares and the engine connects."""

from __future__ import annotations

from nagaya.model.spec import PortMapping
from nagaya.static import NamedTuple


class LinkPlan(NamedTuple):
    """One link of a machine, with the addresses of both families; an empty address = none of that family.

    "bridge": the other end is `host_link`, in `bridge`. "macvlan": a child of the host's link `bridge`. "user": a plain
    user's network: what the machine asks for its VMM, or a helper, asks in its place.
    """

    driver: str = "bridge"  # "bridge" | "macvlan" | "user"
    network: str = ""  # the network's name
    bridge: str = ""  # host bridge, for example "nagaya0"
    host_link: str = ""  # host end of the veth pair, or the tap device; at most 15 characters
    name: str = "eth0"  # inside the machine
    mac: str = ""
    mtu: int = 1500
    address: str = ""  # "10.87.0.2"
    prefix: int = 0
    gateway: str = ""  # "" = no default route
    address6: str = ""  # "fd12:3456:789a:1::2"
    prefix6: int = 0
    gateway6: str = ""
    rate_bits: int = 0  # bits per second in each direction; 0 = no limit
    names: tuple[str, ...] = ()  # that others on the network find it by
    dns: tuple[str, ...] = ()  # who is asked for all other names, in place of the host's servers
    sets_itself_up: bool = (
        False  # by DHCP and router advertisements: a system of its own is inside, and nothing of ours
    )


class NetworkPlan(NamedTuple):
    """How one machine is wired. "host": it shares the host's network; "links": these alone; "none": loopback alone."""

    kind: str  # "none" | "host" | "links"
    links: tuple[LinkPlan, ...] = ()
    nameservers: tuple[str, ...] = ()  # that answer for its networks; empty = the host's own
    search: tuple[str, ...] = ()  # domains, for /etc/resolv.conf
    hosts: tuple[tuple[str, str], ...] = ()  # (name, address) that /etc/hosts says beside the machine's own
    allow_host: bool = False  # it may reach what listens on this host
    ports: tuple[PortMapping, ...] = ()  # published ones, with the ports that the host chose
    rate_bits: int = 0  # bits per second in each direction; 0 = no limit
    warnings: tuple[str, ...] = ()  # what it has to do without
    forwards: tuple[PortMapping, ...] = ()  # what a user-mode network leads to the machine itself, and from where

    @property
    def address(self) -> str:
        """The machine's first address, for who wants one."""
        return next((link.address or link.address6 for link in self.links), "")

    @property
    def addresses(self) -> tuple[str, ...]:
        """All that the machine has, of both families."""
        return tuple(address for link in self.links for address in (link.address, link.address6) if address)

    @property
    def is_user(self) -> bool:
        """Whether it has a plain user's network."""
        return any(link.driver == "user" for link in self.links)


NONE = NetworkPlan("none")
WILDCARDS = ("0.0.0.0", "::")


def is_loopback(address: str) -> bool:
    """Whether a published port's address is one that only this host itself can come to; "" is both of its loopbacks."""
    return not address or address.startswith("127.") or address == "::1"


# What QEMU's and others' user-mode networks (slirp) give to the one machine in each of them.
USER_ADDRESS = "10.0.2.15"
USER_PREFIX = 24
USER_GATEWAY = "10.0.2.2"
USER_NAMESERVER = "10.0.2.3"
USER_ADDRESS6 = "fd6e:6167:6179:6100::15"  # where passt has IPv6 to offer
USER_PREFIX6 = 64
USER_GATEWAY6 = "fd6e:6167:6179:6100::2"
