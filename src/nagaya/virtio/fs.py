"""virtio-fs (virtio 1.2, section 5.11): a directory of the host, served to the guest by virtiofsd over vhost-user.

The daemon answers the guest's requests by itself. Kicks and interrupts pass through our eventfds: an interrupt has to set
virtio-mmio's status register before it is raised, and that register is ours.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

from nagaya.errors import GuestFault, NagayaError, Unsupported, UsageError
from nagaya.memory import GuestMemory
from nagaya.static import Any, Protocol
from nagaya.virtio.device import FILE_SYSTEM, RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1, Activated
from nagaya.virtio.queue import Queue
from nagaya.virtio.vhost_user import Ring

QUEUE_SIZE = 128
TAG_BYTES = 36
_CONFIG = struct.Struct(f"<{TAG_BYTES}sI")  # struct virtio_fs_config
_TRANSPORT_FEATURES = VERSION_1 | RING_INDIRECT_DESC | RING_EVENT_IDX


class Daemon(Protocol):
    """What works on the device's rings: a `VhostUser`."""

    fd: int
    features: int

    def read_config(self, size: int) -> bytes | None: ...
    def start(self, features: int, memory: GuestMemory, rings: Sequence[Ring]) -> None: ...
    def stop(self) -> object: ...
    def close(self) -> None: ...


class Nobody:
    """No daemon, for a machine that is only there to be saved before it mounts anything."""

    features = _TRANSPORT_FEATURES

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # never ready

    def read_config(self, size: int) -> bytes | None:
        return None

    def start(self, features: int, memory: GuestMemory, rings: Sequence[Ring]) -> None:
        """Nobody looks at them."""

    def stop(self) -> None:
        """Nobody did."""

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class FileSystem:
    """The device: a queue for what must not wait (FUSE_FORGET, FUSE_INTERRUPT), and one or more for requests.

    When the daemon ends, this device asks its driver for a reset that leads nowhere; the machine goes on.
    """

    device_id = FILE_SYSTEM
    features = 0

    def __init__(self, name: str, daemon: Daemon, *, tag: str = "", request_queues: int = 1) -> None:
        """`daemon` is connected and greeted. `tag` is what the guest mounts; empty to take the daemon's own.

        Raises `Unsupported` for a daemon that cannot work on our rings, and `RemoteError`.
        """
        missing = _TRANSPORT_FEATURES & ~daemon.features
        if missing:
            raise Unsupported(
                f"the daemon of {name} cannot use the machine's queues",
                finding=f"it lacks the virtio features {missing:#x}",
            )
        self.name = name
        self.queue_sizes = (QUEUE_SIZE,) * (1 + request_queues)
        self._daemon = daemon
        self._config = _make_config(daemon, tag, request_queues)
        self.ended = ""
        """Why the daemon is no longer there; empty while it is."""
        self._live: Activated | None = None
        self._kick_fds = [_eventfd() for _ in self.queue_sizes]
        self._call_fds = [_eventfd() for _ in self.queue_sizes]
        self._counts = {"kicks": 0, "interrupts": 0}

    def read_config(self, offset: int, size: int) -> bytes:
        return self._config[offset : offset + size]

    def write_config(self, offset: int, data: bytes) -> None:
        """Nothing of it can be written."""

    def activate(self, live: Activated) -> None:
        self._live = live
        if self.ended:
            raise GuestFault(f"{self.name}: {self.ended}")
        rings = []
        for number, queue in enumerate(live.queues):
            if queue is not None:
                self._watch_calls(live, queue, self._call_fds[number])
                rings.append(self._ring(number, queue))
        try:
            self._daemon.start(live.features, live.memory, rings)
        except NagayaError as error:
            self._lose(error.message)
            raise GuestFault(f"{self.name}: {self.ended}") from None
        live.loop.watch(self._daemon.fd, self._heard)
        for ring in rings:  # what the driver queued before it was ready
            os.eventfd_write(ring.kick_fd, 1)

    def kicked(self, queue: int) -> None:
        if self.ended:
            raise GuestFault(f"{self.name}: {self.ended}")
        self._counts["kicks"] += 1
        os.eventfd_write(self._kick_fds[queue], 1)

    def reset(self) -> None:
        live, self._live = self._live, None
        if live is None:
            return
        if not self.ended:
            live.loop.unwatch(self._daemon.fd)
            try:
                self._daemon.stop()  # before the guest may use the rings' memory for something else
            except NagayaError as error:
                self._lose(error.message)
        for fd in self._call_fds:
            live.loop.unwatch(fd)

    def close(self) -> None:
        self.reset()
        self._daemon.close()
        for fd in (*self._kick_fds, *self._call_fds):
            os.close(fd)

    def save(self) -> dict[str, Any]:
        """Only before the guest has mounted it: the daemon keeps to itself what it knows of a mount."""
        for queue in self._live.queues if self._live is not None else ():
            if queue is not None and queue.peek_available():  # the daemon pops, not we: all that there ever was
                raise Unsupported(
                    "a machine with directories of the host mounted cannot be saved with its memory",
                    hint="stop it first: its disks can be saved then",
                )
        return {}

    def counters(self) -> dict[str, int]:
        return dict(self._counts)

    def _ring(self, number: int, queue: Queue) -> Ring:
        return Ring(
            number=number,
            size=queue.size,
            descriptors=queue.descriptors,
            available=queue.available,
            used=queue.used,
            next_available=queue.next_available,
            kick_fd=self._kick_fds[number],
            call_fd=self._call_fds[number],
        )

    def _watch_calls(self, live: Activated, queue: Queue, fd: int) -> None:
        def called() -> None:
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                return
            self._counts["interrupts"] += 1
            queue.interrupt()

        live.loop.watch(fd, called)

    def _heard(self) -> None:
        """The daemon says nothing of its own accord: either it has ended, or it has lost its way."""
        live = self._live
        self._lose("its daemon ended")
        if live is not None:
            live.fault(GuestFault(f"{self.name}: {self.ended}"))

    def _lose(self, reason: str) -> None:
        self.ended = reason
        if self._live is not None:
            self._live.loop.unwatch(self._daemon.fd)
        self._daemon.close()  # which lets go of the rings, for the daemon has nobody else to work for


def _make_config(daemon: Daemon, tag: str, request_queues: int) -> bytes:
    if not tag:
        told = daemon.read_config(_CONFIG.size)
        if told is None:
            raise Unsupported("this daemon has no tag of its own for its directory", hint="give one")
        tag_bytes = _CONFIG.unpack(told)[0]
    else:
        tag_bytes = tag.encode()
        if len(tag_bytes) > TAG_BYTES:
            raise UsageError(f"the tag '{tag}' has {len(tag_bytes)} bytes", hint=f"take at most {TAG_BYTES}")
    return _CONFIG.pack(tag_bytes, request_queues)


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
