"""`nagaya pause` and `nagaya unpause`."""

from __future__ import annotations

from nagaya.cli.context import Context
from nagaya.cli.each import each_machine
from nagaya.cli.flags import MANY, Command, Parsed


def pause(context: Context, parsed: Parsed) -> int:
    """Freeze each."""
    return each_machine(context, parsed.words, lambda machine: machine.pause())


def unpause(context: Context, parsed: Parsed) -> int:
    """Let each go on."""
    return each_machine(context, parsed.words, lambda machine: machine.unpause())


PAUSE = Command(pause, usage="MACHINE [MACHINE...]", words=(1, MANY), examples=(("nagaya pause web", ""),))
UNPAUSE = Command(unpause, usage="MACHINE [MACHINE...]", words=(1, MANY), examples=(("nagaya unpause web", ""),))
