"""Timing whole commands, in turns, so that a machine's moods hit all of them alike."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

NAGAYA = os.path.join(os.path.dirname(sys.executable), "nagaya")


class Sample(NamedTuple):
    """Milliseconds of one contestant's rounds."""

    name: str
    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile."""
        low, _, high = statistics.quantiles(self.rounds, n=4)
        return low, high


class Check(NamedTuple):
    """One of the issue's promises."""

    text: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit


def time_command(argv: Sequence[str], *, status: int = 0) -> float:
    """Milliseconds of one run. Raises `RuntimeError` with its output when it ends with any other status."""
    began = time.perf_counter()
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    took = (time.perf_counter() - began) * 1e3
    if done.returncode != status:
        raise RuntimeError(f"{' '.join(argv)}: status {done.returncode}: {done.stderr.decode(errors='replace')[-500:]}")
    return took


def take_turns(contestants: dict[str, Callable[[], float]], *, rounds: int, warm_up: int = 2) -> list[Sample]:
    """Every contestant once a round, beginning with another one each time."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds + warm_up):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            took = contestants[name]()
            if number >= warm_up:
                times[name].append(took)
    return [Sample(name, tuple(times[name])) for name in names]


def command(argv: Sequence[str], *, status: int = 0) -> Callable[[], float]:
    return lambda: time_command(argv, status=status)


def report(title: str, samples: list[Sample], checks: list[Check]) -> bool:
    """Print a table (Markdown) and the promises; whether all were kept."""
    print(f"\n### {title}\n\n| what | median ms | quartiles | of the first |\n|---|---:|---:|---:|")
    for sample in samples:
        low, high = sample.spread
        ratio = sample.median / samples[0].median
        print(f"| {sample.name} | {sample.median:.1f} | {low:.1f} to {high:.1f} | {ratio:.2f}x |")
    print()
    for check in checks:
        print(f"- {'PASS' if check.passed else 'FAIL'}: {check.text}: {check.value:.2f} (at most {check.limit:g})")
    sys.stdout.flush()
    return all(check.passed for check in checks)
