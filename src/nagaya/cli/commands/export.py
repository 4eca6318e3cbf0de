"""`nagaya export`."""

from __future__ import annotations

import os

from nagaya.cli.commands.cp import refuse_terminal
from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Flag, Parsed
from nagaya.errors import HostError


def export(context: Context, parsed: Parsed) -> int:
    """A machine's root as a tar stream, without what is mounted in it: no /proc, no volumes."""
    machine = context.host.machines.get(parsed.words[0])
    path = parsed.text("output")
    if path in ("", "-"):
        refuse_terminal(1, f"nagaya export -o machine.tar {machine.name}")
        machine.tar_out("/", 1, mounts=False)
        return 0
    partial = f"{path}.partial-{os.getpid()}"
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError.from_os(error, f"cannot write {path}") from None
    try:
        try:
            machine.tar_out("/", fd, mounts=False)
        finally:
            os.close(fd)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
    return 0


EXPORT = Command(
    export,
    usage="MACHINE",
    words=(1, 1),
    flags=(Flag("-o --output", "Write to a file instead of standard output", value="FILE"),),
    examples=(("nagaya export -o web.tar web", ""), ("nagaya export web | nagaya import - web:flat", "")),
)
