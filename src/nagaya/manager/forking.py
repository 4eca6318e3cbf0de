"""Forks: further machines that go on from where a running one is, each with a name, a disk and addresses of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from nagaya.engines import engine_of, open_engine
from nagaya.errors import Conflict, HostError, NagayaError, Unsupported, UsageError
from nagaya.manager.naming import check_name
from nagaya.model.spec import MachineSpec
from nagaya.model.state import ALIVE, CREATED, FORK, PAUSED, RUNNING, STARTING, MachineState, require
from nagaya.storage import machines, rootfs, shared_disks, snapshots
from nagaya.storage.tree import remove_tree
from nagaya.supervisor import launch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.manager.attachment import Connection
    from nagaya.manager.machine import Machine
    from nagaya.manager.machines import Machines

MOST = 1000
SHORT_ID = 12
_FIRST = MachineState(phase=STARTING, origin=FORK)
_LEAST_AT_ONCE = 4


def fork(source: Machine, all_: Machines, count: int, *, name: str = "", disk_only: bool = False) -> list[Machine]:
    """Make `count` machines out of a running one; they run, with its programs, when this returns.

    `name` names one; of several they are NAME-1, NAME-2, …. With `disk_only` they begin anew from a copy of its disks, and
    are started if it runs. `source` stands for as long as saving it takes, and then goes on. When one fails, none is left.
    Raises `Unsupported` for a type whose memory cannot be saved, `Conflict`, `HostError`, `LaunchError`.
    """
    if not 1 <= count <= MOST:
        raise UsageError(f"{count} is not a number of forks", hint=f"from 1 to {MOST}")
    names = [""] * count if not name else [name] if count == 1 else [f"{name}-{number + 1}" for number in range(count)]
    for one in filter(None, names):
        check_name(one)
    source.need_agent("fork it", instead="a linked clone of its disk makes another machine: --disk DISK,clone")
    engine = open_engine(source.spec.type)
    if not disk_only and "fork" not in engine.capabilities:
        raise Unsupported(
            f"a machine of type '{source.spec.type}' cannot be forked with its programs: "
            f"{engine.missing.get('fork', 'its memory cannot be saved')}",
            hint="--disk-only starts copies of it from its disks; --type kvm forks whole machines",
        )
    made: list[Machine] = []
    with source.lock():
        source.reload()
        phase = source.settled().phase
        if not disk_only:
            require("fork", phase, source.name)
        elif phase in ALIVE and phase not in (RUNNING, PAUSED):
            raise Conflict(f"machine '{source.name}' is {phase}", hint="try again when it runs", state=phase)
        try:
            _, place = snapshots.begin(source.directory)
            try:
                with _memory_of(source, place) if not disk_only else nullcontext():
                    if phase in ALIVE:
                        source.ask("save", place=place, memory=not disk_only)
                    else:
                        snapshots.copy_disks(source.directory, place)
                    if count > 1 and shared_disks.is_copied_slowly(place, place):
                        shared_disks.make_whole(place)  # one file of it, for all of them to stand on
                    made.extend(_make(source, all_, place, one, starting=phase in ALIVE) for one in names)
                    if phase in ALIVE:
                        _start(made, "" if disk_only else place)
            finally:
                remove_tree(place)
        except BaseException as error:
            for machine in made:
                undo(machine)
            if isinstance(error, OSError):
                raise HostError.from_os(error, f"cannot fork machine '{source.name}'") from None
            raise
        finally:
            for machine in made:
                machine.let_go()
    for machine in made:
        source.record("fork", fork=machine.name, fork_id=machine.id)
    return made


@contextmanager
def _memory_of(source: Machine, place: str) -> Iterator[None]:
    """Have what is saved of its memory in this host's, whence the forks map it; on the disk where that is not to be had."""
    from nagaya.kernel.mount import make_memory_directory

    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit_bytes = source.spec.limits.memory_bytes
    try:
        fd = make_memory_directory() if limit_bytes <= free_bytes // 2 else -1
    except OSError:  # a plain user, or an old kernel
        fd = -1
    try:
        if fd >= 0:
            os.symlink(f"/proc/{os.getpid()}/fd/{fd}", f"{place}/{snapshots.MEMORY}")
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def _start(made: list[Machine], saved: str) -> None:
    """Start all of them, some at a time: each takes a while in which it waits, and all at once would wait too long."""
    if len(made) > 1 and launch.will_fork():
        _preload(made[0].spec)
    at_once = max(_LEAST_AT_ONCE, 2 * (os.cpu_count() or 1))
    under_way: list[tuple[Machine, Connection]] = []
    try:
        for machine in made:
            if len(under_way) >= at_once:
                _await(*under_way.pop(0))
            under_way.append((machine, machine.begin(saved=saved)))
        while under_way:
            _await(*under_way.pop(0))
    finally:
        for _, connection in under_way:
            connection.close()


def _preload(spec: MachineSpec) -> None:
    """Import here, once, what each supervisor would import by itself: it is a fork of this process."""
    import gc

    from nagaya.supervisor import entry, resuming, supervisor

    del entry, resuming, supervisor
    if spec.network not in ("none", "host"):
        from nagaya.net import attach

        del attach
    preload = getattr(open_engine(spec.type), "preload", None)
    if preload is not None:
        preload()
    gc.freeze()  # a collection writes to each object that it looks at: all pages would be copied


def _await(machine: Machine, connection: Connection) -> None:
    machine.await_start(connection)
    connection.close()


def _make(source: Machine, all_: Machines, place: str, name: str, *, starting: bool) -> Machine:
    """One machine on disk, with its command lock held. Leaves nothing when it raises."""
    from nagaya.manager.machine import Machine as Handle

    machine_id = os.urandom(16).hex()
    directory = source.paths.machine(machine_id)
    lock = all_.make_directory(machine_id)
    spec = forked_spec(source.spec, machine_id, name)
    try:
        spec = all_.claim_name(spec)
        rootfs.copy_layers(source.directory, directory)
        snapshots.give_disks(place, directory, backed="backing" in engine_of(spec).capabilities)
        machines.store_spec(source.paths, spec)
        machines.store_state(source.paths, machine_id, _FIRST if starting else MachineState(phase=CREATED))
    except BaseException:
        machines.discard(source.paths, machine_id, spec.name)
        lock.release()
        raise
    made = Handle(source.paths, spec, store=source.store)
    made.record("create")
    made.hold(lock)
    return made


def forked_spec(spec: MachineSpec, machine_id: str, name: str) -> MachineSpec:
    """The same machine under another name. What only one machine can have, an address or a port, is the host's to choose."""
    named_by_id = spec.hostname == spec.id[:SHORT_ID]
    return spec._replace(
        id=machine_id,
        name=name,
        hostname=machine_id[:SHORT_ID] if named_by_id or not name else name,
        created_ns=time.time_ns(),
        attachments=tuple(one._replace(address="", address6="", mac="") for one in spec.attachments),
        ports=tuple(port._replace(host_port=0) for port in spec.ports),
        mounts=tuple(mount._replace(anonymous=False) for mount in spec.mounts),  # the original's, and it goes with that
    )


def undo(machine: Machine) -> None:
    """Remove a machine that did not come to run."""
    machine.let_go()
    try:
        machine.remove(force=True)
    except NagayaError:
        return  # its own end has removed it
