"""All machines of a store: create, find, list, prune."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

from nagaya.engines import open_engine
from nagaya.errors import Conflict, IntegrityError, NotFound
from nagaya.manager import repair
from nagaya.manager.creating import check_options, name_volumes, plan_machine
from nagaya.manager.machine import Machine, Store
from nagaya.manager.naming import check_name, generate_name
from nagaya.manager.options import CreateOptions
from nagaya.manager.settings import choose_type
from nagaya.model.spec import MachineSpec
from nagaya.model.state import CREATED, EXITED, STARTING, MachineState
from nagaya.storage import events, machines, rootfs
from nagaya.storage.lock import FileLock
from nagaya.storage.paths import Paths, make_directory

builtins_list = list  # `Machines.list` hides the type's name from annotations in its own class
TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.images.progress import Progress
    from nagaya.images.store import Image
    from nagaya.manager.hardware import HardwareOptions

SHORTEST_PREFIX = 1


class Machines:
    """The machines below one store."""

    def __init__(self, paths: Paths, store: Store) -> None:
        self.paths = paths
        self._store = store  # not its images: most commands never touch those, and importing them costs

    def create(self, options: CreateOptions, *, progress: Progress | None = None, starting: bool = False) -> Machine:
        """Make a machine, not yet started. Raises `UsageError`, `NotFound`, `Conflict` (name); leaves nothing then.

        `starting` is for a caller that starts it next: if that caller is killed in between, the machine counts as
        one whose start was cut off, so that `run --rm` leaves nothing even then.
        """
        check_options(options)
        if options.attachments:
            from nagaya.manager.networks import check_attachments  # lazy: most machines have the default network

            check_attachments(self.paths, options.attachments)
        if options.name:
            check_name(options.name)
            self.refuse_taken(options.name)
        type_ = choose_type(options.type, platform=options.platform, kernel=options.kernel).type
        engine = open_engine(type_)
        engine.check_host(kernel=options.kernel)
        image = self._store.images.ensure(
            options.image, platform=options.platform, pull=options.pull, insecure=options.insecure, progress=progress
        )
        root_image = ""
        if engine.rootfs_kind == "disk":
            from nagaya.images.progress import Silent  # lazy: virtual machines alone need what follows
            from nagaya.images.rootimage import make_root_image

            root_image = make_root_image(self._store.images, image, progress=progress or Silent())
        with self._store.images.claims(shared=True):
            if self._store.images.find(image.id) is None:
                raise Conflict(f"image '{options.image}' has just been removed", hint="try again")
            spec, lock = self._make(options, image, type_, root_image, starting=starting)
        events.record(self.paths.events, "machine", "create", spec.id, spec.name, image=spec.image)
        machine = Machine(self.paths, spec, store=self._store)
        if starting:
            machine.hold(lock)
        else:
            lock.release()
        return machine

    def create_whole(self, options: HardwareOptions, *, progress: Progress | None = None) -> tuple[Machine, str]:
        """Make a whole machine, not yet started; and what there is to say about it. Raises as `create`.

        `progress` sees an installer being fetched.
        """
        from nagaya.manager import hardware  # lazy: whole machines alone
        from nagaya.storage.disk_images.store import Disks

        if options.name:
            check_name(options.name)
            self.refuse_taken(options.name)
        architecture = hardware.find_architecture(options.architecture)
        runner = hardware.choose_runner(options.type, architecture, options.firmware)
        machine_id = os.urandom(16).hex()
        disks = Disks(self.paths.root)
        spec = hardware.plan_whole_machine(options, disks, runner=runner, machine_id=machine_id)
        with ExitStack() as stack:
            installer = None
            if options.install is not None:
                from nagaya.images.progress import Silent  # lazy: few are installed
                from nagaya.manager.installing import open_installer

                installer = stack.enter_context(
                    open_installer(
                        options.install.source, directory=disks.directory, architecture=architecture,
                        platform=spec.platform, progress=progress or Silent(),
                    )
                )  # fmt: skip
            lock = self.make_directory(machine_id)
            try:
                spec = self.claim_name(spec)
                hardware.make_own_files(self.paths, spec, options, installer)
                machines.store_spec(self.paths, spec)
                machines.store_state(self.paths, machine_id, MachineState(phase=CREATED))
            except BaseException:
                machines.discard(self.paths, machine_id, spec.name)
                raise
            finally:
                lock.release()
        events.record(self.paths.events, "machine", "create", spec.id, spec.name, image=spec.image)
        return Machine(self.paths, spec, store=self._store), runner.note

    def _make(
        self, options: CreateOptions, image: Image, type_: str, root_image: str, *, starting: bool
    ) -> tuple[MachineSpec, FileLock]:
        """The machine on disk, with its command lock held. Leaves nothing when it raises."""
        machine_id = os.urandom(16).hex()
        spec = plan_machine(options, image, type_=type_, machine_id=machine_id, name=options.name)
        lower = self._store.images.layer_directories(image)
        lock = self.make_directory(machine_id)
        try:
            spec = self.claim_name(spec)
            spec = spec._replace(mounts=name_volumes(spec.mounts))
            rootfs.store_layers(self.paths.machine(machine_id), lower, root_image=root_image)
            if root_image:
                rootfs.make_data_disk(self.paths.machine(machine_id), spec)
            machines.store_spec(self.paths, spec)
            self.make_volumes(spec, lower)  # the record, which names them, is there: a kill leaves none behind
            state = MachineState(phase=STARTING if starting else CREATED)
            machines.store_state(self.paths, machine_id, state)
        except BaseException:
            rootfs.remove_anonymous_volumes(self.paths, spec)
            machines.discard(self.paths, machine_id, spec.name)
            lock.release()
            raise
        return spec, lock

    def get(self, name: str) -> Machine:
        """By name, id, or a prefix of an id that only one machine has."""
        machine_id = machines.find_by_name(self.paths, name) or self._find_by_id(name)
        try:
            spec = machines.load_spec(self.paths, machine_id)
        except FileNotFoundError:
            raise self._unknown(name) from None
        return Machine(self.paths, spec, store=self._store)

    def list(self) -> list[Machine]:
        """All machines, newest first; those with a damaged record are in `damaged`. Repairs what a kill left half done."""
        repair.sweep(self.paths)
        found = []
        for machine_id in machines.ids(self.paths):
            try:
                spec = machines.load_spec(self.paths, machine_id)
            except (FileNotFoundError, IntegrityError):
                continue
            if repair.settle(self.paths, spec) is not None:
                found.append(Machine(self.paths, spec, store=self._store))
        return sorted(found, key=lambda machine: machine.spec.created_ns, reverse=True)

    def restore(self, path: str, *, name: str = "", report: Callable[[int, int], None] | None = None) -> Machine:
        """A new machine of what `machine.snapshots.save` has written to the file `path`; it runs if its memory is there.

        See `exporting.load`.
        """
        from nagaya.manager import exporting  # lazy: rare

        return exporting.load(self, self._store, path, name=name, report=report or exporting.silent)

    def damaged(self) -> builtins_list[IntegrityError]:
        """What is wrong with each machine whose record cannot be read."""
        found = []
        for machine_id in machines.ids(self.paths):
            try:
                machines.load_spec(self.paths, machine_id)
            except FileNotFoundError:
                continue
            except IntegrityError as problem:
                found.append(problem)
        return found

    def remove_damaged(self, name: str) -> None:
        """Remove a machine that `get` finds damaged: end it, and free what it holds but its volumes."""
        machine_id = machines.find_by_name(self.paths, name) or self._find_by_id(name)
        repair.remove_damaged(self.paths, machine_id)

    def prune(self) -> builtins_list[str]:
        """Remove all machines that do not run, and the default network if none is left; answers the machines' ids."""
        removed = []
        for machine in self.list():
            try:
                if machine.state.phase in (CREATED, EXITED):
                    machine.remove(volumes=True)
                    removed.append(machine.id)
            except (NotFound, Conflict):
                continue  # somebody removed or started it meanwhile
        if os.path.isdir(f"{self.paths.root}/network") and not os.geteuid():
            from nagaya.net import attach  # lazy: few commands touch the network

            attach.remove_idle(self.paths)
        return removed

    def image_ids(self) -> frozenset[str]:
        """Images that a machine needs. Raises `IntegrityError` when one does not tell."""
        used: set[str] = set()
        for machine_id in machines.ids(self.paths):
            try:
                used.add(machines.load_spec(self.paths, machine_id).image_id)
            except FileNotFoundError:
                continue
        return frozenset(used)

    def volume_names(self) -> frozenset[str]:
        """Volumes that a machine uses. Raises `IntegrityError` when one does not tell."""
        return machines.volumes_in_use(self.paths)

    def disk_paths(self) -> frozenset[str]:
        """Disks of whole machines, other than those that are removed with them. Raises `IntegrityError` as above."""
        return machines.disks_in_use(self.paths)

    # -- inside

    def _find_by_id(self, text: str) -> str:
        if machines.is_id(text):
            return text
        digits = "0123456789abcdef"
        if len(text) < SHORTEST_PREFIX or any(letter not in digits for letter in text):
            raise self._unknown(text)
        found = [machine_id for machine_id in machines.ids(self.paths) if machine_id.startswith(text)]
        if len(found) > 1:
            raise Conflict(f"'{text}' is the beginning of {len(found)} machines' ids", hint="give more digits")
        if not found:
            raise self._unknown(text)
        return found[0]

    def _unknown(self, name: str) -> NotFound:
        return NotFound(f"there is no machine '{name}'", hint="'nagaya ps -a' lists them all")

    def refuse_taken(self, name: str) -> None:
        """A taken name is known before an image is pulled for nothing. The claim itself comes later, and decides."""
        owner = machines.find_by_name(self.paths, name)
        if owner:
            repair.sweep(self.paths)  # its creator, or its remover, may have been killed half-way
            owner = machines.find_by_name(self.paths, name)
        if owner:
            spec = self._spec_or_none(owner)
            if spec is not None and repair.settle(self.paths, spec) is None:
                return
            raise machines.name_taken(name, owner)

    def _spec_or_none(self, machine_id: str) -> MachineSpec | None:
        try:
            return machines.load_spec(self.paths, machine_id)
        except (FileNotFoundError, IntegrityError):
            return None

    def make_directory(self, machine_id: str) -> FileLock:
        """The new machine's directory with its command lock held: one step for `repair.sweep`, by `create.lock`."""
        make_directory(self.paths.machines)
        with FileLock(f"{self.paths.root}/create.lock"):
            os.mkdir(self.paths.machine(machine_id), 0o700)
            lock = machines.command_lock(self.paths, machine_id)
            lock.acquire()
        return lock

    def claim_name(self, spec: MachineSpec) -> MachineSpec:
        """Claim the name in `spec` for it, or a made-up one; answers the record with that. Raises `Conflict`."""
        if spec.name:
            machines.claim_name(self.paths, spec.name, spec.id)
            return spec
        for attempt in range(64):
            name = generate_name(attempt)
            try:
                machines.claim_name(self.paths, name, spec.id)
            except Conflict:
                continue
            return spec._replace(name=name)
        raise Conflict("no free machine name was found", hint="give one with --name")

    def make_volumes(self, spec: MachineSpec, lower: tuple[str, ...]) -> None:
        """Those that it names and that are not there."""
        if any(mount.kind == "volume" for mount in spec.mounts):
            from nagaya.manager import volumes  # lazy: most machines have none

            volumes.make_volumes(self.paths, spec.mounts, lower)
