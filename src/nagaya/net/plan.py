"""A machine's network as data."""

from __future__ import annotations

from nagaya.static import NamedTuple


class NetworkPlan(NamedTuple):
    """How one machine is wired. For "none" and "host" the rest is empty.

    "user" is a plain user's network: nobody can reach the machine, and what it asks for the VMM asks in its place."""

    kind: str  # "none" | "host" | "bridge" | "user"
    bridge: str = ""  # host bridge, for example "nagaya0"
    host_link: str = ""  # host end of the veth pair, at most 15 characters
    address: str = ""  # "10.87.0.2"
    prefix: int = 0
    gateway: str = ""
    mac: str = ""
    mtu: int = 1500


# What QEMU's and others' user-mode networks (slirp) give to the one machine in each of them.
USER_ADDRESS = "10.0.2.15"
USER_PREFIX = 24
USER_GATEWAY = "10.0.2.2"
USER_NAMESERVER = "10.0.2.3"
