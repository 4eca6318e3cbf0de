"""`nagaya cp`."""

from __future__ import annotations

from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Flag, Parsed
from nagaya.errors import UsageError
from nagaya.static import NamedTuple


class Place(NamedTuple):
    """One side of a copy. `machine` is "" for a path on this host."""

    machine: str
    path: str


def parse_place(text: str) -> Place:
    """MACHINE:PATH or PATH. A path with a colon in it is written with a slash before: ./a:b."""
    name, colon, path = text.partition(":")
    if not colon or not name or "/" in name or name.startswith("."):
        return Place("", text)
    return Place(name, path)


def cp(context: Context, parsed: Parsed) -> int:
    """Copy in, out, or a tar stream either way."""
    source, target = (parse_place(text) for text in parsed.words)
    follow_links, archive = parsed.switch("follow-link"), parsed.switch("archive")
    if source.machine and target.machine:
        raise UsageError(
            "one side of 'nagaya cp' must be on this host",
            hint=f"from machine to machine: nagaya cp {parsed.words[0]} - | nagaya cp - {parsed.words[1]}",
        )
    if source.machine:
        machine = context.host.machines.get(source.machine)
        if target.path == "-":
            refuse_terminal(1, f"nagaya cp {parsed.words[0]} - > archive.tar")
            machine.tar_out(source.path, 1)
        else:
            machine.copy_out(source.path, target.path, follow_links=follow_links, archive=archive)
    elif target.machine:
        machine = context.host.machines.get(target.machine)
        if source.path == "-":
            refuse_terminal(0, f"nagaya cp - {parsed.words[1]} < archive.tar")
            machine.tar_in(target.path, 0)
        else:
            machine.copy_in(source.path, target.path, follow_links=follow_links, archive=archive)
    else:
        raise UsageError("one side of 'nagaya cp' must be MACHINE:PATH", hint="for example nagaya cp web:/etc/hosts .")
    return 0


def refuse_terminal(fd: int, instead: str) -> None:
    """An archive is neither shown on a terminal nor typed in. Raises `UsageError`."""
    import os

    if os.isatty(fd):
        what = "written to" if fd else "read from"
        raise UsageError(f"an archive is not {what} a terminal", hint=f"for example {instead}")


CP = Command(
    cp,
    usage="MACHINE:PATH|- PATH|-  (or)  PATH|- MACHINE:PATH",
    words=(2, 2),
    flags=(
        Flag("-a --archive", "Keep owners"),
        Flag("-L --follow-link", "Copy what a symbolic link at PATH points to"),
        Flag("-q --quiet", "Accepted; nothing is printed anyway"),
    ),
    about="'-' is a tar stream on standard input or output. A directory that ends in /. stands for its contents.",
    examples=(
        ("nagaya cp web:/var/log/app.log .", ""),
        ("nagaya cp ./site/. web:/www", ""),
        ("nagaya cp web:/etc - | tar -tv", ""),
    ),
)
