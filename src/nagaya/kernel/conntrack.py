"""Connection tracking's entries by nfnetlink: those of UDP to certain ports, forgotten.

Where a connection's first datagram went, all later ones go, for as long as any come: an entry from before a port was led to
a machine leads past it, and one from after leads to an address that somebody else may have by now. linux/netfilter/
nfnetlink_conntrack.h has the layouts; the program `conntrack` is a package that few have.
"""

from __future__ import annotations

import _socket
import errno

from nagaya.kernel.netlink import AF_INET, AF_INET6, NETLINK_NETFILTER, Netlink, attribute, attributes
from nagaya.static import NamedTuple

NFNL_SUBSYS_CTNETLINK = 1
IPCTNL_MSG_CT_GET = NFNL_SUBSYS_CTNETLINK << 8 | 1
IPCTNL_MSG_CT_DELETE = NFNL_SUBSYS_CTNETLINK << 8 | 2

CTA_TUPLE_ORIG = 1
CTA_TUPLE_REPLY = 2
CTA_ID = 12
CTA_FILTER = 25
CTA_TUPLE_IP = 1
CTA_TUPLE_PROTO = 2
CTA_IP_V4_SRC, CTA_IP_V4_DST = 1, 2
CTA_IP_V6_SRC, CTA_IP_V6_DST = 3, 4
CTA_PROTO_NUM = 1
CTA_PROTO_DST_PORT = 3
CTA_FILTER_ORIG_FLAGS = 1
CTA_FILTER_REPLY_FLAGS = 2
_FILTER_PROTO_NUM = 1 << 3  # CTA_FILTER_F_CTA_PROTO_NUM: net/netfilter/nf_conntrack_netlink.c
_FILTER_PROTO_DST_PORT = 1 << 5
IPPROTO_UDP = 17
NLA_F_NESTED = 0x8000
_MISSING = (errno.EPROTONOSUPPORT, errno.EINVAL, errno.EOPNOTSUPP)
_GENERAL = 4  # bytes of struct nfgenmsg


class Flow(NamedTuple):
    """A UDP flow: where its first datagram was sent to, and who answers, which differs where it was led on."""

    family: int
    target: str
    port: int
    answers: str
    tuple: bytes  # of the kernel's: it is deleted by this
    id: bytes


def list_udp_flows(port: int) -> list[Flow]:
    """Those that were sent to a port, of both families. None where the kernel has no ctnetlink."""
    found: list[Flow] = []
    try:
        with Netlink(NETLINK_NETFILTER) as netlink:
            for family in (AF_INET, AF_INET6):
                for data in netlink.dump(IPCTNL_MSG_CT_GET, _question(family, port), "list connections"):
                    flow = _read(family, attributes(data, _GENERAL))
                    if flow is not None and flow.port == port:  # before Linux 5.8 there is no filter
                        found.append(flow)
    except OSError as error:
        if error.errno not in _MISSING:
            raise
    return found


def forget(flows: list[Flow]) -> None:
    """Delete them; those that are gone by now are fine."""
    with Netlink(NETLINK_NETFILTER) as netlink:
        for flow in flows:
            body = _general(flow.family) + _nested(CTA_TUPLE_ORIG, flow.tuple) + attribute(CTA_ID, flow.id)
            try:
                netlink.request(IPCTNL_MSG_CT_DELETE, 0, body, "forget a connection")
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise


def _question(family: int, port: int) -> bytes:
    proto = attribute(CTA_PROTO_NUM, bytes([IPPROTO_UDP])) + attribute(CTA_PROTO_DST_PORT, port.to_bytes(2, "big"))
    flags = _FILTER_PROTO_NUM | _FILTER_PROTO_DST_PORT
    wanted = attribute(CTA_FILTER_ORIG_FLAGS, flags.to_bytes(4, "little")) + attribute(CTA_FILTER_REPLY_FLAGS, bytes(4))
    return _general(family) + _nested(CTA_TUPLE_ORIG, _nested(CTA_TUPLE_PROTO, proto)) + _nested(CTA_FILTER, wanted)


def _read(family: int, parts: dict[int, bytes]) -> Flow | None:
    original, reply = parts.get(CTA_TUPLE_ORIG, b""), parts.get(CTA_TUPLE_REPLY, b"")
    tuple_ = attributes(original, 0)
    proto = attributes(tuple_.get(CTA_TUPLE_PROTO, b""), 0)
    if proto.get(CTA_PROTO_NUM) != bytes([IPPROTO_UDP]):
        return None
    source, target = (CTA_IP_V4_SRC, CTA_IP_V4_DST) if family == AF_INET else (CTA_IP_V6_SRC, CTA_IP_V6_DST)
    ip = attributes(tuple_.get(CTA_TUPLE_IP, b""), 0)
    answer = attributes(attributes(reply, 0).get(CTA_TUPLE_IP, b""), 0)
    if target not in ip or source not in answer:
        return None
    return Flow(
        family, _socket.inet_ntop(family, ip[target]), int.from_bytes(proto.get(CTA_PROTO_DST_PORT, b""), "big"),
        _socket.inet_ntop(family, answer[source]), original, parts.get(CTA_ID, b""),
    )  # fmt: skip


def _general(family: int) -> bytes:
    return bytes([family, 0, 0, 0])


def _nested(kind: int, value: bytes) -> bytes:
    return attribute(kind | NLA_F_NESTED, value)
