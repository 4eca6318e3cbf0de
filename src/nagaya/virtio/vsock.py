"""virtio-vsock (virtio 1.2, section 5.10): streams between ports of the guest and Unix sockets of the host.

The host's side is what Firecracker made customary. Where the device's socket is PATH:

- a program of the host connects to PATH and writes "CONNECT 1024\\n" to reach the guest's port 1024; it reads
  "OK 1073741824\\n" (its own port) once the guest has accepted, or the end of file when it has not. Before the guest's
  driver is ready, it waits;
- a program of the guest that connects to port 80 of CID 2 reaches the socket PATH_80.
"""

from __future__ import annotations

import errno
import os
import struct
from collections import deque

from nagaya.errors import GuestFault
from nagaya.kernel import unix
from nagaya.static import Any, NamedTuple
from nagaya.virtio.device import VSOCK, Activated, guard
from nagaya.virtio.queue import Chain, Queue
from nagaya.virtio.turn import Turn
from nagaya.virtio.views import after, first, gather, scatter
from nagaya.virtio.vsock_connection import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
    SHUTDOWN_SEND,
    Connection,
    Key,
)

HOST_CID = 2
RECEIVE, TRANSMIT, EVENT = 0, 1, 2
QUEUE_SIZE = 128
TYPE_STREAM = 1
MOST_CONNECTIONS = 512
FIRST_HOST_PORT = 1 << 30
_LAST_HOST_PORT = (1 << 31) - 1

_HEADER = struct.Struct("<QQIIIHHIII")  # struct virtio_vsock_hdr
_EVENT_TRANSPORT_RESET = bytes(4)
_MOST_PACKET_BYTES = 64 << 10
_BURST = 32
_MOST_REFUSALS = 128
"""Refusals that may wait for the guest's buffers. With more, no more packets of its are read."""
_LONGEST_LINE = len("CONNECT 4294967295\n")


class _Header(NamedTuple):
    source_cid: int
    destination_cid: int
    source_port: int
    destination_port: int
    size_bytes: int
    kind: int
    operation: int
    flags: int
    buffer_bytes: int
    forwarded_bytes: int


class Vsock:
    """The device. Its connections live no longer than the driver's activation."""

    device_id = VSOCK
    features = 0
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE)

    def __init__(self, name: str, *, guest_cid: int, listener_fd: int, directory: str, socket_name: str) -> None:
        """`listener_fd` listens on `directory`/`socket_name` (`kernel.unix.listen`), and is the device's from here on.

        `guest_cid` is from 3 to 2^32 - 2: the others have meanings.
        """
        self.name = name
        self.guest_cid = guest_cid
        self._config = struct.pack("<Q", guest_cid)
        self._listener_fd = listener_fd
        self._directory = directory
        self._socket_name = socket_name
        self._live: Activated | None = None
        self._connections: dict[Key, Connection] = {}
        self._greeting: dict[int, bytearray] = {}  # accepted sockets whose line is not complete yet
        self._lingering: set[Connection] = set()  # the guest has forgotten them; their last bytes are still to be read
        self._owing: dict[Connection, None] = {}  # an ordered set
        self._waiting: set[Connection] = set()  # their hosts have written, and the guest has no buffer
        self._refusals: deque[tuple[int, int, int]] = deque()  # to port, from port, type
        self._starved = False  # the guest has no buffer for packets
        self._stalled = False  # packets of the guest wait until it reads ours
        self._turn = Turn()
        self._next_port = FIRST_HOST_PORT
        self._counts = dict.fromkeys(("connections", "refused", "bytes_to_guest", "bytes_from_guest"), 0)

    def read_config(self, offset: int, size: int) -> bytes:
        return self._config[offset : offset + size]

    def write_config(self, offset: int, data: bytes) -> None:
        """Nothing of it can be written."""

    def activate(self, live: Activated) -> None:
        self._live = live
        self._starved = self._stalled = False
        self._listen()
        if live.saved is not None:
            self._tell_reset()  # the connections did not come along
        self._take_packets()

    def kicked(self, queue: int) -> None:
        if queue == RECEIVE:
            self._starved = False
            self._serve()
            if self._stalled:
                self._take_packets()
        elif queue == TRANSMIT:
            self._take_packets()

    def announce_reset(self) -> None:
        """The connections are gone, as after a restored snapshot: the guest's sockets get errors. Loop thread."""
        self._drop_connections()
        self._listen()
        guard(self._live, self._tell_reset)

    def _tell_reset(self) -> None:
        queue = self._queue(EVENT)
        chain = queue.pop() if queue is not None else None
        if queue is not None and chain is not None:
            queue.publish(chain, scatter(chain.writable, _EVENT_TRANSPORT_RESET))
            queue.signal()

    def reset(self) -> None:
        self._drop_connections()
        if self._live is not None:
            self._live.loop.unwatch(self._listener_fd)
        self._turn.cancel()
        self._live = None

    def close(self) -> None:
        self.reset()
        self._turn.close()
        os.close(self._listener_fd)

    def save(self) -> dict[str, Any]:
        """Without the connections: the guest is told that they are gone."""
        return {}

    def counters(self) -> dict[str, int]:
        return dict(self._counts)

    def _queue(self, number: int) -> Queue | None:
        return self._live.queues[number] if self._live is not None else None

    def _drop_connections(self) -> None:
        for connection in (*self._connections.values(), *self._lingering):
            self._unwatch(connection.fd)
            connection.close()
        for fd in self._greeting:
            self._unwatch(fd)
            os.close(fd)
        for held in (self._connections, self._lingering, self._greeting, self._owing, self._waiting, self._refusals):
            held.clear()

    def _unwatch(self, fd: int) -> None:
        if self._live is not None:
            self._live.loop.unwatch(fd)

    # From the host

    def _listen(self) -> None:
        """Accept connections while there is room for more."""
        if self._live is None:
            return
        taken = len(self._connections) + len(self._lingering) + len(self._greeting)
        if taken < MOST_CONNECTIONS:
            self._live.loop.watch(self._listener_fd, self._accept)
        else:
            self._live.loop.unwatch(self._listener_fd)

    def _accept(self) -> None:
        live = self._live
        if live is None:
            return
        try:
            fd = unix.accept(self._listener_fd)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                live.loop.unwatch(self._listener_fd)  # until a connection ends
            return
        os.set_blocking(fd, False)
        self._greeting[fd] = bytearray()
        live.loop.watch(fd, lambda: guard(self._live, lambda: self._greet(fd)))
        self._listen()

    def _greet(self, fd: int) -> None:
        """Read "CONNECT port\\n", and not a byte more: what follows is for the guest."""
        line = self._greeting[fd]
        while not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
            try:
                byte = os.read(fd, 1)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                byte = b""
            if not byte:
                break
            line += byte
        del self._greeting[fd]
        port = parse_greeting(bytes(line))
        key = self._free_key(port) if port is not None else None
        if key is None:
            self._unwatch(fd)
            os.close(fd)
            self._listen()
            return
        self._unwatch(fd)
        self._add(Connection(key, fd, opened_by_host=True))
        self._serve()

    def _free_key(self, guest_port: int) -> Key | None:
        for _ in range(MOST_CONNECTIONS + 1):
            key = Key(self._next_port, guest_port)
            self._next_port = self._next_port + 1 if self._next_port < _LAST_HOST_PORT else FIRST_HOST_PORT
            if key not in self._connections:
                return key
        return None

    def _add(self, connection: Connection) -> None:
        self._connections[connection.key] = connection
        self._owing[connection] = None
        self._counts["connections"] += 1
        self._listen()

    def _moved(self, connection: Connection) -> None:
        """The host's socket is ready for something."""
        if connection.has_unsent:
            connection.flush()
        self._settle(connection)
        if connection in self._lingering or self._connections.get(connection.key) is not connection:
            return
        if connection.wants_host_data:
            self._read(connection)
        self._serve()

    def _settle(self, connection: Connection) -> None:
        """After its state has changed: say what is owed, watch for what is wanted, end what is over."""
        if connection in self._lingering:
            if not connection.has_unsent:
                self._end(connection)
                return
        elif connection.guest_is_done and connection.is_open:
            connection.owed = {RST}
        if connection.owed:
            self._owing[connection] = None
        self._watch(connection)

    def _watch(self, connection: Connection) -> None:
        live = self._live
        if live is None:
            return
        readable = connection.wants_host_data and not connection.waits_for_buffers and connection.credit_bytes > 0
        readable = readable and connection not in self._lingering and RST not in connection.owed
        wanted = (readable, connection.has_unsent)
        if wanted == connection.watched:
            return
        connection.watched = wanted
        if any(wanted):
            live.loop.watch(
                connection.fd,
                lambda: guard(self._live, lambda: self._moved(connection)),
                readable=wanted[0],
                writable=wanted[1],
            )
        else:
            live.loop.unwatch(connection.fd)

    def _end(self, connection: Connection) -> None:
        self._unwatch(connection.fd)
        self._lingering.discard(connection)
        self._owing.pop(connection, None)
        self._waiting.discard(connection)
        if self._connections.get(connection.key) is connection:
            del self._connections[connection.key]
        connection.close()
        self._listen()

    # To the guest

    def _serve(self) -> None:
        """Send what is owed, and what hosts have written, as far as the guest has buffers."""
        queue = self._queue(RECEIVE)
        if queue is None:
            return
        while self._refusals and self._send(queue, *self._refusals[0][:2], kind=self._refusals[0][2], operation=RST):
            self._refusals.popleft()
        for connection in list(self._owing):
            if self._starved:
                break
            self._pay(queue, connection)
        if not self._starved:
            waiting, self._waiting = self._waiting, set()
            for connection in waiting:
                connection.waits_for_buffers = False
                self._watch(connection)
        queue.signal()

    def _pay(self, queue: Queue, connection: Connection) -> None:
        """Send a connection's owed packets; after RST there is no connection any more."""
        key = connection.key
        for operation in sorted(connection.owed):
            if operation not in connection.owed:
                continue  # the packet before has told our credit already
            flags = connection.host_shutdown if operation == SHUTDOWN else 0
            connection.owed.discard(operation)
            if not self._send(
                queue, key.guest_port, key.host_port, connection=connection, operation=operation, flags=flags
            ):
                connection.owed.add(operation)
                return
            if operation == RST:
                self._end(connection)
                return
        self._owing.pop(connection, None)
        self._watch(connection)

    def _send(
        self,
        queue: Queue,
        to_port: int,
        from_port: int,
        *,
        operation: int,
        kind: int = TYPE_STREAM,
        flags: int = 0,
        connection: Connection | None = None,
    ) -> bool:
        """A packet without data; False when the guest has no buffer."""
        chain = self._buffer(queue)
        if chain is None:
            return False
        credit = connection.tell_credit() if connection is not None else (0, 0)
        header = _HEADER.pack(HOST_CID, self.guest_cid, from_port, to_port, 0, kind, operation, flags, *credit)
        scatter(chain.writable, header)
        queue.publish(chain, _HEADER.size)
        return True

    def _buffer(self, queue: Queue) -> Chain | None:
        """The guest's next buffer. Sets `_starved` when there is none."""
        chain = queue.pop()
        if chain is None and queue.rearm():
            chain = queue.pop()
        self._starved = chain is None
        if chain is not None and chain.writable_bytes <= _HEADER.size:
            raise GuestFault(f"a buffer of {chain.writable_bytes} bytes for packets on {self.name}")
        return chain

    def _read(self, connection: Connection) -> None:
        """From the host's socket straight into the guest's buffers."""
        queue = self._queue(RECEIVE)
        if queue is None:
            return
        key = connection.key
        for _ in range(_BURST):
            room = min(connection.credit_bytes, _MOST_PACKET_BYTES)
            if not room:
                connection.owed.add(CREDIT_REQUEST)
                break
            chain = self._buffer(queue)
            if chain is None:
                connection.waits_for_buffers = True
                self._waiting.add(connection)
                break
            try:
                count = connection.read(first(after(chain.writable, _HEADER.size), room))
            except OSError:
                queue.undo_pop()
                connection.owed = {RST}
                break
            if not count:
                queue.undo_pop()
                break
            scatter(
                chain.writable,
                _HEADER.pack(HOST_CID, self.guest_cid, *key, count, TYPE_STREAM, RW, 0, *connection.tell_credit()),
            )
            queue.publish(chain, _HEADER.size + count)
            self._counts["bytes_to_guest"] += count
        queue.signal()
        self._settle(connection)

    # From the guest

    def _take_packets(self) -> None:
        queue = self._queue(TRANSMIT)
        if queue is None or self._live is None:
            return
        self._stalled = False
        queue.disarm()
        for _ in range(_BURST):
            if len(self._refusals) >= _MOST_REFUSALS:
                self._stalled = True
                break
            chain = queue.pop()
            if chain is None:
                if queue.rearm():
                    continue
                break
            self._take_packet(chain)
            queue.publish(chain, 0)
        else:
            self._turn.ask(self._live.loop, lambda: guard(self._live, self._take_packets))
        queue.signal()
        self._serve()

    def _take_packet(self, chain: Chain) -> None:
        packed = gather(chain.readable, _HEADER.size)
        if len(packed) < _HEADER.size:
            raise GuestFault(f"a packet of {len(packed)} bytes on {self.name}")
        header = _Header._make(_HEADER.unpack(packed))
        if header.size_bytes > chain.readable_bytes - _HEADER.size:
            raise GuestFault(f"a packet on {self.name} says {header.size_bytes} bytes and has fewer")
        if header.source_cid != self.guest_cid:
            return  # nobody to answer
        key = Key(header.destination_port, header.source_port)
        if header.destination_cid != HOST_CID or header.kind != TYPE_STREAM:
            self._refuse(header)
            return
        connection = self._connections.get(key)
        if connection is None:
            if header.operation == REQUEST:
                self._connect(key, header)
            elif header.operation != RST:
                self._refuse(header)
            return
        connection.take_credit(header.buffer_bytes, header.forwarded_bytes)
        self._obey(connection, header, chain)
        if connection.key in self._connections:
            self._settle(connection)

    def _refuse(self, header: _Header) -> None:
        if header.operation != RST:
            self._counts["refused"] += 1
            self._refusals.append((header.source_port, header.destination_port, header.kind))

    def _connect(self, key: Key, header: _Header) -> None:
        """The guest wants to reach a socket of the host's."""
        if len(self._connections) + len(self._lingering) >= MOST_CONNECTIONS:
            self._refuse(header)
            return
        try:
            fd = unix.connect(self._directory, f"{self._socket_name}_{key.host_port}", blocking=False)
        except OSError:  # nobody listens there, or too many wait for it already
            self._refuse(header)
            return
        connection = Connection(key, fd, opened_by_host=False)
        connection.take_credit(header.buffer_bytes, header.forwarded_bytes)
        self._add(connection)
        self._watch(connection)

    def _obey(self, connection: Connection, header: _Header, chain: Chain) -> None:
        operation = header.operation
        if operation == RST:
            if connection.guest_shutdown and connection.has_unsent:
                self._linger(connection)
            else:
                self._end(connection)
        elif RST in connection.owed:
            return  # what is under way no longer matters
        elif operation == RESPONSE and not connection.is_open and REQUEST not in connection.owed:
            connection.is_open = True
            if not _write_all(connection.fd, f"OK {connection.key.host_port}\n".encode()):
                connection.owed = {RST}
        elif not connection.is_open:
            connection.owed = {RST}
        elif operation == RW:
            views = after(chain.readable, _HEADER.size)
            self._counts["bytes_from_guest"] += header.size_bytes
            if connection.guest_shutdown & SHUTDOWN_SEND or not connection.take_data(views, header.size_bytes):
                connection.owed = {RST}
        elif operation == SHUTDOWN:
            connection.shut_down(header.flags)
        elif operation == CREDIT_REQUEST:
            connection.owed.add(CREDIT_UPDATE)
        elif operation != CREDIT_UPDATE:
            connection.owed = {RST}

    def _linger(self, connection: Connection) -> None:
        """The guest closed and waits no longer; the host is still to get what it sent before."""
        del self._connections[connection.key]
        self._owing.pop(connection, None)
        self._waiting.discard(connection)
        connection.owed.clear()
        self._lingering.add(connection)
        self._watch(connection)


def parse_greeting(line: bytes) -> int | None:
    """The port in "CONNECT port\\n", or None when it is no such line."""
    word, _, number = line.partition(b" ")
    digits = number[:-1]
    if word != b"CONNECT" or not number.endswith(b"\n") or not digits.isdigit():
        return None
    port = int(digits)
    return port if port <= 0xFFFF_FFFF else None


def _write_all(fd: int, data: bytes) -> bool:
    """Write a few bytes to a socket that has taken none yet: they fit, or it is broken."""
    try:
        return os.write(fd, data) == len(data)
    except OSError:
        return False
