"""`nagaya prune`, and its parts: `machine prune`, `image prune`, `volume prune`."""

from __future__ import annotations

import sys

from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Flag, Parsed
from nagaya.cli.human import format_size
from nagaya.cli.listing import JSON, print_json
from nagaya.errors import EXIT_FAILURE, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    Report = dict[str, object]

_FORCE = Flag("-f --force", "Do not ask")


def prune(context: Context, parsed: Parsed) -> int:
    """Machines that have ended, images that then nothing uses, and with --volumes volumes too."""
    whole = parsed.switch("all")
    what = ["all machines that do not run", "all images that no machine uses" if whole else "all images without a name"]
    if parsed.switch("volumes"):
        what.append("all anonymous volumes that no machine uses")
    if not confirmed(parsed, what):
        return EXIT_FAILURE
    report: Report = {"machines": context.host.machines.prune(), **_images(context, whole=whole)}
    if parsed.switch("volumes"):
        report["volumes"] = _volumes(context, whole=False)
    return _print(parsed, report)


def prune_machines(context: Context, parsed: Parsed) -> int:
    if not confirmed(parsed, ["all machines that do not run"]):
        return EXIT_FAILURE
    return _print(parsed, {"machines": context.host.machines.prune()})


def prune_images(context: Context, parsed: Parsed) -> int:
    whole = parsed.switch("all")
    if not confirmed(parsed, ["all images that no machine uses" if whole else "all images without a name"]):
        return EXIT_FAILURE
    return _print(parsed, _images(context, whole=whole))


def prune_volumes(context: Context, parsed: Parsed) -> int:
    whole = parsed.switch("all")
    if not confirmed(parsed, [f"all {'' if whole else 'anonymous '}volumes that no machine uses"]):
        return EXIT_FAILURE
    return _print(parsed, {"volumes": _volumes(context, whole=whole)})


def _images(context: Context, *, whole: bool) -> Report:
    pruned = context.host.images.prune(all=whole, in_use=context.host.machines.image_ids)
    return {"images": list(pruned.removed), "image_bytes_freed": pruned.bytes_freed}


def _volumes(context: Context, *, whole: bool) -> list[str]:
    used = context.host.machines.volume_names()
    removed = []
    for volume in context.host.volumes.list():
        if volume.name not in used and (whole or _anonymous(volume.name)):
            context.host.volumes.remove(volume.name, force=True)
            removed.append(volume.name)
    return removed


def _anonymous(name: str) -> bool:
    return len(name) == 32 and all(letter in "0123456789abcdef" for letter in name)


def confirmed(parsed: Parsed, what: list[str]) -> bool:
    """Ask, unless -f. Raises `UsageError` when there is nobody to ask."""
    if parsed.switch("force"):
        return True
    if not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask on", hint="-f removes without asking")
    sys.stderr.write("This removes:\n" + "".join(f"  - {line}\n" for line in what) + "Go on? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _print(parsed: Parsed, report: Report) -> int:
    if parsed.switch("json"):
        print_json(report)
        return 0
    for kind in ("machines", "images", "volumes"):
        for line in report.get(kind, ()) if isinstance(report.get(kind), list) else ():  # type: ignore[attr-defined]
            print(line)
    freed = report.get("image_bytes_freed")
    if isinstance(freed, int):
        print(f"Freed {format_size(freed)} of images")
    return 0


_ALL_IMAGES = Flag("-a --all", "Remove images with a name that no machine uses, too")
PRUNE = Command(
    prune,
    flags=(_FORCE, JSON, _ALL_IMAGES, Flag("--volumes", "Remove anonymous volumes that no machine uses, too")),
    examples=(("nagaya prune", ""), ("nagaya prune -af --volumes", "all that is not needed now, without asking")),
)
PRUNE_MACHINES = Command(prune_machines, flags=(_FORCE, JSON))
PRUNE_IMAGES = Command(prune_images, flags=(_FORCE, JSON, _ALL_IMAGES))
PRUNE_VOLUMES = Command(prune_volumes, flags=(_FORCE, JSON, Flag("-a --all", "Remove named volumes, too")))
