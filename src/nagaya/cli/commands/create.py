"""`nagaya create`."""

from __future__ import annotations

from nagaya.cli import create_flags
from nagaya.cli.context import Context
from nagaya.cli.flags import MANY, Command, Parsed


def create(context: Context, parsed: Parsed) -> int:
    """Create, and print the id."""
    print(create_flags.create_machine(context, parsed, create_flags.read_options(parsed)).id)
    return 0


CREATE = Command(
    create,
    usage="IMAGE [COMMAND [ARG...]]",
    words=(1, MANY),
    program_after=1,
    flags=create_flags.FLAGS,
    about="Takes what 'nagaya run' takes; 'nagaya start' starts the machine later.",
    examples=(
        ("nagaya create --name web debian sleep infinity", ""),
        ("nagaya start -a web", "start it and show its output"),
    ),
)
