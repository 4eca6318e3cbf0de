"""`nagaya rename`."""

from __future__ import annotations

from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Parsed


def rename(context: Context, parsed: Parsed) -> int:
    """Give a machine another name."""
    context.host.machines.get(parsed.words[0]).rename(parsed.words[1])
    return 0


RENAME = Command(rename, usage="MACHINE NAME", words=(2, 2), examples=(("nagaya rename web web-old", ""),))
