"""`nagaya volume create`, `ls` and `rm`."""

from __future__ import annotations

from nagaya.cli import filters, listing, values, views
from nagaya.cli.context import Context
from nagaya.cli.each import each_name
from nagaya.cli.flags import MANY, Command, Flag, Parsed
from nagaya.errors import Conflict


def create(context: Context, parsed: Parsed) -> int:
    """Make a volume, with a made-up name when none is given, and print its name."""
    name = parsed.words[0] if parsed.words else ""
    labels = values.parse_labels(parsed.texts("label"), [])
    try:
        name = context.host.volumes.create(name, labels=labels).name
    except Conflict:
        if labels and context.host.volumes.get(name).labels != labels:
            raise
        # As in Docker, what exists already as it was asked for is no failure.
    print(name)
    return 0


def ls(context: Context, parsed: Parsed) -> int:
    """List volumes."""
    wanted = filters.parse_filters(parsed.texts("filter"), filters.VOLUME_KEYS)
    used = context.host.machines.volume_names() if "dangling" in wanted else frozenset()
    found = [
        volume
        for volume in context.host.volumes.list()
        if filters.matches_volume(wanted, volume.name, dict(volume.labels), used=volume.name in used)
    ]
    listing.print_list(
        parsed,
        views.VOLUMES,
        rows=lambda: [views.volume_row(volume) for volume in found],
        records=lambda: [views.volume_record(volume) for volume in found],
        ids=lambda: [volume.name for volume in found],
    )
    return 0


def rm(context: Context, parsed: Parsed) -> int:
    """Remove each that no machine uses. With -f a missing volume is no failure."""
    force = parsed.switch("force")
    used = context.host.machines.volume_names()

    def remove(name: str) -> None:
        context.host.volumes.remove(name, force=force, in_use=used)
        print(name)

    return each_name(context, parsed.words, remove)


CREATE = Command(
    create,
    usage="[VOLUME]",
    words=(0, 1),
    flags=(Flag("-l --label", "Label the volume", value="KEY[=VALUE]", many=True),),
    examples=(("nagaya volume create data", ""), ("nagaya run -v data:/var/lib/app debian", "use it")),
)
LS = Command(
    ls,
    flags=(listing.FILTER, listing.FORMAT, listing.JSON, listing.NO_TRUNC, listing.QUIET),
    about="Filters: " + ", ".join(filters.VOLUME_KEYS) + ".",
    examples=(("nagaya volume ls --filter dangling=true", ""),),
)
RM = Command(
    rm,
    usage="VOLUME [VOLUME...]",
    words=(1, MANY),
    flags=(Flag("-f --force", "A volume that does not exist is no failure"),),
    examples=(("nagaya volume rm data", ""),),
)
