"""A machine's control group, whichever way this host mounts them: v2, v1, or hybrid (v1's controllers beside an empty v2).

Machines live at `nagaya/NAME` below each controller's mount. `docs/cgroups.md` has the table of files.
"""

from __future__ import annotations

import os

from nagaya.engines.base import Stats
from nagaya.engines.cgroups.devices import DeviceRule
from nagaya.errors import Unsupported
from nagaya.model.spec import Limits
from nagaya.static import NamedTuple, Protocol

PARENT = "nagaya"


class Hierarchy(NamedTuple):
    """Where the controllers are: v1's by name, and the v2 tree ("" = none)."""

    v1: dict[str, str]
    v2: str

    @property
    def pure_v2(self) -> bool:
        return bool(self.v2) and "memory" not in self.v1 and "pids" not in self.v1


class Cgroup(Protocol):
    """One machine's control group."""

    warnings: list[str]

    def enter(self) -> None:
        """Move the calling process in."""

    def set_limits(self, limits: Limits) -> None: ...
    def freeze(self) -> None: ...
    def thaw(self) -> None: ...
    def freezer_path(self) -> str:
        """The directory whose processes `freeze` stops; "" = this host has no freezer."""

    def stats(self) -> Stats: ...
    def kill(self) -> None: ...
    def oom_kills(self) -> int: ...
    def populated(self) -> bool: ...
    def remove(self) -> None: ...


def find_hierarchy(mountinfo: str) -> Hierarchy:
    """Read /proc/self/mountinfo's text (proc(5)). The first mount of a controller counts."""
    v1: dict[str, str] = {}
    v2 = ""
    for line in mountinfo.splitlines():
        left, separator, right = line.partition(" - ")
        fields, about = left.split(" "), right.split(" ")
        if not separator or len(fields) < 5 or len(about) < 3:
            continue
        where = fields[4]
        if "\\" in where:  # a codec of its own, which would have to be imported
            where = where.encode().decode("unicode_escape")
        if about[0] == "cgroup2":
            v2 = v2 or where
        elif about[0] == "cgroup":
            for option in about[2].split(","):
                if option in _V1_CONTROLLERS:
                    v1.setdefault(option, where)
    return Hierarchy(v1, v2)


_V1_CONTROLLERS = frozenset(("memory", "pids", "cpu", "cpuacct", "cpuset", "freezer", "devices", "blkio"))


def host_hierarchy() -> Hierarchy:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        return find_hierarchy(file.read())


def find_controllers(hierarchy: Hierarchy) -> frozenset[str]:
    """What a group can be limited in, by version 1's names of the controllers."""
    if not hierarchy.pure_v2:
        return frozenset(hierarchy.v1)
    try:
        with open(f"{hierarchy.v2}/cgroup.controllers", encoding="utf-8") as file:  # other codecs have to be imported
            there = file.read().split()
    except OSError:
        return frozenset()
    return frozenset("blkio" if name == "io" else name for name in there)


def create_cgroup(
    machine_id: str,
    limits: Limits,
    *,
    devices: list[DeviceRule] | None,
    controllers: tuple[str, ...] = (),
    hierarchy: Hierarchy | None = None,
) -> Cgroup:
    """Make a machine's control group with its limits and its device list (None: any device). Raises `Unsupported`, `OSError`.

    `controllers`: version 1 has a tree for each, and each takes its time; () = all that containers need.
    `hierarchy`: the host's, where the caller has read it.
    """
    hierarchy = hierarchy or host_hierarchy()
    cgroup: Cgroup
    if hierarchy.pure_v2:
        from nagaya.engines.cgroups.v2 import CgroupV2

        cgroup = CgroupV2(hierarchy.v2, machine_id)
        cgroup.create(devices)
    elif hierarchy.v1:
        from nagaya.engines.cgroups.v1 import CONTROLLERS, CgroupV1

        cgroup = CgroupV1(hierarchy.v1, machine_id)
        cgroup.create(devices, controllers=controllers or CONTROLLERS)
    else:
        raise Unsupported(
            "no control groups are mounted on this host, and a machine is to have one",
            hint="mount -t cgroup2 none /sys/fs/cgroup",
            finding="/proc/self/mountinfo has no cgroup and no cgroup2",
        )
    try:
        cgroup.set_limits(limits)
    except BaseException:
        cgroup.remove()
        raise
    return cgroup


def find_cgroup(machine_id: str) -> Cgroup | None:
    """The control group that a machine has left, or None."""
    hierarchy = host_hierarchy()
    found: Cgroup
    if hierarchy.pure_v2:
        from nagaya.engines.cgroups.v2 import CgroupV2

        found = CgroupV2(hierarchy.v2, machine_id)
        return found if os.path.isdir(f"{hierarchy.v2}/{PARENT}/{machine_id}") else None
    from nagaya.engines.cgroups.v1 import CgroupV1

    found = CgroupV1(hierarchy.v1, machine_id)
    return found if any(os.path.isdir(f"{mount}/{PARENT}/{machine_id}") for mount in hierarchy.v1.values()) else None
