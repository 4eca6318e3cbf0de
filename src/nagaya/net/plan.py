"""A machine's network as data."""

from __future__ import annotations

from nagaya.static import NamedTuple


class NetworkPlan(NamedTuple):
    """How one machine is wired. For "none" and "host" the rest is empty."""

    kind: str  # "none" | "host" | "bridge"
    bridge: str = ""  # host bridge, for example "nagaya0"
    host_link: str = ""  # host end of the veth pair, at most 15 characters
    address: str = ""  # "10.87.0.2"
    prefix: int = 0
    gateway: str = ""
    mac: str = ""
    mtu: int = 1500
