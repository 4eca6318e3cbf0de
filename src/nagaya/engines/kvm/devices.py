"""The virtio devices that every machine of type kvm has, in the order that its places and its templates depend on."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.virtio.console import Port
    from nagaya.virtio.device import Device


SHARES = "shares"
"""The device for directories of the host: the last one."""


def card_name(number: int) -> str:
    """What network card `number`'s device is called: saved machines know it by that."""
    return f"eth{number}" if number else "net"


def plan_devices(ports: tuple[Port, ...], disks: tuple[Device, ...]) -> list[Device]:
    """Those that every machine has, in their order: network cards and the host's directories come after them."""
    from nagaya.virtio.balloon import Balloon
    from nagaya.virtio.console import Console
    from nagaya.virtio.rng import Rng

    return [Console("console", ports), *disks, Rng("rng"), Balloon("balloon")]
