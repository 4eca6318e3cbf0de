"""`nagaya stop` and `nagaya restart`."""

from __future__ import annotations

from nagaya.cli import values
from nagaya.cli.context import Context
from nagaya.cli.each import each_machine
from nagaya.cli.flags import MANY, Command, Flag, Parsed

_TIME = Flag("-t --time --timeout", "Seconds to wait before SIGKILL (default: the machine's, 10)", value="SECONDS")


def _timeout(parsed: Parsed) -> float | None:
    return values.parse_timeout(parsed.text("timeout"), "--timeout") if parsed.given("timeout") else None


def stop(context: Context, parsed: Parsed) -> int:
    """Stop each."""
    timeout_s = _timeout(parsed)
    return each_machine(context, parsed.words, lambda machine: machine.stop(timeout_s=timeout_s))


def restart(context: Context, parsed: Parsed) -> int:
    """Stop and start each."""
    from nagaya.supervisor.launch import allow_fork  # lazy: `stop` starts nothing

    allow_fork()
    timeout_s = _timeout(parsed)
    return each_machine(context, parsed.words, lambda machine: machine.restart(timeout_s=timeout_s))


STOP = Command(
    stop,
    usage="MACHINE [MACHINE...]",
    words=(1, MANY),
    flags=(_TIME,),
    about="Sends the machine's stop signal (SIGTERM, --stop-signal or the image's), and SIGKILL after the time is up.",
    examples=(("nagaya stop web", ""), ("nagaya stop -t 1 $(nagaya ps -q)", "all that run")),
)
RESTART = Command(
    restart, usage="MACHINE [MACHINE...]", words=(1, MANY), flags=(_TIME,), examples=(("nagaya restart -t 2 web", ""),)
)
