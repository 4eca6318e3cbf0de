"""What `update` may change, and when each change holds."""

from __future__ import annotations

from nagaya.manager.creating import check_options
from nagaya.manager.options import CreateOptions, UpdateOptions
from nagaya.model.spec import Limits, MachineSpec

_WORDS = {
    "memory_bytes": "memory limit",
    "cpus_milli": "CPU limit",
    "pids": "process limit",
    "cpuset_cpus": "CPU set",
    "blkio_weight": "block I/O weight",
}


def plan_update(spec: MachineSpec, options: UpdateOptions) -> MachineSpec:
    """The record after the change. Raises `UsageError` for values that no machine could have."""
    changes = {name: value for name in Limits._fields if (value := getattr(options, name, None)) is not None}
    limits = spec.limits._replace(**changes)
    restart = options.restart if options.restart is not None else spec.restart
    check_options(CreateOptions(image=spec.image, limits=limits, restart=restart, auto_remove=spec.auto_remove))
    return spec._replace(limits=limits, restart=restart)


def describe(before: MachineSpec, after: MachineSpec, *, alive: bool) -> list[str]:
    """A sentence for each thing that changed."""
    when = "now" if alive else "from the next start"
    sentences = [
        f"{_WORDS[name]}: {old or 'none'} -> {new or 'none'} ({when})"
        for name, old, new in zip(Limits._fields, before.limits, after.limits, strict=True)
        if old != new
    ]
    if before.restart != after.restart:
        sentences.append(f"restart policy: {before.restart.policy} -> {after.restart.policy} (now)")
    return sentences
