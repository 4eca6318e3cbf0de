"""`nagaya save` and `nagaya load`."""

from __future__ import annotations

from nagaya.cli.commands.cp import refuse_terminal
from nagaya.cli.context import Context
from nagaya.cli.flags import MANY, Command, Flag, Parsed
from nagaya.cli.progress import open_progress
from nagaya.cli.views import short_id
from nagaya.errors import UsageError

FORMATS = ("oci-archive", "docker-archive", "oci")


def save(context: Context, parsed: Parsed) -> int:
    """Write the archive."""
    path, format = parsed.text("output", "-"), parsed.text("format", FORMATS[0])
    if format not in FORMATS:
        raise UsageError(f"--format: unknown format '{format}'", hint=f"one of: {', '.join(FORMATS)}")
    if path == "-":
        if format == "oci":
            raise UsageError("--format oci makes a directory, and needs -o", hint="-o ./layout")
        refuse_terminal(1, f"nagaya save -o images.tar {parsed.words[0]}")
    with open_progress(quiet=parsed.switch("quiet"), eager=False) as progress:
        context.host.images.save(parsed.words, path, format=format, progress=progress)
    return 0


def load(context: Context, parsed: Parsed) -> int:
    """Read the archive, and print what was in it."""
    path = parsed.text("input", "-")
    if path == "-":
        refuse_terminal(0, "nagaya load -i images.tar")
    with open_progress(quiet=parsed.switch("quiet"), eager=False) as progress:
        images = context.host.images.load(path, progress=progress)
    for image in images:
        names = image.names or (f"sha256:{short_id(image.id)}",)
        print("Loaded image: " + ", ".join(names))
    return 0


SAVE = Command(
    save,
    usage="IMAGE [IMAGE...]",
    words=(1, MANY),
    flags=(
        Flag("-o --output", "Write to a file (or directory, for oci) instead of standard output", value="FILE"),
        Flag("--format", "oci-archive (default), docker-archive or oci, a directory", value="FORMAT"),
        Flag("-q --quiet", "Show no progress"),
    ),
    examples=(("nagaya save -o app.tar app:1", ""), ("nagaya save --format docker-archive app:1 | docker load", "")),
)
LOAD = Command(
    load,
    flags=(
        Flag("-i --input", "Read a file (or directory) instead of standard input", value="FILE"),
        Flag("-q --quiet", "Show no progress"),
    ),
    examples=(("nagaya load -i app.tar", ""),),
)
