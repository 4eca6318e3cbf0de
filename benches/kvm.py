"""Machines of type kvm: what a start costs outside of the guest, what the guest's programs lose, what a machine takes.

On a software KVM the guest's own boot is minutes of a hardware one's: none of the three figures has it in it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from pathlib import Path

from benches.measure import Check, Sample, report, take_turns, time_command
from benches.stores import Stores, open_stores
from benches.vmm import make_elf
from nagaya.engines import open_engine
from nagaya.errors import NagayaError
from tests.e2e.processes import below, supervisors

POWER_OFF = b"\x66\xba\xf4\x00\xb0\x00\xee\xf4"  # mov $0xf4, %dx; mov $0, %al; out %al, (%dx); hlt: ends the machine
FAILED = 125  # its agent has never spoken
GUEST_MEMORY = "/memfd:nagaya-guest-memory"


def main(rounds: int) -> bool:
    try:
        open_engine("kvm").check_host()
    except NagayaError as error:
        print(f"\nkvm: left out: {error.message}")
        return True
    with open_stores() as stores:
        kept = _bench_outside(stores, rounds)
        kept = _bench_inside(stores) and kept
        return _bench_memory(stores) and kept


def _bench_outside(stores: Stores, rounds: int) -> bool:
    """A whole `run` of a machine whose kernel ends at its first instruction."""
    kernel = Path(stores.directory, "kernel")
    kernel.write_bytes(make_elf(POWER_OFF))
    # No template of that kernel can be built, and none is to be tried meanwhile.
    run = ["env", "NAGAYA_TEMPLATES=0", *stores.nagaya, "run", "--rm", "--network", "none"]
    ends_at_once = [*run, "--type", "kvm", "--kernel", str(kernel), "busybox", "true"]
    time_command(ends_at_once, status=FAILED)  # makes the root image, once
    samples = take_turns(
        {
            "run --type kvm, its kernel ends at once": lambda: time_command(ends_at_once, status=FAILED),
            "run --type container": lambda: time_command([*run, "--type", "container", "busybox", "true"]),
        },
        rounds=rounds,
    )
    checks = [Check("everything outside of the guest, ms", samples[0].median, 120)]
    return report("kvm: what a start costs outside of the guest", samples, checks)


def _bench_inside(stores: Stores) -> bool:
    """The same computation in the guest and on the bare host, by turns."""
    argv = [*stores.nagaya, "compare", "--type", "kvm", "--starts", "1", "--json", "busybox"]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    compared = next(item for item in json.loads(done.stdout) if item["type"] == "kvm")
    times = [1 / ratio for ratio in compared["times_the_host"]["cpu"]]
    share = statistics.median(compared["times_the_host"]["cpu"])
    sample = Sample("user-mode computing, of the host's speed (not ms)", tuple(times))
    return report("kvm: programs that compute", [sample], [Check("host's time to the guest's", share, 1 / 0.97)])


def _bench_memory(stores: Stores) -> bool:
    """PSS of all processes of one running machine, but for the guest's memory itself."""
    start = [*stores.nagaya, "run", "-d", "--type", "kvm", "--network", "none", "--memory", "128m"]
    start += ["busybox", "sleep", "600"]
    machine = subprocess.run(start, capture_output=True, text=True, check=True).stdout.strip()
    try:
        time.sleep(1)
        found = supervisors(f"{stores.directory}/nagaya", machine)
        pids = [*found, *below(found)]
        sizes = [_own_pss_mib(pid) for pid in pids]
    finally:
        subprocess.run([*stores.nagaya, "rm", "-f", machine], capture_output=True, check=True)
    print(
        f"\n### kvm: memory beside the guest's own: {len(pids)} processes, "
        + " + ".join(f"{size:.1f}" for size in sizes)
        + " MiB"
    )
    check = Check("PSS of a machine's processes beyond guest memory, MiB", sum(sizes), 30)
    print(f"\n- {'PASS' if check.passed else 'FAIL'}: {check.text}: {check.value:.1f} (at most {check.limit:g})")
    return check.passed


def _own_pss_mib(pid: int) -> float:
    total, guest = 0, False
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if "-" in name.split(" ")[0]:
                guest = GUEST_MEMORY in line
            elif name == "Pss" and not guest:
                total += int(value.split()[0])
    return total / 1024
