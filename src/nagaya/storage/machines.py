"""Machines on disk: their directories, records and names. Who may do what, and when, is the manager's to say."""

from __future__ import annotations

import errno
import os

from nagaya.errors import Conflict, IntegrityError
from nagaya.model.spec import MachineSpec
from nagaya.model.state import PHASES, MachineState
from nagaya.storage import records
from nagaya.storage.lock import FileLock, is_held
from nagaya.storage.paths import Paths, make_directory
from nagaya.storage.tree import remove_tree

TRASH = ".trash-"


def is_id(text: str) -> bool:
    return len(text) == 32 and all(digit in "0123456789abcdef" for digit in text)


def ids(paths: Paths) -> list[str]:
    """Ids of all machine directories, half-made ones included."""
    try:
        return [name for name in os.listdir(paths.machines) if is_id(name)]
    except FileNotFoundError:
        return []


def load_spec(paths: Paths, machine_id: str) -> MachineSpec:
    """Raises `FileNotFoundError` for a machine that is not there (or only half made), `IntegrityError`."""
    hint = f"remove it with 'nagaya rm -f {machine_id[:12]}'"
    try:
        spec = records.load(f"{paths.machine(machine_id)}/spec.json", MachineSpec)
    except IntegrityError as error:
        raise IntegrityError(
            f"the record of machine {machine_id[:12]} is damaged: {error.message}", hint=hint
        ) from None
    if spec.id != machine_id:
        raise IntegrityError(f"machine {machine_id[:12]} holds the record of another ({spec.id[:12]})", hint=hint)
    return spec


def store_spec(paths: Paths, spec: MachineSpec) -> None:
    records.store(f"{paths.machine(spec.id)}/spec.json", spec, durable=not spec.auto_remove)


def load_state(paths: Paths, machine_id: str) -> MachineState:
    state = records.load(f"{paths.machine(machine_id)}/state.json", MachineState)
    if state.phase not in PHASES:
        raise IntegrityError(f"machine {machine_id} is in an unknown phase '{state.phase}'")
    return state


def store_state(paths: Paths, machine_id: str, state: MachineState) -> None:
    """Also on a full disk: a machine that filled it must still be able to end, and to be removed."""
    path = f"{paths.machine(machine_id)}/state.json"
    try:
        records.store(path, state)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not os.path.exists(path):
            raise
        records.overwrite(path, state)


def command_lock(paths: Paths, machine_id: str) -> FileLock:
    """Serialises the commands that change a machine."""
    return FileLock(f"{paths.machine(machine_id)}/command.lock")


def liveness_lock(paths: Paths, machine_id: str) -> FileLock:
    """Held by the supervisor for as long as the machine may run."""
    return FileLock(f"{paths.machine(machine_id)}/lock")


def is_alive(paths: Paths, machine_id: str) -> bool:
    return is_held(f"{paths.machine(machine_id)}/lock")


def is_being_changed(paths: Paths, machine_id: str) -> bool:
    return is_held(f"{paths.machine(machine_id)}/command.lock")


def claim_name(paths: Paths, name: str, machine_id: str) -> None:
    """Give `name` to a machine whose directory exists. Raises `Conflict` when another has it.

    A link whose machine is gone (its remover was killed half-way) is taken over.
    """
    make_directory(paths.names)
    link = f"{paths.names}/{name}"
    with FileLock(f"{paths.root}/names.lock"):
        try:
            os.symlink(machine_id, link)
            return
        except FileExistsError:
            owner = os.readlink(link)
        if owner != machine_id and os.path.exists(paths.machine(owner)):
            raise name_taken(name, owner)
        os.unlink(link)
        os.symlink(machine_id, link)


def name_taken(name: str, owner: str) -> Conflict:
    return Conflict(
        f"the name '{name}' is in use by machine {owner[:12]}",
        hint=f"choose another --name, or remove that machine with 'nagaya rm {name}'",
        state=owner,
    )


def release_name(paths: Paths, name: str, machine_id: str) -> None:
    """Give a name back, if it is still this machine's."""
    link = f"{paths.names}/{name}"
    try:
        with FileLock(f"{paths.root}/names.lock"):  # or a claim could take the link over between our two steps
            if os.readlink(link) == machine_id:
                os.unlink(link)
    except FileNotFoundError:
        pass


def find_by_name(paths: Paths, name: str) -> str:
    """The id behind a name, or ""."""
    if "/" in name or name in ("", ".", ".."):
        return ""
    try:
        machine_id = os.readlink(f"{paths.names}/{name}")
    except OSError:
        return ""
    return machine_id if is_id(machine_id) and os.path.isdir(paths.machine(machine_id)) else ""


def discard(paths: Paths, machine_id: str, name: str) -> None:
    """Remove a machine's directories and name. The caller holds its command lock or its liveness.

    The rename comes first: from then on the machine does not exist, whatever interrupts the slow rest.
    """
    trash = f"{paths.machines}/{TRASH}{machine_id}"
    try:
        os.rename(paths.machine(machine_id), trash)
    except FileNotFoundError:
        pass
    if name:
        release_name(paths, name, machine_id)
    remove_tree(paths.runtime(machine_id))
    remove_tree(trash)


def names_of(paths: Paths, machine_id: str) -> list[str]:
    """All names that lead to a machine: one, or more after a rename that was cut off."""
    return [name for name, owner in all_names(paths) if owner == machine_id]


def all_names(paths: Paths) -> list[tuple[str, str]]:
    """(name, id) of every name that is taken."""
    found = []
    try:
        names = os.listdir(paths.names)
    except FileNotFoundError:
        return []
    for name in names:
        try:
            found.append((name, os.readlink(f"{paths.names}/{name}")))
        except OSError:
            continue  # given back while we look
    return found


def volumes_in_use(paths: Paths, *, without: str = "") -> frozenset[str]:
    """Names of the volumes that machines use, those of the machine `without` left out. Raises `IntegrityError`."""
    used: set[str] = set()
    for machine_id in ids(paths):
        if machine_id == without:
            continue
        try:
            spec = load_spec(paths, machine_id)
        except FileNotFoundError:
            continue
        used.update(mount.source for mount in spec.mounts if mount.kind == "volume")
    return frozenset(used)


def disks_in_use(paths: Paths) -> frozenset[str]:
    """Real paths of the disks that machines have and that are not theirs alone. Raises `IntegrityError`."""
    used: set[str] = set()
    for machine_id in ids(paths):
        try:
            hardware = load_spec(paths, machine_id).hardware
        except FileNotFoundError:
            continue
        if hardware is not None:
            used.update(os.path.realpath(drive.path) for drive in hardware.drives if drive.path and not drive.own)
    return frozenset(used)


def remove_runtime(paths: Paths, machine_id: str) -> None:
    """Remove the run-time files (the control socket) of a machine that has ended."""
    remove_tree(paths.runtime(machine_id))


def sweep_trash(paths: Paths) -> None:
    """Finish removals that were cut off."""
    try:
        names = os.listdir(paths.machines)
    except FileNotFoundError:
        return
    for name in names:
        if name.startswith(TRASH):
            remove_tree(f"{paths.machines}/{name}")
