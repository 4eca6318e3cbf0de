"""Snapshots and forks of an idle machine of type kvm with 512 MiB, begun from a template: how long it stands, what forks take."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time

from benches.measure import Check, Sample, report
from benches.stores import open_stores
from nagaya.kernel.process import read_sharing
from nagaya.kernels.cache import cache_directory, find_kernel

FORKS = 100
STANDS_MS, ONE_FORK_MS, ALL_FORKS_S, OWN_MIB = 50.0, 25.0, 5.0, 12.0
_MIB = 1 << 20


def main(rounds: int) -> bool:
    if find_kernel() is None:
        print("\nsnapshots: left out, no guest kernel is built (nagaya kernel build)")
        return True
    with open_stores() as stores, tempfile.TemporaryDirectory() as cache:
        os.mkdir(f"{cache}/nagaya")
        os.symlink(cache_directory(), f"{cache}/nagaya/kernels")
        environment = {**os.environ, "XDG_CACHE_HOME": cache, "NAGAYA_TEMPLATES": "1", "NAGAYA_TYPE": "kvm"}

        def nagaya(*words: str) -> str:
            ran = subprocess.run([*stores.nagaya, *words], env=environment, check=True, capture_output=True, text=True)
            return ran.stdout

        nagaya("template", "build", "-q", "--network", "none", "busybox")
        nagaya("run", "-d", "--network", "none", "--name", "m", "busybox", "sleep", "1000000")
        paused, stood, sizes = [], [], []
        for number in range(rounds):
            made = json.loads(nagaya("snapshot", "create", "--json", "--whole", "m", f"s{number}"))
            paused.append(made["paused_ms"])
            stood.append(made["programs_stood_ms"])
            sizes.append(made["size_bytes"] / _MIB)
            nagaya("snapshot", "rm", "m", f"s{number}")
        began_s = time.perf_counter()
        names = nagaya("fork", "-n", str(FORKS), "--name", "f", "m").split()
        forks_s = time.perf_counter() - began_s
        own = [_own_mib(state) for state in json.loads(nagaya("inspect", *names))]
        samples = [
            Sample("a snapshot: its CPUs stand", tuple(paused)),
            Sample("a snapshot: its programs stand", tuple(stood)),
        ]
        print(f"\n{sorted(sizes)[len(sizes) // 2]:.1f} MiB for a whole snapshot; {FORKS} forks in {forks_s:.1f} s")
        checks = [
            Check("a snapshot's pause, ms", samples[0].median, STANDS_MS),
            Check("a fork, ms", forks_s * 1e3 / FORKS, ONE_FORK_MS),
            Check(f"{FORKS} forks, s", forks_s, ALL_FORKS_S),
            Check("an idle fork's own memory, MiB", sorted(own)[len(own) // 2], OWN_MIB),
        ]
        return report("snapshots and forks", samples, checks)


def _own_mib(inspected: dict[str, dict[str, int]]) -> float:
    """Of its VMM and of its supervisor, which is that one's parent."""
    vmm = inspected["state"]["pid"]
    with open(f"/proc/{vmm}/stat", encoding="ascii") as file:
        supervisor = int(file.read().rsplit(")", 1)[1].split()[1])
    return read_sharing((vmm, supervisor))["memory_private_bytes"] / _MIB
