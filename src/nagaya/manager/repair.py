"""After a `kill -9`: find machines whose supervisor is gone and put the store and the host right.

Every command that looks at machines calls `settle` on what it looks at, so the truth is always shown, and the
first command that may change things mends them. A machine is broken when its record says that it lives
(model/state.py, ALIVE) and nobody holds its liveness lock.
"""

from __future__ import annotations

import os
import time

from nagaya.errors import HostError, IntegrityError, NagayaError, NotFound
from nagaya.model.spec import MachineSpec
from nagaya.model.state import ALIVE, CREATED, EXITED, RUNNING, STARTING, MachineState, is_unborn
from nagaya.storage import events, machines, migrations, rootfs
from nagaya.storage.lock import FileLock
from nagaya.storage.paths import Paths

KILLED = 128 + 9


def settle(paths: Paths, spec: MachineSpec) -> MachineState | None:
    """The machine's true state, repaired if need be; None when it turned out to be removed."""
    try:
        state = read_state(paths, spec.id)
        if state.phase not in ALIVE or machines.is_alive(paths, spec.id):
            return state
        lock = machines.command_lock(paths, spec.id)
        if not lock.acquire(wait=False):
            return _while_changing(paths, spec.id, state)
        try:
            return repair(paths, spec)
        finally:
            lock.release()
    except FileNotFoundError:
        return None


def has_ended(paths: Paths, machine_id: str) -> bool:
    """Whether a machine whose supervisor does not answer has ended. One that is at its end, and so listens no more, is waited for."""
    if not machines.is_alive(paths, machine_id):
        return True
    try:
        if read_state(paths, machine_id).phase in ALIVE:
            return False
        with machines.liveness_lock(paths, machine_id):
            return True
    except FileNotFoundError:
        return True  # and was removed with that


def _while_changing(paths: Paths, machine_id: str, state: MachineState) -> MachineState:
    """Another command is at work on it: `run` before its supervisor holds the lock, or `rm`. Show, do not touch."""
    if state.phase == STARTING:
        return state
    return read_state(paths, machine_id)


def read_state(paths: Paths, machine_id: str) -> MachineState:
    """The machine's state record. A damaged one is that of a machine that ran: its liveness lock tells the rest."""
    try:
        return machines.load_state(paths, machine_id)
    except IntegrityError:
        return MachineState(phase=RUNNING, started_ns=1, error="its state record was damaged")


def repair(paths: Paths, spec: MachineSpec) -> MachineState | None:
    """Under the command lock: nobody else starts, stops or removes the machine now."""
    state = read_state(paths, spec.id)
    if state.phase not in ALIVE:
        return state
    lock = machines.liveness_lock(paths, spec.id)
    if not lock.acquire(wait=False):
        return state
    try:
        reclaim(paths, spec)
        started = bool(state.started_ns)
        if spec.auto_remove or is_unborn(state) or migrations.is_incoming(paths.machine(spec.id)):
            rootfs.remove_anonymous_volumes(paths, spec)
            machines.discard(paths, spec.id, spec.name)
            events.record(paths.events, "machine", "destroy", spec.id, spec.name, image=spec.image)
            return None
        state = state._replace(
            phase=EXITED if started else CREATED,
            exit_code=KILLED if started else -1,
            error=state.error or _explain(paths, spec, state),
            finished_ns=time.time_ns(),
            pid=0,
            address="",
        )
        machines.store_state(paths, spec.id, state)
        if started:
            events.record(paths.events, "machine", "die", spec.id, spec.name, image=spec.image, exit_code=str(KILLED))
        return state
    finally:
        lock.release()


def _explain(paths: Paths, spec: MachineSpec, state: MachineState) -> str:
    if not state.started_ns:
        return "its start was cut off"
    if state.installing:
        from nagaya.storage.disk_images.installer import is_installing  # lazy: few are installed

        if is_installing(paths.machine(spec.id)):
            return "its supervisor was killed before its system was installed; the next start installs anew"
    return "its supervisor was killed"


def reclaim(paths: Paths, spec: MachineSpec) -> None:
    """Free what a killed supervisor left on the host: processes, cgroups, links, addresses, sockets."""
    from nagaya.engines import engine_of  # lazy: only repairs need an engine outside a supervisor
    from nagaya.kernel.nftables import Nftables
    from nagaya.net import attach

    engine_of(spec).reclaim(spec.id, paths.runtime(spec.id))
    if spec.network not in ("none", "host") and not os.geteuid():
        with Nftables() as nftables:
            attach.let_go(paths, spec.id, nftables)
    machines.remove_runtime(paths, spec.id)


def remove_damaged(paths: Paths, machine_id: str) -> None:
    """Remove a machine whose record cannot be read, with whatever is left of it. Its volumes are not known, and stay."""
    from nagaya.engines import TYPES, open_engine  # lazy: only for what is broken
    from nagaya.kernel.nftables import Nftables
    from nagaya.net import attach

    command, liveness = machines.command_lock(paths, machine_id), machines.liveness_lock(paths, machine_id)
    try:
        command.acquire()
    except FileNotFoundError:
        raise NotFound(f"machine {machine_id[:12]} has been removed") from None
    with command:
        _kill(paths, machine_id)
        for type_ in TYPES:
            open_engine(type_).reclaim(machine_id, paths.runtime(machine_id))
        with liveness:  # if its supervisor lives, it comes to its end now that the machine is killed
            if not os.geteuid():
                with Nftables() as nftables:
                    attach.let_go(paths, machine_id, nftables)
            names = machines.names_of(paths, machine_id)
            machines.discard(paths, machine_id, "")
            for name in names:
                machines.release_name(paths, name, machine_id)
    events.record(paths.events, "machine", "destroy", machine_id, names[0] if names else "")


def _kill(paths: Paths, machine_id: str) -> None:
    """Ask its supervisor, if it has one, to end the machine, whatever its type is."""
    from nagaya.manager.attachment import ask  # lazy: only for what is broken

    try:
        ask(paths.runtime(machine_id), machine_id[:12], "kill", signal=9)
    except (NagayaError, OSError):
        return  # it does not run, or no longer


def mend_snapshots(directory: str) -> None:
    """Under the command lock of the machine in `directory`: finish a restore, drop the rest of a snapshot that was cut off."""
    if not os.path.lexists(f"{directory}/snapshots") and not os.path.lexists(f"{directory}/restore"):
        return
    from nagaya.storage import snapshots  # lazy: few machines have any

    if snapshots.needs_mending(directory):
        try:
            snapshots.mend(directory)
        except OSError as error:
            raise HostError.from_os(error, "cannot finish what was cut off with the machine's snapshots") from None


def _sweep_snapshots(paths: Paths, machine_id: str) -> None:
    from nagaya.storage import snapshots  # lazy: few machines have any

    if not snapshots.needs_mending(paths.machine(machine_id)):
        return
    lock = machines.command_lock(paths, machine_id)
    if not lock.acquire(wait=False):
        return  # somebody is at work, and mends it
    with lock:
        mend_snapshots(paths.machine(machine_id))


def sweep(paths: Paths) -> None:
    """Finish what was cut off while it had no record yet, or none any more: half-made directories, removals, names."""
    machines.sweep_trash(paths)
    for machine_id in machines.ids(paths):
        directory = paths.machine(machine_id)
        try:
            if os.path.exists(f"{directory}/state.json"):
                if os.path.lexists(f"{directory}/snapshots") or os.path.lexists(f"{directory}/restore"):
                    _sweep_snapshots(paths, machine_id)
                continue
            with FileLock(f"{paths.root}/create.lock"):  # a creator makes the directory and takes its lock in one step
                lock = machines.command_lock(paths, machine_id)
                if not lock.acquire(wait=False):
                    continue
        except FileNotFoundError:
            continue
        try:
            if not os.path.exists(f"{directory}/state.json"):
                _discard_half_made(paths, machine_id)
        finally:
            lock.release()
    _sweep_names(paths)


def _discard_half_made(paths: Paths, machine_id: str) -> None:
    """Its creator was killed before the machine had a state; what it had made for it by then goes with it."""
    try:
        spec = machines.load_spec(paths, machine_id)
    except (NagayaError, FileNotFoundError):
        pass  # before it had a record
    else:
        rootfs.remove_anonymous_volumes(paths, spec)
    machines.discard(paths, machine_id, "")


def _sweep_names(paths: Paths) -> None:
    """Give back the names of machines that are gone, and the other one of a machine whose rename was cut off."""
    for name, machine_id in machines.all_names(paths):
        try:
            if not os.path.exists(paths.machine(machine_id)):
                machines.release_name(paths, name, machine_id)
            elif machines.load_spec(paths, machine_id).name != name:
                _settle_name(paths, name, machine_id)
        except (FileNotFoundError, IntegrityError):
            continue  # it is being made, or is broken: it keeps its name until somebody removes it


def _settle_name(paths: Paths, name: str, machine_id: str) -> None:
    lock = machines.command_lock(paths, machine_id)
    if not lock.acquire(wait=False):
        return  # it is being renamed right now
    with lock:
        if machines.load_spec(paths, machine_id).name != name:
            machines.release_name(paths, name, machine_id)
