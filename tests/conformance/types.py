"""Which types the suite runs, which cases on each, and what became of each.

NAGAYA_CONFORMANCE names the types ("container,emulated"). Without it all three run.
NAGAYA_CONFORMANCE_RECORD names a file that outcomes are appended to (`table.py`).
"""

from __future__ import annotations

import functools
import os
import subprocess
import time

import pytest

from nagaya import Machine
from nagaya.engines import TYPES as ALL
from nagaya.engines import open_engine
from nagaya.engines.cgroups.group import Cgroup, find_cgroup
from nagaya.engines.kvm.known import find_kvm
from nagaya.engines.vm.bounds import group_name
from nagaya.errors import NagayaError
from tests.conformance.table import Outcome

CHOSEN = os.environ.get("NAGAYA_CONFORMANCE", "")
TYPES = ALL if CHOSEN in ("", "all") else tuple(CHOSEN.split(","))
PATIENCE_S = 300.0  # for what has to come in the end, on a busy host
PROPERTY = "conformance"
HERE = os.path.dirname(os.path.abspath(__file__))


def group_of(machine: Machine) -> Cgroup | None:
    """Its control group, if there is one."""
    is_container = machine.spec.type == "container"
    return find_cgroup(machine.id if is_container else group_name(machine.id, machine.runtime_dir))


@functools.cache
def find_obstacle(type_: str) -> str:
    """Why this host runs no machine of this type; "" when it does."""
    try:
        open_engine(type_).check_host()
    except NagayaError as error:
        return error.message
    return ""


def mark(items: list[pytest.Item]) -> None:
    """Note at each its case and type."""
    for item in items:
        type_ = type_of(item)
        if type_:
            item.user_properties.append((PROPERTY, (case_of(item, type_), type_)))


def type_of(item: pytest.Item) -> str:
    """The type that a case runs as; "" for one that is not about a type."""
    call = getattr(item, "callspec", None)
    return str(call.params.get("create", "")) if call is not None else ""


def case_of(item: pytest.Item, type_: str) -> str:
    """The case without its type: "test_life: restart_always_until_stopped [x]"."""
    parts = [part for part in item.callspec.id.split("-") if part != type_]  # type: ignore[attr-defined]
    name = item.originalname.removeprefix("test_")  # type: ignore[attr-defined]
    return f"{item.path.stem}: {name}" + (f" [{'-'.join(parts)}]" if parts else "")


class Reports:
    """From pytest's reports of a case's three phases to its outcome, once it is torn down."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], Outcome] = {}

    def take(self, report: pytest.TestReport) -> Outcome | None:
        """What became of the case, when this is the last report of it; None before, and for one that is not about a type."""
        case, type_ = dict(report.user_properties).get(PROPERTY, ("", ""))
        if not case:
            return None
        before = self._seen.pop((case, type_), Outcome(case, type_, "passed"))
        outcome = (
            before
            if before.outcome == "failed" or report.outcome == "passed"
            else before._replace(outcome=report.outcome)
        )
        if report.skipped and isinstance(report.longrepr, tuple):
            outcome = outcome._replace(reason=f"{type_}: {report.longrepr[2].removeprefix('Skipped: ')}")
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message.splitlines()[0] if crash is not None and crash.message else "see its output"
            outcome = outcome._replace(reason=f"{type_}: {said[:160]}")
        outcome = outcome._replace(seconds=round(before.seconds + report.duration, 2))
        if report.when == "teardown":
            return outcome
        self._seen[case, type_] = outcome
        return None


@functools.cache
def describe_run() -> dict[str, str]:
    """Where outcomes come from: the source's revision, the day, the host."""
    git = subprocess.run(
        ["git", "-C", HERE, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    try:
        kvm = f"{find_kvm().kind} KVM"
    except NagayaError:
        kvm = "no KVM"
    host = f"{os.cpu_count()} CPUs, {kvm}, Linux {os.uname().release}"
    return {"revision": git.stdout.strip() or "?", "day": time.strftime("%Y-%m-%d", time.gmtime()), "host": host}
