"""The start-time table: `run --rm busybox true`, whole commands, of every type and of podman and runc, in turns.

And what a restore takes inside of a supervisor: from the fork of the VMM's process to the agent's answer to its set-up, by when
the guest's user space has run for some time already.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack

from benches.apart import run_apart
from benches.measure import Check, Sample, command, report, take_turns
from benches.run import _bundle, _works
from benches.stores import ULIMITS, Stores, open_stores
from nagaya import Host
from nagaya.engines.base import BootRequest
from nagaya.engines.kvm.engine import KvmEngine
from nagaya.engines.kvm.sources import TEMPLATE
from nagaya.kernels.cache import cache_directory, find_kernel
from nagaya.manager.options import CreateOptions
from nagaya.net.plan import NetworkPlan
from nagaya.protocol.frame import Decoder
from nagaya.storage import rootfs
from nagaya.supervisor.etc import write_etc

COLD_ROUNDS = 10
OF_PODMAN, WHOLE_MS, RESTORE_MS = 1.0, 200.0, 15.0


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
        for network in ("bridge", "none"):
            built = ["env", f"XDG_CACHE_HOME={cache}", *stores.nagaya, "template", "build", "-q", "--network", network]
            subprocess.run([*built, "busybox"], check=True, stdout=subprocess.DEVNULL)
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
        kept = report("run --rm busybox true", [*samples, *cold], checks)
        os.environ |= warm
        return _bench_restore(f"{stores.directory}/nagaya", rounds) and kept


def _bench_restore(root: str, rounds: int) -> bool:
    host = Host(root=root)
    times = []
    KvmEngine().preload()
    for _ in range(rounds):
        machine = host.machines.create(CreateOptions(image="busybox", type="kvm", network="none", command=("true",)))
        with ExitStack() as stack:
            runtime = stack.enter_context(tempfile.TemporaryDirectory())
            disks = rootfs.plan_disks(machine.directory, machine.spec)
            network = NetworkPlan("none")
            etc = write_etc(f"{machine.directory}/etc", machine.spec, network)
            began_s = _restore(BootRequest(machine.spec, disks, (), network, etc, runtime), stack)
            times.append((time.perf_counter() - began_s) * 1e3)
        machine.remove(force=True)
    sample = Sample("restore, from the VMM's fork to the agent's answer", tuple(times))
    return report("a machine from a template", [sample], [Check("restore, ms", sample.median, RESTORE_MS)])


def _restore(request: BootRequest, stack: ExitStack) -> float:
    """When its VMM was forked."""
    forks = []
    fork = os.fork

    def watched() -> int:
        forks.append(time.perf_counter())
        return fork()

    os.fork = watched
    try:
        booted = KvmEngine().boot(request, stack)
    finally:
        os.fork = fork
    assert booted.origin == TEMPLATE
    os.set_blocking(booted.agent, True)
    assert booted.told
    decoder, frames = Decoder(), 0
    while frames < 2:  # HELLO, READY
        frames += len(decoder.feed(os.read(booted.agent, 65536)))
    return forks[-1]
