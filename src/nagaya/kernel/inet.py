"""TCP and UDP sockets as plain descriptors (ip(7), ipv6(7), tcp(7), udp(7)); IPv4 or IPv6 as the address is written.

Uses `_socket` for the reason that `unix` gives. All descriptors are close-on-exec and do not block.
"""

from __future__ import annotations

import _socket
import os
import struct

TCP, UDP = "tcp", "udp"
BACKLOG = 1024
SYN_RETRIES = 3  # a machine that does not answer is given up after 1 + 2 + 4 + 8 s instead of two minutes
_LINGER_NOT = struct.pack("ii", 1, 0)
IPV6_RECVPKTINFO, IPV6_PKTINFO, IP_PKTINFO = 49, 50, 8


def family_of(address: str) -> int:
    return _socket.AF_INET6 if ":" in address else _socket.AF_INET


def _open(address: str, kind: int) -> _socket.socket:
    made = _socket.socket(family_of(address), kind | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK, 0)
    if made.family == _socket.AF_INET6:
        made.setsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY, 1)  # "::" is not to take the port from IPv4 as well
    return made


def listen_tcp(address: str, port: int) -> int:
    """A listening socket; `port` 0 = one that is free. Raises `OSError`: EADDRINUSE, EADDRNOTAVAIL, EACCES."""
    made = _open(address, _socket.SOCK_STREAM)
    try:
        # Connections of an earlier listener that have just ended (TIME_WAIT) do not matter. Two listeners stay impossible.
        made.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        made.bind((address, port))
        made.listen(BACKLOG)
    except BaseException:
        made.close()
        raise
    return made.detach()


def bind_udp(address: str, port: int) -> int:
    """A bound socket, which tells for each datagram to which of our addresses it came. Raises as `listen_tcp` does."""
    made = _open(address, _socket.SOCK_DGRAM)
    try:
        made.bind((address, port))
        if made.family == _socket.AF_INET6:
            made.setsockopt(_socket.IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)
        else:
            made.setsockopt(_socket.IPPROTO_IP, IP_PKTINFO, 1)
    except BaseException:
        made.close()
        raise
    return made.detach()


def connect_tcp(address: str, port: int) -> int:
    """A socket whose connection is on its way: it is writable when there is one, or an error. Raises `OSError`."""
    made = _open(address, _socket.SOCK_STREAM)
    try:
        made.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_SYNCNT, SYN_RETRIES)
        try:
            made.connect((address, port))
        except BlockingIOError:
            pass
    except BaseException:
        made.close()
        raise
    return made.detach()


def connect_udp(address: str, port: int) -> _socket.socket:
    """A socket that exchanges datagrams with one peer only. Raises `OSError`."""
    made = _open(address, _socket.SOCK_DGRAM)
    try:
        made.connect((address, port))
    except BaseException:
        made.close()
        raise
    return made


def local_port(fd: int) -> int:
    """The port that a socket is bound to."""
    wrapped = _socket.socket(fileno=fd)
    try:
        port: int = wrapped.getsockname()[1]
        return port
    finally:
        wrapped.detach()


def tune(fd: int) -> None:
    """A relay holds nothing back for larger packets, and hears of peers that have vanished."""
    wrapped = _socket.socket(fileno=fd)
    try:
        wrapped.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
        wrapped.setsockopt(_socket.SOL_SOCKET, _socket.SO_KEEPALIVE, 1)
    finally:
        wrapped.detach()


def take_error(fd: int) -> int:
    """The error that waits at a socket (0 = none); taking it clears it."""
    wrapped = _socket.socket(fileno=fd)
    try:
        error: int = wrapped.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR)
        return error
    finally:
        wrapped.detach()


def end_writing(fd: int) -> None:
    """Send FIN. Raises `OSError` when the peer is gone."""
    wrapped = _socket.socket(fileno=fd)
    try:
        wrapped.shutdown(_socket.SHUT_WR)
    finally:
        wrapped.detach()


def reset(fd: int) -> None:
    """Close a connection so that the peer sees that it broke off (RST), not that it ended."""
    wrapped = _socket.socket(fileno=fd)
    try:
        wrapped.setsockopt(_socket.SOL_SOCKET, _socket.SO_LINGER, _LINGER_NOT)
    except OSError:
        pass
    finally:
        wrapped.detach()
        os.close(fd)
