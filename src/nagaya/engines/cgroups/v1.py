"""Control groups, version 1: one tree per controller (Documentation/admin-guide/cgroup-v1)."""

from __future__ import annotations

import os
import time

from nagaya.engines.base import Stats
from nagaya.engines.cgroups import files
from nagaya.engines.cgroups.devices import DeviceRule
from nagaya.errors import HostError, Unsupported
from nagaya.model.spec import Limits

PARENT = "nagaya"
CONTROLLERS = ("memory", "pids", "cpu", "cpuacct", "freezer", "devices", "blkio")
PERIOD_US = 100_000
FREEZE_WITHIN_S = 10.0


class CgroupV1:
    """A machine's groups, one below each controller's mount that this host has."""

    def __init__(self, mounts: dict[str, str], machine_id: str) -> None:
        self.warnings: list[str] = []
        self._mounts = mounts
        self._id = machine_id
        # cpu and cpuacct are often one mount: the same directory then
        self._paths = {
            name: f"{mounts[name]}/{PARENT}/{machine_id}" for name in (*CONTROLLERS, "cpuset") if name in mounts
        }

    def _directories(self) -> list[str]:
        return list(dict.fromkeys(self._paths.values()))

    def create(self, devices: list[DeviceRule] | None, *, controllers: tuple[str, ...] = CONTROLLERS) -> None:
        """`devices`: all that may be used; None = whatever the processes' own rights allow."""
        made = []
        try:
            for name in controllers:
                if name in self._paths:
                    files.make(self._paths[name])
                    made.append(self._paths[name])
            if devices is not None:
                self._allow_devices(devices)
        except BaseException:
            for path in made:
                files.remove_machine(path)
            raise

    def _allow_devices(self, rules: list[DeviceRule]) -> None:
        path = self._paths.get("devices")
        if path is None:
            raise Unsupported("this host has no control group for devices", finding="no devices controller is mounted")
        files.write(f"{path}/devices.deny", "a")
        for rule in rules:
            files.write(f"{path}/devices.allow", rule.v1())

    def enter(self) -> None:
        """Move the calling process, which must have one thread.

        By `tasks`, not `cgroup.procs`: a thread that moves itself needs no lock on all of the system's forks and exits
        (Linux 5.17, "cgroup: Optimize single thread migration"), for which the kernel waits 10 ms and more.
        """
        for path in self._directories():
            if os.path.isdir(path):
                files.write(f"{path}/tasks", "0")

    def set_limits(self, limits: Limits) -> None:
        self._set_memory(limits.memory_bytes)
        self._set_cpu(limits.cpus_milli)
        self._set_pids(limits.pids)
        self._set_cpuset(limits.cpuset_cpus)
        self._set_block_weight(limits.blkio_weight)

    def _need(self, controller: str, option: str) -> str:
        path = self._paths.get(controller)
        if path is None:
            raise Unsupported(
                f"{option} needs the control group controller '{controller}', which this host does not have",
                finding=f"no {controller} among the cgroup mounts",
            )
        return path

    def _set_memory(self, limit: int) -> None:
        if not limit and files.number(f"{self._paths.get('memory', '')}/memory.limit_in_bytes") == -1:
            return
        path = self._need("memory", "--memory")
        value = str(limit or -1)
        # memsw, if there, must never be below the plain limit: which goes first depends on the direction.
        names = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]
        if not os.path.exists(f"{path}/{names[1]}"):
            names.pop()
        old = files.number(f"{path}/{names[0]}")
        if len(names) == 2 and (not limit or (old != -1 and limit > old)):
            names.reverse()
        for name in names:
            try:
                files.write(f"{path}/{name}", value)
            except OSError as error:
                raise HostError.from_os(
                    error, f"cannot set the memory limit to {value}", hint="it may be below what the machine uses now"
                ) from None

    def _set_cpu(self, milli: int) -> None:
        path = self._paths.get("cpu")
        if milli or (path and files.read(f"{path}/cpu.cfs_quota_us").strip() not in ("-1", "")):
            path = self._need("cpu", "--cpus")
            files.write(f"{path}/cpu.cfs_period_us", str(PERIOD_US))
            files.write(f"{path}/cpu.cfs_quota_us", str(milli * PERIOD_US // 1000 if milli else -1))

    def _set_pids(self, limit: int) -> None:
        path = self._paths.get("pids")
        if limit or (path and files.number(f"{path}/pids.max") != -1):
            files.write(f"{self._need('pids', '--pids-limit')}/pids.max", str(limit) if limit else "max")

    def _set_cpuset(self, cpus: str) -> None:
        path = self._paths.get("cpuset")
        if not cpus:
            if path and os.path.isdir(path):
                files.write(f"{path}/cpuset.cpus", files.read(f"{os.path.dirname(path)}/cpuset.cpus").strip())
            return
        path = self._need("cpuset", "--cpuset-cpus")
        mount = self._mounts["cpuset"]
        existed = os.path.isdir(path)
        files.make(path)
        # A new group's sets are empty, and an empty set takes no process: fill them from the top.
        parent = f"{mount}/{PARENT}"
        for name in ("cpuset.cpus", "cpuset.mems"):
            if not files.read(f"{parent}/{name}").strip():
                files.write(f"{parent}/{name}", files.read(f"{mount}/{name}").strip())
        files.write(f"{path}/cpuset.mems", files.read(f"{parent}/cpuset.mems").strip())
        try:
            files.write(f"{path}/cpuset.cpus", cpus)
        except OSError as error:
            if not existed:
                files.remove(path)
            raise HostError.from_os(
                error,
                f"cannot confine the machine to CPUs {cpus}",
                hint="'nproc' and /proc/cpuinfo show which CPUs there are",
            ) from None
        if not existed:
            self._move_running(path)

    def _move_running(self, path: str) -> None:
        """An update made a group that the running machine is not in yet. Again until no new process turned up."""
        others = self._paths.get("pids") or self._paths.get("memory", "")
        while pids := [pid for pid in files.processes(others) if pid not in files.processes(path)]:
            for pid in pids:
                try:
                    files.write(f"{path}/cgroup.procs", str(pid))
                except ProcessLookupError:
                    continue

    def _set_block_weight(self, weight: int) -> None:
        if not weight:
            return
        path = self._need("blkio", "--blkio-weight")
        for name in ("blkio.weight", "blkio.bfq.weight"):
            if os.path.exists(f"{path}/{name}"):
                files.write(f"{path}/{name}", str(weight))
                return
        self.warnings.append("this host's kernel has no weights for block I/O: --blkio-weight has no effect")

    def freeze(self) -> None:
        self._set_freezer("FROZEN")

    def thaw(self) -> None:
        self._set_freezer("THAWED")

    def freezer_path(self) -> str:
        return self._paths.get("freezer", "")

    def _set_freezer(self, state: str) -> None:
        path = f"{self._need('freezer', 'pause')}/freezer.state"
        files.write(path, state)
        deadline = time.monotonic() + FREEZE_WITHIN_S
        # Version 1 has no notification of this: writing again makes the kernel look again (freezer-subsystem.rst).
        while files.read(path).strip() != state:
            if time.monotonic() > deadline:
                raise HostError(f"the machine did not become {state.lower()} in time", operation="freeze", path=path)
            time.sleep(0.001)
            files.write(path, state)

    def stats(self) -> Stats:
        paths = self._paths
        return Stats(
            cpu_ns=files.number(f"{paths.get('cpuacct', '')}/cpuacct.usage"),
            memory_bytes=self._memory_in_use(),
            memory_limit_bytes=files.number(f"{paths.get('memory', '')}/memory.limit_in_bytes"),
            pids=files.number(f"{paths.get('pids', '')}/pids.current"),
            block_read_bytes=self._block_bytes("Read"),
            block_write_bytes=self._block_bytes("Write"),
        )

    def _memory_in_use(self) -> int:
        """Usage without the page cache that could go at once, as `docker stats` counts."""
        path = self._paths.get("memory", "")
        usage = files.number(f"{path}/memory.usage_in_bytes")
        inactive = files.table(f"{path}/memory.stat").get("total_inactive_file", 0)
        return max(0, usage - inactive) if usage >= 0 else -1

    def _block_bytes(self, kind: str) -> int:
        path = self._paths.get("blkio", "")
        for name in ("blkio.throttle.io_service_bytes_recursive", "blkio.throttle.io_service_bytes"):
            text = files.read(f"{path}/{name}")
            if text:
                rows = [line.split() for line in text.splitlines()]
                return sum(int(row[2]) for row in rows if len(row) == 3 and row[1] == kind)
        return -1

    def kill(self) -> None:
        """Freeze first: a fork bomb cannot outrun us then. SIGKILL takes effect at the thaw."""
        path = self._paths.get("pids") or self._paths.get("memory")
        if path is None or not os.path.isdir(path):
            return
        freezer = self._paths.get("freezer")
        for state in ("FROZEN", "THAWED"):
            if freezer and os.path.isdir(freezer):
                files.write(f"{freezer}/freezer.state", state)
            files.kill_all(path)

    def oom_kills(self) -> int:
        return max(0, files.table(f"{self._paths.get('memory', '')}/memory.oom_control").get("oom_kill", 0))

    def populated(self) -> bool:
        return any(files.processes(path) for path in self._directories() if os.path.isdir(path))

    def remove(self) -> None:
        for path in self._directories():
            files.remove_machine(path)
