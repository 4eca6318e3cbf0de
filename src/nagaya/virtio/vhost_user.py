"""The front end's side of vhost-user (QEMU's docs/interop/vhost-user.rst): a daemon works on the guest's rings.

It gets the guest's memory as a file and an eventfd in each direction for each ring; no request passes through us.
"""

from __future__ import annotations

import _socket
import struct
from collections.abc import Sequence

from nagaya.errors import RemoteError
from nagaya.memory import GuestMemory
from nagaya.static import NamedTuple

GET_FEATURES = 1
SET_FEATURES = 2
SET_OWNER = 3
SET_MEM_TABLE = 5
SET_VRING_NUM = 8
SET_VRING_ADDR = 9
SET_VRING_BASE = 10
GET_VRING_BASE = 11
SET_VRING_KICK = 12
SET_VRING_CALL = 13
GET_PROTOCOL_FEATURES = 15
SET_PROTOCOL_FEATURES = 16
GET_QUEUE_NUM = 17
SET_VRING_ENABLE = 18
GET_CONFIG = 24

F_PROTOCOL_FEATURES = 1 << 30
PROTOCOL_F_MQ = 1 << 0
PROTOCOL_F_REPLY_ACK = 1 << 3
PROTOCOL_F_CONFIG = 1 << 9

_VERSION = 1
_REPLY = 1 << 2
_NEED_REPLY = 1 << 3
_HEADER = struct.Struct("<III")  # request, flags, size of what follows
_U64 = struct.Struct("<Q")
_VRING_STATE = struct.Struct("<II")  # index, number
_VRING_ADDR = struct.Struct("<IIQQQQ")  # index, flags, descriptors, used, available, log
_MEMORY = struct.Struct("<II")  # number of regions, padding
_REGION = struct.Struct("<QQQQ")  # gpa, size, our address, offset in the file
_CONFIG = struct.Struct("<III")  # offset, size, flags
_MOST_REPLY_BYTES = 4096
_PATIENCE_S = 10.0
"""A daemon that takes longer over one message is as good as dead: other devices wait on the same thread."""


class Ring(NamedTuple):
    """One queue for the daemon. Addresses are the guest's; the eventfds stay the caller's."""

    number: int
    size: int
    descriptors: int
    available: int
    used: int
    next_available: int
    kick_fd: int
    call_fd: int


class VhostUser:
    """A connection to a daemon. What it does wrong raises `RemoteError`, its end included: that is final."""

    def __init__(self, fd: int) -> None:
        """`fd` is a connected stream socket, and belongs to this object from here on."""
        self.fd = fd
        self.features = 0
        """What the daemon offers the guest, F_PROTOCOL_FEATURES aside."""
        self.most_queues = 1
        self._socket = _socket.socket(fileno=fd)
        self._socket.settimeout(_PATIENCE_S)
        self._has_protocol = False
        self._protocol_features = 0
        self._rings: list[int] = []

    def greet(self) -> None:
        """Take the daemon, and agree on the protocol. Sets `features` and `most_queues`."""
        self._tell(SET_OWNER)
        features = self._ask(GET_FEATURES)
        if features & F_PROTOCOL_FEATURES:
            ours = PROTOCOL_F_MQ | PROTOCOL_F_REPLY_ACK | PROTOCOL_F_CONFIG
            agreed = self._ask(GET_PROTOCOL_FEATURES) & ours
            self._tell(SET_PROTOCOL_FEATURES, _U64.pack(agreed))
            self._protocol_features = agreed
            if agreed & PROTOCOL_F_MQ:
                self.most_queues = self._ask(GET_QUEUE_NUM)
        self.features = features & ~F_PROTOCOL_FEATURES
        self._has_protocol = bool(features & F_PROTOCOL_FEATURES)

    def read_config(self, size: int) -> bytes | None:
        """The first `size` bytes of the configuration space; None when the daemon leaves it to us."""
        if not self._protocol_features & PROTOCOL_F_CONFIG:
            return None
        reply = self._request(GET_CONFIG, _CONFIG.pack(0, size, 0) + bytes(size))
        return reply[_CONFIG.size :] if len(reply) == _CONFIG.size + size else None

    def start(self, features: int, memory: GuestMemory, rings: Sequence[Ring]) -> None:
        """Hand over the guest's memory, and let the daemon work on `rings`."""
        self._tell(SET_FEATURES, _U64.pack(features | (F_PROTOCOL_FEATURES if self._has_protocol else 0)))
        regions = b"".join(
            _REGION.pack(region.gpa, region.size_bytes, region.hva, region.file_offset) for region in memory.regions
        )
        count = len(memory.regions)
        self._tell(SET_MEM_TABLE, _MEMORY.pack(count, 0) + regions, fds=[memory.fd] * count)
        for ring in rings:
            self._start_ring(memory, ring)

    def _start_ring(self, memory: GuestMemory, ring: Ring) -> None:
        index = ring.number
        self._tell(SET_VRING_NUM, _VRING_STATE.pack(index, ring.size))
        self._tell(SET_VRING_BASE, _VRING_STATE.pack(index, ring.next_available))
        addresses = (memory.hva(gpa, 1) for gpa in (ring.descriptors, ring.used, ring.available))
        self._tell(SET_VRING_ADDR, _VRING_ADDR.pack(index, 0, *addresses, 0))
        self._tell(SET_VRING_CALL, _U64.pack(index), fds=[ring.call_fd])
        self._tell(SET_VRING_KICK, _U64.pack(index), fds=[ring.kick_fd])
        if self._has_protocol:
            self._tell(SET_VRING_ENABLE, _VRING_STATE.pack(index, 1))
        self._rings.append(index)

    def stop(self) -> dict[int, int]:
        """Take the rings back; when it returns, the daemon touches them no more. Ring -> next available entry."""
        positions = {}
        for index in self._rings:
            reply = self._request(GET_VRING_BASE, _VRING_STATE.pack(index, 0))
            if len(reply) != _VRING_STATE.size:
                raise RemoteError(f"the vhost-user daemon answered GET_VRING_BASE with {len(reply)} bytes")
            positions[index] = _VRING_STATE.unpack(reply)[1] & 0xFFFF
        self._rings.clear()
        return positions

    def close(self) -> None:
        """Hang up: the daemon lets go of the guest's memory."""
        self._socket.close()

    def _ask(self, request: int) -> int:
        reply = self._request(request)
        if len(reply) != _U64.size:
            raise RemoteError(f"the vhost-user daemon answered request {request} with {len(reply)} bytes")
        value: int = _U64.unpack(reply)[0]
        return value

    def _tell(self, request: int, payload: bytes = b"", *, fds: Sequence[int] = ()) -> None:
        """A request without an answer of its own: we ask whether it went well, where the daemon knows how to say."""
        confirmed = self._protocol_features & PROTOCOL_F_REPLY_ACK
        self._send(request, payload, flags=_NEED_REPLY if confirmed else 0, fds=fds)
        if confirmed:
            reply = self._receive(request)
            if reply != bytes(_U64.size):
                raise RemoteError(f"the vhost-user daemon refused request {request}")

    def _request(self, request: int, payload: bytes = b"") -> bytes:
        self._send(request, payload, flags=0, fds=())
        return self._receive(request)

    def _send(self, request: int, payload: bytes, *, flags: int, fds: Sequence[int]) -> None:
        message = _HEADER.pack(request, _VERSION | flags, len(payload)) + payload
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        try:
            sent = self._socket.sendmsg([message], rights)
            if sent < len(message):
                self._socket.sendall(message[sent:])
        except OSError as error:
            raise RemoteError(f"the vhost-user daemon went away: {error.strerror or error}") from None

    def _receive(self, request: int) -> bytes:
        answered, flags, size = _HEADER.unpack(self._read(_HEADER.size))
        if answered != request or flags & 3 != _VERSION or not flags & _REPLY or size > _MOST_REPLY_BYTES:
            raise RemoteError(f"the vhost-user daemon answered request {request} with something else")
        return self._read(size)

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            try:
                part = self._socket.recv(size)
            except OSError as error:
                raise RemoteError(f"the vhost-user daemon did not answer: {error.strerror or error}") from None
            if not part:
                raise RemoteError("the vhost-user daemon hung up")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)
