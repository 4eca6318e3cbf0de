"""`nagaya disk …`: the disk images of whole machines."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nagaya.cli import listing, values
from nagaya.cli.context import Context
from nagaya.cli.each import each_name
from nagaya.cli.flags import MANY, Command, Flag, Parsed
from nagaya.cli.human import format_age, format_binary_size, format_local_time, format_time
from nagaya.cli.listing import Layout, print_json
from nagaya.cli.progress import open_progress
from nagaya.cli.template_functions import Row
from nagaya.errors import EXIT_FAILURE, Conflict, UsageError
from nagaya.storage.disk_images.store import Details, Disk

DISKS = Layout(
    columns=("Name", "Format", "Size", "Used", "Changed"),
    headings={
        "Name": "NAME", "Format": "FORMAT", "Size": "SIZE", "Used": "USED", "Changed": "CHANGED",
        "ChangedAt": "CHANGED AT", "Path": "PATH", "Backing": "BACKING",
    },
    elastic=("Name",),
)  # fmt: skip
SNAPSHOTS = Layout(columns=("ID", "Name", "Created"), headings={"ID": "ID", "Name": "NAME", "Created": "CREATED"})
ACTIONS = ("ls", "create", "apply", "rm")

_FORMAT = Flag("--disk-format", "What DISK is, where its name does not say it", value="FORMAT")
_BACKING = Flag("--allow-backing", "Allow a backing file outside the disk's own directory")
_QUIET = Flag("-q --quiet", "Show no progress")
_DISK = "DISK is a name in the store, or the path of a file (with a '/', or an extension such as .qcow2). "
_FORMATS = "Formats: qcow2, raw, vmdk, vdi, vhd, vhdx."


def create(context: Context, parsed: Parsed) -> int:
    """Make it, and print its name."""
    name, size = parsed.words
    context.host.disks.create(name, values.parse_size(size, "SIZE"), format=parsed.text("disk-format"))
    print(name)
    return 0


def ls(context: Context, parsed: Parsed) -> int:
    """List the store's disks."""
    found, now_ns = context.host.disks.list(), time.time_ns()
    listing.print_list(
        parsed,
        DISKS,
        rows=lambda: [disk_row(disk, now_ns=now_ns) for disk in found],
        records=lambda: [disk_record(disk) for disk in found],
        ids=lambda: [disk.name for disk in found],
    )
    return 0


def info(context: Context, parsed: Parsed) -> int:
    """Show each; with --json an array."""
    details: list[Details] = []
    status = each_name(
        context,
        parsed.words,
        lambda name: details.append(
            context.host.disks.info(
                name, format=parsed.text("disk-format"), allow_backing=parsed.switch("allow-backing")
            )
        ),
    )
    if parsed.switch("json"):
        print_json([details_record(each) for each in details])
    elif parsed.text("format"):
        now_ns = time.time_ns()
        listing.print_rows(
            [disk_row(each.disk, now_ns=now_ns) for each in details], DISKS, format=parsed.text("format")
        )
    else:
        for number, each in enumerate(details):
            print(("\n" if number else "") + "\n".join(describe(each)))
    return status


def describe(details: Details) -> list[str]:
    """A disk in lines for people."""
    disk = details.disk
    return [
        f"disk:       {disk.name or disk.path}",
        f"file:       {disk.path}",
        f"format:     {disk.format}",
        f"size:       {format_binary_size(disk.virtual_bytes)} ({disk.virtual_bytes} bytes)",
        f"used:       {format_binary_size(disk.actual_bytes)}",
        *(f"stands on:  {printable(path)}" for path in details.chain[1:]),
        *(f"snapshot:   {printable(each.name)}, {format_local_time(each.created_ns)}" for each in details.snapshots),
    ]


def printable(text: str) -> str:
    """An image's words, whose writer is not known."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def disk_row(disk: Disk, *, now_ns: int) -> Row:
    return Row(
        Name=disk.name or disk.path,
        Format=disk.format,
        Size=format_binary_size(disk.virtual_bytes),
        Used=format_binary_size(disk.actual_bytes),
        Changed=format_age(disk.created_ns, now_ns),
        ChangedAt=format_local_time(disk.created_ns),
        Path=disk.path,
        Backing=printable(disk.backing),
    )


def disk_record(disk: Disk) -> dict[str, object]:
    return {
        "name": disk.name,
        "path": disk.path,
        "format": disk.format,
        "size_bytes": disk.virtual_bytes,
        "used_bytes": disk.actual_bytes,
        "changed_at": format_time(disk.created_ns),
        "backing": printable(disk.backing),
    }


def details_record(details: Details) -> dict[str, object]:
    return {
        **disk_record(details.disk),
        "chain": list(details.chain),
        "snapshots": [
            {"id": each.id, "name": each.name, "created_at": format_time(each.created_ns)} for each in details.snapshots
        ],
    }


@contextmanager
def _showing(parsed: Parsed, label: str, total_bytes: int) -> Iterator[Callable[[float], None]]:
    """What takes a share of the work that is done, and draws it."""
    with open_progress(quiet=parsed.switch("quiet"), eager=True) as progress:
        progress.start("disk", label, total_bytes)
        yield lambda share: progress.advance("disk", int(share * total_bytes))
        progress.finish("disk")


def convert(context: Context, parsed: Parsed) -> int:
    """Convert, and print the new disk."""
    source, target = parsed.words
    disks, format = context.host.disks, parsed.text("disk-format")
    size = disks.get(source, format=format).virtual_bytes
    with _showing(parsed, source, size) as progress:
        disks.convert(
            source, target, format=format, to=parsed.text("to"), compress=parsed.switch("compress"),
            force=parsed.switch("force"), allow_backing=parsed.switch("allow-backing"), progress=progress,
        )  # fmt: skip
    print(target)
    return 0


def clone(context: Context, parsed: Parsed) -> int:
    """Clone, and print the new disk."""
    source, target = parsed.words
    disks, format = context.host.disks, parsed.text("disk-format")
    allow = parsed.switch("allow-backing")
    if parsed.switch("linked"):
        disks.clone(source, target, linked=True, format=format, allow_backing=allow)
    else:
        size = disks.get(source, format=format).actual_bytes
        with _showing(parsed, source, size) as progress:
            disks.clone(source, target, format=format, allow_backing=allow, progress=progress)
    print(target)
    return 0


def resize(context: Context, parsed: Parsed) -> int:
    """Resize, and print the new size in bytes."""
    name, text = parsed.words
    sign = text[0] if text[:1] in ("+", "-") else ""
    size = values.parse_size(text[len(sign) :], "SIZE")
    disks, shrink = context.host.disks, parsed.switch("shrink")
    try:
        print(disks.resize(name, sign, size, format=parsed.text("disk-format"), shrink=shrink).virtual_bytes)
    except Conflict:
        from nagaya.manager.bay import find_user  # lazy: a disk that is in use

        path = os.path.realpath(disks.locate(name))
        machine = find_user(context.host.machines, path)
        if machine is None:
            raise
        print(machine.front.bay.resize(path, sign, size))
    return 0


def snapshot(context: Context, parsed: Parsed) -> int:
    """`ls DISK`, `create DISK NAME`, `apply DISK NAME`, `rm DISK NAME`."""
    action, name, *rest = parsed.words
    if action not in ACTIONS:
        raise UsageError(f"unknown action '{action}'", hint=f"one of: {', '.join(ACTIONS)}")
    if (action == "ls") == bool(rest):
        raise UsageError(f"'nagaya disk snapshot {action}' needs a disk" + (" alone" if rest else " and a name"))
    format = parsed.text("disk-format")
    if action != "ls":
        context.host.disks.snapshot(name, action, rest[0], format=format)
        print(rest[0])
        return 0
    found = context.host.disks.info(name, format=format, allow_backing=True).snapshots
    if parsed.switch("json"):
        print_json([{"id": each.id, "name": each.name, "created_at": format_time(each.created_ns)} for each in found])
        return 0
    rows = [
        Row(ID=printable(each.id), Name=printable(each.name), Created=format_local_time(each.created_ns))
        for each in found
    ]
    listing.print_rows(rows, SNAPSHOTS, format=parsed.text("format"))
    return 0


def check(context: Context, parsed: Parsed) -> int:
    """Say of each what is wrong; status 1 when something is."""
    broken = False

    def look(name: str) -> None:
        nonlocal broken
        found = context.host.disks.check(
            name, format=parsed.text("disk-format"), repair=parsed.switch("repair")
        )  # fmt: skip
        broken = broken or not found.clean
        words = [f"{found.repaired} clusters repaired"] if found.repaired else []
        words += [f"{found.corruptions} damaged"] if found.corruptions else []
        words += [f"{found.leaks} lost (harmless; --repair gives them back)"] if found.leaks else []
        print(f"{name}: {', '.join(words) or 'clean'}")

    status = each_name(context, parsed.words, look)
    return status or (EXIT_FAILURE if broken else 0)


def rm(context: Context, parsed: Parsed) -> int:
    """Remove each that no machine has and nothing stands on."""
    force = parsed.switch("force")
    used = context.host.machines.disk_paths()

    def remove(name: str) -> None:
        context.host.disks.remove(name, force=force, in_use=used)
        print(name)

    return each_name(context, parsed.words, remove)


CREATE = Command(
    create,
    usage="DISK SIZE",
    words=(2, 2),
    flags=(Flag("-f --disk-format", "Format of the new disk (default: qcow2, or what a file's name says)", value="FORMAT"),),
    about=f"{_DISK}It takes space as it is written to. {_FORMATS}",
    examples=(("nagaya disk create web 20g", "in the store"), ("nagaya disk create ./web.vmdk 20g", "a file")),
)  # fmt: skip
LS = Command(
    ls,
    flags=(listing.FORMAT, listing.JSON, listing.NO_TRUNC, listing.QUIET),
    about="Fields: " + ", ".join(DISKS.headings) + ".",
    examples=(("nagaya disk ls", ""), ("nagaya disk ls --format '{{.Name}} {{.Path}}'", "")),
)
INFO = Command(
    info,
    usage="DISK [DISK...]",
    words=(1, MANY),
    flags=(_FORMAT, _BACKING, listing.FORMAT, Flag("--json", "Print a JSON array")),
    about=f"{_DISK}Also of a disk that a machine is using.",
    examples=(("nagaya disk info web", ""), ("nagaya disk info --disk-format raw /dev/vg/web", "a block device")),
)
CONVERT = Command(
    convert,
    usage="DISK NEW",
    words=(2, 2),
    flags=(
        _FORMAT,
        _BACKING,
        _QUIET,
        Flag("--to", "Format of the new disk (default: qcow2, or what a file's name says)", value="FORMAT"),
        Flag("-c --compress", "Compress it (qcow2, vmdk)"),
        Flag("-f --force", "Replace a disk that is there already"),
    ),
    about=f"{_DISK}What lies under it becomes part of the new disk, which appears when it is whole. {_FORMATS}",
    examples=(
        ("nagaya disk convert ./appliance.vmdk web", "into the store, as qcow2"),
        ("nagaya disk convert web ./web.vhdx", "for Hyper-V"),
    ),
)
CLONE = Command(
    clone,
    usage="DISK NEW",
    words=(2, 2),
    flags=(
        _FORMAT,
        _BACKING,
        _QUIET,
        Flag("-l --linked", "A qcow2 disk that stands on DISK and holds only what differs; DISK must stay as it is"),
    ),
    about=f"{_DISK}A copy shares its blocks with DISK where the file system can do that.",
    examples=(
        ("nagaya disk clone --linked debian web", "at once, whatever its size"),
        ("nagaya disk clone web copy", ""),
    ),
)
RESIZE = Command(
    resize,
    usage="DISK [+|-]SIZE",
    words=(2, 2),
    flags=(_FORMAT, Flag("--shrink", "Allow to cut the end off")),
    about=f"{_DISK}Formats: qcow2, raw. A disk that a machine is using becomes larger while"
    " it runs. File systems on it are made larger inside the machine.",
    examples=(("nagaya disk resize web 40g", ""), ("nagaya disk resize web +10g", "")),
)
SNAPSHOT = Command(
    snapshot,
    usage="ls|create|apply|rm DISK [NAME]",
    words=(2, 3),
    flags=(_FORMAT, listing.FORMAT, Flag("--json", "Print one JSON array")),
    about=f"{_DISK}Of qcow2 disks that no machine is using.",
    examples=(
        ("nagaya disk snapshot create web before-upgrade", ""),
        ("nagaya disk snapshot ls web", ""),
        ("nagaya disk snapshot apply web before-upgrade", "go back to it"),
    ),
)
CHECK = Command(
    check,
    usage="DISK [DISK...]",
    words=(1, MANY),
    flags=(_FORMAT, Flag("--repair", "Mend what can be mended without losing data (qcow2)")),
    about=f"{_DISK}Formats: qcow2, vmdk, vdi, vhdx. Looks at the image's own tables, not at file systems.",
    examples=(("nagaya disk check web", ""), ("nagaya disk check --repair web", "after a crash")),
)
RM = Command(
    rm,
    usage="DISK [DISK...]",
    words=(1, MANY),
    flags=(Flag("-f --force", "A disk that does not exist is no failure"),),
    examples=(("nagaya disk rm web", ""),),
)
