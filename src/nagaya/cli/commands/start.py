"""`nagaya start`."""

from __future__ import annotations

from nagaya.cli import terminal, values
from nagaya.cli.context import Context
from nagaya.cli.create_flags import tell, warn_of
from nagaya.cli.each import each_machine
from nagaya.cli.flags import MANY, Command, Flag, Parsed
from nagaya.cli.progress import Late
from nagaya.errors import EXIT_TOOL, NagayaError, UsageError, exit_status
from nagaya.supervisor.launch import allow_fork

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.manager.machine import Machine


def start(context: Context, parsed: Parsed) -> int:
    """Start each machine; with -a or -i one machine, whose streams we carry."""
    allow_fork()
    if not parsed.switch("attach") and not parsed.switch("interactive"):
        return each_machine(context, parsed.words, _start)
    if len(parsed.words) > 1:
        raise UsageError("only one machine can be attached to", hint="leave out -a and -i, or name one machine")
    try:
        return _start_attached(context, parsed)
    except NagayaError as error:
        from nagaya.cli.failures import report  # lazy: rare

        report(error, debug=context.debug)
        return exit_status(error, runs_program=True)


def _start(machine: Machine) -> None:
    with Late() as progress:
        machine.start(progress=progress)
    warn_of(machine)


def _start_attached(context: Context, parsed: Parsed) -> int:
    machine = context.host.machines.get(parsed.words[0])
    process = machine.spec.process
    stdin = parsed.switch("interactive") and process.stdin
    terminal.require_terminal(stdin=stdin, tty=process.tty)
    keys = values.parse_detach_keys(parsed.text("detach-keys", "ctrl-p,ctrl-q"))
    rows, columns = terminal.window_size() if process.tty else (0, 0)
    proxy = parsed.switch("sig-proxy")
    with terminal.watch_signals(stdin=stdin, tty=process.tty, sig_proxy=proxy) as signals:
        with Late() as progress:
            attachment = machine.start(attach=True, rows=rows, columns=columns, progress=progress)
        if attachment is None:
            return EXIT_TOOL
        with attachment:
            tell(attachment.warnings)
            ending = terminal.converse(
                attachment, signals, stdin=stdin, tty=process.tty, detach_keys=keys, sig_proxy=proxy
            )
    return terminal.finish(ending)


START = Command(
    start,
    usage="MACHINE [MACHINE...]",
    words=(1, MANY),
    flags=(
        Flag("-a --attach", "Show its output, and end with its status"),
        Flag("-i --interactive", "Pass standard input as well"),
        Flag("--detach-keys", "Keys that leave it running (default ctrl-p,ctrl-q)", value="KEYS"),
        Flag("--sig-proxy", "Pass signals on to the program", default=True),
    ),
    examples=(("nagaya start web db", ""), ("nagaya start -ai shell", "with its terminal")),
)
