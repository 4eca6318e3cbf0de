"""Control groups as files: which hierarchy a host has, what is written where."""

from __future__ import annotations

from pathlib import Path

import pytest

from nagaya.engines.cgroups import files
from nagaya.engines.cgroups import group as hierarchies
from nagaya.engines.cgroups.devices import DeviceRule
from nagaya.engines.cgroups.v1 import CgroupV1
from nagaya.engines.cgroups.v2 import CgroupV2
from nagaya.engines.container.devices import device_rules
from nagaya.errors import HostError, Unsupported
from nagaya.kernel import bpf
from nagaya.model.spec import Limits

ID = "f" * 32
PURE = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
HYBRID = """30 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
33 30 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
34 30 0:30 / /sys/fs/cgroup/with\\040space rw - cgroup cgroup rw,pids
35 30 0:31 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
36 30 0:29 / /somewhere/else rw - cgroup cgroup rw,memory
"""


def test_hierarchies() -> None:
    assert hierarchies.find_hierarchy(PURE) == hierarchies.Hierarchy({}, "/sys/fs/cgroup")
    assert hierarchies.find_hierarchy(PURE).pure_v2
    found = hierarchies.find_hierarchy(HYBRID)
    assert not found.pure_v2
    assert found.v2 == "/sys/fs/cgroup/unified"
    assert found.v1 == {
        "cpu": "/sys/fs/cgroup/cpu,cpuacct",
        "cpuacct": "/sys/fs/cgroup/cpu,cpuacct",
        "memory": "/sys/fs/cgroup/memory",
        "pids": "/sys/fs/cgroup/with space",
    }
    assert hierarchies.find_hierarchy("nonsense\n\n") == hierarchies.Hierarchy({}, "")


def _v2(tmp_path: Path, *names: str) -> tuple[CgroupV2, Path]:
    directory = tmp_path / "nagaya" / ID
    directory.mkdir(parents=True)
    for name in names:
        (directory / name).write_text("")
    return CgroupV2(str(tmp_path), ID), directory


def test_v2_limits_are_written(tmp_path: Path) -> None:
    group, directory = _v2(tmp_path, "memory.max", "memory.swap.max", "cpu.max", "pids.max", "cpuset.cpus", "io.weight")
    group.set_limits(Limits(memory_bytes=64 << 20, cpus_milli=1500, pids=50, cpuset_cpus="0-1", blkio_weight=500))
    written = {path.name: path.read_text() for path in directory.iterdir()}
    assert written == {
        "memory.max": str(64 << 20),
        "memory.swap.max": "0",
        "cpu.max": "150000 100000",
        "pids.max": "50",
        "cpuset.cpus": "0-1",
        "io.weight": "default 4950",
    }
    group.set_limits(Limits())
    assert (directory / "memory.max").read_text().startswith("max")
    assert (directory / "cpu.max").read_text().startswith("max 100000")


@pytest.mark.parametrize(("weight", "scaled"), [(10, 1), (1000, 10000)])
def test_v2_weights_cover_the_scale(tmp_path: Path, weight: int, scaled: int) -> None:
    group, directory = _v2(tmp_path, "io.weight")
    group.set_limits(Limits(blkio_weight=weight))
    assert (directory / "io.weight").read_text() == f"default {scaled}"


@pytest.mark.parametrize(
    "limits", [Limits(memory_bytes=1 << 30), Limits(cpus_milli=500), Limits(pids=5), Limits(cpuset_cpus="0")]
)
def test_v2_a_limit_that_cannot_hold_is_refused(tmp_path: Path, limits: Limits) -> None:
    group, _ = _v2(tmp_path)
    with pytest.raises(Unsupported, match="controller"):
        group.set_limits(limits)


def test_v2_a_weight_without_support_is_a_warning(tmp_path: Path) -> None:
    group, _ = _v2(tmp_path)
    group.set_limits(Limits(blkio_weight=100))
    assert "no effect" in group.warnings[0]


def test_v2_readings(tmp_path: Path) -> None:
    group, directory = _v2(tmp_path)
    for name, text in {
        "memory.current": "1000000\n", "memory.stat": "anon 5\ninactive_file 400000\n", "memory.max": "max\n",
        "cpu.stat": "usage_usec 250\nuser_usec 1\n", "pids.current": "3\n",
        "io.stat": "8:0 rbytes=100 wbytes=20 rios=1\n8:16 rbytes=1 wbytes=2\n", "memory.events": "oom_kill 2\n",
    }.items():  # fmt: skip
        (directory / name).write_text(text)
    stats = group.stats()
    assert (stats.cpu_ns, stats.memory_bytes, stats.memory_limit_bytes, stats.pids) == (250_000, 600_000, -1, 3)
    assert (stats.block_read_bytes, stats.block_write_bytes) == (101, 22)
    assert group.oom_kills() == 2


def test_v1_limits_in_an_order_that_the_kernel_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "memory" / "nagaya" / ID
    directory.mkdir(parents=True)
    plain, swap = "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
    for name in (plain, swap):
        (directory / name).write_text("9223372036854771712")
    written: list[tuple[str, str]] = []

    def write(path: str, text: str) -> None:
        written.append((Path(path).name, text))
        Path(path).write_text(text if text != "-1" else "9223372036854771712")

    monkeypatch.setattr(files, "write", write)
    group = CgroupV1({"memory": str(tmp_path / "memory")}, ID)
    group.set_limits(Limits(memory_bytes=100 << 20))  # down from no limit: memory first, or swap would lie below it
    group.set_limits(Limits(memory_bytes=200 << 20))  # up: swap first
    group.set_limits(Limits())
    assert [name for name, _ in written] == [plain, swap, swap, plain, swap, plain]
    assert written[-1][1] == "-1"


def test_v1_a_limit_without_its_controller_is_refused(tmp_path: Path) -> None:
    for limits in (Limits(memory_bytes=1 << 30), Limits(cpus_milli=5), Limits(pids=1), Limits(cpuset_cpus="0")):
        with pytest.raises(Unsupported, match="does not have"):
            CgroupV1({}, ID).set_limits(limits)


def test_numbers() -> None:
    assert DeviceRule("c", 1, 3, "rwm").v1() == "c 1:3 rwm"
    assert DeviceRule("b", -1, -1, "m").v1() == "b *:* m"


def test_standard_devices_and_no_disk() -> None:
    rules = device_rules(())
    assert DeviceRule("c", 1, 3, "rwm") in rules
    assert not [rule for rule in rules if rule.type == "b" and set(rule.access) - {"m"}]


def _simulate(program: bytes, type_: int, access: int, major: int, minor: int) -> int:
    """A few lines of BPF: what the filter would answer."""
    from struct import iter_unpack

    code = [(op, regs & 15, regs >> 4, off, imm) for op, regs, off, imm in iter_unpack("<BBhi", program)]
    context = {0: access << 16 | type_, 4: major, 8: minor}
    registers = [0] * 11
    at = 0
    while True:
        operation, dst, src, offset, immediate = code[at]
        at += 1
        if operation == 0x61:
            registers[dst] = context[offset]
        elif operation == 0xBF:
            registers[dst] = registers[src]
        elif operation == 0xB7:
            registers[dst] = immediate
        elif operation == 0x54:
            registers[dst] &= immediate
        elif operation == 0x74:
            registers[dst] >>= immediate
        elif operation == 0x55:
            at += offset if registers[dst] != immediate else 0
        elif operation == 0x45:
            at += offset if registers[dst] & immediate else 0
        elif operation == 0x95:
            return registers[0]
        else:
            raise AssertionError(hex(operation))


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        ((2, 2, 1, 3), 1),  # read /dev/null
        ((2, 6, 1, 3), 1),
        ((2, 2, 1, 1), 0),  # /dev/mem
        ((1, 2, 8, 0), 0),  # a disk
        ((1, 1, 8, 0), 1),  # its mknod
        ((2, 2, 136, 77), 1),  # a terminal
        ((2, 2, 10, 232), 1),  # /dev/kvm, for reading only
        ((2, 6, 10, 232), 0),
    ],
)
def test_the_v2_device_filter(asked: tuple[int, int, int, int], allowed: int) -> None:
    rules = [rule.bpf() for rule in device_rules(())] + [("c", 10, 232, "r")]
    assert _simulate(bpf.device_program(rules), *asked) == allowed


def test_v2_a_group_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose own processes are in the root group: the kernel hands nothing down then."""

    def refuse(path: str, text: str) -> None:
        raise OSError(16, "Device or resource busy", path)

    (tmp_path / "cgroup.controllers").write_text("memory pids\n")
    monkeypatch.setattr(files, "write", refuse)
    with pytest.raises(HostError, match="cannot enable"):
        CgroupV2(str(tmp_path), ID).create(None)
    assert [path.name for path in tmp_path.iterdir()] == ["cgroup.controllers"]
