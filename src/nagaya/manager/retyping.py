"""Giving a machine that does not run other walls: its data goes along, from directories to a disk and back.

The record is what decides: until it says the new type, what has been made for that is not looked at, and afterwards what
was left of the old one is not. So a kill in between loses nothing, and the next change clears away what it left.
"""

from __future__ import annotations

import os

from nagaya.engines import open_engine
from nagaya.errors import Conflict, HostError, Unsupported, UsageError
from nagaya.manager.creating import check_platform
from nagaya.model.spec import MachineSpec
from nagaya.storage import machines, rootfs, shared_disks
from nagaya.storage.tree import remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.manager.machine import Machine


def rebuild(machine: Machine, planned: MachineSpec, *, alive: bool) -> None:
    """Make `machine` what `planned` says, which differs from its record in the type or the disk's size; then store that.

    Its command lock is held. Raises `Conflict` when it is `alive`, `Unsupported` and `UsageError` for what this host or
    this machine cannot have, and what making a disk, or reading one, raises; the machine is then as it was.
    """
    if alive:
        what = "type" if planned.type != machine.spec.type else "disk"
        raise Conflict(
            f"machine '{machine.name}' runs: its {what} can be changed only while it does not",
            hint=f"stop it first: nagaya stop {machine.name}",
            state="running",
            required="created or exited",
        )
    before, after = open_engine(machine.spec.type), open_engine(planned.type)
    if planned.type != machine.spec.type:
        check_platform(planned.platform, planned.image, type_=planned.type)
        after.check_host(kernel=planned.kernel)
    after.check(planned)
    if "backing" not in after.capabilities and after.rootfs_kind == "disk":
        shared_disks.make_whole(machine.directory)
    if before.rootfs_kind != after.rootfs_kind:
        (_make_disk if after.rootfs_kind == "disk" else _make_directories)(machine, planned)
    elif after.rootfs_kind == "disk" and planned.limits.storage_bytes != machine.spec.limits.storage_bytes:
        _grow_disk(machine, planned)
    elif planned.type == machine.spec.type:
        raise UsageError(
            f"machine '{machine.name}' is a {planned.type}, which has no disk of its own", hint="leave --storage away"
        )
    machines.store_spec(machine.paths, planned)


def _grow_disk(machine: Machine, planned: MachineSpec) -> None:
    from nagaya.storage.disks import DEFAULT_BYTES, grow_data_disk

    size_bytes = planned.limits.storage_bytes or DEFAULT_BYTES
    grow_data_disk(f"{machine.directory}/{rootfs.DATA_DISK}", size_bytes)


def _make_disk(machine: Machine, planned: MachineSpec) -> None:
    from nagaya.images.progress import Silent
    from nagaya.images.rootimage import make_root_image
    from nagaya.storage.disks import DEFAULT_BYTES, populate_data_disk

    directory = machine.directory
    if os.path.lexists(f"{directory}/copy.done"):
        raise Unsupported(
            f"machine '{machine.name}' is a whole copy of its image, of which no disk can be made",
            hint="make an image of it with 'nagaya commit', and a new machine of that",
            finding="this host could not mount an overlay for it",
        )
    images = machine.images
    root_image = make_root_image(images, images.get(planned.image_id), progress=Silent())
    disk = f"{directory}/{rootfs.DATA_DISK}"
    _remove_file(disk)
    if os.path.isdir(f"{directory}/upper"):
        populate_data_disk(disk, planned.limits.storage_bytes or DEFAULT_BYTES, f"{directory}/upper")
    else:  # it was never started
        rootfs.make_data_disk(directory, planned)
    rootfs.store_layers(directory, rootfs.load_layers(directory), root_image=root_image)
    machines.store_spec(machine.paths, planned)
    for name in ("upper", "work", "rootfs"):
        remove_tree(f"{directory}/{name}")


def _make_directories(machine: Machine, planned: MachineSpec) -> None:
    from nagaya.kernel.reflink import sync_file_system
    from nagaya.manager.copying import copy_changes

    if os.geteuid():
        raise Unsupported("only root can take a machine's files off its disk with their owners", hint="run it as root")
    directory = machine.directory
    fresh, upper = f"{directory}/upper.tmp", f"{directory}/upper"
    try:
        for path in (fresh, upper, f"{directory}/work"):
            remove_tree(path)
        os.mkdir(fresh, 0o755)
        copy_changes(machine, fresh, locked=True)
        sync_file_system(fresh)  # the disk goes in a moment
        os.mkdir(f"{directory}/work", 0o700)
        os.rename(fresh, upper)
    except OSError as error:
        raise HostError.from_os(error, f"cannot take over the files of machine '{machine.name}'") from None
    finally:
        remove_tree(fresh)
    machines.store_spec(machine.paths, planned)
    _remove_file(f"{directory}/{rootfs.DATA_DISK}")
    _remove_file(f"{directory}/{rootfs.BACKING_DISK}")


def _remove_file(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
