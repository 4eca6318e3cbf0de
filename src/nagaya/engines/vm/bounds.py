"""A virtual machine's control group: what its VMM and the helpers beside it may use of this host, together.

The guest has its memory and its CPUs and no more in any case. These bounds are for a VMM that leaks, or that its guest has
taken over.
"""

from __future__ import annotations

import os
import zlib
from contextlib import ExitStack

from nagaya.engines.cgroups.group import Cgroup, create_cgroup, find_cgroup, find_controllers, host_hierarchy
from nagaya.engines.vm import rules
from nagaya.errors import HostError
from nagaya.kernel.files import is_in_memory
from nagaya.model.spec import Limits, MachineSpec

# Beside the guest's memory: programs, screens and firmware, and the page cache of its disks, which goes when it has to.
OVERHEAD_BYTES = 1 << 30
TRANSLATED_BYTES = 1 << 30  # TCG's buffer of translated code is as large at most
_TABLES = 64  # one page of tables for so many of the guest, here and in KVM, and room for more
MOST_TASKS, _TASKS_PER_CPU = 256, 4  # QEMU and virtiofsd have up to 64 threads for files, each


def plan_bounds(spec: MachineSpec, *, translates: bool) -> Limits:
    """The group's limits. `translates`: the guest's code is translated, and not run by the CPU."""
    guest_bytes, limits = rules.memory_bytes(spec), spec.limits
    return Limits(
        memory_bytes=guest_bytes + guest_bytes // _TABLES + OVERHEAD_BYTES + (TRANSLATED_BYTES if translates else 0),
        cpus_milli=limits.cpus_milli if limits.cpus_milli % 1000 else 0,  # of whole ones the guest has so many
        pids=MOST_TASKS + _TASKS_PER_CPU * rules.cpus(spec),
        cpuset_cpus=limits.cpuset_cpus,
        blkio_weight=limits.blkio_weight,
    )


class Bounds:
    """One machine's. Without rights to make a control group nothing is bounded, and all of this does nothing."""

    def __init__(self) -> None:
        self.warnings: tuple[str, ...] = ()
        self._group: Cgroup | None = None
        self._limits = Limits()

    def make(self, spec: MachineSpec, runtime_dir: str, stack: ExitStack, *, translates: bool) -> None:
        """Before anything of the machine runs, whose `BootRequest.runtime_dir` that is. `stack` removes the group: what is
        pushed there later has gone by then.

        What the user asked for and cannot be had raises `Unsupported`, `HostError`; our own bounds are a warning then.
        """
        self.warnings = ()
        if os.geteuid() or rules.is_errand(spec):
            return
        wanted = plan_bounds(spec, translates=translates)
        asked = wanted._replace(memory_bytes=0, pids=0)
        hierarchy = host_hierarchy()
        there = find_controllers(hierarchy)
        missing = [name for name in ("memory", "pids") if name not in there]
        if missing:
            self.warnings = (
                f"this host has no control group controller for {' and '.join(missing)}: "
                "nothing bounds what the machine's VMM uses of that",
            )
            wanted = wanted._replace(
                memory_bytes=wanted.memory_bytes if "memory" in there else 0, pids=wanted.pids if "pids" in there else 0
            )
        if wanted == Limits():
            return
        controllers = ("memory", "pids", "cpuacct", *(("cpu",) if wanted.cpus_milli else ()))
        try:
            self._group = create_cgroup(
                group_name(spec.id, runtime_dir),
                wanted,
                devices=None,
                controllers=(*controllers, *(("blkio",) if wanted.blkio_weight else ())),
                hierarchy=hierarchy,
            )
        except (OSError, HostError) as error:
            if asked != Limits():
                if isinstance(error, OSError):
                    raise HostError.from_os(error, "cannot make the machine's control group") from None
                raise
            why = error.message if isinstance(error, HostError) else error.strerror
            self.warnings = (
                f"nothing bounds what the machine's VMM uses of this host: no control group can be made: {why}",
            )
            return
        stack.callback(self._remove)
        self._limits = wanted
        self.warnings += tuple(self._group.warnings)

    def enter(self) -> None:
        """In a child with one thread, before it gives its rights up."""
        if self._group is not None:
            self._group.enter()

    def read_cpu_ns(self) -> int:
        """What all of the machine's processes have used, those that have ended too; -1 where nobody counts."""
        return self._group.stats().cpu_ns if self._group is not None else -1

    def oom_killed(self) -> bool:
        """Whether the host's kernel has killed a process of the machine's for want of memory."""
        return self._group is not None and self._group.oom_kills() > 0

    def make_room(self, directory: str, size_bytes: int) -> None:
        """So much is going to be written to `directory`: where that is in memory, it counts as the writer's."""
        if self._group is None or not self._limits.memory_bytes or not is_in_memory(directory):
            return
        wanted = self._limits._replace(memory_bytes=self._limits.memory_bytes + size_bytes)
        self._group.set_limits(wanted)
        self._limits = wanted

    def follow_cpus(self, spec: MachineSpec) -> None:
        """The machine has another number of CPUs now. Raises `HostError`."""
        if self._group is None or not self._limits.pids:
            return
        wanted = self._limits._replace(pids=plan_bounds(spec, translates=False).pids)
        self._group.set_limits(wanted)
        self._limits = wanted

    def _remove(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.remove()


def group_name(machine_id: str, runtime_dir: str) -> str:
    """Of the machine that has this directory: one that moves to another store of this host is there twice for a while."""
    return f"{machine_id}-{zlib.crc32(runtime_dir.encode()):08x}"


def reclaim(machine_id: str, runtime_dir: str) -> None:
    """Kill and remove what a killed supervisor has left. Idempotent."""
    group = None if os.geteuid() else find_cgroup(group_name(machine_id, runtime_dir))
    if group is not None:
        group.kill()
        group.remove()
