"""`nagaya machine attach-disk`, `detach-disk` and `resize-disk`: the disks of a whole machine that is there already."""

from __future__ import annotations

import os

from nagaya.cli import values
from nagaya.cli.commands.hardware import parse_disk
from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Flag, Parsed

_NAMES = "DISK is named as it was given, or disk0, disk1, … if it is the machine's own."


def attach(context: Context, parsed: Parsed) -> int:
    """Put it in, and print what it is called from now on."""
    name, disk = parsed.words
    print(context.host.machines.get(name).front.bay.attach(parse_disk(disk)))
    return 0


def detach(context: Context, parsed: Parsed) -> int:
    """Take it out."""
    name, disk = parsed.words
    context.host.machines.get(name).front.bay.detach(_path(disk), remove=parsed.switch("remove"))
    return 0


def resize(context: Context, parsed: Parsed) -> int:
    """Resize it, and print its new size in bytes."""
    name, disk, text = parsed.words
    sign = text[0] if text[:1] in ("+", "-") else ""
    size = values.parse_size(text[len(sign) :], "SIZE")
    print(context.host.machines.get(name).front.bay.resize(_path(disk), sign, size, shrink=parsed.switch("shrink")))
    return 0


def _path(text: str) -> str:
    return os.path.abspath(text) if "/" in text else text


ATTACH = Command(
    attach,
    usage="MACHINE DISK",
    words=(2, 2),
    about="DISK is what 'nagaya machine create --disk' takes: a size for a new disk of the machine's own, or"
    " DISK[,clone][,ro][,format=F][,size=S][,allow-backing]. A machine that runs gets it at once (not with --compat),"
    " and has it at its next start too.",
    examples=(
        ("nagaya machine attach-disk web 50g", "a new one"),
        ("nagaya machine attach-disk web data", "one of 'nagaya disk ls'"),
    ),
)
DETACH = Command(
    detach,
    usage="MACHINE DISK",
    words=(2, 2),
    flags=(Flag("--remove", "Remove a disk that is the machine's own, with what is on it"),),
    about=f"{_NAMES} Of a machine that runs those that were attached: its system has to let go of it, so unmount it there"
    " first. All others while it is off.",
    examples=(("nagaya machine detach-disk web data", ""), ("nagaya machine detach-disk --remove web disk1", "")),
)
RESIZE = Command(
    resize,
    usage="MACHINE DISK [+|-]SIZE",
    words=(3, 3),
    flags=(Flag("--shrink", "Allow to cut the end off, of a machine that is off"),),
    about=f"{_NAMES} Larger while the machine runs, too: its system sees the new size at once, and makes its own"
    " partitions and file systems larger.",
    examples=(("nagaya machine resize-disk web disk0 40g", ""), ("nagaya machine resize-disk web data +10g", "")),
)
