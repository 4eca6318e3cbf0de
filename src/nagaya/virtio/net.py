"""virtio-net (virtio 1.2, section 5.1): one pair of queues, over a link that is a tap device or a socket.

Where the host has vhost-net, the kernel moves a tap device's frames instead (`vhost_net`).
"""

from __future__ import annotations

import struct

from nagaya.errors import GuestFault
from nagaya.static import Any
from nagaya.virtio.device import NET, Activated, guard
from nagaya.virtio.net_link import (
    DROPPED,
    ETHERNET_BYTES,
    F_GUEST_TSO4,
    F_GUEST_TSO6,
    F_GUEST_UFO,
    FULL,
    HEADER_BYTES,
    MOST_FRAME_BYTES,
    Link,
    ReceiveBuffers,
)
from nagaya.virtio.queue import Chain, Queue
from nagaya.virtio.turn import Turn

F_MTU = 1 << 3
F_MAC = 1 << 5
F_MRG_RXBUF = 1 << 15
F_STATUS = 1 << 16
S_LINK_UP = 1

RECEIVE, TRANSMIT = 0, 1
QUEUE_SIZE = 256
_BURST = 64
"""Frames moved in one direction before the other devices on the loop have their turn."""
_LARGE = F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_UFO


class Net:
    """The device. When its link ends, the guest sees the cable unplugged."""

    device_id = NET
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE)

    def __init__(self, name: str, link: Link, *, mac: bytes, mtu: int = 0) -> None:
        """`mac` is 6 bytes; `mtu` the link's, or 0 to leave the guest at its 1500."""
        self.name = name
        self.mac = mac
        self.mtu = mtu
        self.features = link.features | F_MAC | F_STATUS | F_MRG_RXBUF | (F_MTU if mtu else 0)
        self._link = link
        self._plugged = True
        self._alive = True  # the link: once ended, it does not come back
        self._config = self._make_config()
        self._live: Activated | None = None
        self._buffers: ReceiveBuffers | None = None
        self._transmit: Queue | None = None
        self._held: Chain | None = None  # a frame for which the link had no room
        self._turn = Turn()
        self.link_error = ""
        """Why the link ended, for the log."""
        self._received = [0, 0, 0]  # frames, bytes, dropped: of the activations before
        self._sent = [0, 0, 0]

    def _make_config(self) -> bytes:
        status = S_LINK_UP if self._plugged and self._alive else 0
        return struct.pack("<6sHHH", self.mac, status, 1, self.mtu)

    def read_config(self, offset: int, size: int) -> bytes:
        return self._config[offset : offset + size]

    def write_config(self, offset: int, data: bytes) -> None:
        """Nothing of it can be written by a modern driver."""

    def plug(self, plugged: bool) -> None:
        """Put the cable in, or pull it out: no frame passes then. Loop thread."""
        if plugged != self._plugged:
            self._plugged = plugged
            self._link_changed()
            if plugged:
                self._guarded_move()
            else:
                self._watch()

    def activate(self, live: Activated) -> None:
        self._live = live
        if self._alive:
            try:
                self._link.start(live.features)
            except OSError as error:
                self._link_ended(error)
        queue = live.queues[RECEIVE]
        if queue is not None:
            largest = MOST_FRAME_BYTES if live.features & _LARGE else ETHERNET_BYTES + max(self.mtu, 1500)
            mergeable = bool(live.features & F_MRG_RXBUF)
            self._buffers = ReceiveBuffers(queue, mergeable=mergeable, largest_bytes=HEADER_BYTES + largest)
        self._transmit = live.queues[TRANSMIT]
        self._move()

    def kicked(self, queue: int) -> None:
        if queue == RECEIVE:
            self._receive()
        else:
            self._send()
        self._watch()

    def reset(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.loop.unwatch(self._link.fd)
        if self._buffers is not None:
            buffers = self._buffers
            for index, count in enumerate((buffers.packets, buffers.bytes, buffers.dropped)):
                self._received[index] += count
        self._turn.cancel()
        self._buffers = self._transmit = self._held = None

    def close(self) -> None:
        self.reset()
        self._turn.close()
        self._link.close()

    def save(self) -> dict[str, Any]:
        """Buffers that wait for frames are taken anew; the part of a frame that had no room in them is lost."""
        taken = self._buffers.taken if self._buffers is not None else 0
        return {"unpopped": {RECEIVE: taken, TRANSMIT: int(self._held is not None)}}

    def counters(self) -> dict[str, int]:
        buffers = self._buffers
        now = (buffers.packets, buffers.bytes, buffers.dropped) if buffers is not None else (0, 0, 0)
        names = ("frames", "bytes", "dropped")
        received = {f"received_{name}": self._received[index] + now[index] for index, name in enumerate(names)}
        return received | {f"sent_{name}": self._sent[index] for index, name in enumerate(names)}

    def _move(self) -> None:
        self._send()
        self._receive()
        self._watch()

    def _guarded_move(self) -> None:
        guard(self._live, self._move)

    def _receive(self) -> None:
        buffers = self._buffers
        if buffers is None or not self._alive or not self._plugged:
            return
        try:
            self._link.receive(buffers, _BURST)
        except ConnectionError as error:
            self._link_ended(error)
        buffers.signal()

    def _send(self) -> None:
        queue = self._transmit
        if queue is None:
            return
        queue.disarm()
        try:
            if not self._alive or self._link.flush():
                self._send_frames(queue)
        except ConnectionError as error:
            self._link_ended(error)
            self._send_frames(queue)
        queue.signal()

    def _send_frames(self, queue: Queue) -> None:
        for _ in range(_BURST):
            chain, self._held = self._held, None
            if chain is None:
                chain = queue.pop()
            if chain is None:
                if queue.rearm():
                    continue
                return
            self._held = chain  # until it is known that it has gone: the link may end meanwhile
            if chain.readable_bytes < HEADER_BYTES:
                raise GuestFault(f"a frame of {chain.readable_bytes} bytes on {self.name}, its header included")
            outcome = self._link.send(chain) if self._alive and self._plugged else DROPPED
            if outcome == FULL:
                return
            self._held = None
            if outcome == DROPPED:
                self._sent[2] += 1
            else:
                self._sent[0] += 1
                self._sent[1] += chain.readable_bytes - HEADER_BYTES
            queue.publish(chain, 0)
        if self._live is not None:
            self._turn.ask(self._live.loop, self._guarded_move)

    def _link_ended(self, error: OSError) -> None:
        """Frames are dropped from now on. A socket's other side ended, or the tap device was removed."""
        self._alive = False
        self.link_error = str(error)
        self._link_changed()

    def _link_changed(self) -> None:
        self._config = self._make_config()
        if self._live is not None and self._live.features & F_STATUS:
            self._live.config_changed()

    def _watch(self) -> None:
        live = self._live
        if live is None:
            return
        readable = self._plugged and self._buffers is not None and not self._buffers.starved
        writable = self._held is not None or not self._link.flush()
        if self._alive and (readable or writable):
            live.loop.watch(self._link.fd, self._guarded_move, readable=readable, writable=writable)
        else:
            live.loop.unwatch(self._link.fd)
