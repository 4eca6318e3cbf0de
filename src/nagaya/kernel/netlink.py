"""netlink(7) and rtnetlink(7), as messages of our own.

pyroute2 does all this and more, and takes 166 ms to import: a start has 40.
"""

from __future__ import annotations

import _socket
import errno
import os
from collections.abc import Iterator
from struct import Struct

from nagaya.static import NamedTuple, Self

AF_INET = 2
AF_INET6 = 10
NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP = 0x300
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLMSG_ERROR = 2
NLMSG_DONE = 3
NETLINK_EXT_ACK = 11
NETLINK_CAP_ACK = 10
SOL_NETLINK = 270
NLMSGERR_ATTR_MSG = 1

RTM_NEWLINK = 16
RTM_DELLINK = 17
RTM_GETLINK = 18
RTM_NEWADDR = 20
RTM_GETADDR = 22
RTM_NEWROUTE = 24
RTM_GETROUTE = 26
RTM_GETNEIGH = 30
RTN_UNICAST = 1
RT_TABLE_MAIN = 254
RTPROT_BOOT = 3
RTPROT_RA = 9
IFF_UP = 1

IFLA_ADDRESS = 1
IFLA_IFNAME = 3
IFLA_MTU = 4
IFLA_MASTER = 10
IFLA_LINKINFO = 18
IFLA_NET_NS_PID = 19
IFLA_STATS64 = 23
IFLA_INFO_KIND = 1
IFLA_INFO_DATA = 2
VETH_INFO_PEER = 1
IFLA_LINK = 5
IFLA_MACVLAN_MODE = 1
MACVLAN_MODE_BRIDGE = 4
IFA_ADDRESS = 1
IFA_LOCAL = 2
IFA_BROADCAST = 4
IFA_F_NODAD = 0x02
NDA_DST = 1
NDA_LLADDR = 2
NUD_VALID = 0xDE  # permanent, noarp, reachable, probe, stale, delay
RTA_DST = 1
RTA_OIF = 4
RTA_GATEWAY = 5

_HEADER = Struct("=IHHII")
_IFINFO = Struct("=BxHiII")
_IFADDR = Struct("=BBBBi")
_NDMSG = Struct("=BxxxiHBB")
_RTMSG = Struct("=BBBBBBBBI")
_ATTR = Struct("=HH")
_ERROR = Struct("=i")
_STATS = Struct("=QQQQ")  # struct rtnl_link_stats64 begins so: packets received and sent, bytes received and sent


class Route(NamedTuple):
    """A unicast route: where to, as a network's first address and its prefix, and the index of the link (0: several)."""

    network: bytes  # 4 or 16 bytes; all zero with prefix 0 for a default route
    prefix: int
    link: int
    protocol: int


class Link(NamedTuple):
    """A network interface. `kind` is "bridge", "veth", "tun" and so on; "" for a real one. `master`: an index, or 0."""

    number: int  # its index
    name: str
    kind: str
    mac: str
    master: int
    mtu: int
    is_up: bool
    received_bytes: int
    sent_bytes: int


def attribute(kind: int, value: bytes) -> bytes:
    """struct nlattr with its value, padded to four bytes."""
    length = _ATTR.size + len(value)
    return _ATTR.pack(length, kind) + value + bytes(-length % 4)


def message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """struct nlmsghdr with what follows it. Ours are all multiples of four bytes long."""
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, 0) + body


def read_header(data: bytes) -> tuple[int, int, int]:
    """(length, kind, sequence number) of a message."""
    length, kind, _, sequence, _ = _HEADER.unpack_from(data)
    return length, kind, sequence


def read_error(data: bytes) -> int:
    """The error number in a message of kind NLMSG_ERROR; 0 = none, it is an acknowledgement."""
    code: int = -_ERROR.unpack_from(data, _HEADER.size)[0]
    return code


def number(value: int) -> bytes:
    return value.to_bytes(4, "little")


def text(value: str) -> bytes:
    return value.encode() + b"\0"


def index_of(name: str) -> int:
    """An interface's index in our network namespace. Raises `OSError` when there is none of that name."""
    return _socket.if_nametoindex(name)


class Netlink:
    """One netlink socket. Every request waits for the kernel's acknowledgement."""

    def __init__(self, protocol: int = NETLINK_ROUTE) -> None:
        self._socket = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, protocol)
        try:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        except OSError:
            pass  # before Linux 4.12: errors come without their text
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def request(self, kind: int, flags: int, body: bytes, what: str) -> None:
        """Send one message. Raises `OSError` with the kernel's own words where it has some."""
        self._sequence += 1
        self._socket.send(message(kind, NLM_F_REQUEST | NLM_F_ACK | flags, self._sequence, body))
        while True:
            data = self._socket.recv(65536)
            length, kind_, sequence = read_header(data)
            if sequence == self._sequence and kind_ == NLMSG_ERROR:
                code = read_error(data)
                if code:
                    raise OSError(code, f"{what}: {_extended_text(data[:length]) or os.strerror(code)}")
                return

    def dump(self, kind: int, body: bytes, what: str) -> Iterator[bytes]:
        """What the kernel lists for one request: the payload of each message, without its header."""
        self._sequence += 1
        self._socket.send(message(kind, NLM_F_REQUEST | NLM_F_DUMP, self._sequence, body))
        while True:
            data = self._socket.recv(1 << 18)
            at = 0
            while at + _HEADER.size <= len(data):
                length, kind_, _, sequence, _ = _HEADER.unpack_from(data, at)
                if length < _HEADER.size:
                    raise OSError(errno.EPROTO, f"{what}: the kernel's answer is malformed")
                if sequence == self._sequence:
                    if kind_ == NLMSG_DONE:
                        return
                    if kind_ == NLMSG_ERROR:
                        code = -_ERROR.unpack_from(data, at + _HEADER.size)[0]
                        raise OSError(code, f"{what}: {os.strerror(code)}")
                    yield data[at + _HEADER.size : at + length]
                at += length + -length % 4

    # -- links

    def links(self) -> list[Link]:
        """All interfaces of our network namespace. (/sys may show another's.)"""
        return [_read_link(data) for data in self.dump(RTM_GETLINK, _IFINFO.pack(0, 0, 0, 0, 0), "list links")]

    def find_link(self, name: str) -> Link | None:
        """One interface, by its name."""
        self._sequence += 1
        body = _IFINFO.pack(0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, text(name))
        self._socket.send(message(RTM_GETLINK, NLM_F_REQUEST, self._sequence, body))
        while True:
            data = self._socket.recv(65536)
            length, kind, sequence = read_header(data)
            if sequence != self._sequence:
                continue
            if kind != NLMSG_ERROR:
                return _read_link(data[_HEADER.size : length])
            code = read_error(data)
            if code in (errno.ENODEV, errno.ERANGE):  # the second: no interface may have so long a name
                return None
            raise OSError(code, f"look at link {name}: {os.strerror(code)}")

    def add_bridge(self, name: str, mac: str = "", mtu: int = 0) -> bool:
        """Make a bridge; False when there is an interface of that name already.

        Without a MAC of its own a bridge takes the least one of its ports', and changes it as they come and go.
        """
        info = attribute(IFLA_LINKINFO, attribute(IFLA_INFO_KIND, b"bridge"))
        body = _IFINFO.pack(0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, text(name)) + info
        if mac:
            body += attribute(IFLA_ADDRESS, bytes.fromhex(mac.replace(":", "")))
        if mtu:
            body += attribute(IFLA_MTU, number(mtu))
        try:
            self.request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"make bridge {name}")
        except FileExistsError:
            return False
        return True

    def add_veth(self, name: str, *, master: int, mtu: int, peer: str, peer_mac: str, peer_pid: int) -> None:
        """A pair: `name` here, up and in bridge `master`; `peer` in the network namespace of process `peer_pid`."""
        mac = bytes.fromhex(peer_mac.replace(":", ""))
        inside = (
            _IFINFO.pack(0, 0, 0, 0, 0)
            + attribute(IFLA_IFNAME, text(peer))
            + attribute(IFLA_ADDRESS, mac)
            + attribute(IFLA_MTU, number(mtu))
            + attribute(IFLA_NET_NS_PID, number(peer_pid))
        )
        data = attribute(IFLA_INFO_DATA, attribute(VETH_INFO_PEER, inside))
        body = (
            _IFINFO.pack(0, 0, 0, IFF_UP, IFF_UP)
            + attribute(IFLA_IFNAME, text(name))
            + attribute(IFLA_MTU, number(mtu))
            + attribute(IFLA_MASTER, number(master))
            + attribute(IFLA_LINKINFO, attribute(IFLA_INFO_KIND, b"veth") + data)
        )
        self.request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"make link {name}")

    def add_macvlan(
        self, name: str, *, parent: int, mac: str, mtu: int, kind: str = "macvlan", peer_pid: int = 0
    ) -> None:
        """A link with a MAC address of its own on `parent`, in the network namespace of `peer_pid` (0 = here, and up).

        Those on one parent hear each other, but not the parent itself. `kind` "macvtap": frames go to /dev/tapINDEX.
        """
        info = attribute(IFLA_INFO_KIND, kind.encode()) + attribute(
            IFLA_INFO_DATA, attribute(IFLA_MACVLAN_MODE, number(MACVLAN_MODE_BRIDGE))
        )
        flags = 0 if peer_pid else IFF_UP
        body = (
            _IFINFO.pack(0, 0, 0, flags, flags)
            + attribute(IFLA_IFNAME, text(name))
            + attribute(IFLA_LINK, number(parent))
            + attribute(IFLA_ADDRESS, bytes.fromhex(mac.replace(":", "")))
            + attribute(IFLA_MTU, number(mtu))
            + (attribute(IFLA_NET_NS_PID, number(peer_pid)) if peer_pid else b"")
            + attribute(IFLA_LINKINFO, info)
        )
        self.request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"make link {name}")

    def release(self, index: int) -> None:
        """Take a link out of its bridge, and down."""
        body = _IFINFO.pack(0, 0, index, 0, IFF_UP) + attribute(IFLA_MASTER, number(0))
        self.request(RTM_NEWLINK, 0, body, "take a link out of its bridge")

    def set_up(self, index: int) -> None:
        self.request(RTM_NEWLINK, 0, _IFINFO.pack(0, 0, index, IFF_UP, IFF_UP), "bring a link up")

    def enslave(self, index: int, *, master: int, mtu: int) -> None:
        """Put a link into bridge `master` and bring it up, its packets of at most `mtu` bytes."""
        body = (
            _IFINFO.pack(0, 0, index, IFF_UP, IFF_UP)
            + attribute(IFLA_MTU, number(mtu))
            + attribute(IFLA_MASTER, number(master))
        )
        self.request(RTM_NEWLINK, 0, body, "put a link into a bridge")

    def delete_link(self, name: str) -> bool:
        """Delete an interface (of a veth pair both ends); False when there is none."""
        try:
            self.request(
                RTM_DELLINK, 0, _IFINFO.pack(0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, text(name)), f"delete link {name}"
            )
        except OSError as error:
            if error.errno == errno.ENODEV:
                return False
            raise
        return True

    # -- addresses and routes

    def add_address(self, index: int, address: str, prefix: int) -> None:
        """Give an interface an IPv4 address; one that it has already is fine."""
        raw = _socket.inet_aton(address)
        broadcast = (int.from_bytes(raw, "big") | ((1 << (32 - prefix)) - 1)).to_bytes(4, "big")
        body = (
            _IFADDR.pack(AF_INET, prefix, 0, 0, index)
            + attribute(IFA_LOCAL, raw)
            + attribute(IFA_ADDRESS, raw)
            + attribute(IFA_BROADCAST, broadcast)
        )
        try:
            self.request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, body, f"add address {address}")
        except FileExistsError:
            return

    def add_address6(self, index: int, address: str, prefix: int) -> None:
        """Give an interface an IPv6 address, at once (no duplicate address detection); one that it has is fine."""
        raw = _socket.inet_pton(AF_INET6, address)
        body = _IFADDR.pack(AF_INET6, prefix, IFA_F_NODAD, 0, index) + attribute(IFA_ADDRESS, raw)
        try:
            self.request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, body, f"add address {address}")
        except FileExistsError:
            return

    def addresses(self, index: int = 0) -> set[str]:
        """An interface's addresses, of both families; 0 = of all interfaces."""
        found = set()
        for data in self.dump(RTM_GETADDR, _IFADDR.pack(0, 0, 0, 0, 0), "list addresses"):
            family, _, _, _, link = _IFADDR.unpack_from(data)
            raw = attributes(data, _IFADDR.size).get(IFA_ADDRESS)
            if index in (0, link) and raw is not None:
                found.add(_socket.inet_ntop(family, raw))
        return found

    def routes(self, family: int) -> list[Route]:
        """The unicast routes of all tables, of AF_INET or AF_INET6."""
        found = []
        for data in self.dump(RTM_GETROUTE, _RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0), "list routes"):
            family_, prefix, _, _, _, protocol, _, kind, _ = _RTMSG.unpack_from(data)
            if family_ != family or kind != RTN_UNICAST:
                continue
            parts = attributes(data, _RTMSG.size)
            link = int.from_bytes(parts.get(RTA_OIF, b""), "little")
            network = parts.get(RTA_DST, bytes(4 if family == AF_INET else 16))
            found.append(Route(network, prefix, link, protocol))
        return found

    def neighbours6(self, index: int) -> list[tuple[bytes, str]]:
        """(IPv6 address, MAC address) of those that are, or were lately, known by a link."""
        found = []
        for data in self.dump(RTM_GETNEIGH, _NDMSG.pack(AF_INET6, 0, 0, 0, 0), "list neighbours"):
            _, link, state, _, _ = _NDMSG.unpack_from(data)
            parts = attributes(data, _NDMSG.size)
            address, mac = parts.get(NDA_DST, b""), parts.get(NDA_LLADDR, b"")
            if link == index and state & NUD_VALID and len(address) == 16 and len(mac) == 6:
                found.append((address, _mac(mac)))
        return found

    def add_default_route(self, gateway: str) -> None:
        """By an IPv4 or IPv6 gateway. Raises `OSError` when there is one of that family already."""
        family = AF_INET6 if ":" in gateway else AF_INET
        # family, dst_len, src_len, tos, table main, protocol boot, scope universe, type unicast, flags
        body = _RTMSG.pack(family, 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, 0, RTN_UNICAST, 0)
        body += attribute(RTA_GATEWAY, _socket.inet_pton(family, gateway))
        self.request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, body, f"add default route by {gateway}")


def attributes(data: bytes, at: int) -> dict[int, bytes]:
    """The attributes that follow a message's fixed part, by number (the flags of nested ones left out)."""
    found = {}
    while at + _ATTR.size <= len(data):
        length, kind = _ATTR.unpack_from(data, at)
        if length < _ATTR.size:
            break
        found[kind & 0x3FFF] = data[at + _ATTR.size : at + length]
        at += length + -length % 4
    return found


def _mac(raw: bytes) -> str:
    return ":".join(f"{byte:02x}" for byte in raw)


def _read_link(data: bytes) -> Link:
    _, _, index, flags, _ = _IFINFO.unpack_from(data)
    parts = attributes(data, _IFINFO.size)
    info = attributes(parts.get(IFLA_LINKINFO, b""), 0)
    stats = parts.get(IFLA_STATS64, b"")
    _, _, received, sent = _STATS.unpack_from(stats) if len(stats) >= _STATS.size else (0, 0, -1, -1)
    return Link(
        number=index,
        name=parts.get(IFLA_IFNAME, b"").rstrip(b"\0").decode("utf-8", "replace"),
        kind=info.get(IFLA_INFO_KIND, b"").rstrip(b"\0").decode(errors="replace"),
        mac=_mac(parts.get(IFLA_ADDRESS, b"")),
        master=int.from_bytes(parts.get(IFLA_MASTER, b""), "little"),
        mtu=int.from_bytes(parts.get(IFLA_MTU, b""), "little"),
        is_up=bool(flags & IFF_UP),
        received_bytes=received,
        sent_bytes=sent,
    )


def _extended_text(message: bytes) -> str:
    """The kernel's explanation in an extended acknowledgement (with NETLINK_CAP_ACK right behind the header)."""
    at = _HEADER.size + _ERROR.size + _HEADER.size
    while at + _ATTR.size <= len(message):
        length, kind = _ATTR.unpack_from(message, at)
        if length < _ATTR.size:
            break
        if kind == NLMSGERR_ATTR_MSG:
            return message[at + _ATTR.size : at + length].rstrip(b"\0").decode("utf-8", "replace")
        at += length + -length % 4
    return ""
