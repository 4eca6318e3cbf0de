"""The control group that all processes of a machine are in, whatever its walls are."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from nagaya import Host, Machine
from nagaya.model.spec import Limits
from tests.conformance.types import PATIENCE_S, group_of

Start = Callable[..., Machine]
WAITS = "while [ ! -e /go ]; do sleep 0.1; done; exec tail /dev/zero"


@pytest.fixture(autouse=True)
def _root() -> None:
    if os.geteuid():
        pytest.skip("needs root")


def supervisor_of(machine: Machine) -> int:
    with open(f"/proc/{machine.state.pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("PPid:"))


def test_it_goes_with_the_machine(start: Start) -> None:
    machine = start("sleep", "600")
    group = group_of(machine)
    assert group is not None and group.populated()
    reading = group.stats()
    assert reading.pids >= 1 and machine.stats().cpu_ns <= group.stats().cpu_ns
    if machine.spec.type != "container":  # a container has the limits that it was given
        assert 1 << 30 < reading.memory_limit_bytes < 4 << 30
    machine.stop(timeout_s=0)
    machine.wait()
    assert group_of(machine) is None


def test_it_goes_when_the_supervisor_was_killed(host: Host, start: Start) -> None:
    machine = start("sleep", "600")
    os.kill(supervisor_of(machine), signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while host.machines.get(machine.id).state.phase == "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert group_of(machine) is None


def test_who_takes_too_much_of_the_hosts_memory_is_ended(start: Start) -> None:
    machine = start("sh", "-c", WAITS)
    group = group_of(machine)
    assert group is not None
    group.set_limits(Limits(memory_bytes=group.stats().memory_bytes + (48 << 20)))
    machine.run(["touch", "/go"])
    assert machine.wait() == 137
    assert machine.state.oom_killed
    assert group_of(machine) is None
