"""`nagaya stats`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from nagaya.cli import listing
from nagaya.cli.context import Context
from nagaya.cli.flags import MANY, Command, Flag, Parsed
from nagaya.cli.human import format_binary_size, format_size
from nagaya.cli.template_functions import Row
from nagaya.cli.views import short_id
from nagaya.errors import Conflict, NotFound, RemoteError
from nagaya.model.state import PAUSED, RUNNING
from nagaya.static import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.engines.base import Stats
    from nagaya.manager.machine import Machine

INTERVAL_S = 1.0  # between the two readings that a CPU share takes; the counters offer nothing to wait for

LAYOUT = listing.Layout(
    columns=("ID", "Name", "CPUPerc", "MemUsage", "MemPerc", "MemPrivate", "NetIO", "BlockIO", "PIDs"),
    headings={
        "ID": "MACHINE ID", "Name": "NAME", "CPUPerc": "CPU %", "MemUsage": "MEM USAGE / LIMIT", "MemPerc": "MEM %", "MemPrivate": "PRIVATE", "MemShared": "MEM SHARED", "MemProportional": "MEM PROPORTIONAL",
        "NetIO": "NET I/O", "BlockIO": "BLOCK I/O", "PIDs": "PIDS",
    },
)  # fmt: skip


class Reading(NamedTuple):
    machine: Machine
    time_s: float
    stats: Stats


def stats(context: Context, parsed: Parsed) -> int:
    """Once, or again each second until interrupted."""
    for name in parsed.words:
        context.host.machines.get(name)  # an unknown name is an error, a machine that ends meanwhile is not
    before = _read(context, parsed)
    live = not parsed.switch("no-stream") and not parsed.switch("json")
    clear = "\x1b[H\x1b[J" if live and sys.stdout.isatty() else ""
    while True:
        time.sleep(INTERVAL_S)
        now = _read(context, parsed)
        earlier = {reading.machine.id: reading for reading in before}
        shares = [_cpu_share(earlier.get(reading.machine.id), reading) for reading in now]
        sys.stdout.write(clear)
        _show(parsed, now, shares)
        sys.stdout.flush()
        if not live:
            return 0
        before = now


def _read(context: Context, parsed: Parsed) -> list[Reading]:
    machines = context.host.machines
    chosen = [machines.get(name) for name in parsed.words] if parsed.words else machines.list()
    readings = []
    for machine in chosen:
        try:
            if parsed.words or machine.state.phase in (RUNNING, PAUSED):
                readings.append(Reading(machine, time.monotonic(), machine.stats()))
        except (NotFound, Conflict, RemoteError):
            if parsed.words and len(parsed.words) == 1:
                raise
            continue  # it has ended
    return readings


def _cpu_share(before: Reading | None, now: Reading) -> float:
    """Share of one CPU between two readings; -1 when the host does not account for it."""
    if before is None or before.stats.cpu_ns < 0 or now.stats.cpu_ns < before.stats.cpu_ns:
        return -1.0
    return (now.stats.cpu_ns - before.stats.cpu_ns) / 1e9 / max(now.time_s - before.time_s, 1e-3)


def _show(parsed: Parsed, readings: Sequence[Reading], shares: Sequence[float]) -> None:
    if parsed.switch("json"):
        listing.print_json(
            [
                {"id": r.machine.id, "name": r.machine.name, "cpu_share": share, **r.stats._asdict()}
                for r, share in zip(readings, shares, strict=True)
            ]
        )
        return
    no_trunc = parsed.switch("no-trunc")
    rows = [row(reading, share, no_trunc=no_trunc) for reading, share in zip(readings, shares, strict=True)]
    listing.print_rows(rows, LAYOUT, format=parsed.text("format"), no_trunc=no_trunc)


def row(reading: Reading, share: float, *, no_trunc: bool) -> Row:
    """A line; "--" is what this host does not account for."""
    stats = reading.stats
    limit = stats.memory_limit_bytes if stats.memory_limit_bytes > 0 else _host_memory()
    percent = f"{100 * stats.memory_bytes / limit:.2f}%" if stats.memory_bytes >= 0 else "--"
    return Row(
        ID=reading.machine.id if no_trunc else short_id(reading.machine.id),
        Name=reading.machine.name,
        Container=reading.machine.name,
        CPUPerc=f"{100 * share:.2f}%" if share >= 0 else "--",
        MemUsage=f"{_size(stats.memory_bytes)} / {_size(limit)}",
        MemPerc=percent,
        MemPrivate=_size(stats.memory_private_bytes),
        MemShared=_size(stats.memory_shared_bytes),
        MemProportional=_size(stats.memory_pss_bytes),
        NetIO=_pair(stats.net_rx_bytes, stats.net_tx_bytes),
        BlockIO=_pair(stats.block_read_bytes, stats.block_write_bytes),
        PIDs=str(stats.pids) if stats.pids >= 0 else "--",
    )


def _host_memory() -> int:
    import os

    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _size(count: int) -> str:
    return format_binary_size(count) if count >= 0 else "--"


def _pair(first: int, second: int) -> str:
    return "--" if first < 0 and second < 0 else f"{format_size(max(first, 0))} / {format_size(max(second, 0))}"


STATS = Command(
    stats,
    usage="[MACHINE...]",
    words=(0, MANY),
    flags=(
        Flag("--no-stream", "Show it once"),
        listing.FORMAT,
        listing.JSON,
        listing.NO_TRUNC,
    ),
    about="Without a name: all machines that run. Of a virtual machine's memory, PRIVATE is what no other process has; what "
    "machines of one template or fork have not changed is there once ({{.MemShared}}), and {{.MemProportional}} adds up over "
    "all. Fields: " + ", ".join(LAYOUT.headings) + ".",
    examples=(("nagaya stats", ""), ("nagaya stats --no-stream --json web", "")),
)
