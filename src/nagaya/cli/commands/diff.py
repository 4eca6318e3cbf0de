"""`nagaya diff`."""

from __future__ import annotations

from nagaya.cli.context import Context
from nagaya.cli.failures import printable
from nagaya.cli.flags import Command, Parsed
from nagaya.cli.listing import JSON, print_json


def diff(context: Context, parsed: Parsed) -> int:
    """A line for each path: A added, C changed, D deleted."""
    changes = context.host.machines.get(parsed.words[0]).diff()
    if parsed.switch("json"):
        print_json([{"kind": change.kind, "path": change.path} for change in changes])
        return 0
    for change in changes:
        print(change.kind, printable(change.path))
    return 0


DIFF = Command(
    diff,
    usage="MACHINE",
    words=(1, 1),
    flags=(JSON,),
    about="A: added, C: changed, D: deleted.",
    examples=(("nagaya diff web", ""),),
)
