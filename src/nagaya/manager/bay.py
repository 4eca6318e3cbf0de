"""The disks of a whole machine, after it was made: put in, taken out, made larger; while it runs too, where that goes."""

from __future__ import annotations

import os

from nagaya.engines import engine_of
from nagaya.engines.qemu.pc_arguments import SLOTS
from nagaya.errors import Conflict, HostError, NagayaError, NotFound, UsageError
from nagaya.manager.hardware import DriveOptions, make_own_disk, own_format, plan_drive
from nagaya.model.spec import Drive, Hardware
from nagaya.model.state import ALIVE, require
from nagaya.storage import machines
from nagaya.storage.disk_images.seed import SEED
from nagaya.storage.disk_images.store import Disks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.manager.machine import Machine
    from nagaya.manager.machines import Machines


class Bay:
    """What `machine.front.bay` is. A disk is named as it was given, or "disk1" if it is the machine's own."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._disks = Disks(machine.paths.root)

    @property
    def _hardware(self) -> Hardware:
        hardware = self._machine.spec.hardware
        assert hardware is not None
        return hardware

    def attach(self, options: DriveOptions) -> str:
        """Put a disk in; what it is called by `detach`. Raises as creating a machine with it would, and leaves nothing."""
        machine = self._machine
        with machine.lock():
            machine.reload()
            hardware, before = self._hardware, machine.spec
            drive = plan_drive(options, self._free_number(), self._disks, own_format(hardware.firmware))
            if any(each.path == drive.path and not (each.read_only and drive.read_only) for each in hardware.drives):
                raise Conflict(f"machine '{machine.name}' has disk '{options.text}' already")
            drive = drive._replace(slot=self._free_slot())
            planned = before._replace(hardware=hardware._replace(drives=(*hardware.drives, drive)))
            engine_of(planned).check(planned)
            target = f"{machine.directory}/{drive.path}" if drive.own else ""
            if target:
                self._drop(target)  # of a command that was cut off: no record names it
            try:
                if target:
                    make_own_disk(self._disks, target, drive, options)
                machine.spec = planned
                machines.store_spec(machine.paths, planned)
                if machine.settled().phase in ALIVE:
                    machine.ask("plug_disk", slot=drive.slot)
            except BaseException:
                machine.spec = before
                machines.store_spec(machine.paths, before)
                if target:
                    self._drop(target)
                raise
        machine.record("attach", disk=_name(drive))
        return _name(drive)

    def detach(self, name: str, *, remove: bool = False) -> None:
        """Take a disk out; its own is removed with that, which has to be said. Raises `NotFound`, `Conflict`."""
        machine = self._machine
        with machine.lock():
            machine.reload()
            number, drive = self._find(name)
            hardware, before = self._hardware, machine.spec
            if drive.own and not remove:
                raise Conflict(
                    f"disk '{name}' is the machine's own, and goes with what is on it",
                    hint="say --remove if that is meant; 'nagaya disk convert' makes a copy before",
                )
            if remove and not drive.own:
                raise UsageError(
                    f"disk '{name}' is not the machine's own", hint="'nagaya disk rm' removes it afterwards"
                )
            rest = tuple(each for at, each in enumerate(hardware.drives) if at != number)
            if not [each for each in rest if each.path != SEED]:
                raise Conflict("a machine needs a disk or a CD, and this is its last one")
            alive = machine.settled().phase in ALIVE
            if alive and not drive.slot:
                raise Conflict(
                    f"disk '{name}' was in machine '{machine.name}' when it was made, and cannot be taken out while it runs",
                    hint=f"stop it first: nagaya stop {machine.name}", state="running", required="not running",
                )  # fmt: skip
            if alive:
                machine.ask("unplug_disk", slot=drive.slot)
            machine.spec = before._replace(hardware=hardware._replace(drives=rest))
            machines.store_spec(machine.paths, machine.spec)
            if drive.own:
                self._drop(f"{machine.directory}/{drive.path}")
        machine.record("detach", disk=_name(drive))

    def resize(self, name: str, sign: str, size_bytes: int, *, shrink: bool = False) -> int:
        """Make a disk so large, or with the sign "+" or "-" so much more or less; its new size. Larger alone while it runs."""
        machine = self._machine
        with machine.lock():
            machine.reload()
            number, drive = self._find(name)
            path = f"{machine.directory}/{drive.path}" if drive.own else drive.path
            if machine.settled().phase not in ALIVE:
                return self._disks.resize(path, sign, size_bytes, format=drive.format, shrink=shrink).virtual_bytes
            require("plug", machine.state.phase, machine.name)
            now = self._disks.get(path, format=drive.format).virtual_bytes
            wanted = self._disks.plan_size(now, sign, size_bytes)
            if wanted < now:
                raise Conflict(
                    f"disk '{name}' is in use by machine '{machine.name}', and cannot become smaller",
                    hint=f"stop it first: nagaya stop {machine.name}", state="running", required="not running",
                )  # fmt: skip
            machine.ask("resize_disk", drive=number, size_bytes=wanted)
        machine.record("resize", disk=_name(drive), size=str(wanted))
        return wanted

    # -- inside

    def _find(self, name: str) -> tuple[int, Drive]:
        for number, drive in enumerate(self._hardware.drives):
            if not drive.cdrom and drive.own and name in (_name(drive), drive.path):
                return number, drive
        try:
            path = os.path.realpath(self._disks.locate(name))
        except NagayaError:
            path = ""
        for number, drive in enumerate(self._hardware.drives):
            if not drive.cdrom and not drive.own and drive.path == path:
                return number, drive
        has = ", ".join(_name(drive) for drive in self._hardware.drives if not drive.cdrom)
        raise NotFound(f"machine '{self._machine.name}' has no disk '{name}'", hint=f"it has: {has or 'none'}")

    def _free_number(self) -> int:
        taken = {_name(drive) for drive in self._hardware.drives if drive.own}
        return next(number for number in range(len(taken) + 1) if f"disk{number}" not in taken)

    def _free_slot(self) -> int:
        if self._hardware.compat:
            return 0
        taken = {drive.slot for drive in self._hardware.drives}
        slot = next((number for number in range(1, SLOTS + 1) if number not in taken), 0)
        if not slot:
            raise UsageError(f"a machine has at most {SLOTS} disks that were attached to it", hint="detach one first")
        return slot

    def _drop(self, path: str) -> None:
        try:
            os.unlink(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise HostError.from_os(error, "cannot remove the disk") from None


def find_user(all_: Machines, path: str) -> Machine | None:
    """The machine that runs with the disk at `path` to write to."""
    for machine in all_.list():
        drives = machine.spec.hardware.drives if machine.spec.hardware is not None else ()
        has_it = any(drive.path == path and not drive.own and not drive.read_only for drive in drives)
        if has_it and machine.state.phase in ALIVE:
            return machine
    return None


def _name(drive: Drive) -> str:
    return drive.path.partition(".")[0] if drive.own else drive.path
