"""From a machine's record to its rootfs and mount plans."""

from __future__ import annotations

import os

from nagaya.errors import IntegrityError, NagayaError, NotFound, UsageError
from nagaya.model.spec import MachineSpec
from nagaya.static import NamedTuple
from nagaya.storage import machines, records
from nagaya.storage.paths import Paths
from nagaya.storage.plan import DiskPlan, HardwarePlan, MountPlan, RootfsPlan

DATA_DISK = "data.img"
BACKING_DISK = "data.backing"
BLANK_DISKS = "blank-disks"
OWN_ROOT = "root.img"
"""The root image of a machine that came with it from elsewhere."""
FIRMWARE_STATE = "uefi-variables.fd"
TPM_STATE = "tpm-state"


class Layers(NamedTuple):
    """The image's unpacked layers, topmost first, as the machine's `rootfs.json` keeps them."""

    lower: tuple[str, ...]
    root_image: str = ""  # the same as one file-system image, for machines with disks


def store_layers(directory: str, lower: tuple[str, ...], *, root_image: str = "") -> None:
    records.store(f"{directory}/rootfs.json", Layers(lower, root_image))


def copy_layers(source: str, directory: str) -> None:
    """Give the machine in `directory` the same root as that in `source`. Raises `OSError`."""
    layers = records.load(f"{source}/rootfs.json", Layers)
    if layers.root_image == f"{source}/{OWN_ROOT}":
        os.link(layers.root_image, f"{directory}/{OWN_ROOT}")
        layers = layers._replace(root_image=f"{directory}/{OWN_ROOT}")
    records.store(f"{directory}/rootfs.json", layers)


def make_data_disk(directory: str, spec: MachineSpec) -> None:
    """The disk that a virtual machine will write to: its first start makes a file system of it. Raises `HostError`."""
    from nagaya.storage.disks import DEFAULT_BYTES, reserve_data_disk  # lazy: virtual machines alone have one

    reserve_data_disk(f"{directory}/{DATA_DISK}", spec.limits.storage_bytes or DEFAULT_BYTES)


def load_record(directory: str, spec: MachineSpec) -> Layers:
    """What the machine's root is made of; nothing for a whole machine, which has disks alone."""
    if spec.hardware is not None:
        return Layers(())
    return records.load(f"{directory}/rootfs.json", Layers)


def is_own_file(name: str) -> bool:
    """Whether a file of a whole machine's directory is one that its system writes."""
    stem, _, ending = name.rpartition(".")
    return name in (FIRMWARE_STATE, TPM_STATE) or (
        stem.startswith("disk") and ending in ("qcow2", "raw") and stem[4:].isdigit()
    )


def load_layers(directory: str) -> tuple[str, ...]:
    return records.load(f"{directory}/rootfs.json", Layers).lower


def plan_disks(directory: str, spec: MachineSpec) -> DiskPlan:
    """A virtual machine's disks. Raises `IntegrityError` when one is no longer there."""
    image, data = records.load(f"{directory}/rootfs.json", Layers).root_image, f"{directory}/{DATA_DISK}"
    if not os.path.isfile(image):
        raise IntegrityError(
            f"the root image of '{spec.image}' is missing from the store ({image})",
            hint=f"bring the image back with 'nagaya pull {spec.image}', then start the machine",
        )
    if not os.path.isfile(data):
        raise IntegrityError(f"the machine's disk is missing ({data})", hint="remove the machine: nagaya rm")
    backing = f"{directory}/{BACKING_DISK}"
    return DiskPlan(
        image, data, spec.read_only, f"{os.path.dirname(os.path.dirname(directory))}/{BLANK_DISKS}",
        backing if os.path.lexists(backing) else "",
    )  # fmt: skip


def plan_hardware(paths: Paths, spec: MachineSpec) -> HardwarePlan:
    """A whole machine's drives. Raises `Conflict` for a disk that is to be written and that others stand on."""
    from nagaya.storage.disk_images.store import Disks  # lazy: whole machines alone have them

    directory, disks, install = paths.machine(spec.id), Disks(paths.root), None
    drives = spec.hardware.drives if spec.hardware is not None else ()
    if spec.hardware is not None and spec.hardware.install is not None:
        from nagaya.storage.disk_images.installer import find_in  # lazy: few are installed

        install = find_in(directory, spec)
    found = tuple(f"{directory}/{drive.path}" if drive.own else drive.path for drive in drives)
    for drive, path in zip(drives, found, strict=True):
        if path and not drive.read_only:
            disks.refuse_dependants(path)
    return HardwarePlan(
        found, (disks.directory, directory), f"{directory}/{FIRMWARE_STATE}", f"{directory}/{TPM_STATE}", install
    )


def plan_rootfs(directory: str, spec: MachineSpec) -> RootfsPlan:
    """The machine's overlay. Raises `IntegrityError` when a layer is no longer there."""
    lower = load_layers(directory)
    for layer in lower:
        if not os.path.isdir(layer):
            raise IntegrityError(
                f"a layer of image '{spec.image}' is missing from the store ({layer})",
                hint=f"bring it back with 'nagaya pull {spec.image}'",
            )
    return RootfsPlan(lower, f"{directory}/upper", f"{directory}/work", spec.read_only)


def plan_mounts(paths: Paths, spec: MachineSpec) -> tuple[MountPlan, ...]:
    """The machine's mounts with sources resolved on this host, parents before children."""
    plans = []
    for mount in spec.mounts:
        source, kind = mount.source, mount.kind
        if kind == "volume":
            from nagaya.storage.volumes import Volumes  # lazy: most machines have none

            source, kind = Volumes(paths.root).get(mount.source).path, "bind"
        elif kind == "bind":
            if not os.path.isabs(source):
                raise UsageError(f"the mount source '{source}' is not an absolute path")
            if not os.path.exists(source):
                raise NotFound(
                    f"the mount source '{source}' does not exist",
                    hint=f"make it first, for example 'mkdir -p {source}'",
                )
        plans.append(
            MountPlan(
                kind,
                source,
                mount.target,
                mount.read_only,
                mount.propagation,
                mount.size_bytes,
                mount.mode,
                mount.options,
                owned=mount.kind == "volume",
            )
        )
    return tuple(sorted(plans, key=lambda plan: plan.target.rstrip("/").count("/")))


def find_in_layers(lower: tuple[str, ...], target: str) -> tuple[str, ...]:
    """The layers' directories at the path `target`, topmost first: what an overlay would merge there.

    Nothing when the path goes through a link: what a volume at such a place begins with is not defined.
    """
    found: list[str] = []
    for layer in lower:
        path = layer
        for part in target.strip("/").split("/"):
            path = f"{path}/{part}"
            if os.path.islink(path):
                return ()
            if os.path.lexists(path) and not os.path.isdir(path):
                return tuple(found)  # a file, or a deletion: what lies below it does not show
            if not os.path.isdir(path):
                break
        else:
            found.append(path)
        if _hides_lower(layer, target):
            break
    return tuple(found)


def _hides_lower(layer: str, target: str) -> bool:
    """Whether a directory on the way to `target` is opaque in this layer."""
    path = layer
    for part in target.strip("/").split("/"):
        path = f"{path}/{part}"
        try:
            if os.getxattr(path, "trusted.overlay.opaque", follow_symlinks=False) == b"y":
                return True
        except OSError:
            continue
    return False


def remove_anonymous_volumes(paths: Paths, spec: MachineSpec) -> None:
    """Remove the volumes that were made for this machine alone. Call it while the machine's record is still there."""
    names = [mount.source for mount in spec.mounts if mount.anonymous]
    if not names:
        return
    from nagaya.storage.volumes import Volumes  # lazy: most machines have none

    volumes = Volumes(paths.root)
    for name in names:
        try:
            volumes.remove(name, force=True, in_use=machines.volumes_in_use(paths, without=spec.id))
        except NagayaError:
            continue  # gone already, or somebody else uses it by its name: theirs now
