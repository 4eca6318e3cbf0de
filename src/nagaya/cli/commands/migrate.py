"""`nagaya migrate send`, `receive` and `resolve`."""

from __future__ import annotations

import json
import os
import sys
import time

from nagaya.cli.context import Context
from nagaya.cli.failures import printable
from nagaya.cli.flags import Command, Flag, Parsed
from nagaya.cli.human import format_size
from nagaya.cli.progress import write_status
from nagaya.errors import EXIT_FAILURE, NagayaError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.manager.receiving import Received

_ADDRESSES = (
    "ADDRESS is unix:PATH, tcp:HOST:PORT, exec:COMMAND (a command whose standard input and output are the stream), or - for "
    "this command's own. Nothing on the stream is encrypted or authenticated: across hosts, let ssh carry it."
)


def send(context: Context, parsed: Parsed) -> int:
    """Send a machine, and say what it took."""
    from nagaya.manager import migrating
    from nagaya.migration.addresses import describe, parse_address
    from nagaya.migration.departure import Terms

    if not parsed.given("to"):
        raise UsageError("where to?", hint="for example --to exec:'ssh host nagaya migrate receive -'")
    to = parse_address(parsed.text("to"))
    if to.kind == "-" and parsed.switch("json"):
        raise UsageError(
            "--json writes to standard output, which --to - makes the stream", hint="use --to exec:COMMAND"
        )
    if to.kind == "-" and (os.isatty(0) or os.isatty(1)):
        raise UsageError("--to - needs the target on standard input and output", hint="use --to exec:COMMAND")
    terms = Terms(_milliseconds(parsed), parsed.switch("post-copy"))
    machine = context.host.machines.get(parsed.words[0])
    shown = _Shown(quiet=parsed.switch("quiet"), as_json=parsed.switch("json"))
    sent = migrating.send(machine, to, terms, on_progress=shown.take)
    if parsed.switch("json"):
        print(json.dumps({"event": "moved", "name": machine.name, "to": describe(to), **sent._asdict()}), flush=True)
    elif not parsed.switch("quiet"):
        stood = f"it stood for {sent.downtime_ms:.0f} ms" if sent.downtime_ms else "the stream broke behind it"
        write_status(
            f"{machine.name}: runs there; {stood}, {format_size(sent.sent_bytes)} in {sent.rounds} rounds,"
            f" {sent.total_s:.1f} s in all\n"
        )
    return 0


def _milliseconds(parsed: Parsed) -> int:
    text = parsed.text("max-downtime", "100")
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:9]) <= 600_000:
        raise UsageError(f"--max-downtime: '{text}' is no number of milliseconds", hint="from 1 to 600000")
    return int(text)


class _Shown:
    """Progress: a line for each round, and now and then within one; with `--json` all of it as objects."""

    def __init__(self, *, quiet: bool, as_json: bool) -> None:
        self._quiet, self._as_json = quiet, as_json
        self._last: tuple[int, float] = (-1, 0.0)

    def take(self, message: dict[str, object]) -> None:
        number, sent, left, rate = (
            value if isinstance(value := message.get(name), int) else 0
            for name in ("round", "sent_bytes", "left_bytes", "bytes_per_s")
        )
        if self._as_json:
            record = {"round": number, "sent_bytes": sent, "left_bytes": left, "bytes_per_s": rate}
            print(json.dumps({"event": "progress", **record}), flush=True)
            return
        now_s = time.monotonic()
        if self._quiet or (number == self._last[0] and now_s - self._last[1] < 2.0):
            return
        self._last = (number, now_s)
        left_text = f", {left >> 12} pages left" if number else ""
        rate_text = f", {format_size(rate)}/s" if rate else ""
        write_status(f"round {number}: {format_size(sent)} sent{left_text}{rate_text}\n")


def receive(context: Context, parsed: Parsed) -> int:
    """Take one machine, or with `--keep` one after the other, and print their names."""
    from nagaya.migration.addresses import parse_address

    address = parse_address(parsed.words[0] if parsed.words else "-")
    if address.kind == "exec":
        raise UsageError("a machine is received at unix:PATH, tcp:HOST:PORT, or -")
    if address.kind != "-":
        return _listen(context, parsed)
    if parsed.switch("keep"):
        raise UsageError(
            "standard input and output bring one machine", hint="leave --keep away, or listen at an address"
        )
    if os.isatty(0) or os.isatty(1):
        raise UsageError("a terminal brings no machine", hint="nagaya migrate receive unix:/run/migrate.sock")
    from nagaya.manager.receiving import receive as take

    fds = os.dup(0), os.dup(1)
    os.dup2(2, 1)  # what else this process, or one that it starts, has to say must not get into the stream
    received = take(context.host, fds)
    if received is not None:
        _tell(received, quiet=True, as_json=False)
    return 0


def _listen(context: Context, parsed: Parsed) -> int:
    from nagaya.kernel import unix
    from nagaya.manager.receiving import receive as take
    from nagaya.migration.addresses import describe, listen, parse_address

    address = parse_address(parsed.words[0])
    listener = listen(address)
    if not parsed.switch("quiet"):
        write_status(f"listening at {describe(address)}\n")
    status = 0
    try:
        while True:
            fd = unix.accept(listener)
            try:
                received = take(context.host, (fd, fd))
            except NagayaError as problem:
                if not parsed.switch("keep"):
                    raise
                write_status(f"nagaya: {printable(problem.message)}\n")
                received, status = None, EXIT_FAILURE
            finally:
                os.close(fd)
            if received is not None:
                _tell(received, quiet=parsed.switch("quiet"), as_json=parsed.switch("json"))
                if not parsed.switch("keep"):
                    return status
    except KeyboardInterrupt:
        return status
    finally:
        os.close(listener)
        if address.kind == "unix":
            try:
                os.unlink(address.path)
            except FileNotFoundError:
                pass


def _tell(received: Received, *, quiet: bool, as_json: bool) -> None:
    for warning in received.warnings:
        sys.stderr.write(f"nagaya: warning: {printable(warning)}\n")
    if as_json:
        print(json.dumps({"event": "arrived", "name": received.machine.name, "id": received.machine.id}), flush=True)
    elif not quiet:
        print(received.machine.name, flush=True)


def resolve(context: Context, parsed: Parsed) -> int:
    """Find out, or be told, where a machine is that was handed over, and print it."""
    from nagaya.manager import migrating
    from nagaya.migration.addresses import parse_address

    here, there, to = parsed.switch("here"), parsed.switch("there"), parsed.text("to")
    if here + there + bool(to) != 1:
        raise UsageError("say who knows: --to ADDRESS, or --here, or --there", hint="--to asks the target itself")
    machine = context.host.machines.get(parsed.words[0])
    if to:
        runs_there = migrating.resolve(machine, to=parse_address(to))
    else:
        runs_there = migrating.resolve(machine, runs_there=there)
    print(f"{machine.name}: {'runs there, and is gone from here' if runs_there else 'stays here'}")
    return 0


_QUIET = Flag("-q --quiet", "Show no progress")
SEND = Command(
    send,
    usage="MACHINE --to ADDRESS",
    words=(1, 1),
    flags=(
        Flag("--to", "Where the target receives", value="ADDRESS"),
        Flag("--max-downtime", "How long it may stand at the end (default: 100)", value="MS"),
        Flag(
            "--post-copy",
            "When it writes faster than that allows, let it run there before all of its memory is there (type kvm)",
        ),
        Flag("--json", "Progress and result as JSON objects, one a line"),
        _QUIET,
    ),
    about="The machine runs here until all of it is there, and then there; it keeps its name, id, addresses and programs, and "
    "whatever fails before that leaves it running here. Of type kvm or emulated, without volumes and snapshots. "
    + _ADDRESSES,
    examples=(
        ("nagaya migrate send web --to exec:'ssh host nagaya migrate receive -'", "to another host"),
        ("nagaya migrate send web --to unix:/run/migrate.sock", "to another store on this one"),
        ("nagaya migrate send --max-downtime 500 web --to tcp:192.0.2.7:7007", "a busy one"),
    ),
)
RECEIVE = Command(
    receive,
    usage="[ADDRESS]",
    words=(0, 1),
    flags=(
        Flag("--keep", "Go on for further machines, until interrupted"),
        Flag("--json", "Each machine as a JSON object"),
        _QUIET,
    ),
    about="Takes one machine and ends when it runs here. Its image comes along where it is not here yet. " + _ADDRESSES,
    examples=(
        ("nagaya migrate receive unix:/run/migrate.sock", ""),
        ("nagaya migrate receive --keep tcp:192.0.2.7:7007", "on a network that is yours alone"),
        ("nagaya migrate receive -", "what ssh starts for the source"),
    ),
)
RESOLVE = Command(
    resolve,
    usage="MACHINE",
    words=(1, 1),
    flags=(
        Flag("--to", "Ask the target, which receives there", value="ADDRESS"),
        Flag("--here", "It does not run there, and never will: let it go on here"),
        Flag("--there", "It runs there: remove it from here"),
    ),
    about="For a machine whose stream broke at the last step, when the target had been told that it may run and had not said that "
    "it does. It stands here until this is settled, for it must not run twice.",
    examples=(
        ("nagaya migrate resolve web --to exec:'ssh host nagaya migrate receive -'", ""),
        ("nagaya migrate resolve web --there", "the user has looked"),
    ),
)
