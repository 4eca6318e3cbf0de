"""`nagaya template build`, `ls`, `rm` and `prune`: machines saved just after their boot, for others to begin from."""

from __future__ import annotations

import sys
import time

from nagaya.cli import listing, values
from nagaya.cli.context import Context
from nagaya.cli.each import each_name
from nagaya.cli.flags import MANY, Command, Flag, Parsed
from nagaya.cli.human import format_age, format_local_time, format_size, format_time
from nagaya.cli.listing import Layout
from nagaya.cli.template_functions import Row
from nagaya.engines.kvm import template
from nagaya.engines.kvm.template import Template
from nagaya.errors import UsageError

TEMPLATES = Layout(
    columns=("ID", "Kind", "Memory", "CPUs", "Network", "Used", "Size"),
    headings={
        "ID": "TEMPLATE ID", "Kind": "KIND", "Memory": "MEMORY", "CPUs": "CPUS", "Network": "NETWORK", "Used": "USED",
        "Size": "SIZE", "UsedAt": "USED AT", "Image": "IMAGE", "Path": "PATH",
    },
    elastic=("Kind",),
)  # fmt: skip


def build(context: Context, parsed: Parsed) -> int:
    """Build what machines of an image would begin from, or find it built already, and print its id."""
    from nagaya.manager.templates import build_template  # lazy: the other commands build nothing

    def report(text: str) -> None:
        if not parsed.switch("quiet"):
            print(text, file=sys.stderr)

    network = parsed.text("network") or "bridge"
    if network not in ("bridge", "none"):
        raise UsageError(f"--network: '{network}' is not for templates", hint="one of: bridge, none")
    built = build_template(
        context.host, parsed.words[0] if parsed.words else "", report=report, network=network != "none",
        memory_bytes=values.parse_size(parsed.text("memory") or "0", "--memory"),
        cpus_milli=values.parse_cpus(parsed.text("cpus") or "0", "--cpus"),
    )  # fmt: skip
    print(built)
    return 0


def ls(context: Context, parsed: Parsed) -> int:
    """List templates, the one that was used last first."""
    found, now_ns = template.list_templates(), time.time_ns()
    listing.print_list(
        parsed,
        TEMPLATES,
        rows=lambda: [_row(one, now_ns) for one in found],
        records=lambda: [_record(one) for one in found],
        ids=lambda: [one.id for one in found],
    )
    return 0


def _row(one: Template, now_ns: int) -> Row:
    return Row(
        ID=one.id, Kind="prepared" if one.image else "bare", Memory=format_size(one.memory_bytes), CPUs=str(one.cpus),
        Network=one.cards or "none", Used=format_age(one.used_ns, now_ns), Size=format_size(one.size_bytes),
        UsedAt=format_local_time(one.used_ns), Image=one.image, Path=one.path,
    )  # fmt: skip


def _record(one: Template) -> dict[str, object]:
    return {
        "id": one.id, "kind": "prepared" if one.image else "bare", "memory_bytes": one.memory_bytes, "cpus": one.cpus,
        "network": one.cards, "volumes": one.shares, "image": one.image, "size_bytes": one.size_bytes, "used_at": format_time(one.used_ns),
        "path": one.path,
    }  # fmt: skip


def rm(context: Context, parsed: Parsed) -> int:
    """Remove templates; machines that began from one go on."""
    if parsed.switch("all") == bool(parsed.words):
        raise UsageError("name templates to remove, or give --all", hint="'nagaya template ls' lists them")

    def remove(name: str) -> None:
        found = template.get(name)
        template.remove(found.id)
        print(found.id)

    return each_name(context, parsed.words or [one.id for one in template.list_templates()], remove)


def prune(context: Context, parsed: Parsed) -> int:
    """Remove what no machine can begin from any more, and what builds that were killed have left."""
    from nagaya.engines.kvm.template_build import prune_all  # lazy: as `build`

    for gone in prune_all():
        print(gone)
    return 0


BUILD = Command(
    build,
    usage="[IMAGE]",
    words=(0, 1),
    flags=(
        Flag("--cpus", "Of machines that are given so many", value="NUMBER"),
        Flag("-m --memory", "Of machines that are given so much", value="SIZE"),
        Flag("--network", "Of machines with the default network (bridge), or with none", value="MODE"),
        Flag("-q --quiet", "Do not say what is being done"),
    ),
    about="Machines of type kvm begin from a template where there is one, and the first start of a kind has it built in the "
    "background: this is for who does not want to wait for that. Without IMAGE, it is the one for every image.",
    examples=(("nagaya template build", ""), ("nagaya template build debian", "with debian's root mounted")),
)
LS = Command(
    ls,
    flags=(listing.FORMAT, listing.JSON, listing.NO_TRUNC, listing.QUIET),
    about="Fields: " + ", ".join(TEMPLATES.headings) + ".",
    examples=(("nagaya template ls", ""), ("nagaya template ls --format '{{.ID}} {{.Image}}'", "")),
)
RM = Command(
    rm,
    usage="TEMPLATE [TEMPLATE...]",
    words=(0, MANY),
    flags=(Flag("-a --all", "Remove every one"),),
    examples=(("nagaya template rm 3f2a", ""), ("nagaya template rm --all", "")),
)
PRUNE = Command(prune, examples=(("nagaya template prune", ""),))
