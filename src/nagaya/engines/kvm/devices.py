"""The virtio devices that every machine of type kvm has, in the order that its places and its templates depend on."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.virtio.console import Port
    from nagaya.virtio.device import Device


def plan_devices(ports: tuple[Port, ...], disks: tuple[Device, ...]) -> list[Device]:
    """Those that every machine has, in their order: a network card and the host's directories come after them."""
    from nagaya.virtio.balloon import Balloon
    from nagaya.virtio.console import Console
    from nagaya.virtio.rng import Rng

    return [Console("console", ports), *disks, Rng("rng"), Balloon("balloon")]
