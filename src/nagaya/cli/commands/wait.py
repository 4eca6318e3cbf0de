"""`nagaya wait`."""

from __future__ import annotations

from nagaya.cli.context import Context
from nagaya.cli.each import each_name
from nagaya.cli.flags import MANY, Command, Parsed


def wait(context: Context, parsed: Parsed) -> int:
    """Print the exit status of each, in the order given."""
    machines = context.host.machines
    return each_name(context, parsed.words, lambda name: print(machines.get(name).wait(), flush=True))


WAIT = Command(wait, usage="MACHINE [MACHINE...]", words=(1, MANY), examples=(("nagaya wait job", ""),))
