"""What a supervisor costs: its proportional memory, and whether the hundredth start takes longer than the first."""

from __future__ import annotations

import statistics

from benches.measure import Check, Sample, report, time_command
from benches.stores import open_stores
from tests.e2e.processes import supervisors

MACHINES = 100
GROUP = 10


def _pss_mib(pid: int) -> float:
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) / 1024


def main(rounds: int) -> bool:
    with open_stores() as stores:
        run = [*stores.nagaya, "run", "-d", "--network", "none", "busybox", "sleep", "3600"]
        for _ in range(2):
            time_command(run)
        alone = statistics.median(_pss_mib(pid) for pid in supervisors(f"{stores.directory}/nagaya"))
        times = [time_command(run) for _ in range(MACHINES)]
        pids = supervisors(f"{stores.directory}/nagaya")
        assert len(pids) == MACHINES + 2
        memory = [_pss_mib(pid) for pid in pids]
        first, last = statistics.median(times[:GROUP]), statistics.median(times[-GROUP:])
        samples = [
            Sample(f"starts 1 to {GROUP}", tuple(times[:GROUP])),
            Sample(f"starts {MACHINES - GROUP + 1} to {MACHINES}", tuple(times[-GROUP:])),
        ]
        checks = [
            Check("supervisor's PSS in MiB, 2 machines", alone, 15),
            Check(f"supervisor's PSS in MiB, {MACHINES} machines, largest", max(memory), 15),
            Check("last ten starts, of the first ten's time", last / first, 1.25),
        ]
        return report(f"{MACHINES} idle containers, one after another", samples, checks)
