"""`nagaya rm`."""

from __future__ import annotations

from nagaya.cli.context import Context
from nagaya.cli.each import each_machine, each_name
from nagaya.cli.flags import MANY, Command, Flag, Parsed
from nagaya.errors import IntegrityError, NotFound


def rm(context: Context, parsed: Parsed) -> int:
    """Remove each. With -f a machine that does not exist is no failure."""
    force, volumes = parsed.switch("force"), parsed.switch("volumes")
    if not force:
        return each_machine(context, parsed.words, lambda machine: machine.remove(volumes=volumes))

    def remove(name: str) -> None:
        try:
            context.host.machines.get(name).remove(force=True, volumes=volumes)
        except IntegrityError:
            context.host.machines.remove_damaged(name)
        except NotFound as error:
            from nagaya.cli.failures import say  # lazy: rare

            say(error.message)
            return
        print(name)

    return each_name(context, parsed.words, remove)


RM = Command(
    rm,
    usage="MACHINE [MACHINE...]",
    words=(1, MANY),
    flags=(
        Flag("-f --force", "Kill it first when it runs"),
        Flag("-v --volumes", "Remove its anonymous volumes too"),
    ),
    examples=(("nagaya rm job", ""), ("nagaya rm -f $(nagaya ps -aq)", "all of them")),
)
