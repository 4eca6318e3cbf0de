"""The snapshots of one machine: take, list, restore, rename and remove them. docs/snapshots.md."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from nagaya import __version__
from nagaya.engines import engine_of, open_engine
from nagaya.errors import Conflict, HostError, IntegrityError, NagayaError, NotFound, Unsupported, UsageError
from nagaya.manager.naming import check_name
from nagaya.model.spec import MachineSpec
from nagaya.model.state import ALIVE, PAUSED, RUNNING, STARTING
from nagaya.static import NamedTuple
from nagaya.storage import rootfs, snapshots
from nagaya.storage.snapshots import Snapshot
from nagaya.storage.tree import remove_tree

builtins_list = list  # `Snapshots.list` hides the type's name from annotations in its own class
TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.engines.base import Engine
    from nagaya.manager.machine import Machine

MAX_DESCRIPTION = 4096


MOST_BASES = 8
"""Snapshots below one whose memory is a difference to the next: each has to be there, and is looked into at a restore."""


class Taken(NamedTuple):
    """A snapshot that was just made. For how long its CPUs stood, and for how long its programs, which its agent stops before
    and lets go on after that; 0 when it did not run.
    """

    snapshot: Snapshot
    paused_ms: float
    stood_ms: float
    warnings: tuple[str, ...]


class Snapshots:
    """What `machine.snapshots` is. Each call looks at the disk anew."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._directory = machine.directory

    # -- looking

    def list(self) -> builtins_list[Snapshot]:
        """All that can be used, oldest first."""
        return snapshots.load_all(self._directory)[0]

    def damaged(self) -> builtins_list[tuple[str, str]]:
        """(id, why) of those whose record cannot be read."""
        return snapshots.load_all(self._directory)[1]

    def current(self) -> str:
        """The id of the snapshot that the machine's disks descend from; "" = none."""
        return snapshots.load_current(self._directory)

    def get(self, name: str) -> Snapshot:
        """By name, id, or the beginning of an id. Raises `NotFound`, `Conflict` when several begin so."""
        found, damaged = snapshots.load_all(self._directory)
        for snapshot in found:
            if name in (snapshot.name, snapshot.id):
                return snapshot
        starting = [snapshot for snapshot in found if name and snapshot.id.startswith(name)]
        if len(starting) > 1:
            raise Conflict(f"'{name}' is the beginning of {len(starting)} snapshots' ids", hint="give more digits")
        if starting:
            return starting[0]
        for snapshot_id, why in damaged:
            if name and snapshot_id.startswith(name):
                raise IntegrityError(
                    f"snapshot {snapshot_id} cannot be used: {why}",
                    hint=f"remove it with 'nagaya snapshot rm {self._machine.name} {snapshot_id}'",
                )
        raise NotFound(
            f"machine '{self._machine.name}' has no snapshot '{name}'",
            hint=f"'nagaya snapshot ls {self._machine.name}' lists them",
        )

    def directory(self, snapshot: Snapshot) -> str:
        """Where it lies."""
        return snapshots.directory(self._directory, snapshot.id)

    # -- making

    def create(
        self, name: str = "", *, description: str = "", memory: bool | None = None, whole: bool = False
    ) -> Taken:
        """Take one of the machine as it is, running or not.

        Its memory is what differs from the snapshot's that the machine descends from, where the type can, unless `whole`.

        `memory`: with what is in its memory; None = if it runs and its type can, else the disks alone, with a warning
        where that is news. Raises `Unsupported` for memory that cannot be saved, `Conflict`, `HostError`; leaves nothing.
        """
        if name:
            check_name(name, "snapshot")
        if len(description) > MAX_DESCRIPTION or not description.isprintable():
            raise UsageError(f"a description is one printable line of at most {MAX_DESCRIPTION} characters")
        machine = self._machine
        with machine.lock():
            machine.reload()
            name = self._choose_name(name)
            _refuse_unfinished(machine)
            phase = machine.settled().phase
            if phase in ALIVE and phase not in (RUNNING, PAUSED):
                raise Conflict(
                    f"machine '{machine.name}' is {phase}: no snapshot can be taken of it now",
                    hint="try again when it runs, or is stopped", state=phase, required="running, or not running",
                )  # fmt: skip
            alive = phase in ALIVE
            wants, warnings = _settle_memory(machine.spec, memory, alive=alive)
            warnings += _tell_of_others(machine.spec)
            try:
                snapshot_id, place = snapshots.begin(self._directory)
            except OSError as error:
                raise HostError.from_os(error, "cannot make a snapshot") from None
            try:
                times = (0.0, 0.0)
                base = self._find_base() if wants and not whole else ""
                if alive:
                    times, told, wants = self._save(place, wants, base, explicit=memory is True)
                    warnings += told
                else:
                    snapshots.copy_disks(self._directory, place)
                made = Snapshot(
                    format=snapshots.format_of(place), id=snapshot_id, name=name, parent=self.current(),
                    created_ns=time.time_ns(), description=description, spec=machine.spec,
                    layers=rootfs.load_record(self._directory, machine.spec), phase=phase, memory=wants,
                    version=__version__, parts=snapshots.sum_parts(place), base=self._base_of(place) if wants else "",
                )  # fmt: skip
                made = snapshots.finish(self._directory, place, made)
            except BaseException as error:
                remove_tree(place)
                if isinstance(error, OSError):
                    raise HostError.from_os(error, "cannot make a snapshot") from None
                if isinstance(error, RecursionError):
                    raise Unsupported("the machine's directories are nested too deeply for a snapshot") from None
                raise
        machine.record("snapshot", snapshot=name)
        return Taken(made, *times, tuple(warnings))

    def _find_base(self) -> str:
        """The directory of the memory that the next snapshot's may be a difference to; "" = none."""
        current = self.current()
        if not current or "save-behind" not in engine_of(self._machine.spec).capabilities:
            return ""
        try:
            found = snapshots.load(self._directory, current)
            deep = len(snapshots.bases(self._directory, found)) + 1 >= MOST_BASES
        except NagayaError:  # who wants to restore it is told
            return ""
        return "" if deep or not found.memory else f"{self.directory(found)}/{snapshots.MEMORY}"

    def _base_of(self, place: str) -> str:
        """The id of the snapshot that the memory in `place` has come to build on."""
        engine = engine_of(self._machine.spec)
        if "save-behind" not in engine.capabilities:
            return ""
        base: str = engine.find_base(f"{place}/{snapshots.MEMORY}")  # type: ignore[attr-defined]
        return os.path.basename(os.path.dirname(base))

    def _save(
        self, place: str, memory: bool, base: str, *, explicit: bool
    ) -> tuple[tuple[float, float], builtins_list[str], bool]:
        """Have the supervisor do it; (milliseconds that its CPUs, and that its programs stood; warnings; whether with memory)."""
        warnings: list[str] = []
        try:
            answer = self._machine.ask("save", place=place, memory=memory, base=base)
        except Unsupported as problem:
            if not memory or explicit:
                raise
            warnings.append(f"the disks alone are in the snapshot: {problem.message}")
            remove_tree(place)
            os.mkdir(place, 0o700)
            memory = False
            answer = self._machine.ask("save", place=place, memory=False)
        told = answer.get("warnings")
        warnings += [str(line) for line in told] if isinstance(told, list) else []
        paused_ms, stood_ms = (
            float(told) if isinstance(told := answer.get(key), (int, float)) else 0.0
            for key in ("paused_ms", "stood_ms")
        )
        return (paused_ms, stood_ms), warnings, memory

    def _choose_name(self, name: str) -> str:
        taken = {snapshot.name for snapshot in self.list()} | set(snapshots.ids(self._directory))
        if name in taken:
            raise Conflict(
                f"machine '{self._machine.name}' has a snapshot '{name}' already",
                hint=f"choose another name, or 'nagaya snapshot rm {self._machine.name} {name}'", state=name,
            )  # fmt: skip
        number = 0
        while not name:
            number += 1
            name = f"snap{number}" if f"snap{number}" not in taken else ""
        return name

    # -- changing

    def rename(self, name: str, new: str) -> None:
        """Give it another name."""
        check_name(new, "snapshot")
        with self._machine.lock():
            snapshot = self.get(name)
            if snapshot.name == new:
                return
            self._choose_name(new)
            snapshots.store(self.directory(snapshot), snapshot._replace(name=new))

    def remove(self, name: str) -> str:
        """Remove it; its children become its parent's, and what they need of its memory theirs. Answers its id.

        A damaged one goes too: those that need its memory are lost then, but for their disks.
        """
        with self._machine.lock():
            parent, fold = "", None
            try:
                snapshot = self.get(name)
                snapshot_id, parent = snapshot.id, snapshot.parent
                if snapshot.memory:
                    fold = getattr(open_engine(snapshot.spec.type), "fold_base", None)
            except IntegrityError:
                snapshot_id = next(one for one in snapshots.ids(self._directory) if one.startswith(name))
            try:
                snapshots.remove(self._directory, snapshot_id, parent=parent, fold=fold)
            except OSError as error:
                raise HostError.from_os(error, "cannot remove the snapshot") from None
            except (IntegrityError, Unsupported) as problem:
                raise Conflict(
                    f"snapshot '{name}' cannot be removed: others build on its memory, and that cannot be merged into"
                    f" theirs ({problem.message})",
                    hint="remove those first: 'nagaya snapshot inspect' names their base", state="needed", required="leaf",
                ) from None  # fmt: skip
        return snapshot_id

    def prune(self, *, keep: int = 0) -> builtins_list[str]:
        """Remove all but the newest `keep`; answers their names."""
        old = self.list()
        removed = []
        for snapshot in old[: max(0, len(old) - keep)]:
            try:
                self.remove(snapshot.id)
            except NotFound:
                continue  # somebody else was quicker
            removed.append(snapshot.name)
        return removed

    # -- going back

    def restore(self, name: str = "", *, memory: bool | None = None) -> Snapshot:
        """Make the machine what it was, name and id apart; "" = the snapshot that it descends from.

        With its memory its programs go on where they were; without (or with `memory` False) the machine starts anew if
        it runs now, and else stays off. Everything is checked and copied first: what fails until then leaves the machine
        as it is, running or not. Raises `NotFound`, `IntegrityError`, `Unsupported`, `HostError`.
        """
        machine = self._machine
        lock = machine.lock()
        try:
            machine.reload()
            snapshot = self._find_to_restore(name)
            with_memory = snapshot.memory if memory is None else memory
            spec = _restored_spec(machine.spec, snapshot.spec)
            self._check(snapshot, spec, with_memory=with_memory)
            try:
                snapshots.prepare_restore(
                    self._directory, self.directory(snapshot), snapshot, spec,
                    backed="backing" in engine_of(spec).capabilities,
                )  # fmt: skip
                runs = self._end()
                snapshots.commit_restore(self._directory)
            except OSError as error:
                raise HostError.from_os(error, f"cannot restore snapshot '{snapshot.name}'") from None
            finally:
                remove_tree(f"{self._directory}/{snapshots.RESTORE}.tmp")
            machine.spec = spec
            machine.record("restore", snapshot=snapshot.name)
            if with_memory or runs:
                machine.hold(lock)
                machine.go(saved=self.directory(snapshot) if with_memory else "")
        finally:
            lock.release()
        return snapshot

    def save(
        self, name: str, path: str, *, image: bool = True, report: Callable[[int, int], None] | None = None
    ) -> None:
        """Write one to the file `path`, which another host can open: `Machines.restore`. See `exporting.save`."""
        from nagaya.manager import exporting  # lazy: rare

        exporting.save(self._machine, name, path, image=image, report=report or exporting.silent)

    def _find_to_restore(self, name: str) -> Snapshot:
        if name:
            return self.get(name)
        current = self.current()
        if not current:
            raise UsageError(
                f"which snapshot of machine '{self._machine.name}'?",
                hint=f"'nagaya snapshot ls {self._machine.name}' lists them",
            )
        return self.get(current)

    def _check(self, snapshot: Snapshot, spec: MachineSpec, *, with_memory: bool) -> None:
        """All that can be said against a restore while the machine still is what it is."""
        machine, place = self._machine, self.directory(snapshot)
        if spec.type != machine.spec.type:
            raise Conflict(
                f"snapshot '{snapshot.name}' is of a {spec.type}, and machine '{machine.name}' is a {machine.spec.type}"
                " by now",
                hint=f"change it back first: nagaya update --type {spec.type} {machine.name}",
                state=machine.spec.type, required=spec.type,
            )  # fmt: skip
        if with_memory and not snapshot.memory:
            raise Unsupported(
                f"snapshot '{snapshot.name}' has the disks alone: its memory was not saved",
                hint="restore it without --memory: the machine then starts anew from them",
            )
        phase = machine.settled().phase
        if phase == STARTING:
            raise Conflict(f"machine '{machine.name}' is just starting", hint="try again when it runs", state=phase)
        snapshots.verify(place, snapshot)
        for base in snapshots.bases(self._directory, snapshot) if with_memory else ():
            snapshots.verify(self.directory(base), base, memory_alone=True)
        engine = engine_of(spec)
        if engine.rootfs_kind == "hardware":
            rootfs.plan_hardware(machine.paths, spec)
        elif engine.rootfs_kind == "disk":
            if not os.path.isfile(snapshot.layers.root_image):
                raise IntegrityError(
                    f"the root image of '{spec.image}' is missing from the store", hint=f"nagaya pull {spec.image}"
                )
        elif not all(os.path.isdir(layer) for layer in snapshot.layers.lower):
            raise IntegrityError(
                f"a layer of image '{spec.image}' is missing from the store", hint=f"nagaya pull {spec.image}"
            )
        engine.check(spec)
        if with_memory:
            if "memory" not in engine.capabilities:
                raise Unsupported(f"a machine of type '{spec.type}' cannot go on from saved memory")
            engine.check_saved(spec, f"{place}/{snapshots.MEMORY}")  # type: ignore[attr-defined]

    def _end(self) -> bool:
        """End the machine if it runs; whether it did."""
        machine = self._machine
        if machine.settled().phase not in ALIVE:
            return False
        machine.end(keep=True)
        return True


def _restored_spec(now: MachineSpec, then: MachineSpec) -> MachineSpec:
    """The machine as it was, but for who it is and what does not change what runs in it."""
    return then._replace(
        id=now.id,
        name=now.name,
        restart=now.restart,
        autostart=now.autostart,
        auto_remove=now.auto_remove,
        labels=now.labels,
    )


def _tell_of_others(spec: MachineSpec) -> list[str]:
    """A whole machine's disks that are not its own lie elsewhere, and stay as they are."""
    return [f"disk '{path}' is not in the snapshot, for it is not the machine's own" for path in _others(spec)]


def _others(spec: MachineSpec) -> list[str]:
    """The paths of disks that the machine writes and that are not its own."""
    drives = spec.hardware.drives if spec.hardware is not None else ()
    return [drive.path for drive in drives if drive.path and not drive.own and not drive.read_only]


def _settle_memory(spec: MachineSpec, memory: bool | None, *, alive: bool) -> tuple[bool, list[str]]:
    """Whether the memory is to be saved. Raises `Unsupported` when it was asked for and cannot be."""
    engine = engine_of(spec)
    if memory and not alive:
        raise Conflict(
            f"machine '{spec.name}' does not run: there is no memory to save", hint="leave --memory away",
            state="not running", required="running",
        )  # fmt: skip
    why_not = _why_not_save(engine)
    if not why_not and not _others(spec):
        return alive and memory is not False, []
    if memory and _others(spec):
        raise Unsupported(
            f"what is in the memory of machine '{spec.name}' goes with its disks, and '{_others(spec)[0]}' is not its own",
            hint="leave --memory away: its own disks alone are saved then",
        )
    if memory:
        raise Unsupported(
            f"the memory of a machine of type '{spec.type}' cannot be saved: {why_not}",
            hint="leave --memory away: the disks alone are saved then; or use --type kvm",
        )
    return False, []


def _why_not_save(engine: Engine) -> str:
    """Why its machines' memory cannot be saved; "" = it can."""
    if "memory" not in engine.capabilities:
        return engine.missing.get("memory", "its engine does not save it")
    return str(engine.why_not_save()) if hasattr(engine, "why_not_save") else ""


def _refuse_unfinished(machine: Machine) -> None:
    """Raise `Conflict` for one whose system is not installed: what would go on from there is half an installation."""
    if machine.spec.hardware is None or machine.spec.hardware.install is None:
        return
    from nagaya.storage.disk_images.installer import is_installing  # lazy: few are installed

    if is_installing(machine.directory):
        raise Conflict(
            f"the system of machine '{machine.name}' is not installed yet, and there is nothing to keep",
            hint=f"'nagaya logs -f {machine.name}' shows how far it is", state="not installed",
        )  # fmt: skip
