"""A machine's handle beside a supervisor that is at its end."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nagaya.errors import Conflict
from nagaya.manager.machine import Machine
from nagaya.model.spec import MachineSpec, Process
from nagaya.model.state import EXITED, RUNNING, MachineState
from nagaya.storage import machines
from nagaya.storage.paths import Paths

SPEC = MachineSpec(
    id="a" * 32, name="m", type="container", image="i", image_id="sha256:1", platform="", process=Process(("true",)),
    hostname="m", created_ns=1,
)  # fmt: skip


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Its supervisor holds its lock, and does not listen: `test` says whether that is its end."""
    paths = Paths(str(tmp_path / "root"), str(tmp_path / "run"))
    os.makedirs(paths.machine(SPEC.id))
    os.makedirs(paths.runtime(SPEC.id))
    machines.store_spec(paths, SPEC)
    store: Any = None
    return Machine(paths, SPEC, store=store)


def test_whoever_ends_a_machine_waits_for_one_that_is_at_its_end(machine: Machine) -> None:
    """It listens no more before it lets go: the volumes that go with it may be large."""
    machines.store_state(machine.paths, SPEC.id, MachineState(phase=EXITED, started_ns=1, exit_code=0))
    supervisor = machines.liveness_lock(machine.paths, SPEC.id)
    supervisor.acquire()
    released_s: list[float] = []

    def release() -> None:
        released_s.append(time.monotonic())
        supervisor.release()

    timer = threading.Timer(0.3, release)
    timer.start()
    machine.end(keep=True)
    assert released_s and time.monotonic() >= released_s[0]
    timer.join()
    assert machine.state.phase == EXITED


def test_one_that_runs_and_does_not_answer_has_not_ended(machine: Machine) -> None:
    machines.store_state(machine.paths, SPEC.id, MachineState(phase=RUNNING, started_ns=1))
    with machines.liveness_lock(machine.paths, SPEC.id), pytest.raises(Conflict):
        machine.end(keep=True)
