"""`nagaya tag`."""

from __future__ import annotations

from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Parsed


def tag(context: Context, parsed: Parsed) -> int:
    """Give an image a further name."""
    context.host.images.tag(parsed.words[0], parsed.words[1])
    return 0


TAG = Command(
    tag, usage="IMAGE NAME[:TAG]", words=(2, 2), examples=(("nagaya tag app:1 registry.example/team/app:1", ""),)
)
