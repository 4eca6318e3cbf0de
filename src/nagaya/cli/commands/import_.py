"""`nagaya import`."""

from __future__ import annotations

from nagaya.cli.commands.cp import refuse_terminal
from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Flag, Parsed
from nagaya.cli.progress import open_progress


def import_(context: Context, parsed: Parsed) -> int:
    """Make the image, and print its id."""
    source, reference = parsed.words
    if source == "-":
        refuse_terminal(0, f"nagaya import - {reference} < rootfs.tar")
    with open_progress(quiet=parsed.switch("quiet"), eager=False) as progress:
        image = context.host.images.import_rootfs(
            source,
            reference,
            changes=tuple(parsed.texts("change")),
            message=parsed.text("message"),
            platform=parsed.text("platform"),
            progress=progress,
        )
    print(image.id)
    return 0


IMPORT = Command(
    import_,
    usage="FILE|DIRECTORY|- REPOSITORY[:TAG]",
    words=(2, 2),
    flags=(
        Flag("-c --change", "Apply a Dockerfile instruction: CMD, ENTRYPOINT, ENV, …", value="INSTRUCTION", many=True),
        Flag("-m --message", "What it is", value="TEXT"),
        Flag("--platform", "What its programs are for (default: this host)", value="OS/ARCH"),
        Flag("-q --quiet", "Show no progress"),
    ),
    about="The archive is a tar file, compressed or not; '-' reads it from standard input.",
    examples=(("nagaya import -c 'CMD [\"/bin/sh\"]' rootfs.tar.xz base:1", ""), ("nagaya import ./rootfs base:1", "")),
)
