"""What bounds a virtual machine's processes, and what becomes of that where this host cannot."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from nagaya.engines.cgroups.group import Hierarchy, find_controllers
from nagaya.engines.vm import bounds
from nagaya.engines.vm.bounds import OVERHEAD_BYTES, TRANSLATED_BYTES, Bounds, plan_bounds
from nagaya.errors import HostError, Unsupported
from nagaya.kernel.files import is_in_memory
from nagaya.model.spec import Limits, MachineSpec, Process

GIB = 1 << 30
NO_LIMITS = Limits()


def make_spec(limits: Limits = NO_LIMITS) -> MachineSpec:
    return MachineSpec(
        id="b" * 32, name="m", type="emulated", image="i", image_id="sha256:0", platform="linux/amd64",
        process=Process(("true",)), hostname="h", created_ns=0, limits=limits,
    )  # fmt: skip


class Group:
    """A control group that only notes."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.said: list[str] = []
        self.limits: list[Limits] = []

    def enter(self) -> None:
        self.said.append("enter")

    def set_limits(self, limits: Limits) -> None:
        self.limits.append(limits)

    def oom_kills(self) -> int:
        return 1

    def remove(self) -> None:
        self.said.append("remove")


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    """On a host where root makes groups, whoever runs this test."""
    made = Group()

    def create(
        machine_id: str, limits: Limits, *, devices: object, controllers: tuple[str, ...], hierarchy: Hierarchy
    ) -> Group:
        assert (
            machine_id == bounds.group_name("b" * 32, "/run/m")
            and devices is None
            and {"memory", "pids", "cpuacct"} <= set(controllers)
            and hierarchy == bounds.host_hierarchy()
        )
        made.limits.append(limits)
        return made

    monkeypatch.setattr(bounds.os, "geteuid", lambda: 0)
    monkeypatch.setattr(bounds, "create_cgroup", create)
    monkeypatch.setattr(bounds, "host_hierarchy", lambda: Hierarchy(dict.fromkeys(("memory", "pids", "cpu"), "/x"), ""))
    return made


def test_they_follow_from_the_machines_size() -> None:
    spec = make_spec(Limits(memory_bytes=64 * GIB, cpus_milli=3000))
    wanted = plan_bounds(spec, translates=False)
    assert wanted.memory_bytes == 65 * GIB + OVERHEAD_BYTES
    assert wanted.pids == 256 + 12 and wanted.cpus_milli == 0
    assert plan_bounds(spec, translates=True).memory_bytes == wanted.memory_bytes + TRANSLATED_BYTES


def test_a_part_of_a_cpu_is_the_hosts_to_ration() -> None:
    asked = Limits(cpus_milli=1500, pids=5, cpuset_cpus="0", blkio_weight=100)
    wanted = plan_bounds(make_spec(asked), translates=False)
    assert wanted.cpus_milli == 1500 and wanted.pids == 256 + 8  # those that were asked for are its programs'
    assert (wanted.cpuset_cpus, wanted.blkio_weight) == ("0", 100)


def test_a_machine_that_is_in_two_stores_has_two_groups() -> None:
    assert bounds.group_name("b" * 32, "/a/run/m") != bounds.group_name("b" * 32, "/b/run/m")


def test_the_group_goes_with_the_machine(group: Group) -> None:
    made = Bounds()
    with ExitStack() as stack:
        made.make(make_spec(), "/run/m", stack, translates=True)
        made.enter()
        assert made.oom_killed() and made.warnings == ()
    assert group.said == ["enter", "remove"] and not made.oom_killed()


def test_what_is_saved_to_memory_has_room(group: Group, tmp_path: Path) -> None:
    made = Bounds()
    disk = next((place for place in (str(tmp_path), "/var/tmp", "/") if not is_in_memory(place)), "")
    if not disk or not is_in_memory("/dev/shm"):
        pytest.skip("needs a file system on a disk, and a tmpfs at /dev/shm")
    with ExitStack() as stack:
        made.make(make_spec(), "/run/m", stack, translates=False)
        made.make_room(disk, GIB)
        assert len(group.limits) == 1
        made.make_room("/dev/shm", GIB)
        made.make_room("/dev/shm", GIB)
    first = group.limits[0].memory_bytes
    assert [each.memory_bytes - first for each in group.limits] == [0, GIB, 2 * GIB]


def test_a_plain_user_has_none(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds.os, "geteuid", lambda: 1000)
    made = Bounds()
    with ExitStack() as stack:
        made.make(make_spec(Limits(cpuset_cpus="0")), "/run/m", stack, translates=False)
        made.enter()
        made.make_room("/dev/shm", GIB)
    assert made.read_cpu_ns() == -1 and not made.oom_killed() and not group.limits and not group.said


@pytest.mark.parametrize(
    ("there", "words", "left"),
    [
        (("memory",), "controller for pids", Limits(memory_bytes=1)),
        (("pids", "cpu"), "controller for memory", Limits(pids=260)),
        ((), "controller for memory and pids", None),
    ],
)
def test_what_this_host_lacks_is_a_warning(
    group: Group, monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], words: str, left: Limits | None
) -> None:
    monkeypatch.setattr(bounds, "host_hierarchy", lambda: Hierarchy(dict.fromkeys(there, "/x"), ""))
    made = Bounds()
    with ExitStack() as stack:
        made.make(make_spec(), "/run/m", stack, translates=False)
        assert len(made.warnings) == 1 and words in made.warnings[0]
        assert [(bool(each.memory_bytes), each.pids) for each in group.limits] == (
            [(bool(left.memory_bytes), left.pids)] if left else []
        )


@pytest.mark.parametrize("asked", [Limits(cpuset_cpus="0"), Limits(cpus_milli=500), Limits(blkio_weight=10)])
def test_what_was_asked_for_is_not_left_away(group: Group, monkeypatch: pytest.MonkeyPatch, asked: Limits) -> None:
    def refuse(*_: object, **__: object) -> Group:
        raise OSError(30, os.strerror(30), "/sys/fs/cgroup/memory/nagaya")

    monkeypatch.setattr(bounds, "create_cgroup", refuse)
    with ExitStack() as stack:
        made = Bounds()
        made.make(make_spec(), "/run/m", stack, translates=False)
        assert "Read-only file system" in made.warnings[0]
        with pytest.raises(HostError):
            made.make(make_spec(asked), "/run/m", stack, translates=False)
    monkeypatch.undo()
    if os.geteuid():
        pytest.skip("needs root")
    monkeypatch.setattr(bounds, "host_hierarchy", lambda: Hierarchy({}, ""))
    monkeypatch.setattr("nagaya.engines.cgroups.group.host_hierarchy", lambda: Hierarchy({}, ""))
    with ExitStack() as stack, pytest.raises(Unsupported):
        Bounds().make(make_spec(asked), "/run/m", stack, translates=False)


def test_controllers_of_version_2_are_those_that_are_handed_out(tmp_path: Path) -> None:
    assert find_controllers(Hierarchy({}, str(tmp_path))) == frozenset()
    (tmp_path / "cgroup.controllers").write_text("cpu io memory\n")
    assert find_controllers(Hierarchy({}, str(tmp_path))) == {"cpu", "blkio", "memory"}
    assert find_controllers(Hierarchy({"memory": "/x"}, "")) == {"memory"}
