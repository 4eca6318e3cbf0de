"""`nagaya attach`."""

from __future__ import annotations

from nagaya.cli import terminal, values
from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Flag, Parsed


def attach(context: Context, parsed: Parsed) -> int:
    """Carry the streams of a machine's program from now on; its status is ours."""
    machine = context.host.machines.get(parsed.words[0])
    process = machine.spec.process
    stdin = process.stdin and not parsed.switch("no-stdin")
    terminal.require_terminal(stdin=stdin, tty=process.tty)
    keys = values.parse_detach_keys(parsed.text("detach-keys", "ctrl-p,ctrl-q"))
    proxy = parsed.switch("sig-proxy")
    with (
        terminal.watch_signals(stdin=stdin, tty=process.tty, sig_proxy=proxy) as signals,
        machine.attach(stdin=stdin) as attachment,
    ):
        ending = terminal.converse(attachment, signals, stdin=stdin, tty=process.tty, detach_keys=keys, sig_proxy=proxy)
    return terminal.finish(ending)


ATTACH = Command(
    attach,
    usage="MACHINE",
    words=(1, 1),
    runs_program=True,
    flags=(
        Flag("--no-stdin", "Do not pass standard input on"),
        Flag("--detach-keys", "Keys that leave it running (default ctrl-p,ctrl-q)", value="KEYS"),
        Flag("--sig-proxy", "Pass signals on to the program (without a terminal)", default=True),
    ),
    examples=(("nagaya attach shell", "ctrl-p ctrl-q leaves it running"),),
)
