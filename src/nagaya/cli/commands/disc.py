"""`nagaya insert` and `nagaya eject`: the discs of a whole machine's CD drives."""

from __future__ import annotations

import os

from nagaya.cli import values
from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Flag, Parsed

_DRIVE = Flag("--drive", "Which of its CD drives, from 0 on (default 0)", value="NUMBER")
_ABOUT = "Also of a machine that is off. A system that holds its drive shut is not asked."


def insert(context: Context, parsed: Parsed) -> int:
    """Put it in, in place of what was there."""
    name, path = parsed.words
    context.host.machines.get(name).front.change_disc(os.path.abspath(path), drive=_drive(parsed))
    return 0


def eject(context: Context, parsed: Parsed) -> int:
    """Take it out."""
    context.host.machines.get(parsed.words[0]).front.change_disc("", drive=_drive(parsed))
    return 0


def _drive(parsed: Parsed) -> int:
    return values.parse_integer(parsed.text("drive", "0"), "--drive", least=0, most=1024)


INSERT = Command(
    insert,
    usage="MACHINE FILE",
    words=(2, 2),
    flags=(_DRIVE,),
    about=_ABOUT,
    examples=(("nagaya insert web ./drivers.iso", ""),),
)
EJECT = Command(
    eject, usage="MACHINE", words=(1, 1), flags=(_DRIVE,), about=_ABOUT, examples=(("nagaya eject web", ""),)
)
