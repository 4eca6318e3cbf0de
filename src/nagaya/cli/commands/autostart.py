"""`nagaya autostart`: machines that start and stop with the host."""

from __future__ import annotations

from collections.abc import Callable

from nagaya.cli import values
from nagaya.cli.context import Context
from nagaya.cli.each import each_machine
from nagaya.cli.flags import MANY, Command, Flag, Parsed
from nagaya.cli.listing import Layout, print_json, print_rows
from nagaya.cli.template_functions import Row
from nagaya.errors import EXIT_FAILURE, NagayaError
from nagaya.manager import autostart
from nagaya.manager.machine import Machine
from nagaya.model.spec import Autostart

STOP_S = 300.0
ROWS = Layout(
    columns=("Name", "Order", "Delay", "State"),
    headings={"Name": "NAME", "Order": "ORDER", "Delay": "DELAY", "State": "STATE"},
    elastic=("Name",),
)


def enable(context: Context, parsed: Parsed) -> int:
    """Settle it for each."""
    delay_s = values.parse_timeout(parsed.text("delay"), "--delay") if parsed.given("delay") else 0.0
    order = values.parse_integer(parsed.text("order", "0"), "--order", least=0, most=autostart.MOST_ORDER)
    settled = Autostart(order, delay_s)
    return each_machine(context, parsed.words, lambda machine: autostart.settle(machine, settled))


def disable(context: Context, parsed: Parsed) -> int:
    """Unsettle it for each."""
    return each_machine(context, parsed.words, lambda machine: autostart.settle(machine, None))


def ls(context: Context, parsed: Parsed) -> int:
    """List them in the order in which they are started."""
    found = [(machine, machine.spec.autostart) for machine in autostart.in_order(context.host.machines.list())]
    if parsed.switch("json"):
        print_json(
            [
                {"name": machine.name, "order": when.order, "delay_s": when.delay_s, "state": machine.state.phase}
                for machine, when in found
                if when is not None
            ]
        )
        return 0
    rows = [
        Row(Name=machine.name, Order=str(when.order), Delay=f"{when.delay_s:g} s", State=machine.state.phase)
        for machine, when in found
        if when is not None
    ]
    print_rows(rows, ROWS, format=parsed.text("format"))
    return 0


def start(context: Context, parsed: Parsed) -> int:
    """Start all that are to be started with the host."""
    return _all(context, lambda failed: autostart.start_all(context.host.machines.list(), failed))


def stop(context: Context, parsed: Parsed) -> int:
    """Stop all that run."""
    timeout_s = values.parse_timeout(parsed.text("timeout"), "--timeout") if parsed.given("timeout") else STOP_S
    return _all(context, lambda failed: autostart.stop_all(context.host.machines.list(), timeout_s, failed))


def _all(context: Context, act: Callable[[autostart.Failed], list[Machine]]) -> int:
    status = 0

    def failed(machine: Machine, problem: NagayaError) -> None:
        nonlocal status
        from nagaya.cli.failures import report  # lazy: most succeed

        report(problem, debug=context.debug)
        status = EXIT_FAILURE

    for machine in act(failed):
        print(machine.name)
    return status


ENABLE = Command(
    enable,
    usage="MACHINE [MACHINE...]",
    words=(1, MANY),
    flags=(
        Flag("--order", "Lower ones are started earlier, and stopped later (default 0)", value="NUMBER"),
        Flag("--delay", "Seconds to wait before it is started", value="SECONDS"),
    ),
    about="What starts them is 'nagaya autostart start', by the unit that 'nagaya generate systemd --all' prints.",
    examples=(("nagaya autostart enable db", ""), ("nagaya autostart enable --order 10 --delay 5 web", "after db")),
)
DISABLE = Command(
    disable, usage="MACHINE [MACHINE...]", words=(1, MANY), examples=(("nagaya autostart disable web", ""),)
)
LS = Command(
    ls,
    flags=(Flag("--format", "Print each by this Go template", value="TEMPLATE"), Flag("--json", "Print a JSON array")),
    examples=(("nagaya autostart ls", ""),),
)
START = Command(
    start,
    about="Those that run already stay as they are. One that cannot be started does not keep the others from it; the"
    " status is 1 then.",
    examples=(("nagaya autostart start", "as the host's unit does"),),
)
STOP = Command(
    stop,
    flags=(
        Flag("--timeout", "Seconds for all together (default 300); what runs then is switched off", value="SECONDS"),
    ),
    about="All machines that run, in good order: those of the highest order first, and before them those that do not"
    " start with the host. Each has its own --stop-timeout, too.",
    examples=(("nagaya autostart stop --timeout 90", "as the host's unit does"),),
)
