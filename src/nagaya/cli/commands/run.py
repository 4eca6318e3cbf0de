"""`nagaya run`."""

from __future__ import annotations

from nagaya.cli import create_flags, terminal, values
from nagaya.cli.context import Context
from nagaya.cli.flags import MANY, Command, Flag, Parsed
from nagaya.cli.progress import Late
from nagaya.errors import UsageError
from nagaya.supervisor.launch import allow_fork


def run(context: Context, parsed: Parsed) -> int:
    """Create, start, and (without -d) carry the streams until the program ends."""
    options = create_flags.read_options(parsed)
    keys = values.parse_detach_keys(parsed.text("detach-keys", "ctrl-p,ctrl-q"))
    detach, proxy = parsed.switch("detach"), parsed.switch("sig-proxy")
    if not detach:
        terminal.require_terminal(stdin=options.stdin, tty=options.tty)
    rows, columns = terminal.window_size() if options.tty else (0, 0)
    options = options._replace(rows=rows, columns=columns)
    machine = create_flags.create_machine(context, parsed, options, starting=True)
    allow_fork()
    progress = Late(quiet=parsed.switch("quiet"))
    if detach:
        with progress:
            machine.start(rows=rows, columns=columns, progress=progress)
        create_flags.warn_of(machine)
        print(machine.id)
        return 0
    with terminal.watch_signals(stdin=options.stdin, tty=options.tty, sig_proxy=proxy) as signals:
        with progress:
            attachment = machine.start(attach=True, rows=rows, columns=columns, progress=progress)
        if attachment is None:
            raise UsageError("the machine has no streams to attach to")
        with attachment:
            create_flags.tell(attachment.warnings)
            ending = terminal.converse(
                attachment, signals, stdin=options.stdin, tty=options.tty, detach_keys=keys, sig_proxy=proxy
            )
    return terminal.finish(ending)


RUN = Command(
    run,
    usage="IMAGE [COMMAND [ARG...]]",
    words=(1, MANY),
    program_after=1,
    runs_program=True,
    flags=(
        *create_flags.FLAGS,
        Flag("-d --detach", "Leave it running in the background, and print its id"),
        Flag("--detach-keys", "Keys that leave it running (default ctrl-p,ctrl-q)", value="KEYS"),
        Flag("--sig-proxy", "Pass signals on to the program", default=True),
    ),
    about="Everything after IMAGE is the program's. The exit status is the program's own; 125 when nagaya failed, 126"
    " when the program cannot be executed, 127 when it was not found, 128+n when signal n ended it.",
    examples=(
        ("nagaya run --rm debian cat /etc/os-release", "run one command"),
        ("nagaya run --rm -it debian bash", "work in it"),
        ("nagaya run -d --name web -v ./site:/www:ro busybox httpd -f -h /www", "a service"),
        ("nagaya run -d -p 8080:80 -v ./site:/www:ro busybox httpd -f -h /www", "and its port on this host's loopback"),
        ("nagaya run -d -p 0.0.0.0:5353:53/udp --net-rate 10mbit busybox dnsd", "UDP, for everybody, at most so fast"),
        ("nagaya run --rm -m 256m --cpus 0.5 --network none debian make", "with limits"),
        ("echo hi | nagaya run --rm -i busybox cat", "in a pipe"),
    ),
)
