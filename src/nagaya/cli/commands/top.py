"""`nagaya top`."""

from __future__ import annotations

from nagaya.cli import listing
from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Parsed
from nagaya.cli.human import format_binary_size
from nagaya.cli.template_functions import Row

_LAYOUT = listing.Layout(
    columns=("PID", "PPID", "User", "Time", "Memory", "Command"),
    headings={
        "PID": "PID", "PPID": "PPID", "User": "USER", "Time": "TIME", "Memory": "MEMORY", "Command": "COMMAND",
    },
    elastic=("Command",),
)  # fmt: skip


def top(context: Context, parsed: Parsed) -> int:
    """One line for each process, numbered as the machine sees it."""
    processes = context.host.machines.get(parsed.words[0]).top()
    if parsed.switch("json"):
        listing.print_json([process._asdict() for process in processes])
        return 0
    rows = [
        Row(
            PID=str(process.pid),
            PPID=str(process.ppid),
            User=process.user,
            Time=_time(process.cpu_s),
            Memory=format_binary_size(process.memory_bytes),
            Command="".join(letter if letter.isprintable() else "?" for letter in process.command),
        )
        for process in processes
    ]
    listing.print_rows(rows, _LAYOUT, format=parsed.text("format"), no_trunc=parsed.switch("no-trunc"))
    return 0


def _time(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


TOP = Command(
    top,
    usage="MACHINE",
    words=(1, 1),
    flags=(listing.FORMAT, listing.JSON, listing.NO_TRUNC),
    examples=(("nagaya top web", ""),),
)
