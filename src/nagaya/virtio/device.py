"""What a virtio device is to its transport, and what it gets from it."""

from __future__ import annotations

from collections.abc import Callable

from nagaya.errors import GuestFault
from nagaya.memory import GuestMemory
from nagaya.static import Any, NamedTuple, Protocol
from nagaya.virtio.loop import Loop
from nagaya.virtio.queue import Queue

# Device types: virtio 1.2, section 5.
NET = 1
BLOCK = 2
CONSOLE = 3
ENTROPY = 4
BALLOON = 5
VSOCK = 19
FILE_SYSTEM = 26

# Features of every device: section 6. These are the transport's to offer, not the device's.
RING_INDIRECT_DESC = 1 << 28
RING_EVENT_IDX = 1 << 29
VERSION_1 = 1 << 32


class QueuePlace(NamedTuple):
    """What a driver says of one queue: its number, its entries, and the guest's addresses of its parts."""

    number: int
    size: int
    descriptors: int
    available: int
    used: int


def make_queue(memory: GuestMemory, place: QueuePlace, features: int, interrupt: Callable[[], None]) -> Queue:
    """The queue, as the agreed `features` have it. Raises `GuestFault`, as `Queue` does."""
    return Queue(
        memory, index=place.number, size=place.size, descriptors=place.descriptors, available=place.available,
        used=place.used, event_index=bool(features & RING_EVENT_IDX), indirect=bool(features & RING_INDIRECT_DESC),
        interrupt=interrupt,
    )  # fmt: skip


def _raise(fault: GuestFault) -> None:
    raise fault


class Activated(NamedTuple):
    """What a device has from the driver's DRIVER_OK until the next reset."""

    memory: GuestMemory
    queues: tuple[Queue | None, ...]
    """By number; None for one that the driver left off."""
    features: int
    """What both sides agreed on."""
    loop: Loop
    config_changed: Callable[[], None]
    """Tells the driver that the configuration space is not what it was. Any thread."""
    fault: Callable[[GuestFault], None] = _raise
    """For a fault found outside of `activate` and `kicked`: does what the transport does when those raise it."""
    kick_fds: tuple[int, ...] = ()
    """By queue: where the driver's notifications arrive. For a device that takes them itself (`Direct`)."""
    interrupt_fd: int = -1
    """Each write to it is an edge on the device's interrupt line. Likewise."""
    saved: dict[str, Any] | None = None
    """What `Device.save` has answered, where the driver has been at it before: this goes on from there."""


def guard(live: Activated | None, step: Callable[[], None]) -> None:
    """Run what the loop or the host's side calls: a fault of the guest's in it stops the device, and not the caller."""
    try:
        step()
    except GuestFault as fault:
        if live is None:
            raise
        live.fault(fault)


class Device(Protocol):
    """One virtio device. All but the configuration space is used on the loop's thread only, so it needs no lock."""

    @property
    def name(self) -> str:
        """For logs and statistics: blk0, net0."""

    @property
    def device_id(self) -> int:
        """Virtio 1.2, section 5."""

    @property
    def features(self) -> int:
        """Offered bits, without the transport's."""

    @property
    def queue_sizes(self) -> tuple[int, ...]:
        """The largest size of each queue; powers of two."""

    def read_config(self, offset: int, size: int) -> bytes:
        """Bytes of the configuration space; fewer at its end. vCPU threads."""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver wrote; what may not be written stays. vCPU threads."""

    def activate(self, live: Activated) -> None:
        """The driver is ready. Raises `GuestFault` when it agreed to what cannot be."""

    def kicked(self, queue: int) -> None:
        """A queue has work. After a `GuestFault` the transport asks the driver for a reset, and calls no more."""

    def reset(self) -> None:
        """Let go of `live` at once, requests in flight included; ready for `activate` again."""

    def close(self) -> None:
        """Give back what the host lent. Nothing is called after it."""

    def counters(self) -> dict[str, int]:
        """Requests, bytes, errors since the start. Any thread."""

    def save(self) -> dict[str, Any]:
        """What is to be in `Activated.saved` another time, beside the queues; the device does nothing meanwhile.

        "unpopped" has, by queue, how many of the chains popped last are not published: they are popped again then.
        Raises `Unsupported` when there is more to it than can be saved.
        """


class Direct(Device, Protocol):
    """A device whose kicks and interrupts do not pass through its transport: another process's, or the kernel's.

    From `activate` to `reset` it waits for `Activated.kick_fds` itself, and raises the interrupt by `interrupt_fd`.
    """

    direct: bool
    """True."""

    def is_raised(self) -> bool:
        """Whether it may have raised an interrupt for used buffers that the driver has not acknowledged. vCPU threads."""

    def acknowledged(self) -> None:
        """The driver has: what is raised from now on comes with an edge of its own. vCPU threads."""

    def hold(self) -> Callable[[], None]:
        """Touch no memory of the guest's until the answer is called. `save` says "indices" too: its queues' states."""


def as_direct(device: Device) -> Direct | None:
    """The device, if it is one of those."""
    return device if getattr(device, "direct", False) else None  # type: ignore[return-value]
