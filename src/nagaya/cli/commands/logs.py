"""`nagaya logs`."""

from __future__ import annotations

import sys
import time

from nagaya.cli import values
from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Flag, Parsed
from nagaya.cli.human import format_time


def logs(context: Context, parsed: Parsed) -> int:
    """Write each line to the stream that its program wrote it to."""
    now_ns = time.time_ns()
    since_ns, until_ns = (
        values.parse_time(parsed.text(key), f"--{key}", now_ns=now_ns) if parsed.given(key) else 0
        for key in ("since", "until")
    )
    follow, stamps = parsed.switch("follow"), parsed.switch("timestamps")
    tail = parsed.text("tail", "all")
    machine = context.host.machines.get(parsed.words[0])
    outputs = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}
    continued = dict.fromkeys(outputs, False)
    lines = machine.logs(
        follow=follow,
        since_ns=since_ns,
        until_ns=until_ns,
        tail=-1 if tail in ("all", "-1") else values.parse_integer(tail, "--tail", least=0),
    )
    for line in lines:
        out = outputs[line.stream]
        stamp = b"" if not stamps or continued[line.stream] else format_time(line.time_ns).encode() + b" "
        out.write(stamp + line.data + (b"" if line.partial else b"\n"))
        continued[line.stream] = line.partial
        if follow:
            out.flush()
    for out in outputs.values():
        out.flush()
    return 0


LOGS = Command(
    logs,
    usage="MACHINE",
    words=(1, 1),
    flags=(
        Flag("-f --follow", "Go on with what is written until the machine ends"),
        Flag("-t --timestamps", "Write the time before each line"),
        Flag("-n --tail", "Only so many of the last lines (default all)", value="NUMBER"),
        Flag("--since", "Only lines from this time on: RFC 3339, Unix time, or 10m for ten minutes ago", value="TIME"),
        Flag("--until", "Only lines up to this time", value="TIME"),
    ),
    examples=(("nagaya logs -f --tail 20 web", ""), ("nagaya logs -t --since 10m web", "")),
)
