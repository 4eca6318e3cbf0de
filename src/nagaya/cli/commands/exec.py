"""`nagaya exec`."""

from __future__ import annotations

from nagaya.cli import terminal, values
from nagaya.cli.context import Context
from nagaya.cli.flags import MANY, Command, Flag, Parsed
from nagaya.errors import UsageError
from nagaya.manager.options import ExecOptions


def exec_(context: Context, parsed: Parsed) -> int:
    """Run a program in a running machine; its status is ours."""
    name, *argv = parsed.words
    stdin, tty, detach = parsed.switch("interactive"), parsed.switch("tty"), parsed.switch("detach")
    keys = values.parse_detach_keys(parsed.text("detach-keys", "ctrl-p,ctrl-q"))
    if not detach:
        terminal.require_terminal(stdin=stdin, tty=tty)
    rows, columns = terminal.window_size() if tty else (0, 0)
    options = ExecOptions(
        argv=tuple(argv),
        env=values.parse_environment(parsed.texts("env"), parsed.texts("env-file")),
        workdir=parsed.text("workdir") or None,
        user=parsed.text("user") if parsed.given("user") else None,
        tty=tty,
        stdin=stdin and not detach,
        rows=rows,
        columns=columns,
    )
    machine = context.host.machines.get(name)
    if detach:
        machine.exec(options, detach=True)
        return 0
    proxy = parsed.switch("sig-proxy")
    with terminal.watch_signals(stdin=stdin, tty=tty, sig_proxy=proxy) as signals:
        attachment = machine.exec(options)
        if attachment is None:
            raise UsageError("the program has no streams to attach to")
        with attachment:
            ending = terminal.converse(attachment, signals, stdin=stdin, tty=tty, detach_keys=keys, sig_proxy=proxy)
    return terminal.finish(ending)


EXEC = Command(
    exec_,
    usage="MACHINE COMMAND [ARG...]",
    words=(2, MANY),
    program_after=1,
    runs_program=True,
    flags=(
        Flag("-d --detach", "Leave it running in the background"),
        Flag("-i --interactive", "Pass standard input to the program"),
        Flag("-t --tty", "Give the program a terminal"),
        Flag("-e --env", "Set an environment variable; a mere NAME passes ours on", value="NAME[=VALUE]", many=True),
        Flag("--env-file", "Read environment variables from a file", value="FILE", many=True),
        Flag("-u --user", "User (and group) of the program, names or numbers", value="USER[:GROUP]"),
        Flag("-w --workdir", "Working directory of the program", value="DIR"),
        Flag("--detach-keys", "Keys that leave it running (default ctrl-p,ctrl-q)", value="KEYS"),
        Flag("--sig-proxy", "Pass signals on to the program", default=True),
    ),
    about="Everything after MACHINE is the program's. Exit status as with 'nagaya run'.",
    examples=(
        ("nagaya exec -it web bash", ""),
        ("nagaya exec -u nobody -w /tmp web id", ""),
        ("nagaya exec -i db sh -c 'cat > /tmp/dump' < dump.sql", ""),
    ),
)
