"""Snapshots on disk: a directory each, below their machine's, that is whole from the moment it has its name.

    MACHINE/snapshots/ID/snapshot.json   `Snapshot`: what it is of, and a sum of each part
                        data.img         the machine's disk, and data.backing if it stands on that
                                         (storage/shared_disks.py); or
                        disk0.qcow2 …    those of a whole machine, and its UEFI's variables; or
                        upper/  copy/    what a container has written
                        memory/…         what the engine has saved (engines/base.py, `Saving`)
                        programs.json    what the supervisor knew of the programs (supervisor/resuming.py)
    MACHINE/snapshots/current            id of the one that the machine's disks descend from
    MACHINE/snapshots/.tmp-ID  .trash-ID being made, being removed
    MACHINE/snapshots/.whole-ID          what takes the place of ID, without need of a base that is to be removed
    MACHINE/restore/                     what a restore puts in place: from the moment it has that name it will be

Whoever changes any of it holds the machine's command lock. What a kill has left is finished by `mend`.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable

from nagaya.errors import HostError, IntegrityError, NotFound, Unsupported
from nagaya.kernel import reflink
from nagaya.model.spec import MachineSpec
from nagaya.static import Any, NamedTuple
from nagaya.storage import digests, records, shared_disks
from nagaya.storage.paths import make_directory
from nagaya.storage.rootfs import BACKING_DISK, DATA_DISK, Layers, is_own_file
from nagaya.storage.tree import remove_tree

FORMAT = 2
SHARED_FORMAT = 3
"""Of a snapshot whose disk stands on a backing file: who knows 2 alone would take the half for the whole."""
RECORD = "snapshot.json"
MEMORY = "memory"
PROGRAMS = "programs.json"
TREES = ("upper", "copy")  # and `copy.done` beside the latter
RESTORE = "restore"
_CURRENT = "current"
_TEMPORARY, _TRASH, _WHOLE = ".tmp-", ".trash-", ".whole-"
_COPY_MARK = "copy.done"
_NO_BACKING = "data.backing.none"  # of a restore: the machine's disk will be one file


class Part(NamedTuple):
    """A file or a tree of a snapshot. `data_bytes` leaves out what is zeros."""

    name: str
    kind: str  # "file" | "tree"
    digest: str
    data_bytes: int


class Snapshot(NamedTuple):
    """What a snapshot says of itself. `digest` sums up the record, with "" in its own place."""

    format: int
    id: str
    name: str
    parent: str  # the id of the one that its machine's disks descended from; "" = none
    created_ns: int
    description: str
    spec: MachineSpec  # the machine as it was
    layers: Layers
    phase: str  # what the machine was: created, running, paused, exited
    memory: bool
    version: str  # of the Nagaya that made it
    parts: tuple[Part, ...]
    base: str = ""  # the id of the snapshot that its memory is a difference to
    digest: str = ""

    @property
    def data_bytes(self) -> int:
        return sum(part.data_bytes for part in self.parts)


def directory(machine_dir: str, snapshot_id: str) -> str:
    return f"{machine_dir}/snapshots/{snapshot_id}"


def ids(machine_dir: str) -> list[str]:
    try:
        return [name for name in os.listdir(f"{machine_dir}/snapshots") if _is_id(name)]
    except FileNotFoundError:
        return []


def _is_id(name: str) -> bool:
    return len(name) == 16 and all(digit in "0123456789abcdef" for digit in name)


def load(machine_dir: str, snapshot_id: str) -> Snapshot:
    """Read and check a record, not what it stands for. Raises `NotFound`, `IntegrityError`, `Unsupported` (a newer format)."""
    return load_record(f"{directory(machine_dir, snapshot_id)}/{RECORD}", snapshot_id)


def load_record(path: str, snapshot_id: str = "") -> Snapshot:
    """The record at `path`, of the snapshot `snapshot_id` if that is told. Raises as `load`."""
    hint = "it cannot be restored; 'nagaya snapshot rm' removes it"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise NotFound("there is no such snapshot") from None
    except OSError as error:
        raise HostError.from_os(error, "cannot open a snapshot's record") from None
    try:
        raw = os.read(fd, records.MAX_BYTES)
    finally:
        os.close(fd)
    try:
        data = json.loads(raw)
        format_ = data["format"]
    except (ValueError, RecursionError, TypeError, KeyError):
        raise IntegrityError(f"the record of snapshot {snapshot_id or path} is damaged", hint=hint) from None
    if type(format_) is int and format_ not in (FORMAT, SHARED_FORMAT):
        raise Unsupported(
            f"snapshot {snapshot_id or path} is of format {format_}, and this Nagaya knows {FORMAT} and {SHARED_FORMAT}",
            hint="use the version of Nagaya that made it",
        )
    try:
        found = records.from_data(Snapshot, data, what=path)
    except IntegrityError as error:
        raise IntegrityError(f"the record of snapshot {snapshot_id} is damaged: {error.message}", hint=hint) from None
    if snapshot_id and found.id != snapshot_id:
        raise IntegrityError(f"the record of snapshot {found.name} is damaged: its sum is wrong", hint=hint)
    check(found, data)
    return found


def check(found: Snapshot, data: dict[str, Any]) -> None:
    """Raise `IntegrityError` for a record that is not as it was written: `data`, which may be from before a field was new."""
    hint = "it cannot be restored; 'nagaya snapshot rm' removes it"
    if (found.base and not _is_id(found.base)) or not _is_id(found.id) or found.digest != _sum(data):
        raise IntegrityError(f"the record of snapshot {found.name} is damaged: its sum is wrong", hint=hint)
    for part in found.parts:
        if part.name.startswith("/") or ".." in part.name.split("/") or part.kind not in ("file", "tree"):
            raise IntegrityError(f"the record of snapshot {found.name} names a part '{part.name}'", hint=hint)


def store(place: str, snapshot: Snapshot) -> Snapshot:
    """Write the record into the directory `place`; answers it with its sum."""
    summed = snapshot._replace(digest=_sum(records.to_data(snapshot)))
    records.store(f"{place}/{RECORD}", summed, durable=True)
    return summed


def _sum(data: dict[str, Any]) -> str:
    import hashlib  # lazy: rare

    text = json.dumps({**data, "digest": ""}, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def load_all(machine_dir: str) -> tuple[list[Snapshot], list[tuple[str, str]]]:
    """All snapshots, oldest first, and (id, why not) of those whose record cannot be used."""
    found, damaged = [], []
    for snapshot_id in ids(machine_dir):
        try:
            found.append(load(machine_dir, snapshot_id))
        except NotFound:
            damaged.append((snapshot_id, "its record is missing"))
        except (IntegrityError, Unsupported, HostError) as error:
            damaged.append((snapshot_id, error.message))
    return sorted(found, key=lambda snapshot: (snapshot.created_ns, snapshot.id)), damaged


def load_current(machine_dir: str) -> str:
    """The id of the snapshot that the machine descends from, or ""."""
    try:
        with open(f"{machine_dir}/snapshots/{_CURRENT}", encoding="ascii", errors="replace") as file:
            name = file.read(64).strip()
    except OSError:
        return ""
    return name if _is_id(name) else ""


def store_current(machine_dir: str, snapshot_id: str) -> None:
    records.write_file(f"{machine_dir}/snapshots/{_CURRENT}", snapshot_id.encode(), durable=True)


# -- making one


def begin(machine_dir: str) -> tuple[str, str]:
    """(id, directory) of a snapshot that is to be made. Until `finish` nobody but `mend` sees it."""
    make_directory(f"{machine_dir}/snapshots")
    snapshot_id = os.urandom(8).hex()
    place = f"{machine_dir}/snapshots/{_TEMPORARY}{snapshot_id}"
    os.mkdir(place, 0o700)
    return snapshot_id, place


def copy_disks(machine_dir: str, place: str) -> None:
    """What the machine in `machine_dir` has written, into the directory `place`. Nobody may write to it meanwhile.

    Blocks are shared where the file system can share them. Raises `OSError`, and `HostError` for what cp(1) says.
    """
    for name in (DATA_DISK, *filter(is_own_file, os.listdir(machine_dir))):
        copy_file(f"{machine_dir}/{name}", f"{place}/{name}")
    shared_disks.copy(machine_dir, place)
    for name in TREES:
        if os.path.isdir(f"{machine_dir}/{name}"):
            _copy_tree(f"{machine_dir}/{name}", f"{place}/{name}")
    copy_file(f"{machine_dir}/{_COPY_MARK}", f"{place}/{_COPY_MARK}")


def give_disks(place: str, target: str, *, backed: bool) -> None:
    """`copy_disks` out of a snapshot, which nobody writes, for a machine that goes on from it. Raises as that.

    With `backed`, of an engine that can read one on a backing file, a disk that would take long to copy stands on the
    snapshot's; without, it is one file, whatever the snapshot's is.
    """
    if not backed:
        copy_disks(place, target)
        shared_disks.make_whole(target)
    elif not (shared_disks.is_worth_it(place, target) and shared_disks.stand_on(place, target)):
        copy_disks(place, target)


def copy_quickly(machine_dir: str, place: str) -> bool:
    """`copy_disks`, where that takes no longer than to start a process for it; else False, and nothing has been done."""
    names = [DATA_DISK, *filter(is_own_file, os.listdir(machine_dir))]
    if any(os.path.lexists(f"{machine_dir}/{name}") for name in TREES):
        return False
    allocated = 0
    for name in names:
        try:
            allocated += os.lstat(f"{machine_dir}/{name}").st_blocks * shared_disks.SECTOR
        except FileNotFoundError:
            continue
    if allocated > shared_disks.QUICK_BYTES:
        return False
    copy_disks(machine_dir, place)
    return True


def copy_again(machine_dir: str, place: str, runs: list[tuple[int, int]]) -> None:
    """Bring a copy of the data disk, that `copy_disks` made earlier, up to date in `runs`, (offset, bytes). Raises `OSError`."""
    read = os.open(f"{machine_dir}/{DATA_DISK}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        write = os.open(f"{place}/{DATA_DISK}", os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            reflink.copy_again(read, write, runs)
        finally:
            os.close(write)
    finally:
        os.close(read)


def sync_disk(place: str) -> None:
    """Bring the copy of the data disk to the host's: whoever copies a little more then need not wait for all of it. Raises `OSError`."""
    fd = os.open(f"{place}/{DATA_DISK}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def copy_file(source: str, target: str) -> None:
    """A regular file, its mode kept; nothing when it is not there. Raises `OSError`."""
    try:
        read = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        mode = stat.S_IMODE(os.fstat(read).st_mode)
        write = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        try:
            if not reflink.clone(read, write):
                reflink.copy_data(read, write)
        finally:
            os.close(write)
    finally:
        os.close(read)


def _copy_tree(source: str, target: str) -> None:
    """A container's files with all that they are: cp(1) knows hard links, holes, attributes and overlayfs's whiteouts."""
    argv = [
        "cp", "-R", "-d", "--preserve=mode,ownership,timestamps,links,xattr", "--reflink=auto", "--sparse=auto", "-T",
        "--", source, target,
    ]  # fmt: skip
    said = os.memfd_create("cp", os.MFD_CLOEXEC)
    try:
        actions = [(os.POSIX_SPAWN_DUP2, said, 2)]
        environment = {"PATH": os.defpath, "LC_ALL": "C"}
        pid = os.posix_spawnp("cp", argv, environment, file_actions=actions)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        told = os.pread(said, 4096, 0).decode(errors="replace").strip()
    finally:
        os.close(said)
    if status:
        full = "No space left" in told
        raise HostError(
            f"cannot copy the machine's files: {told.splitlines()[0] if told else f'cp ended with status {status}'}",
            hint="free some space, for example with 'nagaya snapshot rm'" if full else "",
            errno=errno.ENOSPC if full else 0,
        )


def format_of(place: str) -> int:
    return SHARED_FORMAT if shared_disks.is_shared(place) else FORMAT


def sum_parts(place: str) -> tuple[Part, ...]:
    """The sums of all that is in a snapshot's directory but its record. Raises `OSError`."""
    parts = []
    for name in _list(place):
        kind = "tree" if name in TREES else "file"
        parts.append(_sum_part(place, name, kind))
    return tuple(parts)


def _sum_part(place: str, name: str, kind: str) -> Part:
    if kind == "tree":
        return Part(name, kind, *digests.digest_tree(f"{place}/{name}"))
    digest, data_bytes = digests.digest_file(f"{place}/{name}")  # in larger blocks than the file's holes
    return Part(name, kind, digest, min(data_bytes, os.lstat(f"{place}/{name}").st_blocks * shared_disks.SECTOR))


def _list(place: str) -> list[str]:
    """Names of a snapshot's parts: trees as one, of `memory` each file."""
    found = []
    for name in sorted(os.listdir(place)):
        if name.startswith(RECORD):  # one that was cut off while it was rewritten, too
            continue
        if name in TREES or not os.path.isdir(f"{place}/{name}"):
            found.append(name)
        else:
            found += [f"{name}/{below}" for below in _list(f"{place}/{name}")]
    return found


def finish(machine_dir: str, place: str, snapshot: Snapshot) -> Snapshot:
    """The directory `place` of `begin` is whole: give it its name. What follows a kill is all of it, or nothing."""
    snapshot = store(place, snapshot)
    reflink.sync_file_system(place)
    os.rename(place, directory(machine_dir, snapshot.id))
    store_current(machine_dir, snapshot.id)  # durable: so the rename before it is
    return snapshot


def verify(place: str, snapshot: Snapshot, *, memory_alone: bool = False) -> None:
    """Compare every part with its sum. Raises `IntegrityError`, `HostError`."""
    hint = "the machine was left as it is; 'nagaya snapshot rm' removes the snapshot"
    parts = [part for part in snapshot.parts if not memory_alone or part.name.startswith(f"{MEMORY}/")]
    known = {part.name for part in snapshot.parts}
    try:
        strange = set(_list(place)) - known
        if strange:
            raise IntegrityError(f"snapshot '{snapshot.name}' has a part that it should not: {min(strange)}", hint=hint)
        for part in parts:
            sum_ = digests.digest_tree if part.kind == "tree" else digests.digest_file
            if sum_(f"{place}/{part.name}")[0] != part.digest:
                raise IntegrityError(
                    f"snapshot '{snapshot.name}' is damaged: {part.name} is not what was saved", hint=hint
                )
    except FileNotFoundError as error:
        raise IntegrityError(f"snapshot '{snapshot.name}' is damaged: {error.filename} is missing", hint=hint) from None
    except OSError as error:
        raise HostError.from_os(error, f"cannot read snapshot '{snapshot.name}'") from None


def bases(machine_dir: str, snapshot: Snapshot) -> list[Snapshot]:
    """The snapshots without which its memory is worth nothing, the nearest first. Raises `IntegrityError`."""
    found: list[Snapshot] = []
    while snapshot.base:
        try:
            below = load(machine_dir, snapshot.base)
        except NotFound:
            raise IntegrityError(
                f"snapshot '{snapshot.name}' is damaged: the one that its memory builds on, {snapshot.base}, is missing"
            ) from None
        if below.id in (one.id for one in found):
            raise IntegrityError(f"snapshot '{snapshot.name}' is damaged: it builds on itself")
        found.append(below)
        snapshot = below
    return found


# -- removing one


def remove(machine_dir: str, snapshot_id: str, *, parent: str, fold: Callable[[str, str], None] | None = None) -> None:
    """Remove one, whose children become its `parent`'s. A kill in between leaves a valid tree.

    `fold` is the engine's `fold_base`, for snapshots whose memory builds on this one's; without, they are left without it.
    """
    for other in load_all(machine_dir)[0]:
        if fold is not None and other.base == snapshot_id:
            other = _make_whole(machine_dir, other, fold)
        if other.parent == snapshot_id:
            store(directory(machine_dir, other.id), other._replace(parent=parent))
    if load_current(machine_dir) == snapshot_id:
        store_current(machine_dir, parent)
    _discard(machine_dir, snapshot_id)


def _discard(machine_dir: str, snapshot_id: str) -> None:
    trash = f"{machine_dir}/snapshots/{_TRASH}{snapshot_id}"
    remove_tree(trash)
    os.rename(directory(machine_dir, snapshot_id), trash)
    remove_tree(trash)


def _make_whole(machine_dir: str, snapshot: Snapshot, fold: Callable[[str, str], None]) -> Snapshot:
    """Put a snapshot in its own place that does without its base. Until it has its name, `mend` removes it, and then puts it there."""
    old, place = directory(machine_dir, snapshot.id), f"{machine_dir}/snapshots/{_TEMPORARY}{snapshot.id}"
    base = load(machine_dir, snapshot.base)
    remove_tree(place)
    os.mkdir(place, 0o700)
    for part in snapshot.parts:
        if not part.name.startswith(f"{MEMORY}/"):
            os.link(f"{old}/{part.name}", f"{place}/{part.name}")
    os.mkdir(f"{place}/{MEMORY}", 0o700)
    fold(f"{old}/{MEMORY}", f"{place}/{MEMORY}")
    kept = [part for part in snapshot.parts if not part.name.startswith(f"{MEMORY}/")]
    made = [_sum_part(place, f"{MEMORY}/{name}", "file") for name in _list(f"{place}/{MEMORY}")]
    whole = store(place, snapshot._replace(parts=tuple(sorted([*kept, *made])), base=base.base))
    reflink.sync_file_system(place)
    os.rename(place, f"{machine_dir}/snapshots/{_WHOLE}{snapshot.id}")
    _finish_whole(machine_dir, snapshot.id)
    return whole


def _finish_whole(machine_dir: str, snapshot_id: str) -> None:
    if os.path.lexists(directory(machine_dir, snapshot_id)):
        _discard(machine_dir, snapshot_id)
    os.rename(f"{machine_dir}/snapshots/{_WHOLE}{snapshot_id}", directory(machine_dir, snapshot_id))


# -- restoring one


def is_of_another(place: str, machine_dir: str, machine_id: str) -> bool:
    """Whether what is saved in `place` was another machine until now: a fork's original, or one of another store."""
    if os.path.dirname(os.path.dirname(place)) != machine_dir:
        return True
    try:
        return load_record(f"{place}/{RECORD}").spec.id != machine_id
    except NotFound:
        return False


def prepare_restore(machine_dir: str, place: str, snapshot: Snapshot, spec: MachineSpec, *, backed: bool) -> str:
    """A snapshot's disks (see `give_disks`), and the records that go with them; `commit_restore` puts them in place.

    Answers where they are. The machine may run meanwhile. Raises `OSError`, `HostError`.
    """
    fresh = f"{machine_dir}/{RESTORE}.tmp"
    remove_tree(fresh)
    os.mkdir(fresh, 0o700)
    give_disks(place, fresh, backed=backed)
    if not shared_disks.is_shared(fresh):
        _touch(f"{fresh}/{_NO_BACKING}")
    records.store(f"{fresh}/spec.json", spec)
    records.store(f"{fresh}/rootfs.json", snapshot.layers)
    records.write_file(f"{fresh}/{_CURRENT}", snapshot.id.encode())
    reflink.sync_file_system(fresh)
    return fresh


def commit_restore(machine_dir: str) -> None:
    """From here on the machine, which does not run, is what was prepared, whoever is killed. Raises `OSError`."""
    os.rename(f"{machine_dir}/{RESTORE}.tmp", f"{machine_dir}/{RESTORE}")
    records.sync(machine_dir)
    _finish_restore(machine_dir)


def _finish_restore(machine_dir: str) -> None:
    """Every step may be the second of its kind: what is still in the directory has not been put in place."""
    fresh, old = f"{machine_dir}/{RESTORE}", f"{machine_dir}/{RESTORE}/old"
    if not os.path.exists(f"{fresh}/settled"):
        # What the snapshot does not have, the machine must not keep: one that was never started has no `upper`.
        for name in (*TREES, _COPY_MARK, "work"):
            if os.path.lexists(f"{fresh}/{name}") or not os.path.lexists(f"{machine_dir}/{name}"):
                continue
            if not os.path.exists(f"{fresh}/{name}.placed"):
                remove_tree(old)
                os.rename(f"{machine_dir}/{name}", old)
        for name in (*TREES, _COPY_MARK):
            if not os.path.lexists(f"{fresh}/{name}"):
                continue
            _touch(f"{fresh}/{name}.placed")  # before: a second run must not take the new one for the old one
            if os.path.lexists(f"{machine_dir}/{name}"):
                remove_tree(old)
                os.rename(f"{machine_dir}/{name}", old)
            os.rename(f"{fresh}/{name}", f"{machine_dir}/{name}")
        _touch(f"{fresh}/settled")
    make_directory(f"{machine_dir}/snapshots")
    if os.path.lexists(f"{fresh}/{_NO_BACKING}") and os.path.lexists(f"{machine_dir}/{BACKING_DISK}"):
        os.unlink(f"{machine_dir}/{BACKING_DISK}")  # what the old disk stands on; nobody starts it before this is over
    for name, target in (
        (BACKING_DISK, BACKING_DISK),
        (DATA_DISK, DATA_DISK),
        *((name, name) for name in os.listdir(fresh) if is_own_file(name)),
        ("rootfs.json", "rootfs.json"),
        ("spec.json", "spec.json"),
        (_CURRENT, f"snapshots/{_CURRENT}"),
    ):
        if os.path.lexists(f"{fresh}/{name}"):
            os.rename(f"{fresh}/{name}", f"{machine_dir}/{target}")
    records.sync(machine_dir)
    os.rename(fresh, f"{fresh}.tmp")  # its marks must not go before the rest of it
    remove_tree(f"{fresh}.tmp")


def _touch(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


# -- after a kill


def needs_mending(machine_dir: str) -> bool:
    """Whether a command on this machine's snapshots was cut off, or is at work. Two looks at the disk."""
    if os.path.lexists(f"{machine_dir}/{RESTORE}") or os.path.lexists(f"{machine_dir}/{RESTORE}.tmp"):
        return True
    try:
        names = os.listdir(f"{machine_dir}/snapshots")
    except FileNotFoundError:
        return False
    return any(name.startswith((_TEMPORARY, _TRASH, _WHOLE)) for name in names)


def mend(machine_dir: str) -> None:
    """Under the command lock: finish a restore that had begun, drop what else was cut off. Raises `OSError`."""
    if os.path.lexists(f"{machine_dir}/{RESTORE}"):
        _finish_restore(machine_dir)
    remove_tree(f"{machine_dir}/{RESTORE}.tmp")
    try:
        names = os.listdir(f"{machine_dir}/snapshots")
    except FileNotFoundError:
        return
    for name in names:
        if name.startswith(_WHOLE):
            _finish_whole(machine_dir, name.removeprefix(_WHOLE))
        elif name.startswith((_TEMPORARY, _TRASH)) or name.endswith(".tmp"):
            remove_tree(f"{machine_dir}/snapshots/{name}")
