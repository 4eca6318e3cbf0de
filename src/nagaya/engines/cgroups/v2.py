"""Control groups, version 2 (Documentation/admin-guide/cgroup-v2.rst)."""

from __future__ import annotations

import os
import select
import time

from nagaya.engines.base import Stats
from nagaya.engines.cgroups import files
from nagaya.engines.cgroups.devices import DeviceRule
from nagaya.errors import HostError, Unsupported
from nagaya.kernel import bpf
from nagaya.model.spec import Limits

PARENT = "nagaya"
WANTED = ("memory", "pids", "cpu", "cpuset", "io")
PERIOD_US = 100_000
FREEZE_WITHIN_S = 10.0


class CgroupV2:
    """A machine's one group below `root`, the cgroup2 mount."""

    def __init__(self, root: str, machine_id: str) -> None:
        self.warnings: list[str] = []
        self._root = root
        self._path = f"{root}/{PARENT}/{machine_id}"

    def create(self, devices: list[DeviceRule] | None) -> None:
        """`devices`: all that may be used; None = whatever the processes' own rights allow."""
        files.make(os.path.dirname(self._path))
        try:
            for directory in (self._root, os.path.dirname(self._path)):
                self._enable(directory)
            files.make(self._path)
            if devices is not None:
                self._allow_devices(devices)
        except BaseException:
            files.remove_machine(self._path)
            raise

    def _enable(self, directory: str) -> None:
        """Hand the controllers down. Only what is not handed down yet: each write takes a lock on all groups."""
        there = files.read(f"{directory}/cgroup.controllers").split()
        handed = files.read(f"{directory}/cgroup.subtree_control").split()
        missing = [f"+{name}" for name in WANTED if name in there and name not in handed]
        if missing:
            try:
                files.write(f"{directory}/cgroup.subtree_control", " ".join(missing))
            except OSError as error:
                raise HostError.from_os(
                    error,
                    f"cannot enable control group controllers in {directory}",
                    hint="in a container, processes in the root group must be moved into a child group first",
                ) from None

    def _allow_devices(self, rules: list[DeviceRule]) -> None:
        program = bpf.device_program([rule.bpf() for rule in rules])
        group = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            loaded = bpf.load_device_program(program)
            try:
                bpf.attach_device_program(loaded, group)
            finally:
                os.close(loaded)
        except OSError as error:
            raise HostError.from_os(error, "cannot install the device filter (bpf)") from None
        finally:
            os.close(group)

    def enter(self) -> None:
        files.write(f"{self._path}/cgroup.procs", "0")

    def set_limits(self, limits: Limits) -> None:
        self._set("memory.max", str(limits.memory_bytes or "max"), bool(limits.memory_bytes), "--memory")
        # As with v1's memsw: what is asked for is memory and swap together.
        if os.path.exists(f"{self._path}/memory.swap.max"):
            self._set("memory.swap.max", "0" if limits.memory_bytes else "max", False, "--memory")
        quota = limits.cpus_milli * PERIOD_US // 1000
        self._set("cpu.max", f"{quota} {PERIOD_US}" if quota else f"max {PERIOD_US}", bool(quota), "--cpus")
        self._set("pids.max", str(limits.pids or "max"), bool(limits.pids), "--pids-limit")
        self._set("cpuset.cpus", limits.cpuset_cpus or "\n", bool(limits.cpuset_cpus), "--cpuset-cpus")
        if limits.blkio_weight:
            self._set_block_weight(limits.blkio_weight)

    def _set(self, name: str, value: str, asked: bool, option: str) -> None:
        path = f"{self._path}/{name}"
        if not os.path.exists(path):
            if asked:
                controller = name.split(".")[0]
                raise Unsupported(
                    f"{option} needs the control group controller '{controller}', which this host does not hand out",
                    hint=f"see {self._root}/cgroup.controllers",
                    finding=f"{path} does not exist",
                )
            return
        try:
            files.write(path, value)
        except OSError as error:
            raise HostError.from_os(error, f"cannot apply {option} {value.strip()}") from None

    def _set_block_weight(self, weight: int) -> None:
        """Docker's 10..1000 on io.weight's scale of 1..10000, by the formula that runc uses."""
        scaled = 1 + (weight - 10) * 9999 // 990
        for name, value in (("io.bfq.weight", str(weight)), ("io.weight", f"default {scaled}")):
            if os.path.exists(f"{self._path}/{name}"):
                files.write(f"{self._path}/{name}", value)
                return
        self.warnings.append("this host's kernel has no weights for block I/O: --blkio-weight has no effect")

    def freeze(self) -> None:
        self._freeze(1)

    def freezer_path(self) -> str:
        return self._path

    def thaw(self) -> None:
        self._freeze(0)

    def _freeze(self, value: int) -> None:
        files.write(f"{self._path}/cgroup.freeze", str(value))
        fd = os.open(f"{self._path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLPRI)
            deadline = time.monotonic() + FREEZE_WITHIN_S
            while f"frozen {value}" not in os.pread(fd, 4096, 0).decode():
                left = deadline - time.monotonic()
                if left <= 0 or not poll.poll(int(left * 1000)):
                    raise HostError("the machine did not freeze or thaw in time", operation="freeze", path=self._path)
        finally:
            os.close(fd)

    def stats(self) -> Stats:
        memory = files.number(f"{self._path}/memory.current")
        inactive = files.table(f"{self._path}/memory.stat").get("inactive_file", 0)
        cpu = files.table(f"{self._path}/cpu.stat").get("usage_usec", -1)
        io = self._io()
        return Stats(
            cpu_ns=cpu * 1000 if cpu >= 0 else -1,
            memory_bytes=max(0, memory - inactive) if memory >= 0 else -1,
            memory_limit_bytes=files.number(f"{self._path}/memory.max"),
            pids=files.number(f"{self._path}/pids.current"),
            block_read_bytes=io[0],
            block_write_bytes=io[1],
        )

    def _io(self) -> tuple[int, int]:
        path = f"{self._path}/io.stat"
        if not os.path.exists(path):
            return -1, -1
        pairs = [field.partition("=") for line in files.read(path).splitlines() for field in line.split()[1:]]
        return (
            sum(int(value) for key, _, value in pairs if key == "rbytes"),
            sum(int(value) for key, _, value in pairs if key == "wbytes"),
        )

    def kill(self) -> None:
        """cgroup.kill (Linux 5.14) takes forks along; before that, one after another."""
        try:
            files.write(f"{self._path}/cgroup.kill", "1")
        except FileNotFoundError:
            if os.path.isdir(self._path):
                files.kill_all(self._path)

    def oom_kills(self) -> int:
        return files.table(f"{self._path}/memory.events").get("oom_kill", 0)

    def populated(self) -> bool:
        return "populated 1" in files.read(f"{self._path}/cgroup.events")

    def remove(self) -> None:
        files.remove_machine(self._path)
