"""What `update` may change, and when each change holds."""

from __future__ import annotations

from nagaya.errors import UsageError
from nagaya.manager.creating import check_options
from nagaya.manager.options import CreateOptions, UpdateOptions
from nagaya.manager.settings import CHOICES, Choice, choose_type
from nagaya.model.spec import Limits, MachineSpec
from nagaya.static import NamedTuple

_WORDS = {
    "memory_bytes": "memory limit",
    "cpus_milli": "CPU limit",
    "pids": "process limit",
    "cpuset_cpus": "CPU set",
    "storage_bytes": "disk",
    "blkio_weight": "block I/O weight",
}


class Update(NamedTuple):
    """The record after a change. `note`: a sentence about the type that `auto` stood for, "" for none."""

    spec: MachineSpec
    note: str = ""


def plan_update(spec: MachineSpec, options: UpdateOptions) -> Update:
    """What the change comes to. Raises `UsageError` for values that no machine could have."""
    changes = {name: value for name in Limits._fields if (value := getattr(options, name, None)) is not None}
    limits = spec.limits._replace(**changes)
    restart = options.restart if options.restart is not None else spec.restart
    check_options(CreateOptions(image=spec.image, limits=limits, restart=restart, auto_remove=spec.auto_remove))
    choice = Choice(spec.type)
    if options.type is not None:
        if not options.type:
            raise UsageError("--type: no type was given", hint=f"one of: {', '.join(CHOICES)}")
        choice = choose_type(options.type, platform=spec.platform, kernel=spec.kernel)
    note = f"{options.type} is {choice.type} here, because {choice.reason}" if choice.reason else ""
    return Update(spec._replace(type=choice.type, limits=limits, restart=restart), note)


def describe(before: MachineSpec, after: MachineSpec, *, alive: bool) -> list[str]:
    """A sentence for each thing that changed."""
    when = "now" if alive else "from the next start"
    sentences = [
        f"{_WORDS[name]}: {_say(name, old)} -> {_say(name, new)} ({when})"
        for name, old, new in zip(Limits._fields, before.limits, after.limits, strict=True)
        if old != new
    ]
    if before.type != after.type:
        sentences.insert(0, f"type: {before.type} -> {after.type} (from the next start, with its data)")
    if before.restart != after.restart:
        sentences.append(f"restart policy: {before.restart.policy} -> {after.restart.policy} (now)")
    return sentences


def _say(name: str, value: object) -> str:
    """A limit's value as it is written on a command line."""
    if not isinstance(value, int) or not value:
        return str(value or "none")
    if name == "cpus_milli":
        return f"{value / 1000:g}"
    if name.endswith("_bytes"):
        units = ((30, "GiB"), (20, "MiB"), (10, "KiB"), (0, " bytes"))
        return next(f"{value >> shift}{unit}" for shift, unit in units if not value % (1 << shift))
    return str(value)
