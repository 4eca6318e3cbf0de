"""`nagaya kill`."""

from __future__ import annotations

from nagaya.cli import values
from nagaya.cli.context import Context
from nagaya.cli.each import each_machine
from nagaya.cli.flags import MANY, Command, Flag, Parsed


def kill(context: Context, parsed: Parsed) -> int:
    """Signal each."""
    number = values.parse_signal(parsed.text("signal", "KILL"))
    return each_machine(context, parsed.words, lambda machine: machine.kill(number))


KILL = Command(
    kill,
    usage="MACHINE [MACHINE...]",
    words=(1, MANY),
    flags=(Flag("-s --signal", "Signal to send, by name or number (default KILL)", value="SIGNAL"),),
    examples=(("nagaya kill web", ""), ("nagaya kill -s HUP web", "have it read its configuration again")),
)
