"""`nagaya installer ls`, `rm` and `prune`: what `nagaya machine create --install debian` has fetched."""

from __future__ import annotations

import time

from nagaya.cli import listing
from nagaya.cli.context import Context
from nagaya.cli.each import each_name
from nagaya.cli.flags import MANY, Command, Flag, Parsed
from nagaya.cli.human import format_age, format_local_time, format_size, format_time
from nagaya.cli.listing import Layout
from nagaya.cli.template_functions import Row
from nagaya.errors import UsageError
from nagaya.storage.disk_images import installer_cache
from nagaya.storage.disk_images.installer_cache import Kept

INSTALLERS = Layout(
    columns=("ID", "Suite", "Architecture", "Version", "Used", "Size"),
    headings={
        "ID": "INSTALLER ID", "Suite": "SUITE", "Architecture": "ARCHITECTURE", "Version": "VERSION", "Used": "USED",
        "Size": "SIZE", "UsedAt": "USED AT", "FetchedAt": "FETCHED AT", "Package": "PACKAGE", "Path": "PATH",
    },
    elastic=("Version",),
)  # fmt: skip


def ls(context: Context, parsed: Parsed) -> int:
    """List installers, the one that was used last first."""
    found, now_ns = installer_cache.list_kept(), time.time_ns()
    listing.print_list(
        parsed,
        INSTALLERS,
        rows=lambda: [_row(one, now_ns) for one in found],
        records=lambda: [_record(one) for one in found],
        ids=lambda: [one.id for one in found],
    )
    return 0


def _row(one: Kept, now_ns: int) -> Row:
    record = one.record
    return Row(
        ID=one.id, Suite=record.suite, Architecture=record.architecture, Version=record.version,
        Used=format_age(one.used_ns, now_ns), Size=format_size(record.size_bytes), UsedAt=format_local_time(one.used_ns),
        FetchedAt=format_local_time(record.fetched_ns), Package=record.package, Path=one.path,
    )  # fmt: skip


def _record(one: Kept) -> dict[str, object]:
    record = one.record
    return {
        "id": one.id, "package": record.package, "version": record.version, "suite": record.suite,
        "architecture": record.architecture, "digest": f"sha256:{record.digest}", "size_bytes": record.size_bytes,
        "fetched_at": format_time(record.fetched_ns), "checked_at": format_time(record.asked_ns),
        "used_at": format_time(one.used_ns), "path": one.path,
    }  # fmt: skip


def rm(context: Context, parsed: Parsed) -> int:
    """Remove installers; machines that were given one have a copy."""
    if parsed.switch("all") == bool(parsed.words):
        raise UsageError("name installers to remove, or give --all", hint="'nagaya installer ls' lists them")

    def remove(name: str) -> None:
        found = installer_cache.get(name)
        installer_cache.remove(found.id)
        print(found.id)

    with installer_cache.open_cache():
        return each_name(context, parsed.words or [one.id for one in installer_cache.list_kept()], remove)


def prune(context: Context, parsed: Parsed) -> int:
    """Remove what nobody has used for a month, what is damaged, and what fetches that were killed have left."""
    with installer_cache.open_cache():
        for gone in installer_cache.prune():
            print(gone)
    return 0


LS = Command(
    ls,
    flags=(listing.FORMAT, listing.JSON, listing.NO_TRUNC, listing.QUIET),
    about="Fields: " + ", ".join(INSTALLERS.headings) + ".",
    examples=(("nagaya installer ls", ""), ("nagaya installer ls --format '{{.ID}} {{.Package}}'", "")),
)
RM = Command(
    rm,
    usage="INSTALLER [INSTALLER...]",
    words=(0, MANY),
    flags=(Flag("-a --all", "Remove every one"),),
    examples=(("nagaya installer rm 3f2a", ""), ("nagaya installer rm --all", "")),
)
PRUNE = Command(prune, examples=(("nagaya installer prune", ""),))
