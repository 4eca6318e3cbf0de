"""The start-time table: `run --rm busybox true`, whole commands, of every type and of podman and runc, in turns.

Beside the wall clock, the CPU time of the VMM of a start from a template, from its restore to the program's end: on a
shared host the former says how busy that was.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable

from benches.apart import run_apart
from benches.measure import Check, Sample, command, report, take_turns
from benches.run import _bundle, _works
from benches.stores import ULIMITS, Stores, open_stores
from nagaya.kernels.cache import cache_directory, find_kernel

COLD_ROUNDS = 10
OF_PODMAN, WHOLE_MS = 1.0, 200.0


def _run(stores: Stores, type_: str, environment: dict[str, str]) -> Callable[[], float]:
    words = [f"{name}={value}" for name, value in environment.items()]
    return command(
        ["env", *words, *stores.nagaya, "run", "--rm", "--type", type_, "--network", "bridge", "busybox", "true"]
    )


def main(rounds: int) -> bool:
    return run_apart(lambda: _main(rounds))


def _main(rounds: int) -> bool:
    if find_kernel() is None:
        print("\nstart: left out, no guest kernel is built (nagaya kernel build)")
        return True
    with open_stores() as stores, tempfile.TemporaryDirectory() as cache:
        os.mkdir(f"{cache}/nagaya")
        os.symlink(cache_directory(), f"{cache}/nagaya/kernels")
        warm = {"XDG_CACHE_HOME": cache, "NAGAYA_TEMPLATES": "1"}
        built = ["env", f"XDG_CACHE_HOME={cache}", *stores.nagaya, "template", "build", "-q", "busybox"]
        subprocess.run(built, check=True, stdout=subprocess.DEVNULL)
        off = {"NAGAYA_TEMPLATES": "0"}
        contestants: dict[str, Callable[[], float]] = {}
        if stores.podman:
            contestants["podman run --rm (runc, its default network)"] = command(
                [*stores.podman, "run", "--rm", *ULIMITS, "busybox", "true"]
            )
        contestants["container"] = _run(stores, "container", off)
        contestants["kvm from a template"] = _run(stores, "kvm", warm)
        if shutil.which("qemu-system-x86_64"):
            contestants["emulated"] = _run(stores, "emulated", off)
        if shutil.which("runc") and _works(argv := _bundle(stores, "runc")):
            contestants["runc run (a bundle, no network)"] = command(argv)
        samples = take_turns(contestants, rounds=rounds, warm_up=1)
        cold = take_turns({"kvm, booted": _run(stores, "kvm", off)}, rounds=min(rounds, COLD_ROUNDS), warm_up=0)
        by_name: dict[str, Sample] = {sample.name: sample for sample in samples}
        template = by_name["kvm from a template"].median
        checks = [Check("kvm from a template, ms", template, WHOLE_MS)]
        if stores.podman:
            checks.append(Check("kvm from a template, of podman's time", template / samples[0].median, OF_PODMAN))
        return report("run --rm busybox true", [*samples, *cold], checks)
