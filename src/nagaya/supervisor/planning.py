"""What a machine is to be booted from, this time."""

from __future__ import annotations

from nagaya.model.spec import MachineSpec
from nagaya.net.plan import NetworkPlan
from nagaya.storage import rootfs
from nagaya.storage.plan import DiskPlan, HardwarePlan, RootfsPlan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.supervisor.supervisor import Supervisor


def plan_boot(machine: Supervisor, network: NetworkPlan) -> tuple[MachineSpec, RootfsPlan | DiskPlan | HardwarePlan]:
    """The machine's record, or what it is as long as its system is being installed; and the root of that."""
    spec, hardware, directory = machine.spec, machine.spec.hardware, machine.paths.machine(machine.spec.id)
    if machine.engine.rootfs_kind == "disk":
        return spec, rootfs.plan_disks(directory, spec)
    if hardware is None:
        return spec, rootfs.plan_rootfs(directory, spec)
    machine.installing = None
    if hardware.install is not None:
        from nagaya.supervisor.installing import find_installing  # lazy: few are installed

        machine.installing = find_installing(machine)
        spec = spec if machine.installing is None else machine.installing.spec
    elif hardware.seed is not None:
        from nagaya.supervisor.seeding import seed  # lazy: those alone that cloud-init is in

        seed(directory, spec, network)
    return spec, rootfs.plan_hardware(machine.paths, spec)
