"""Disks that come to a whole machine, go, and grow while it runs. The manager has changed the record, or is about to."""

from __future__ import annotations

from nagaya.errors import RemoteError
from nagaya.model.spec import Drive, MachineSpec
from nagaya.storage import machines, rootfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.supervisor.supervisor import Supervisor


def plug_disk(machine: Supervisor, slot: int) -> None:
    """Put in what the record has in that slot by now."""
    spec = machines.load_spec(machine.paths, machine.spec.id)
    number, drive = _find(spec, slot)
    plan = rootfs.plan_hardware(machine.paths, spec)
    machine.engine.plug_disk(drive, plan.paths[number], allowed=plan.backing_places)  # type: ignore[attr-defined]
    machine.spec = spec


def unplug_disk(machine: Supervisor, slot: int) -> None:
    """Take out what is in that slot, which the record has still: a system may keep it."""
    _, drive = _find(machine.spec, slot)
    machine.engine.unplug_disk(drive)  # type: ignore[attr-defined]
    hardware = machine.spec.hardware
    assert hardware is not None
    rest = tuple(each for each in hardware.drives if each.slot != slot)
    machine.spec = machine.spec._replace(hardware=hardware._replace(drives=rest))


def resize_disk(machine: Supervisor, number: int, size_bytes: int) -> None:
    drives = machine.spec.hardware.drives if machine.spec.hardware is not None else ()
    if number >= len(drives) or drives[number].cdrom:
        raise RemoteError(f"control protocol: the machine's record has no disk {number}")
    machine.engine.resize_disk(drives[number], number, size_bytes)  # type: ignore[attr-defined]


def _find(spec: MachineSpec, slot: int) -> tuple[int, Drive]:
    drives = spec.hardware.drives if spec.hardware is not None else ()
    for number, drive in enumerate(drives):
        if drive.slot == slot and not drive.cdrom:
            return number, drive
    raise RemoteError(f"control protocol: the machine's record has nothing in slot {slot}")
