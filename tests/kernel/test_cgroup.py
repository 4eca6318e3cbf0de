"""Control groups on this host's own hierarchy, and version 2's core files on the v2 tree that it has."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nagaya.engines.cgroups.group import Cgroup, create_cgroup, find_cgroup, host_hierarchy
from nagaya.engines.cgroups.v2 import CgroupV2
from nagaya.engines.container.devices import device_rules
from nagaya.model.spec import Device, Limits

ID = f"{os.getpid():032x}"


@pytest.fixture(autouse=True)
def _root() -> None:
    if os.geteuid():
        pytest.skip("needs root")


@pytest.fixture
def group() -> Iterator[Cgroup]:
    made = create_cgroup(ID, Limits(), devices=device_rules(()))
    yield made
    made.kill()
    made.remove()
    assert find_cgroup(ID) is None


def _enter(group: Cgroup, code: str = "") -> int:
    """A child in the group that runs `code` and then sleeps; it is in when this returns."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            group.enter()
            exec(code)
            os.write(write, b"1")
            time.sleep(60)
        finally:
            os._exit(9)
    os.close(write)
    assert os.read(read, 1) == b"1"
    os.close(read)
    return pid


def _ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_kill_takes_all_and_removal_leaves_nothing(group: Cgroup) -> None:
    pids = [_enter(group) for _ in range(5)]
    assert group.populated()
    group.kill()
    assert [_ended(pid) for pid in pids] == [-9] * 5
    assert not group.populated()


def test_a_frozen_group_stands_still_and_can_be_killed(group: Cgroup) -> None:
    pid = _enter(
        group, "import threading; threading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()"
    )
    group.freeze()
    before = group.stats().cpu_ns
    time.sleep(0.1)
    assert group.stats().cpu_ns == before
    group.thaw()
    time.sleep(0.1)
    assert group.stats().cpu_ns > before
    group.freeze()
    group.kill()
    assert _ended(pid) == -9


def test_devices_that_are_not_listed_are_denied(group: Cgroup) -> None:
    code = """
import os
os.close(os.open("/dev/null", os.O_RDWR))
try:
    os.open("/dev/fuse", os.O_RDWR)
except PermissionError:
    pass
else:
    os._exit(3)
"""
    pid = _enter(group, code)
    group.kill()
    assert _ended(pid) == -9


def test_limits_change_while_it_runs(group: Cgroup) -> None:
    pid = _enter(group)
    group.set_limits(Limits(memory_bytes=64 << 20, cpus_milli=500, pids=10, cpuset_cpus="0"))
    assert group.stats().memory_limit_bytes == 64 << 20
    assert os.sched_getaffinity(pid) == {0}
    group.set_limits(Limits(memory_bytes=128 << 20))
    assert group.stats().memory_limit_bytes == 128 << 20
    group.set_limits(Limits())
    assert group.stats().memory_limit_bytes == -1
    group.kill()
    _ended(pid)


def test_out_of_memory_is_counted(group: Cgroup) -> None:
    group.set_limits(Limits(memory_bytes=16 << 20))
    pid = os.fork()
    if pid == 0:
        group.enter()
        bytearray(64 << 20)
        os._exit(0)
    assert _ended(pid) == -9
    assert group.oom_kills() >= 1


def test_leftovers_are_found_by_id(group: Cgroup) -> None:
    pid = _enter(group)
    left = find_cgroup(ID)
    assert left is not None
    left.kill()
    assert _ended(pid) == -9


def test_version_2_freezes_kills_and_filters_devices() -> None:
    root = host_hierarchy().v2
    if not root:
        pytest.skip("needs a cgroup2 mount")
    group = CgroupV2(root, ID)
    group.create(device_rules((Device("/dev/fuse", "/dev/fuse", "r"),) if os.path.exists("/dev/fuse") else ()))
    code = """
import os
os.close(os.open("/dev/null", os.O_RDWR))
if os.path.exists("/dev/fuse"):
    os.close(os.open("/dev/fuse", os.O_RDONLY))
    try:
        os.open("/dev/fuse", os.O_RDWR)
    except PermissionError:
        pass
    else:
        os._exit(3)
"""
    try:
        pid = _enter(group, code)
        assert group.populated()
        group.freeze()
        assert "frozen 1" in Path(f"{root}/nagaya/{ID}/cgroup.events").read_text()
        group.thaw()
        group.kill()
        assert _ended(pid) == -9
    finally:
        group.remove()
    assert not os.path.exists(f"{root}/nagaya/{ID}")
