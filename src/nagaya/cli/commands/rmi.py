"""`nagaya rmi`."""

from __future__ import annotations

from nagaya.cli.context import Context
from nagaya.cli.each import each_name
from nagaya.cli.flags import MANY, Command, Flag, Parsed
from nagaya.errors import NotFound


def rmi(context: Context, parsed: Parsed) -> int:
    """Remove each, and print what was untagged and deleted. With -f a missing image is no failure."""
    force = parsed.switch("force")
    in_use = context.host.machines.image_ids

    def remove(name: str) -> None:
        try:
            lines = context.host.images.remove(name, force=force, in_use=in_use)
        except NotFound as error:
            if not force:
                raise
            from nagaya.cli.failures import say  # lazy: rare

            say(error.message)
            return
        for line in lines:
            print(line)

    return each_name(context, parsed.words, remove)


RMI = Command(
    rmi,
    usage="IMAGE [IMAGE...]",
    words=(1, MANY),
    flags=(Flag("-f --force", "Remove an image with several names, too"),),
    examples=(("nagaya rmi app:1", ""), ("nagaya rmi $(nagaya images -q --filter dangling=true)", "")),
)
