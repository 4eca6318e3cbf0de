"""Relaying datagrams between a published UDP port and the machine: for each client a socket of its own to the machine,
so that an answer finds its way back. A client that is silent for a minute is forgotten; of too many the most silent one.
"""

from __future__ import annotations

import _socket
import time
from collections import OrderedDict

from nagaya.kernel import inet
from nagaya.supervisor.loop import Loop

MOST_CLIENTS = 1000
SILENT_S = 60.0
SWEEP_S = 5.0
BURST = 32
DATAGRAM_BYTES = 65535
_CONTROL_BYTES = _socket.CMSG_SPACE(64)

Ancillary = list[tuple[int, int, bytes]]


class _Peer:
    """One client of one port: its address, and the address of ours that it knows."""

    __slots__ = ("answer_from", "client", "heard_s", "port", "socket")

    def __init__(self, port: _Port, client: object, answer_from: Ancillary, socket: _socket.socket) -> None:
        self.port = port
        self.client = client
        self.answer_from = answer_from
        self.socket = socket
        self.heard_s = 0.0


class _Port:
    __slots__ = ("address", "number", "socket")

    def __init__(self, socket: _socket.socket, address: str, number: int) -> None:
        self.socket = socket
        self.address = address
        self.number = number


def _answer_from(ancillary: Ancillary) -> Ancillary:
    """What to send along with an answer, so that it comes from the address that was asked.

    struct in_pktinfo has the interface (which is to be left open), the local address, the destination of the header;
    struct in6_pktinfo the address and the interface, which a link-local address needs.
    """
    for level, kind, data in ancillary:
        if level == _socket.IPPROTO_IP and kind == inet.IP_PKTINFO and len(data) >= 12:
            return [(level, kind, bytes(4) + data[4:8] + bytes(4))]
        if level == _socket.IPPROTO_IPV6 and kind == inet.IPV6_PKTINFO and len(data) >= 20:
            return [(level, kind, data[:20] if data[:2] == b"\xfe\x80" else data[:16] + bytes(4))]
    return []


class UdpRelay:
    """All UDP ports of one machine."""

    def __init__(self, loop: Loop, *, most: int = MOST_CLIENTS, silent_s: float = SILENT_S) -> None:
        self._loop = loop
        self._most = most
        self._silent_s = silent_s
        self._ports: list[_Port] = []
        self._peers: OrderedDict[tuple[int, object, bytes], _Peer] = OrderedDict()  # the most silent one first
        self._buffer = bytearray(DATAGRAM_BYTES)
        self._view = memoryview(self._buffer)
        self._sweeping = False

    def add(self, fd: int, address: str, number: int) -> None:
        """Relay what comes to the bound socket `fd`, which is its owner's, to the machine's `address` and port."""
        port = _Port(_socket.socket(fileno=fd), address, number)
        self._ports.append(port)
        self._loop.watch(fd, lambda events: self._from_clients(port))

    @property
    def clients(self) -> int:
        return len(self._peers)

    def _from_clients(self, port: _Port) -> None:
        for _ in range(BURST):
            try:
                count, ancillary, _, client = port.socket.recvmsg_into([self._buffer], _CONTROL_BYTES)
            except BlockingIOError:
                return
            except OSError:
                continue  # an earlier answer was refused (ICMP): it says so here, once
            peer = self._find(port, client, _answer_from(ancillary))
            if peer is None:
                continue  # no descriptor for it: datagrams may be lost
            try:
                self._send(peer, count)
            except OSError:
                continue  # its queue is full, or the machine's program is not there

    def _send(self, peer: _Peer, count: int) -> None:
        """Raises `OSError`."""
        try:
            peer.socket.send(self._view[:count])
        except ConnectionRefusedError:  # that is what an earlier one met: this one was not sent
            peer.socket.send(self._view[:count])

    def _find(self, port: _Port, client: object, answer_from: Ancillary) -> _Peer | None:
        key = (port.socket.fileno(), client, answer_from[0][2] if answer_from else b"")
        peer = self._peers.get(key)
        if peer is None:
            while len(self._peers) >= self._most:
                self._forget(next(iter(self._peers)))
            try:
                peer = _Peer(port, client, answer_from, inet.connect_udp(port.address, port.number))
            except OSError:
                return None
            self._peers[key] = peer
            self._loop.watch(peer.socket.fileno(), lambda events: self._from_machine(key))
            if not self._sweeping:
                self._sweeping = True
                self._loop.after(min(SWEEP_S, self._silent_s), self._sweep)
        self._heard(key, peer)
        return peer

    def _heard(self, key: tuple[int, object, bytes], peer: _Peer) -> None:
        peer.heard_s = time.monotonic()
        self._peers.move_to_end(key)

    def _from_machine(self, key: tuple[int, object, bytes]) -> None:
        peer = self._peers.get(key)
        if peer is None:
            return
        for _ in range(BURST):
            try:
                count = peer.socket.recv_into(self._buffer)
            except BlockingIOError:
                return
            except OSError:
                continue  # refused by the machine: the error is taken with this, and comes once
            self._heard(key, peer)
            try:
                peer.port.socket.sendmsg([self._view[:count]], peer.answer_from, 0, peer.client)  # type: ignore[arg-type]
            except OSError:
                continue

    def _sweep(self) -> None:
        oldest_s = time.monotonic() - self._silent_s
        for key, peer in list(self._peers.items()):
            if peer.heard_s > oldest_s:
                break
            self._forget(key)
        self._sweeping = bool(self._peers)
        if self._sweeping:
            self._loop.after(min(SWEEP_S, self._silent_s), self._sweep)

    def _forget(self, key: tuple[int, object, bytes]) -> None:
        peer = self._peers.pop(key)
        self._loop.forget(peer.socket.fileno())
        peer.socket.close()

    def close(self) -> None:
        for key in list(self._peers):
            self._forget(key)
        for port in self._ports:
            self._loop.forget(port.socket.fileno())
            port.socket.detach()
        self._ports = []
