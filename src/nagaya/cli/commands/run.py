"""`nagaya run`."""

from __future__ import annotations

from nagaya.cli import create_flags, terminal, values
from nagaya.cli.context import Context
from nagaya.cli.flags import MANY, Command, Flag, Parsed
from nagaya.errors import NagayaError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.manager.machine import Machine


def run(context: Context, parsed: Parsed) -> int:
    """Create, start, and (without -d) carry the streams until the program ends."""
    options = create_flags.read_options(parsed)
    detach = parsed.switch("detach")
    keys = values.parse_detach_keys(parsed.text("detach-keys", "ctrl-p,ctrl-q"))
    if not detach:
        terminal.require_terminal(stdin=options.stdin, tty=options.tty)
    rows, columns = terminal.window_size() if options.tty else (0, 0)
    options = options._replace(rows=rows, columns=columns)
    machine = create_flags.create_machine(context, parsed, options, starting=True)
    if detach:
        _start(machine, rm=options.auto_remove)
        print(machine.id)
        return 0
    proxy = parsed.switch("sig-proxy")
    with terminal.watch_signals(stdin=options.stdin, tty=options.tty, sig_proxy=proxy) as signals:
        attachment = _start(machine, rm=options.auto_remove, attach=True, rows=rows, columns=columns)
        assert attachment is not None
        with attachment:
            if attachment.warnings:
                from nagaya.cli.failures import warn  # lazy: most hosts give a machine all that it asked for

                warn(attachment.warnings)
            ending = terminal.converse(
                attachment, signals, stdin=options.stdin, tty=options.tty, detach_keys=keys, sig_proxy=proxy
            )
    return terminal.finish(ending)
