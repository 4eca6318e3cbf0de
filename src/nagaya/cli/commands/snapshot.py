"""`nagaya snapshot create`, `ls`, `tree`, `inspect`, `restore`, `rename`, `rm` and `prune`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nagaya.cli import listing
from nagaya.cli.commands.prune import confirmed
from nagaya.cli.context import Context
from nagaya.cli.each import each_name
from nagaya.cli.flags import MANY, Command, Flag, Parsed
from nagaya.cli.human import format_age, format_local_time, format_size, format_time
from nagaya.cli.listing import Layout, print_json
from nagaya.cli.progress import open_progress
from nagaya.cli.template_functions import Row
from nagaya.errors import EXIT_FAILURE, UsageError
from nagaya.supervisor.launch import allow_fork

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.manager.machine import Machine
    from nagaya.storage.snapshots import Snapshot

SNAPSHOTS = Layout(
    columns=("Machine", "Name", "Parent", "Created", "State", "Size", "Description"),
    headings={
        "ID": "SNAPSHOT ID", "Machine": "MACHINE", "Name": "NAME", "Parent": "PARENT", "Base": "BASE", "Created": "CREATED",
        "CreatedAt": "CREATED AT", "State": "STATE", "Memory": "MEMORY", "Size": "SIZE", "Description": "DESCRIPTION",
        "Current": "CURRENT",
    },
    elastic=("Description", "Machine"),
)  # fmt: skip


def create(context: Context, parsed: Parsed) -> int:
    """Take a snapshot, and print its name."""
    memory = _memory(parsed)
    keep = _number(parsed, "keep")
    machine = context.host.machines.get(parsed.words[0])
    name = parsed.words[1] if len(parsed.words) > 1 else ""
    taken = machine.snapshots.create(
        name, description=parsed.text("description"), memory=memory, whole=parsed.switch("whole")
    )
    for warning in taken.warnings:
        sys.stderr.write(f"nagaya: warning: {warning}\n")
    if parsed.switch("json"):
        print_json(
            {**record(machine, taken.snapshot), "paused_ms": taken.paused_ms, "programs_stood_ms": taken.stood_ms}
        )
    else:
        print(taken.snapshot.name)
    if keep:
        machine.snapshots.prune(keep=keep)
    return 0


def _memory(parsed: Parsed) -> bool | None:
    with_, without = parsed.switch("memory"), parsed.switch("no-memory")
    if with_ and without:
        raise UsageError("--memory and --no-memory exclude each other")
    return True if with_ else False if without else None


def _number(parsed: Parsed, key: str) -> int:
    text = parsed.text(key)
    if text and (not (text.isascii() and text.isdigit()) or not 1 <= int(text[:9]) <= 1_000_000):
        raise UsageError(f"--{key}: '{text}' is no number of snapshots", hint=f"for example --{key} 5")
    return int(text[:9]) if text else 0


def ls(context: Context, parsed: Parsed) -> int:
    """List the snapshots of one machine, or of all."""
    found = _found(context, parsed.words)
    now_ns = time.time_ns()
    listing.print_list(
        parsed,
        SNAPSHOTS,
        rows=lambda: [row(machine, snapshot, now_ns=now_ns) for machine, snapshot in found],
        records=lambda: [record(machine, snapshot) for machine, snapshot in found],
        ids=lambda: [snapshot.name for _, snapshot in found],
    )
    return _tell_damaged(context, parsed.words)


def _machines(context: Context, words: tuple[str, ...]) -> list[Machine]:
    return [context.host.machines.get(word) for word in words] or context.host.machines.list()


def _found(context: Context, words: tuple[str, ...]) -> list[tuple[Machine, Snapshot]]:
    machines = _machines(context, words)
    return [(machine, snapshot) for machine in machines for snapshot in machine.snapshots.list()]


def _tell_damaged(context: Context, words: tuple[str, ...]) -> int:
    status = 0
    for machine in _machines(context, words):
        for snapshot_id, why in machine.snapshots.damaged():
            sys.stderr.write(f"nagaya: snapshot {snapshot_id} of machine '{machine.name}' cannot be used: {why}\n")
            status = EXIT_FAILURE
    return status


def row(machine: Machine, snapshot: Snapshot, *, now_ns: int) -> Row:
    parents = {one.id: one.name for one in machine.snapshots.list()}
    return Row(
        ID=snapshot.id,
        Machine=machine.name,
        Name=snapshot.name,
        Parent=parents.get(snapshot.parent, ""),
        Base=parents.get(snapshot.base, snapshot.base),
        Created=format_age(snapshot.created_ns, now_ns),
        CreatedAt=format_local_time(snapshot.created_ns),
        State=f"{snapshot.phase}, with memory" if snapshot.memory else f"{snapshot.phase}, disks alone",
        Memory=str(snapshot.memory).lower(),
        Size=format_size(snapshot.data_bytes),
        Description=snapshot.description,
        Current=str(machine.snapshots.current() == snapshot.id).lower(),
    )


def record(machine: Machine, snapshot: Snapshot) -> dict[str, object]:
    """A snapshot, JSON-ready."""
    return {
        "id": snapshot.id,
        "name": snapshot.name,
        "machine": machine.name,
        "machine_id": machine.id,
        "parent": snapshot.parent or None,
        "base": snapshot.base or None,
        "current": machine.snapshots.current() == snapshot.id,
        "created_at": format_time(snapshot.created_ns),
        "description": snapshot.description,
        "type": snapshot.spec.type,
        "state": snapshot.phase,
        "memory": snapshot.memory,
        "size_bytes": snapshot.data_bytes,
        "version": snapshot.version,
        "format": snapshot.format,
        "image": snapshot.spec.image,
        "directory": machine.snapshots.directory(snapshot),
        "parts": [
            {"name": part.name, "digest": part.digest, "data_bytes": part.data_bytes} for part in snapshot.parts
        ],
    }  # fmt: skip


def tree(context: Context, parsed: Parsed) -> int:
    """Show which snapshot came from which; `*` is where the machine is."""
    for machine in _machines(context, parsed.words):
        found = machine.snapshots.list()
        if not found and not parsed.words:
            continue
        print(machine.name)
        known = {snapshot.id for snapshot in found}
        children: dict[str, list[Snapshot]] = {}
        for snapshot in found:
            children.setdefault(snapshot.parent if snapshot.parent in known else "", []).append(snapshot)
        _print_tree(children, "", "", current=machine.snapshots.current())
    return _tell_damaged(context, parsed.words)


def _print_tree(children: dict[str, list[Snapshot]], parent: str, indent: str, *, current: str) -> None:
    waiting = [
        (snapshot, indent, at == len(children[parent]) - 1) for at, snapshot in enumerate(children.get(parent, ()))
    ]
    while waiting:  # no recursion: a chain may be long
        snapshot, lead, last = waiting.pop(0)
        mark = "*" if snapshot.id == current else ""
        about = f"  {snapshot.description}" if snapshot.description else ""
        print(f"{lead}{'└── ' if last else '├── '}{snapshot.name}{mark}{about}")
        below = children.get(snapshot.id, [])
        lead += "    " if last else "│   "
        waiting[:0] = [(one, lead, at == len(below) - 1) for at, one in enumerate(below)]


def inspect(context: Context, parsed: Parsed) -> int:
    """Show everything about snapshots of a machine."""
    machine = context.host.machines.get(parsed.words[0])
    found: list[dict[str, object]] = []

    def look(name: str) -> None:
        found.append(record(machine, machine.snapshots.get(name)))

    status = each_name(context, parsed.words[1:], look)
    format = parsed.text("format")
    if format and format != "json":
        from nagaya.cli.template import Template  # lazy: only --format

        template = Template(format)
        for data in found:
            sys.stdout.write(template.render(data) + "\n")
    else:
        print_json(found)
    return status


def save(context: Context, parsed: Parsed) -> int:
    """Write a snapshot to a file."""
    machine = context.host.machines.get(parsed.words[0])
    path = parsed.words[2]
    if path == "-" and sys.stdout.isatty():
        raise UsageError("a snapshot is no text for a terminal", hint="name a file, or send it into another program")
    with _moving(parsed, "saving") as report:
        machine.snapshots.save(parsed.words[1], path, image=not parsed.switch("no-image"), report=report)
    return 0


@contextmanager
def _moving(parsed: Parsed, label: str) -> Iterator[Callable[[int, int], None]]:
    begun = False
    with open_progress(quiet=parsed.switch("quiet"), eager=True) as progress:

        def report(done: int, total: int) -> None:
            nonlocal begun
            if not begun:
                progress.start("snapshot", label, total)
                begun = True
            progress.advance("snapshot", min(done, total))

        yield report
        if begun:
            progress.finish("snapshot")


def restore(context: Context, parsed: Parsed) -> int:
    """Make the machine what it was, and print the snapshot's name; or make one of a file."""
    allow_fork()
    memory = _memory(parsed)
    path = parsed.text("from")
    if path:
        if len(parsed.words) > 1 or memory is not None:
            raise UsageError(
                "a machine that is made of a file has its name, and what the file has",
                hint="nagaya snapshot restore --from FILE [NAME]",
            )
        with _moving(parsed, "restoring") as report:
            made = context.host.machines.restore(path, name="".join(parsed.words), report=report)
        print(made.name)
        return 0
    if not parsed.words:
        raise UsageError("which machine?", hint="nagaya snapshot restore MACHINE, or --from FILE")
    machine = context.host.machines.get(parsed.words[0])
    name = parsed.words[1] if len(parsed.words) > 1 else ""
    print(machine.snapshots.restore(name, memory=memory).name)
    return 0


def rename(context: Context, parsed: Parsed) -> int:
    """Give a snapshot another name."""
    context.host.machines.get(parsed.words[0]).snapshots.rename(parsed.words[1], parsed.words[2])
    return 0


def rm(context: Context, parsed: Parsed) -> int:
    """Remove snapshots; what descends from them stays, and stays whole."""
    machine = context.host.machines.get(parsed.words[0])
    names = parsed.words[1:]
    if parsed.switch("all") == bool(names):
        raise UsageError("name snapshots to remove, or give --all", hint="'nagaya snapshot ls' lists them")
    if parsed.switch("all"):
        names = tuple([one.id for one in machine.snapshots.list()] + [id_ for id_, _ in machine.snapshots.damaged()])

    def remove(name: str) -> None:
        machine.snapshots.remove(name)
        print(name)

    return each_name(context, names, remove)


def prune(context: Context, parsed: Parsed) -> int:
    """Remove old snapshots of machines, of all when none is named."""
    keep = _number(parsed, "keep")
    what = f"all snapshots but the newest {keep} of each machine" if keep else "all snapshots of each machine"
    if not confirmed(parsed, [f"{what} out of: {', '.join(parsed.words) or 'all machines'}"]):
        return EXIT_FAILURE
    removed = {machine.name: machine.snapshots.prune(keep=keep) for machine in _machines(context, parsed.words)}
    if parsed.switch("json"):
        print_json({"snapshots": removed})
        return 0
    for machine, names in removed.items():
        for name in names:
            print(f"{machine}/{name}")
    return 0


_MEMORY = Flag("--memory", "With what is in its memory: refused where that cannot be")
_NO_MEMORY = Flag("--no-memory", "The disks alone")
_ABOUT_CREATE = (
    "Of a machine that runs, its memory is saved where its type can (kvm, emulated, and containers where CRIU is installed), and its programs go on from there "
    "after a restore; else its disks alone, as they are at one moment. Volumes and directories of the host are not part of it."
)
CREATE = Command(
    create,
    usage="MACHINE [SNAPSHOT]",
    words=(1, 2),
    flags=(
        Flag("-m --description", "What it is of", value="TEXT"), _MEMORY, _NO_MEMORY,
        Flag("--whole", "All of its memory, and not what differs from the snapshot before"), listing.JSON,
        Flag("--keep", "Afterwards remove all but the newest so many of the machine", value="NUMBER"),
    ),
    about=_ABOUT_CREATE,
    examples=(
        ("nagaya snapshot create web", "called snap1, snap2, …"),
        ("nagaya snapshot create -m 'before the upgrade' web clean", ""),
        ("nagaya snapshot create --keep 7 web", "for a timer"),
    ),
)  # fmt: skip
LS = Command(
    ls,
    usage="[MACHINE...]",
    words=(0, MANY),
    flags=(listing.FORMAT, listing.JSON, listing.NO_TRUNC, listing.QUIET),
    about="Fields: " + ", ".join(SNAPSHOTS.headings) + ".",
    examples=(("nagaya snapshot ls web", ""), ("nagaya snapshot ls --format '{{.Machine}}/{{.Name}} {{.Size}}'", "")),
)
TREE = Command(tree, usage="[MACHINE...]", words=(0, MANY), examples=(("nagaya snapshot tree web", ""),))
INSPECT = Command(
    inspect,
    usage="MACHINE SNAPSHOT [SNAPSHOT...]",
    words=(2, MANY),
    flags=(
        Flag("-f --format", "A Go template such as '{{.Parent}}', or json", value="FORMAT"),
        Flag("--json", "Print one JSON array (as without it)"),
    ),
    examples=(("nagaya snapshot inspect web clean", ""),),
)  # fmt: skip
_QUIET = Flag("-q --quiet", "Show no progress")
SAVE = Command(
    save,
    usage="MACHINE SNAPSHOT FILE",
    words=(3, 3),
    flags=(
        Flag("--no-image", "Without what the machine's root is made of: for a host that has the same image"),
        _QUIET,
    ),
    about="All of it is in the file: memory, state and disk, with that of the snapshots that it builds on. Volumes and "
    "directories of the host are not. '-' is standard output. 'snapshot restore --from' makes a machine of it.",
    examples=(
        ("nagaya snapshot save web clean web.snapshot", ""),
        ("nagaya snapshot save web clean - | zstd > web.snapshot.zst", ""),
    ),
)
RESTORE = Command(
    restore,
    usage="MACHINE [SNAPSHOT] | --from FILE [NAME]",
    words=(0, 2),
    flags=(
        Flag("--from", "Make a new machine of what 'snapshot save' has written", value="FILE"), _QUIET,
        Flag("--memory", "Go on from its memory: refused when that was not saved"),
        Flag("--no-memory", "From its disks alone: what runs is started anew"),
    ),
    about="In place: what the machine is now is lost, unless there is a snapshot of it. All is checked and copied before the "
    "machine is ended. Without a name: the snapshot that the machine descends from. With its memory the machine runs on "
    "afterwards; without, it is started anew if it runs, and else stays off.",
    examples=(
        ("nagaya snapshot restore web clean", ""), ("nagaya snapshot restore --no-memory web", ""),
        ("nagaya snapshot restore --from web.snapshot web2", "a new machine"),
    ),
)  # fmt: skip  # fmt: skip
RENAME = Command(
    rename, usage="MACHINE SNAPSHOT NAME", words=(3, 3), examples=(("nagaya snapshot rename web snap1 clean", ""),)
)
RM = Command(
    rm,
    usage="MACHINE [SNAPSHOT...]",
    words=(1, MANY),
    flags=(Flag("-a --all", "Remove every one of the machine"),),
    examples=(("nagaya snapshot rm web clean", ""), ("nagaya snapshot rm --all web", "")),
)
PRUNE = Command(
    prune,
    usage="[MACHINE...]",
    words=(0, MANY),
    flags=(
        Flag("-f --force", "Do not ask"), listing.JSON,
        Flag("--keep", "Keep the newest so many of each machine", value="NUMBER"),
    ),
    examples=(("nagaya snapshot prune --keep 5", ""), ("nagaya snapshot prune -f web", "")),
)  # fmt: skip
