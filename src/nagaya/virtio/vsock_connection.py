"""One connection between a port of the guest and a Unix socket of the host: what is owed to either side.

The credit rules are those of virtio 1.2, section 5.10.6.3: each side says how much it can hold (`buf_alloc`) and how much
it has passed on (`fwd_cnt`); both count modulo 2^32.
"""

from __future__ import annotations

import _socket
import os
import select
from collections.abc import Sequence

from nagaya.static import NamedTuple
from nagaya.virtio.views import after, first

REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
SHUTDOWN_RECEIVE, SHUTDOWN_SEND = 1, 2
SHUTDOWN_BOTH = SHUTDOWN_RECEIVE | SHUTDOWN_SEND

BUFFER_BYTES = 128 << 10
"""What we hold for one connection while its reader on the host is slow. A connection may cost us this much memory."""
_COUNT_MASK = 0xFFFF_FFFF


class Key(NamedTuple):
    """Which connection: the port on the host's side and the guest's."""

    host_port: int
    guest_port: int


class Connection:
    """State, and the host's socket. `owed` holds the packets that the guest is to get, apart from data."""

    def __init__(self, key: Key, fd: int, *, opened_by_host: bool) -> None:
        """`fd` is a connected stream socket that does not block; it belongs to the connection."""
        self.key = key
        self.fd = fd
        self.opened_by_host = opened_by_host
        self.is_open = not opened_by_host
        self.owed = {REQUEST if opened_by_host else RESPONSE}
        self.host_shutdown = 0
        """What the host's side will not do any more, as we tell the guest: SHUTDOWN_*."""
        self.guest_shutdown = 0
        self.waits_for_buffers = False
        self.watched = (False, False)
        self._socket = _socket.socket(fileno=fd)
        self._unsent = bytearray()  # from the guest; its sum with what is under way never exceeds BUFFER_BYTES
        self._received_bytes = 0  # from the guest, ever
        self._forwarded_bytes = 0
        self._told_forwarded_bytes = 0
        self._sent_bytes = 0  # to the guest, ever
        self._peer_buffer_bytes = 0
        self._peer_forwarded_bytes = 0
        self._host_is_gone = False  # it takes no more bytes; there may still be some to read

    def close(self) -> None:
        self._socket.close()

    @property
    def guest_is_done(self) -> bool:
        """The guest neither sends nor takes more, and the host has got all that it sent."""
        return self.guest_shutdown == SHUTDOWN_BOTH and not self._unsent

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    @property
    def credit_bytes(self) -> int:
        """How much the guest can take now."""
        under_way = (self._sent_bytes - self._peer_forwarded_bytes) & _COUNT_MASK
        return max(0, self._peer_buffer_bytes - under_way)

    @property
    def wants_host_data(self) -> bool:
        """A connection that the guest asked for carries nothing before it has its answer."""
        ended = self.host_shutdown & SHUTDOWN_SEND or self.guest_shutdown & SHUTDOWN_RECEIVE
        return self.is_open and not ended and RESPONSE not in self.owed

    def take_credit(self, buffer_bytes: int, forwarded_bytes: int) -> None:
        """Every packet of the guest says what it can hold."""
        self._peer_buffer_bytes, self._peer_forwarded_bytes = buffer_bytes, forwarded_bytes
        if self.credit_bytes:
            self.owed.discard(CREDIT_REQUEST)

    def tell_credit(self) -> tuple[int, int]:
        """The same from us, for the packet that is about to go."""
        self._told_forwarded_bytes = self._forwarded_bytes
        self.owed.discard(CREDIT_UPDATE)
        return BUFFER_BYTES, self._forwarded_bytes & _COUNT_MASK

    def take_data(self, views: Sequence[memoryview], size_bytes: int) -> bool:
        """The guest sent `size_bytes`, the front of `views`. False when that is more than it was allowed."""
        if self._received_bytes + size_bytes - self._forwarded_bytes > BUFFER_BYTES:
            return False
        self._received_bytes += size_bytes
        data = first(views, size_bytes)
        done = 0 if self._unsent else self._write(data)
        if self._host_is_gone:
            done = size_bytes
        for view in after(data, done):
            self._unsent += view
        self._count_forwarded(done)
        return True

    def flush(self) -> None:
        """Pass on what the host did not take before."""
        if self._unsent:
            done = self._write([self._unsent])
            if self._host_is_gone:
                done = len(self._unsent)
            del self._unsent[:done]
            self._count_forwarded(done)
        if not self._unsent and self.guest_shutdown & SHUTDOWN_SEND and not self._host_is_gone:
            self._shut(_socket.SHUT_WR)

    def read(self, views: Sequence[memoryview]) -> int:
        """Read from the host into `views`; 0 when there is nothing now. Sets `host_shutdown` at the end of its data.

        Raises `ConnectionError` when the connection is broken.
        """
        try:
            count = os.readv(self.fd, views)
        except (BlockingIOError, InterruptedError):
            return 0
        if not count:
            poll = select.poll()
            poll.register(self.fd, 0)
            gone = self._host_is_gone or bool(poll.poll(0))  # hung up: it is not only its sending that has ended
            self.host_shutdown |= SHUTDOWN_BOTH if gone else SHUTDOWN_SEND
            self.owed.add(SHUTDOWN)
        self._sent_bytes += count
        return count

    def shut_down(self, flags: int) -> None:
        """The guest will not receive, or not send, any more."""
        self.guest_shutdown |= flags & SHUTDOWN_BOTH
        self.flush()

    def _write(self, views: Sequence[memoryview | bytearray]) -> int:
        if self._host_is_gone or not views:
            return 0
        try:
            return os.writev(self.fd, views)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:  # it reads no more, but may have written before it went
            self._host_is_gone = True
            self.host_shutdown |= SHUTDOWN_RECEIVE
            self.owed.add(SHUTDOWN)
            return 0

    def _shut(self, how: int) -> None:
        try:
            self._socket.shutdown(how)
        except OSError:  # the host was quicker
            self._host_is_gone = True

    def _count_forwarded(self, size_bytes: int) -> None:
        self._forwarded_bytes += size_bytes
        if self._forwarded_bytes - self._told_forwarded_bytes >= BUFFER_BYTES // 4:
            self.owed.add(CREDIT_UPDATE)
