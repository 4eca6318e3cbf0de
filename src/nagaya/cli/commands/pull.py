"""`nagaya pull` and `nagaya push`."""

from __future__ import annotations

import os

from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Flag, Parsed
from nagaya.cli.progress import open_progress

_QUIET = Flag("-q --quiet", "Show no progress")
_INSECURE = Flag("--insecure", "Allow a registry on loopback without TLS")


def pull(context: Context, parsed: Parsed) -> int:
    """Get the image, and print its id."""
    with open_progress(quiet=parsed.switch("quiet"), eager=True) as progress:
        image = context.host.images.pull(
            parsed.words[0],
            platform=parsed.text("platform") or os.environ.get("DOCKER_DEFAULT_PLATFORM", ""),
            insecure=parsed.switch("insecure"),
            progress=progress,
        )
    print(image.id)
    return 0


def push(context: Context, parsed: Parsed) -> int:
    """Send the image, and print its manifest's digest."""
    reference, *destination = parsed.words
    with open_progress(quiet=parsed.switch("quiet"), eager=True) as progress:
        digest = context.host.images.push(
            reference, destination[0] if destination else "", insecure=parsed.switch("insecure"), progress=progress
        )
    print(digest)
    return 0


PULL = Command(
    pull,
    usage="SOURCE",
    words=(1, 1),
    flags=(Flag("--platform", "Platform of the image (DOCKER_DEFAULT_PLATFORM)", value="OS/ARCH"), _INSECURE, _QUIET),
    about="SOURCE is a name in a registry (docker:// may be left out), oci:DIR[:TAG], oci-archive:FILE,"
    " docker-archive:FILE, or debian[:SUITE] and busybox, which are made on this host where no registry can be reached.",
    examples=(
        ("nagaya pull debian", ""),
        ("nagaya pull --insecure 127.0.0.1:5000/app:1", ""),
        ("nagaya pull oci:./layout:latest", ""),
    ),
)
PUSH = Command(
    push,
    usage="IMAGE [DESTINATION]",
    words=(1, 2),
    flags=(_INSECURE, _QUIET),
    about="Without DESTINATION the image goes where its name says.",
    examples=(("nagaya push app:1 registry.example/team/app:1", ""), ("nagaya push app:1 oci:./layout:1", "")),
)
