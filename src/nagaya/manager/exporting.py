"""Snapshots as files: out of one store, and into another as a machine of its own."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nagaya import __version__
from nagaya.engines import open_engine
from nagaya.errors import HostError, IntegrityError, NagayaError, NotFound, Unsupported
from nagaya.images.rootimage import DIRECTORY as ROOT_IMAGES
from nagaya.manager.forking import forked_spec, undo
from nagaya.manager.naming import check_name
from nagaya.model.spec import MachineSpec
from nagaya.model.state import CREATED, STARTING, MachineState
from nagaya.static import NamedTuple
from nagaya.storage import digests, machines, rootfs, shared_disks, snapshot_file, snapshots
from nagaya.storage.rootfs import Layers
from nagaya.storage.snapshot_file import Head, Member, Reader, Stream
from nagaya.storage.snapshots import Snapshot
from nagaya.storage.tree import remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.images.store import ImageStore
    from nagaya.manager.machine import Machine, Store
    from nagaya.manager.machines import Machines

Report = Callable[[int, int], None]
"""Hears of bytes moved, and of how many there are (0 = not known)."""
_ROOT, _IMAGE = "root.img", "image.tar"
_ROOT_NAME = re.compile(r"[0-9a-f]{64}\.[a-z]+")
_NO_ROOM = "the snapshot cannot be written"


def silent(done: int, of: int) -> None:
    """A report that nobody hears."""


class _Source(NamedTuple):
    head: Head
    paths: dict[str, str]


def save(machine: Machine, name: str, path: str, *, image: bool = True, report: Report = silent) -> None:
    """Write a snapshot of `machine` to the file `path` ("-" = standard output), which stands for itself.

    With what the machine's root is made of, unless `image` is off: another host has to have the very same then. Its own
    disks and its memory are in it, volumes and directories of the host are not. Raises `NotFound`, `IntegrityError`,
    `Unsupported`, `HostError`; leaves no half of a file.
    """
    with machine.lock():
        machine.reload()
        snapshot = machine.snapshots.get(name)
        if snapshot.spec.hardware is not None:
            raise Unsupported(
                f"machine '{machine.name}' is a whole machine, whose disks are files that can be copied as they are",
                hint="'nagaya disk convert' makes one file of a disk",
            )
        stage = f"{machine.directory}/snapshots/.tmp-{os.urandom(8).hex()}"
        try:
            os.mkdir(stage, 0o700)
            source = _gather(machine, snapshot, stage, image=image)
            total, done = sum(member.data_bytes for member in source.head.members), 0

            def count(moved: int) -> None:
                nonlocal done
                done += moved
                report(done, total)

            with _open_target(path) as out:
                snapshot_file.write(out, source.head, lambda member: source.paths[member.name], count)
        except BrokenPipeError:
            raise HostError(f"{_NO_ROOM}: whoever reads standard output has ended") from None
        except OSError as error:
            raise HostError.from_os(error, _NO_ROOM) from None
        finally:
            remove_tree(stage)


def _gather(machine: Machine, snapshot: Snapshot, stage: str, *, image: bool) -> _Source:
    """What the file is to have, and where that is."""
    place = machine.snapshots.directory(snapshot)
    snapshots.verify(place, snapshot)
    paths = {part.name: f"{place}/{part.name}" for part in snapshot.parts}
    parts = list(snapshot.parts)
    if any(part.name == rootfs.BACKING_DISK for part in parts):
        parts = [part for part in parts if part.name not in (rootfs.DATA_DISK, rootfs.BACKING_DISK)]
        parts += snapshots.sum_parts(_join_disk(place, f"{stage}/disk"))
        paths[rootfs.DATA_DISK] = f"{stage}/disk/{rootfs.DATA_DISK}"
    if snapshot.base:
        whole = _fold(machine, snapshot, stage)
        parts = [part for part in parts if not part.name.startswith(f"{snapshots.MEMORY}/")]
        for part in snapshots.sum_parts(whole):
            parts.append(part._replace(name=f"{snapshots.MEMORY}/{part.name}"))
            paths[parts[-1].name] = f"{whole}/{part.name}"
    members = [Member(part.name, part.kind, _mode(paths[part.name]), part.data_bytes) for part in parts]
    root, digest = snapshot.layers.root_image, ""
    if root:
        digest, data_bytes = digests.digest_file(root)
        if image:
            members.append(Member(_ROOT, "file", 0o644, data_bytes))
            paths[_ROOT] = root
    elif image:
        paths[_IMAGE] = f"{stage}/{_IMAGE}"
        machine.images.save((snapshot.spec.image_id,), paths[_IMAGE])
        members.append(Member(_IMAGE, "file", 0o600, os.path.getsize(paths[_IMAGE])))
    record = snapshots.store(
        stage,
        snapshot._replace(
            format=snapshots.FORMAT, parent="", base="", parts=tuple(parts), layers=Layers((), os.path.basename(root))
        ),
    )
    return _Source(Head(record, tuple(members), digest), paths)


def _mode(path: str) -> int:
    return os.lstat(path).st_mode & 0o777


def _join_disk(place: str, target: str) -> str:
    """The new directory `target`, with the disk of a snapshot that stands on a backing file as one."""
    os.mkdir(target, 0o700)
    snapshots.copy_file(f"{place}/{rootfs.DATA_DISK}", f"{target}/{rootfs.DATA_DISK}")
    shared_disks.copy(place, target)
    shared_disks.make_whole(target)
    return target


def _fold(machine: Machine, snapshot: Snapshot, stage: str) -> str:
    """The directory of its memory with that of all its bases."""
    engine = open_engine(snapshot.spec.type)
    for base in snapshots.bases(machine.directory, snapshot):
        snapshots.verify(machine.snapshots.directory(base), base, memory_alone=True)
    found, number = f"{machine.snapshots.directory(snapshot)}/{snapshots.MEMORY}", 0
    # The name of a base is relative: each step is as deep below the machine as a snapshot's own memory.
    while engine.find_base(found):  # type: ignore[attr-defined]
        target = f"{stage}/{snapshots.MEMORY}{number}"
        os.mkdir(target, 0o700)
        engine.fold_base(found, target)  # type: ignore[attr-defined]
        if number:
            remove_tree(found)
        found, number = target, number + 1
    return found


@contextmanager
def _open_target(path: str) -> Iterator[Stream]:
    if path == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass
        raise


def load(all_: Machines, store: Store, path: str, *, name: str = "", report: Report = silent) -> Machine:
    """Make a machine of a file that `save` has written ("-" = standard input): the snapshot is its first.

    With memory it runs, with the programs of then, when this returns; else it is there to be started. It has an id, and
    where `name` says so a name, of its own. Everything is checked before it exists. Raises `IntegrityError` for what is
    damaged, `Unsupported` for what this host or this version cannot go on with, `NotFound`, `Conflict`, `HostError`.
    """
    try:
        with _open_source(path) as file:
            reader = Reader(file)
            head = reader.head()
            _check(head)
            name = name or head.snapshot.spec.name
            check_name(name)
            all_.refuse_taken(name)
            return _load(all_, store, reader, head, name, report)
    except OSError as error:
        raise HostError.from_os(error, "cannot read the snapshot's file") from None


@contextmanager
def _open_source(path: str) -> Iterator[Stream]:
    if path == "-":
        yield sys.stdin.buffer
        return
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise NotFound(f"there is no file {path}", hint="'nagaya snapshot save' writes one") from None
    with file:
        yield file


def _check(head: Head) -> None:
    """All that can be said before the first byte of it is written here."""
    record = head.snapshot
    if record.spec.hardware is not None or record.base:
        raise IntegrityError("the snapshot's file does not stand for itself")
    if record.memory and record.version != __version__:
        raise Unsupported(
            f"the snapshot was taken by Nagaya {record.version}, and this is {__version__}: its memory cannot go on here",
            hint="use that version",
        )
    allowed = {_ROOT, _IMAGE, *(part.name for part in record.parts)}
    names = [member.name for member in head.members]
    if set(names) - allowed or len(set(names)) != len(names) or {part.name for part in record.parts} - set(names):
        raise IntegrityError("the snapshot's file has not the parts that it says")
    engine = open_engine(record.spec.type)
    engine.check_host(kernel=record.spec.kernel)
    engine.check(record.spec)


def _load(all_: Machines, store: Store, reader: Reader, head: Head, name: str, report: Report) -> Machine:
    from nagaya.manager.machine import Machine as Handle

    machine_id = os.urandom(16).hex()
    spec = forked_spec(head.snapshot.spec, machine_id, name)
    directory = all_.paths.machine(machine_id)
    total, done = sum(member.data_bytes for member in head.members), 0

    def count(moved: int) -> None:
        nonlocal done
        done += moved
        report(done, total)

    lock = all_.make_directory(machine_id)
    try:
        spec = all_.claim_name(spec)
        snapshot_id, place = snapshots.begin(directory)
        reader.extract(head, place, count)
        layers = _settle_root(store.images, head, place, directory)
        record = head.snapshot._replace(id=snapshot_id, layers=layers)
        snapshots.verify(place, record)
        engine = open_engine(spec.type)
        if record.memory:
            engine.check_saved(spec, f"{place}/{snapshots.MEMORY}")  # type: ignore[attr-defined]
        record = snapshots.finish(directory, place, record)
        all_.make_volumes(spec, layers.lower)
        machines.store_state(all_.paths, machine_id, MachineState(phase=STARTING if record.memory else CREATED))
        snapshots.prepare_restore(
            directory, snapshots.directory(directory, record.id), record, spec,
            backed="backing" in engine.capabilities,
        )  # fmt: skip
        snapshots.commit_restore(directory)
    except BaseException:
        machines.discard(all_.paths, machine_id, name)
        lock.release()
        raise
    made = Handle(all_.paths, spec, store=store)
    made.record("create")
    made.hold(lock)
    try:
        if record.memory:
            made.go(saved=snapshots.directory(directory, record.id))
    except NagayaError:
        undo(made)
        raise
    finally:
        made.let_go()
    return made


def _settle_root(images: ImageStore, head: Head, place: str, directory: str) -> Layers:
    """What the machine's root is made of here: an image of this store, or else what the file has brought."""
    spec = head.snapshot.spec
    brought = f"{place}/{_IMAGE}"
    if os.path.exists(brought):
        if images.find(spec.image_id) is None:
            images.load(brought)
        os.unlink(brought)
    image = images.find(spec.image_id)
    lower = images.layer_directories(image) if image is not None else ()
    if not head.root_digest:
        if image is None:
            raise _missing(spec)
        return Layers(lower)
    name, brought = head.snapshot.layers.root_image, f"{place}/{_ROOT}"
    here = f"{images.root}/{ROOT_IMAGES}/{name}"
    if _ROOT_NAME.fullmatch(name) and _is(here, head.root_digest):
        if os.path.exists(brought):
            os.unlink(brought)
        return Layers(lower, here)
    if not os.path.exists(brought):
        raise _missing(spec)
    if not _is(brought, head.root_digest):
        raise IntegrityError("the snapshot's file is damaged: its root is not what was saved")
    os.rename(brought, f"{directory}/{rootfs.OWN_ROOT}")
    return Layers(lower, f"{directory}/{rootfs.OWN_ROOT}")


def _is(path: str, digest: str) -> bool:
    try:
        return digests.digest_file(path)[0] == digest
    except FileNotFoundError:
        return False


def _missing(spec: MachineSpec) -> NotFound:
    return NotFound(
        f"the snapshot's file does not hold its image, '{spec.image}', and this store has not got the same",
        hint=f"nagaya pull {spec.image}, or save it without --no-image",
    )
