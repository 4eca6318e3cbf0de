"""Outcomes by case and type: a record of runs, and the table made of it (docs/conformance.md).

    python -m tests.conformance.table RECORD... > docs/conformance.md

A record is what the suite appends to the file that NAGAYA_CONFORMANCE_RECORD names, a line for each case, so that a type on
which the whole takes an hour can be run in slices. The last line about a case and a type is the one that counts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

from nagaya.engines import TYPES as ALL

SIGNS = {"passed": "ok", "failed": "**failed**", "skipped": "skipped"}
HEAD = """# Conformance: the same cases on every type

One suite, `tests/conformance`, drives machines of each type through the library, and every type has to pass the same cases; a
case that a type cannot pass is skipped by a fact that the type states about itself (`nagaya inspect` lists them), with the
reason below. Made of real runs by `python -m tests.conformance.table`; not edited by hand.

    NAGAYA_CONFORMANCE=all NAGAYA_CONFORMANCE_RECORD=/tmp/record pytest tests/conformance
    python -m tests.conformance.table /tmp/record > docs/conformance.md
"""


class Outcome(NamedTuple):
    """What came of one case on one type. Its fields are a record's line, as JSON."""

    case: str  # "test_life: phases"
    type: str
    outcome: str  # passed | failed | skipped
    reason: str = ""  # of a skip or a failure
    seconds: float = 0.0
    revision: str = ""  # of the source that was run
    day: str = ""  # in UTC
    host: str = ""  # what it ran on


def read_records(paths: list[str]) -> list[Outcome]:
    """Every line's outcome, in order."""
    return [Outcome(**json.loads(line)) for path in paths for line in Path(path).read_text().splitlines()]


class Table:
    """The last outcome of each case and type, cases in the order in which they came first."""

    def __init__(self) -> None:
        self._outcomes: dict[str, dict[str, Outcome]] = {}

    def add(self, outcome: Outcome) -> None:
        self._outcomes.setdefault(outcome.case, {})[outcome.type] = outcome

    def all(self) -> list[Outcome]:
        return [outcome for outcomes in self._outcomes.values() for outcome in outcomes.values()]

    def types(self) -> list[str]:
        found = {outcome.type for outcome in self.all()}
        return [type_ for type_ in ALL if type_ in found]

    def of(self, type_: str) -> list[Outcome]:
        return [outcome for outcome in self.all() if outcome.type == type_]

    def reasons(self) -> dict[str, int]:
        """Why cases were skipped or failed, and how many."""
        found: dict[str, int] = {}
        for outcome in self.all():
            if outcome.outcome != "passed":
                found[outcome.reason] = found.get(outcome.reason, 0) + 1
        return found

    def totals(self) -> list[str]:
        """A line for each type, and one for each reason not to pass."""
        lines = []
        for type_ in self.types():
            found = [outcome.outcome for outcome in self.of(type_)]
            counts = [f"{found.count(outcome)} {outcome}" for outcome in SIGNS if outcome in found]
            left = len(self._outcomes) - len(found)
            lines.append(f"{type_:<10} {', '.join(counts)}" + (f", {left} not run" if left else ""))
        return lines + [f"  {count}: {reason}" for reason, count in self.reasons().items()]

    def failures(self) -> list[str]:
        """A line for each case that a type fails."""
        return [
            f"{case}: " + ", ".join(f"{type_} {outcome.outcome}" for type_, outcome in outcomes.items())
            for case, outcomes in self._outcomes.items()
            if any(outcome.outcome == "failed" for outcome in outcomes.values())
        ]

    def markdown(self) -> str:
        """The totals with where they come from, the cases, and the reasons that the cases name by number."""
        types = self.types()
        rows = [["type", "cases", *SIGNS, "run on", "source", "host"], ["---"] + ["---:"] * 4 + ["---"] * 3]
        for type_ in types:
            found = self.of(type_)
            counts = [str(sum(outcome.outcome == sign for outcome in found)) for sign in SIGNS]
            origin = [", ".join(sorted({getattr(o, name) for o in found})) for name in ("day", "revision", "host")]
            rows.append([type_, str(len(found)), *counts, *origin])
        numbers = {reason: number for number, reason in enumerate(self.reasons(), 1)}
        cases = [["case", *types], ["---"] * (len(types) + 1)]
        for case, outcomes in sorted(self._outcomes.items(), key=lambda item: item[0].partition(":")[0]):
            cases.append([case.replace("|", "\\|"), *(self._cell(outcomes.get(type_), numbers) for type_ in types)])
        text = (
            HEAD
            + "\n"
            + _lines(rows)
            + "\nSeconds are a whole case's, on a host that did other work too.\n\n"
            + _lines(cases)
        )
        return text + ("\n" if numbers else "") + "".join(f"{number}. {reason}\n" for reason, number in numbers.items())

    @staticmethod
    def _cell(outcome: Outcome | None, numbers: dict[str, int]) -> str:
        if outcome is None:
            return "not run"
        if outcome.outcome != "passed":
            return f"{SIGNS[outcome.outcome]} ({numbers[outcome.reason]})"
        return f"{SIGNS[outcome.outcome]} {outcome.seconds:.1f} s"


def _lines(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    table = Table()
    for found in read_records(sys.argv[1:]):
        table.add(found)
    sys.stdout.write(table.markdown())
