"""What a network card's cable leads to: a tap device, or a socket to a user-mode network (passt, QEMU's -netdev stream).

A link moves one frame at a time between its descriptor and the guest's buffers. Frames from and to the guest begin with
a `struct virtio_net_hdr_v1` of 12 bytes (virtio 1.2, section 5.1.6). A tap device reads and writes that header itself,
and so takes unfinished checksums and packets above the MTU; sockets carry bare frames.
"""

from __future__ import annotations

import errno
import os
from collections import deque

from nagaya.errors import GuestFault
from nagaya.kernel import tun
from nagaya.static import Protocol
from nagaya.virtio.queue import Chain, Queue
from nagaya.virtio.views import after, gather, scatter

F_CSUM = 1 << 0
F_GUEST_CSUM = 1 << 1
F_GUEST_TSO4 = 1 << 7
F_GUEST_TSO6 = 1 << 8
F_GUEST_ECN = 1 << 9
F_GUEST_UFO = 1 << 10
F_HOST_TSO4 = 1 << 11
F_HOST_TSO6 = 1 << 12
F_HOST_ECN = 1 << 13
F_HOST_UFO = 1 << 14

HEADER_BYTES = 12
ETHERNET_BYTES = 18
"""Two addresses, a VLAN tag, the type."""
MOST_FRAME_BYTES = 65535 + ETHERNET_BYTES
"""The largest packet before segmentation, with its Ethernet header."""
MOST_VIEWS = 512
"""readv and writev take 1024 (IOV_MAX); one more chain must fit after the check."""
_NO_HEADER = bytes(HEADER_BYTES)
_NUM_BUFFERS_OFFSET = 10

SENT, FULL, DROPPED = range(3)
"""What became of a frame: FULL means that it is to be sent again when the link is writable."""


class ReceiveBuffers:
    """The guest's buffers for frames, taken from the queue ahead of the frames: `readv` has to know where to write.

    A frame fills one chain, or with `mergeable` as many as it needs.
    """

    def __init__(self, queue: Queue, *, mergeable: bool, largest_bytes: int) -> None:
        """`largest_bytes` is the largest frame to expect, header included; a larger one only takes longer."""
        self.starved = False
        self.packets = 0
        self.bytes = 0
        self.dropped = 0
        self._queue = queue
        self._mergeable = mergeable
        self._largest_bytes = largest_bytes
        self._chains: deque[Chain] = deque()
        self._views: list[memoryview] = []
        self._room_bytes = 0
        self._overflow = memoryview(bytearray(MOST_FRAME_BYTES))  # takes what a frame has beyond the guest's buffers
        self._excess = b""  # the end of a frame whose beginning is in the buffers at hand
        self._excess_at = 0

    def read_frame(self, fd: int, *, header: bool) -> bool:
        """Read one frame straight into the guest's memory; False when it has no buffer (`starved`) or `fd` no frame.

        `header`: what comes from `fd` begins with the virtio header. Raises `ConnectionResetError` at the end of it.
        """
        if not self._prepare(self._largest_bytes):
            return False
        views = self._views
        if not header:
            scatter(views, _NO_HEADER)
            views = after(views, HEADER_BYTES)
        try:
            count = os.readv(fd, [*views, self._overflow])
        except (BlockingIOError, InterruptedError):
            return False
        if not count:
            raise ConnectionResetError(errno.ECONNRESET, "the network's socket was closed")
        if not header:
            count += HEADER_BYTES
        if count <= self._room_bytes:
            self._finish(count)
        else:
            self._excess = bytes(self._overflow[: count - self._room_bytes])
            self._excess_at = self._room_bytes
            self._prepare(self._largest_bytes)
        return True

    def copy_frame(self, frame: memoryview) -> bool:
        """Copy a bare frame into the guest's memory; False when it has not got the buffers now (`starved`)."""
        size_bytes = HEADER_BYTES + len(frame)
        if not self._prepare(size_bytes):
            return False
        if size_bytes <= self._room_bytes:
            scatter(self._views, _NO_HEADER)
            scatter(after(self._views, HEADER_BYTES), frame)
            self._finish(size_bytes)
        elif self._is_hopeless():
            self.dropped += 1
        else:
            self.starved = True
            return False
        return True

    @property
    def taken(self) -> int:
        """How many chains were popped and are not filled yet."""
        return len(self._chains)

    def signal(self) -> None:
        """Tell the guest of its frames, once for many."""
        self._queue.signal()

    def _prepare(self, wanted_bytes: int) -> bool:
        """Take buffers up to `wanted_bytes`, and end a frame that waits for some; False when a frame has none."""
        self._take(max(wanted_bytes, self._excess_at + len(self._excess)) if self._excess else wanted_bytes)
        if self._excess:
            total = self._excess_at + len(self._excess)
            if total <= self._room_bytes:
                scatter(after(self._views, self._excess_at), self._excess)
                self._excess = b""
                self._finish(total)
            elif self._is_hopeless():
                self._excess = b""
                self.dropped += 1
            else:
                return False
            self._take(wanted_bytes)
        return bool(self._chains)

    def _take(self, wanted_bytes: int) -> None:
        queue = self._queue
        self.starved = False
        while (self._room_bytes < wanted_bytes and self._mergeable) or not self._chains:
            chain = queue.pop() if len(self._views) < MOST_VIEWS else None
            if chain is None:
                if len(self._views) < MOST_VIEWS and queue.rearm():
                    continue
                self.starved = not self._chains or bool(self._excess)
                return
            if chain.writable_bytes <= HEADER_BYTES:
                raise GuestFault(f"a buffer of {chain.writable_bytes} bytes for frames")
            self._chains.append(chain)
            self._views += chain.writable
            self._room_bytes += chain.writable_bytes

    def _is_hopeless(self) -> bool:
        """No more buffers can come: the frame at hand will never fit."""
        return not self._mergeable or len(self._chains) == self._queue.size or len(self._views) >= MOST_VIEWS

    def _finish(self, count: int) -> None:
        """The first `count` bytes of the buffers are a frame: hand them to the guest."""
        self.packets += 1
        self.bytes += count - HEADER_BYTES
        filled = []
        while count > 0:
            chain = self._chains.popleft()
            filled.append((chain, min(count, chain.writable_bytes)))
            count -= chain.writable_bytes
            self._room_bytes -= chain.writable_bytes
            del self._views[: len(chain.writable)]
        first = filled[0][0].writable
        number = len(filled).to_bytes(2, "little")
        if len(first[0]) >= HEADER_BYTES:
            first[0][_NUM_BUFFERS_OFFSET:HEADER_BYTES] = number
        else:
            scatter(after(first, _NUM_BUFFERS_OFFSET), number)
        if len(filled) == 1:
            self._queue.publish(*filled[0])
        else:
            self._queue.publish_all(filled)  # one store of the index: a driver that sees a part drops the frame


class Link(Protocol):
    """The other end of the cable. `fd` belongs to it and does not block."""

    fd: int
    features: int
    """What it can do for the guest: F_CSUM and so on."""

    def start(self, features: int) -> None:
        """The guest has agreed to `features`. Raises `OSError`."""

    def receive(self, buffers: ReceiveBuffers, most_frames: int) -> None:
        """Hand frames to the guest. Raises `ConnectionError` when the other side is gone."""

    def send(self, chain: Chain) -> int:
        """SENT, FULL or DROPPED. Raises `ConnectionError` when the other side is gone."""

    def flush(self) -> bool:
        """Send what is left of the frame before; True when nothing is. Raises `ConnectionError`."""

    def close(self) -> None:
        """Close `fd`."""


class Tap:
    """A tap device with a virtio header before each frame, as `kernel.tun.open_tap` opens it."""

    features = (
        F_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN | F_HOST_UFO
        | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN | F_GUEST_UFO
    )  # fmt: skip
    _OFFLOADS = (
        (F_GUEST_CSUM, tun.TUN_F_CSUM), (F_GUEST_TSO4, tun.TUN_F_TSO4), (F_GUEST_TSO6, tun.TUN_F_TSO6),
        (F_GUEST_ECN, tun.TUN_F_TSO_ECN), (F_GUEST_UFO, tun.TUN_F_UFO),
    )  # fmt: skip

    def __init__(self, fd: int) -> None:
        """`fd` belongs to this object from here on. It is made not to block: one that does would stop all devices."""
        self.fd = fd
        os.set_blocking(fd, False)

    def start(self, features: int) -> None:
        tun.set_vnet_header(self.fd, HEADER_BYTES)
        flags = sum(flag for feature, flag in self._OFFLOADS if features & feature)
        try:
            tun.set_offload(self.fd, flags)
        except OSError as error:  # Linux 4.14 to 4.20 has no UFO to offer, and refuses the word
            if error.errno != errno.EINVAL or not flags & tun.TUN_F_UFO:
                raise
            tun.set_offload(self.fd, flags & ~tun.TUN_F_UFO)

    def receive(self, buffers: ReceiveBuffers, most_frames: int) -> None:
        for _ in range(most_frames):
            try:
                if not buffers.read_frame(self.fd, header=True):
                    break
            except OSError as error:
                raise ConnectionResetError(error.errno, f"tap device: {error.strerror}") from None

    def send(self, chain: Chain) -> int:
        if chain.readable_bytes > HEADER_BYTES + MOST_FRAME_BYTES:
            return DROPPED
        try:
            os.writev(self.fd, chain.readable)
        except (BlockingIOError, InterruptedError):
            return FULL
        except OSError as error:
            if error.errno == errno.EBADFD:
                raise ConnectionResetError(error.errno, "the tap device was deleted") from None
            return DROPPED  # the link is down (EIO), or the header makes no sense (EINVAL)
        return SENT

    def flush(self) -> bool:
        return True

    def close(self) -> None:
        os.close(self.fd)


class Unplugged:
    """No link at all, for a machine that is only there to be saved: what is sent is lost. It looks like another kind."""

    def __init__(self, *, like_tap: bool) -> None:
        self.features = Tap.features if like_tap else 0
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # never ready

    def start(self, features: int) -> None:
        """Nothing to agree on."""

    def receive(self, buffers: ReceiveBuffers, most_frames: int) -> None:
        """Nothing comes."""

    def send(self, chain: Chain) -> int:
        return DROPPED

    def flush(self) -> bool:
        return True

    def close(self) -> None:
        os.close(self.fd)


class Datagrams:
    """A connected socket where a datagram is a frame: SOCK_SEQPACKET, or SOCK_DGRAM."""

    features = 0

    def __init__(self, fd: int) -> None:
        """`fd` belongs to this object from here on. It is made not to block: one that does would stop all devices."""
        self.fd = fd
        os.set_blocking(fd, False)

    def start(self, features: int) -> None:
        """Nothing to agree on."""

    def receive(self, buffers: ReceiveBuffers, most_frames: int) -> None:
        for _ in range(most_frames):
            if not buffers.read_frame(self.fd, header=False):
                break

    def send(self, chain: Chain) -> int:
        if not 0 < chain.readable_bytes - HEADER_BYTES <= MOST_FRAME_BYTES:
            return DROPPED
        try:
            os.writev(self.fd, after(chain.readable, HEADER_BYTES))
        except (BlockingIOError, InterruptedError):
            return FULL
        except OSError as error:
            if error.errno in (errno.EMSGSIZE, errno.ENOBUFS, errno.ENOMEM):
                return DROPPED
            raise ConnectionResetError(error.errno, f"network socket: {error.strerror}") from None
        return SENT

    def flush(self) -> bool:
        return True

    def close(self) -> None:
        os.close(self.fd)


class Stream:
    """A connected SOCK_STREAM socket: before each frame its length, four bytes, the highest first.

    Many small frames come with one read, and are copied from there: that is cheaper than two reads for each.
    """

    features = 0
    _LENGTH_BYTES = 4

    def __init__(self, fd: int) -> None:
        """`fd` belongs to this object from here on. It is made not to block: one that does would stop all devices."""
        self.fd = fd
        os.set_blocking(fd, False)
        self._read = memoryview(bytearray(4 * (self._LENGTH_BYTES + MOST_FRAME_BYTES)))
        self._start = self._end = 0  # what of it is still to be handed on
        self._tail = b""  # what the socket did not take of a frame; the guest's buffers are free by then

    def start(self, features: int) -> None:
        """Nothing to agree on."""

    def receive(self, buffers: ReceiveBuffers, most_frames: int) -> None:
        if not self._hand_on(buffers):
            return
        try:
            count = os.readv(self.fd, [self._read[self._end :]])
        except (BlockingIOError, InterruptedError):
            return
        if not count:
            raise ConnectionResetError(errno.ECONNRESET, "the network's socket was closed")
        self._end += count
        self._hand_on(buffers)

    def _hand_on(self, buffers: ReceiveBuffers) -> bool:
        """Copy the frames that are here whole; False when the guest has no buffers for the next."""
        read, start, end = self._read, self._start, self._end
        fitted = True
        while end - start >= self._LENGTH_BYTES:
            body = start + self._LENGTH_BYTES
            length = int.from_bytes(read[start:body], "big")
            if not 0 < length <= MOST_FRAME_BYTES:
                raise ConnectionResetError(errno.EPROTO, f"the network's socket announced a frame of {length} bytes")
            if end - body < length:
                break
            fitted = buffers.copy_frame(read[body : body + length])
            if not fitted:
                break
            start = body + length
        if start:
            read[: end - start] = read[start:end]
        self._start, self._end = 0, end - start
        return fitted

    def send(self, chain: Chain) -> int:
        length = chain.readable_bytes - HEADER_BYTES
        if not 0 < length <= MOST_FRAME_BYTES:
            return DROPPED
        if not self.flush():
            return FULL
        prefix = length.to_bytes(self._LENGTH_BYTES, "big")
        frame = after(chain.readable, HEADER_BYTES)
        sent = self._write([prefix, *frame])
        if not sent:
            return FULL
        if sent < len(prefix) + length:
            # Kept whole, and apart from the guest: a reset must not cut a frame short, for all later ones depend on it.
            self._tail = (prefix + gather(frame, length))[sent:]
        return SENT

    def flush(self) -> bool:
        if self._tail:
            self._tail = self._tail[self._write([self._tail]) :]
        return not self._tail

    def _write(self, parts: list[bytes | memoryview]) -> int:
        try:
            return os.writev(self.fd, parts)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise ConnectionResetError(error.errno, f"network socket: {error.strerror}") from None

    def close(self) -> None:
        os.close(self.fd)
