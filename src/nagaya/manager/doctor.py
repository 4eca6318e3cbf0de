"""What this host can do, found out without changing anything."""

from __future__ import annotations

from nagaya.errors import NagayaError, Unsupported
from nagaya.manager.facilities import look_at_facilities
from nagaya.manager.finding import LIMITED, MISSING, OK, Finding

TYPES = ("container", "kvm", "emulated")


def examine(root: str = "") -> list[Finding]:
    """Everything, in the order in which it is shown; `TYPES` are those that run machines. `root`: the store, "" = the default."""
    from nagaya.storage.paths import find_paths

    types = [look_at_containers(), look_at_kvm(), look_at_emulation(), look_at_guest_kernel()]
    return types + look_at_facilities(find_paths(root).root)


def can_run(findings: list[Finding]) -> bool:
    """Whether a machine of any type can run."""
    return any(finding.topic in TYPES and finding.status != MISSING for finding in findings)


def _refused(topic: str, error: NagayaError) -> Finding:
    how = error.finding if isinstance(error, Unsupported) else "trying it out"
    return Finding(topic, MISSING, error.message, how, error.hint)


def look_at_containers() -> Finding:
    from nagaya.engines.cgroups.group import host_hierarchy
    from nagaya.engines.container.engine import ContainerEngine

    try:
        ContainerEngine().check_host()
    except NagayaError as error:
        return _refused("container", error)
    hierarchy, how = host_hierarchy(), "/proc/self/mountinfo"
    if hierarchy.pure_v2:
        return Finding("container", OK, "cgroup v2", how, "containers run, with limits")
    if not hierarchy.v1:
        return Finding(
            "container", MISSING, "no control groups are mounted", how, "mount -t cgroup2 none /sys/fs/cgroup"
        )
    found = "cgroup v1's controllers beside v2" if hierarchy.v2 else "cgroup v1"
    return Finding("container", OK, found, how, "containers run, with limits")


def look_at_kvm() -> Finding:
    from nagaya.engines.kvm.known import HARDWARE
    from nagaya.engines.kvm.probe import probe_kvm
    from nagaya.engines.kvm.speed import has_quick_kernel

    try:
        kvm = probe_kvm()
    except NagayaError as error:
        return _refused("kvm", error)
    if kvm.kind == HARDWARE:
        return Finding("kvm", OK, "hardware KVM", kvm.how, "guests run at the CPU's speed")
    if has_quick_kernel():
        return Finding(
            "kvm",
            OK,
            "software KVM (PVM)",
            kvm.how,
            "guests run at the CPU's speed with our kernel; others boot in minutes",
        )
    return Finding(
        "kvm",
        LIMITED,
        "software KVM (PVM)",
        kvm.how,
        "other kernels boot in minutes; one for it: 'nagaya kernel build'",
    )


def look_at_emulation() -> Finding:
    from nagaya.engines.qemu.engine import EmulatedEngine, list_platforms

    try:
        EmulatedEngine().check_host()
    except NagayaError as error:
        return _refused("emulated", error)
    how = "QEMU in PATH, a guest kernel and an agent for each"
    return Finding(
        "emulated", OK, ", ".join(list_platforms()), how, "images for these platforms run, 5 to 20 times slower"
    )


def look_at_guest_kernel() -> Finding:
    from nagaya.kernels.cache import BUILD_HINT, cache_directory, find_kernel

    kernel = find_kernel()
    if kernel is None:
        return Finding("guest kernel", MISSING, "none has been built", cache_directory(), BUILD_HINT)
    return Finding(
        "guest kernel", OK, kernel.record.version, kernel.path, "machines with a kernel of their own boot it"
    )
