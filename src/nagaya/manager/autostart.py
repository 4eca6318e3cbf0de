"""Machines that start with the host, in their order, and end in good order with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from itertools import groupby

from nagaya.errors import NagayaError, NotFound
from nagaya.manager.machine import Machine
from nagaya.model.spec import Autostart
from nagaya.model.state import ALIVE
from nagaya.storage import machines

MOST_ORDER = 1_000_000
Failed = Callable[[Machine, NagayaError], None]


def settle(machine: Machine, autostart: Autostart | None) -> None:
    """Whether, and when, the machine starts with the host."""
    with machine.lock():
        machine.reload()
        machine.spec = machine.spec._replace(autostart=autostart)
        machines.store_spec(machine.paths, machine.spec)
    machine.record("update")


def in_order(all_: Iterable[Machine]) -> list[Machine]:
    """Those that start with the host, the first one first."""
    found = [machine for machine in all_ if machine.spec.autostart is not None]
    return sorted(found, key=lambda machine: (_order(machine), machine.spec.created_ns))


def start_all(all_: Iterable[Machine], failed: Failed) -> list[Machine]:
    """Start those that do not run; answers them. One that cannot be started does not keep the others from it."""
    started = []
    for machine in in_order(all_):
        assert machine.spec.autostart is not None
        try:
            if machine.state.phase in ALIVE:
                continue
            time.sleep(machine.spec.autostart.delay_s)
            machine.start()
            started.append(machine)
        except NagayaError as problem:
            failed(machine, problem)
    return started


def stop_all(all_: Iterable[Machine], timeout_s: float, failed: Failed) -> list[Machine]:
    """Stop all that run, in reverse; answers them. Those of one order at the same time, and those without any first.

    Each has its own time for that, but no more than is left of `timeout_s` for all: what runs then is switched off.
    """
    deadline_s = time.monotonic() + timeout_s
    running = [machine for machine in all_ if _runs(machine)]
    stopped: list[Machine] = []

    def stop(machine: Machine) -> None:
        left_s = max(0.0, deadline_s - time.monotonic())
        try:
            machine.stop(timeout_s=min(machine.spec.stop_timeout_s, left_s))
            stopped.append(machine)
        except NotFound:
            stopped.append(machine)  # it was created with --rm
        except NagayaError as problem:
            failed(machine, problem)

    running.sort(key=lambda machine: -_order(machine))
    for _, group in groupby(running, key=_order):
        threads = [threading.Thread(target=stop, args=(machine,)) for machine in group]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return stopped


def _order(machine: Machine) -> int:
    return machine.spec.autostart.order if machine.spec.autostart is not None else MOST_ORDER + 1


def _runs(machine: Machine) -> bool:
    try:
        return machine.state.phase in ALIVE
    except NagayaError:
        return False
