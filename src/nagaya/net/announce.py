"""Telling a machine that has come from another host who its gateway is now: it still knows the other host's."""

from __future__ import annotations

import _socket

from nagaya.net.plan import NetworkPlan

_BROADCAST = b"\xff" * 6
_ETHERTYPE_ARP = 0x0806
_ETHERNET_IPV4 = b"\0\1\x08\0\6\4"  # RFC 826: hardware and protocol, and their addresses' lengths
_REQUEST = b"\0\1"


def announce_gateways(plan: NetworkPlan) -> None:
    """An ARP announcement (RFC 5227, 2.3) from each bridge that the machine is plugged into. Raises `OSError`.

    IPv6 neighbours look again by themselves, within seconds (RFC 4861, 7.3).
    """
    for link in plan.links:
        if link.driver == "bridge" and link.gateway:
            _announce(link.bridge, _socket.inet_aton(link.gateway))


def _announce(bridge: str, address: bytes) -> None:
    end = _socket.socket(_socket.AF_PACKET, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, 0)
    try:
        end.bind((bridge, _ETHERTYPE_ARP))
        mac = end.getsockname()[4]
        end.send(make_announcement(mac, address))
    finally:
        end.close()


def make_announcement(mac: bytes, address: bytes) -> bytes:
    """The frame: who has `address`? says who has it."""
    head = _BROADCAST + mac + _ETHERTYPE_ARP.to_bytes(2, "big")
    return head + _ETHERNET_IPV4 + _REQUEST + mac + address + bytes(6) + address
