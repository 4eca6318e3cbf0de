"""`nagaya ps`."""

from __future__ import annotations

import time

from nagaya.cli import filters, listing, values, views
from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Flag, Parsed
from nagaya.errors import NotFound
from nagaya.model.spec import MachineSpec
from nagaya.model.state import PAUSED, RESTARTING, RUNNING, STARTING, MachineState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.manager.machine import Machine

Found = list[tuple["Machine", MachineState]]


def ps(context: Context, parsed: Parsed) -> int:
    """List machines: those that run, or with -a (or a filter on the state, -n, -l) all."""
    wanted = filters.parse_filters(parsed.texts("filter"), filters.MACHINE_KEYS)
    last = 1 if parsed.switch("latest") else values.parse_integer(parsed.text("last", "-1"), "--last", least=-1)
    everything = parsed.switch("all") or last >= 0 or "status" in wanted or "exited" in wanted
    found = _select(context, wanted, everything=everything)
    if last >= 0:
        found = found[:last]
    now_ns, no_trunc = time.time_ns(), parsed.switch("no-trunc")
    sized = parsed.switch("size") or ".Size" in parsed.text("format")
    layout = views.MACHINES
    if parsed.switch("size"):
        layout = layout._replace(columns=(*layout.columns, "Size"))
    listing.print_list(
        parsed,
        layout,
        rows=lambda: [
            views.machine_row(
                machine.spec, state, now_ns=now_ns, no_trunc=no_trunc, size_bytes=_size(machine) if sized else -1
            )
            for machine, state in found
        ],
        records=lambda: [
            views.machine_record(machine.spec, state, now_ns=now_ns, size_bytes=_size(machine) if sized else -1)
            for machine, state in found
        ],
        ids=lambda: [machine.id if no_trunc else views.short_id(machine.id) for machine, _ in found],
    )
    for problem in context.host.machines.damaged():
        from nagaya.cli.failures import report  # lazy: rare

        report(problem, debug=context.debug)
    return 0


def _select(context: Context, wanted: filters.Filters, *, everything: bool) -> Found:
    def created_ns_of(name: str) -> int:
        spec: MachineSpec = context.host.machines.get(name).spec
        return spec.created_ns

    found: Found = []
    for machine in context.host.machines.list():
        try:
            state = machine.state
        except NotFound:
            continue  # removed while we look
        shown = everything or state.phase in (RUNNING, PAUSED, RESTARTING, STARTING)
        if shown and filters.matches_machine(
            wanted, views.machine_facts(machine.spec, state), created_ns_of=created_ns_of
        ):
            found.append((machine, state))
    return found


def _size(machine: Machine) -> int:
    """Bytes on disk of what the machine has written. It may change, and vanish, while we count."""
    import os

    total = 0
    for directory, _, names in os.walk(f"{machine.directory}/upper"):
        for name in names:
            try:
                total += os.lstat(f"{directory}/{name}").st_blocks * 512
            except OSError:
                continue
    return total


PS = Command(
    ps,
    flags=(
        Flag("-a --all", "Show machines that do not run, too"),
        Flag("-n --last", "Show the last created ones, in any state", value="NUMBER"),
        Flag("-l --latest", "Show the latest created one, in any state"),
        Flag("-s --size", "Show how much each has written"),
        listing.FILTER,
        listing.FORMAT,
        listing.JSON,
        listing.NO_TRUNC,
        listing.QUIET,
    ),
    about="Filters: " + ", ".join(filters.MACHINE_KEYS) + ".\nFields: " + ", ".join(views.MACHINES.headings) + ".",
    examples=(
        ("nagaya ps -a --filter status=exited", ""),
        ("nagaya ps --format 'table {{.Names}}\\t{{.Status}}'", "own columns"),
        ("nagaya ps -a --json", "for scripts"),
    ),
)
