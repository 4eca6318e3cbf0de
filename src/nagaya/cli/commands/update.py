"""`nagaya update`."""

from __future__ import annotations

from nagaya.cli import values
from nagaya.cli.context import Context
from nagaya.cli.each import each_name
from nagaya.cli.flags import MANY, Command, Flag, Parsed
from nagaya.manager.options import UpdateOptions


def update(context: Context, parsed: Parsed) -> int:
    """Change each, and say what changed and when it holds."""
    options = _options(parsed)

    def change(name: str) -> None:
        sentences = context.host.machines.get(name).update(options)
        print(name)
        for sentence in sentences:
            print(f"  {sentence}")

    return each_name(context, parsed.words, change)


def _options(parsed: Parsed) -> UpdateOptions:
    return UpdateOptions(
        type=parsed.text("type") if parsed.given("type") else None,
        storage_bytes=values.parse_size(parsed.text("storage"), "--storage") if parsed.given("storage") else None,
        memory_bytes=values.parse_size(parsed.text("memory"), "--memory") if parsed.given("memory") else None,
        cpus_milli=values.parse_cpus(parsed.text("cpus")) if parsed.given("cpus") else None,
        pids=values.parse_pids(parsed.text("pids-limit")) if parsed.given("pids-limit") else None,
        cpuset_cpus=values.parse_cpuset(parsed.text("cpuset-cpus")) if parsed.given("cpuset-cpus") else None,
        blkio_weight=values.parse_weight(parsed.text("blkio-weight")) if parsed.given("blkio-weight") else None,
        restart=values.parse_restart(parsed.text("restart")) if parsed.given("restart") else None,
    )


UPDATE = Command(
    update,
    usage="MACHINE [MACHINE...]",
    words=(1, MANY),
    flags=(
        Flag("-m --memory", "Most memory to use (0: no limit)", value="SIZE"),
        Flag("--cpus", "Most CPUs to use (0: no limit)", value="NUMBER"),
        Flag("--pids-limit", "Most processes to have (-1: no limit)", value="NUMBER"),
        Flag("--cpuset-cpus", "CPUs to run on", value="CPUS"),
        Flag("--blkio-weight", "Share of block I/O, 10 to 1000 (0: the usual)", value="WEIGHT"),
        Flag("--type", "Kind of wall: container, kvm, emulated, auto; its data goes along", value="TYPE"),
        Flag("--storage", "Size of a virtual machine's own disk, more than it has", value="SIZE"),
        Flag("--restart", "no, on-failure[:RETRIES], always, unless-stopped", value="POLICY"),
    ),
    about="Limits of a running machine change at once; of one that does not run, from its next start."
    " Type and storage can be changed only while it does not run.",
    examples=(
        ("nagaya update --type emulated web", "behind a thicker wall, with its data"),
        ("nagaya update -m 1g --cpus 2 web", ""),
        ("nagaya update --restart always web", ""),
    ),
)
