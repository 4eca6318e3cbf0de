"""virtio-net whose frames the host's kernel moves (vhost-net) between the guest's rings and a tap device.

Kicks go from the guest to the kernel's thread, and its interrupts to the guest, by eventfds alone: no frame and no
notification passes through Python. Negotiation, configuration space and reset are `Net`'s.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

from nagaya.errors import GuestFault
from nagaya.kernel import vhost as kernel
from nagaya.static import Any
from nagaya.virtio.device import RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1, Activated
from nagaya.virtio.net import F_MRG_RXBUF, Net
from nagaya.virtio.net_link import Tap
from nagaya.virtio.queue import Queue

DEVICE = "/dev/vhost-net"
_LOG_PAGE_BYTES = 4096  # VHOST_PAGE_SIZE of the kernel's drivers/vhost/vhost.c
_RING_FEATURES = VERSION_1 | RING_EVENT_IDX | RING_INDIRECT_DESC | F_MRG_RXBUF


def open_vhost_net() -> int:
    """The kernel's back end for one card, or -1: the host has none, this user may not use it, or it is too old."""
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        if not _RING_FEATURES & ~kernel.features(fd):
            return fd
    except OSError:
        pass
    os.close(fd)
    return -1


def make_tap_card(name: str, tap: int, *, mac: bytes, mtu: int = 0, vhost: bool = True) -> Net:
    """The quickest card that this host has for a tap device, whose descriptor is the card's from here on."""
    fd = open_vhost_net() if vhost else -1
    return Net(name, Tap(tap), mac=mac, mtu=mtu) if fd < 0 else VhostNet(name, Tap(tap), fd, mac=mac, mtu=mtu)


class VhostNet(Net):
    """A card on a tap device. `direct`: the transport leaves its kicks and the acknowledging of interrupts to it."""

    direct = True

    def __init__(self, name: str, link: Tap, vhost_fd: int, *, mac: bytes, mtu: int = 0) -> None:
        """`vhost_fd` is from `open_vhost_net`, and belongs to this object from here on."""
        super().__init__(name, link, mac=mac, mtu=mtu)
        self._vhost = vhost_fd
        self._owned = False
        self._running: tuple[int, ...] = ()  # the numbers of queues that the kernel works on
        self._log: ctypes.Array[ctypes.c_char] | None = None  # of pages, while somebody wants to know

    def activate(self, live: Activated) -> None:
        """See `Device`. Raises `GuestFault` for rings that the kernel does not take."""
        self._live = live
        queues = tuple(queue for queue in live.queues if queue is not None)
        try:
            self._link.start(live.features)
            if (
                not self._owned
            ):  # not before: the owner is the process, and it may have forked since the device was made
                kernel.set_owner(self._vhost)
                self._owned = True
            kernel.set_features(self._vhost, live.features & _RING_FEATURES)
            kernel.set_memory(
                self._vhost, [(region.gpa, region.size_bytes, region.hva) for region in live.memory.regions]
            )
            for queue in queues:
                self._hand_over(queue, live)
            self._running = tuple(queue.index for queue in queues)
            if self._plugged:
                self._connect(self._link.fd)
        except OSError as error:
            raise GuestFault(f"{self.name}: {error.strerror}") from None

    def _hand_over(self, queue: Queue, live: Activated) -> None:
        hva = live.memory.hva
        kernel.set_ring(
            self._vhost, queue.index, size=queue.size, descriptors=hva(queue.descriptors, 1),
            available=hva(queue.available, 1), used=hva(queue.used, 1), next_available=queue.next_available,
            kick_fd=live.kick_fds[queue.index], call_fd=live.interrupt_fd,
        )  # fmt: skip

    def _connect(self, backend: int) -> None:
        for number in self._running:
            kernel.set_backend(self._vhost, number, backend)

    def plug(self, plugged: bool) -> None:
        """Put the cable in, or pull it out: no frame passes then. Loop thread."""
        if plugged != self._plugged:
            self._plugged = plugged
            self._connect(self._link.fd if plugged else kernel.VHOST_FILE_UNBIND)
            self._link_changed()

    def kicked(self, queue: int) -> None:
        """See `Device`: never, for the kernel waits for the kicks."""

    def is_raised(self) -> bool:
        """Whether its interrupt may be one for a used buffer. The kernel does not say when it raised one: always."""
        return bool(self._running)

    def acknowledged(self) -> None:
        """The driver has seen the interrupt: nothing to take back."""

    def hold(self) -> Callable[[], None]:
        """See `Direct`."""
        self._connect(kernel.VHOST_FILE_UNBIND)
        return lambda: self._connect(self._link.fd) if self._plugged else None

    def save(self) -> dict[str, Any]:
        """See `Device`; while it is held. What the kernel has used it has said in the guest's memory alone."""
        positions = self.positions()
        queues = self._live.queues if self._live is not None else ()
        return {"indices": [queue and (positions[queue.index], queue.published()) for queue in queues]}

    def log_writes(self, on: bool) -> None:
        """Have the kernel log the pages that it writes frames to, or not any more. Loop thread. Raises `OSError`."""
        live = self._live
        if live is None:
            self._log = None
            return
        if on:
            self._log = self._new_log(live)
            kernel.set_log(self._vhost, ctypes.addressof(self._log))
        kernel.set_features(self._vhost, live.features & _RING_FEATURES | (1 << kernel.VHOST_F_LOG_ALL if on else 0))
        if not on:
            self._log = None

    def mark_written(self) -> None:
        """Mark in the memory's log what the kernel has logged. Loop thread. Raises `OSError`."""
        live, log = self._live, self._log
        if live is None or log is None:
            return
        self._log = self._new_log(live)  # bits that the kernel sets cannot be cleared beside it: let it set others
        kernel.set_log(self._vhost, ctypes.addressof(self._log))
        for at, byte in enumerate(log.raw):
            for bit in range(8) if byte else ():
                if byte >> bit & 1:
                    live.memory.mark((8 * at + bit) * _LOG_PAGE_BYTES, _LOG_PAGE_BYTES)

    @staticmethod
    def _new_log(live: Activated) -> ctypes.Array[ctypes.c_char]:
        end = max(region.gpa + region.size_bytes for region in live.memory.regions)
        return ctypes.create_string_buffer(-(-end // (8 * _LOG_PAGE_BYTES)) + 8)  # it is written in words

    def reset(self) -> None:
        """See `Device`. When it returns, the kernel touches the guest's memory no more."""
        self._connect(kernel.VHOST_FILE_UNBIND)
        self._running = ()
        self._live = None

    def positions(self) -> dict[int, int]:
        """Queue number -> the next available entry that it would take. To be asked after the cable was pulled out."""
        return {number: kernel.ring_position(self._vhost, number) for number in self._running}

    def close(self) -> None:
        """See `Device`."""
        super().close()
        os.close(self._vhost)

    def counters(self) -> dict[str, int]:
        """See `Device`: frames are counted by the host's link, and nowhere here."""
        return {}
