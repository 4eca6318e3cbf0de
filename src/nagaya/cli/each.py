"""A command that takes several names: each gets its turn, whatever becomes of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from nagaya.cli.context import Context
from nagaya.errors import EXIT_FAILURE, EXIT_USAGE, NagayaError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.manager.machine import Machine


def each_name(context: Context, names: Iterable[str], action: Callable[[str], object]) -> int:
    """Do `action` with every name; print the errors; 0 when there were none, 2 when one was a misuse, else 1."""
    status = 0
    for name in names:
        try:
            action(name)
        except NagayaError as error:
            from nagaya.cli.failures import report  # lazy: most succeed

            report(error, debug=context.debug)
            status = max(status, EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILURE)
    return status


def each_machine(context: Context, names: Iterable[str], action: Callable[[Machine], object]) -> int:
    """The same with the machine of each name, which is printed as it was given once the action is done."""

    def act(name: str) -> None:
        action(context.host.machines.get(name))
        print(name)

    return each_name(context, names, act)
