"""Which types the suite runs, which cases on each, and the table of case by type.

NAGAYA_CONFORMANCE names the types ("container,emulated", "all"). Without it all three run; where KVM is a software one, on
which a boot takes ten seconds and more, `kvm` then runs the cases marked `core` alone.
NAGAYA_CONFORMANCE_TABLE names a file that the whole table is written into, as Markdown.
"""

from __future__ import annotations

import functools
import os

import pytest

from nagaya.engines import TYPES as ALL
from nagaya.engines import open_engine
from nagaya.engines.kvm.known import HARDWARE, find_kvm
from nagaya.errors import NagayaError

CHOSEN = os.environ.get("NAGAYA_CONFORMANCE", "")
TYPES = ALL if CHOSEN in ("", "all") else tuple(CHOSEN.split(","))
KVM_TIMEOUT_S = 600  # of a case with several boots on a software KVM
PROPERTY = "conformance"
SIGNS = {"passed": "ok", "failed": "FAILED", "skipped": "skipped"}


@functools.cache
def find_obstacle(type_: str) -> str:
    """Why this host runs no machine of this type; "" when it does."""
    try:
        open_engine(type_).check_host()
    except NagayaError as error:
        return error.message
    return ""


def is_slow(type_: str) -> bool:
    """Whether a boot of this type takes so long that only the core cases run by default."""
    if CHOSEN or type_ != "kvm":
        return False
    try:
        return find_kvm().kind != HARDWARE
    except NagayaError:
        return False  # then every case is skipped, with that reason


def choose(items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """(those to run, those that a slow type leaves out); marks each with its case and type."""
    kept, left = [], []
    for item in items:
        type_ = type_of(item)
        if type_ == "kvm":
            item.add_marker(pytest.mark.timeout(KVM_TIMEOUT_S))
        if type_ and is_slow(type_) and item.get_closest_marker("core") is None:
            left.append(item)
            continue
        if type_:
            item.user_properties.append((PROPERTY, (case_of(item, type_), type_)))
        kept.append(item)
    return kept, left


def type_of(item: pytest.Item) -> str:
    """The type that a case runs as; "" for one that is not about a type."""
    call = getattr(item, "callspec", None)
    return str(call.params.get("create", "")) if call is not None else ""


def case_of(item: pytest.Item, type_: str) -> str:
    """The case without its type: "test_life: restart_always_until_stopped [x]"."""
    parts = [part for part in item.callspec.id.split("-") if part != type_]  # type: ignore[attr-defined]
    name = item.originalname.removeprefix("test_")  # type: ignore[attr-defined]
    return f"{item.path.stem}: {name}" + (f" [{'-'.join(parts)}]" if parts else "")


class Table:
    """Outcomes by case and type, in the order in which they come."""

    def __init__(self) -> None:
        self._outcomes: dict[str, dict[str, str]] = {}
        self._reasons: dict[str, int] = {}

    def take(self, report: pytest.TestReport) -> None:
        case, type_ = dict(report.user_properties).get(PROPERTY, ("", ""))
        if not case:
            return
        outcomes = self._outcomes.setdefault(case, {})
        if report.when == "call" or report.outcome != "passed":  # set-up and tear-down count when they do not pass
            if outcomes.get(type_) != "failed":
                outcomes[type_] = report.outcome
            if report.skipped and isinstance(report.longrepr, tuple):
                reason = f"{type_}: {report.longrepr[2].removeprefix('Skipped: ')}"
                self._reasons[reason] = self._reasons.get(reason, 0) + 1

    def types(self) -> list[str]:
        return [type_ for type_ in ALL if any(type_ in outcomes for outcomes in self._outcomes.values())]

    def totals(self) -> list[str]:
        """A line for each type, and one for each reason to skip."""
        lines = []
        for type_ in self.types():
            found = [outcomes[type_] for outcomes in self._outcomes.values() if type_ in outcomes]
            counts = [f"{found.count(outcome)} {outcome}" for outcome in SIGNS if outcome in found]
            left = len(self._outcomes) - len(found)
            lines.append(f"{type_:<10} {', '.join(counts)}" + (f", {left} not run" if left else ""))
        return lines + [f"  skipped {count} on {reason}" for reason, count in self._reasons.items()]

    def failures(self) -> list[str]:
        """A line for each case that does not come out alike."""
        return [
            f"{case}: " + ", ".join(f"{type_} {SIGNS[outcome]}" for type_, outcome in outcomes.items())
            for case, outcomes in self._outcomes.items()
            if "failed" in outcomes.values()
        ]

    def markdown(self) -> str:
        types = self.types()
        rows = [["case", *types], ["---"] * (len(types) + 1)]
        for case, outcomes in self._outcomes.items():
            rows.append([case, *(SIGNS[outcomes[type_]] if type_ in outcomes else "not run" for type_ in types)])
        return "".join(f"| {' | '.join(row)} |\n" for row in rows)
