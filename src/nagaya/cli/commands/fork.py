"""`nagaya fork`."""

from __future__ import annotations

from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Flag, Parsed
from nagaya.errors import UsageError
from nagaya.supervisor.launch import allow_fork


def fork(context: Context, parsed: Parsed) -> int:
    """Make the machines, and print their names."""
    text = parsed.text("number", "1")
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"--number: '{text}' is no number", hint="for example -n 10")
    allow_fork()
    machine = context.host.machines.get(parsed.words[0])
    for made in machine.fork(int(text[:9]), name=parsed.text("name"), disk_only=parsed.switch("disk-only")):
        print(made.name)
    return 0


FORK = Command(
    fork,
    usage="MACHINE",
    words=(1, 1),
    flags=(
        Flag("-n --number", "How many (default: 1)", value="NUMBER"),
        Flag("--name", "What it is called; several are NAME-1, NAME-2, …", value="NAME"),
        Flag("--disk-only", "Start them anew from a copy of its disks, without its programs"),
    ),
    about="Each has an id, a host name, addresses and a disk of its own, and fresh random numbers before any program runs on. "
    "Memory that none of them changes is there once, for machines of type kvm. Published ports get new numbers of the host's "
    "choice; volumes are shared.",
    examples=(("nagaya fork -n 10 --name try sandbox", "try-1 to try-10"), ("nagaya fork --disk-only web", "")),
)
