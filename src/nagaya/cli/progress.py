"""How an image's arrival looks: live bars on a terminal, plain lines elsewhere, nothing with -q.

Our own hundred lines rather than a library: `rich` adds 48 ms and 10 MiB to the process that forks a supervisor, and
that supervisor keeps the memory as long as its machine lives.
"""

from __future__ import annotations

import os
import sys
import time
from _thread import allocate_lock  # not `threading`: 1 ms on every run, and only parallel downloads need the lock

from nagaya.cli.failures import printable
from nagaya.cli.human import format_size
from nagaya.static import Self

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.images.progress import Progress

INTERVAL_S = 0.1
BAR_CELLS = 24
LABEL_CELLS = 28


def open_progress(*, quiet: bool, eager: bool) -> Shown:
    """The progress for this standard error. Not `eager`: one step alone ("local image") is not worth a line."""
    if quiet:
        return Shown()
    if can_redraw():
        return Bars(eager=eager)
    return Lines(eager=eager)


class Late:
    """A progress that is there from its first news on: most starts have none, and pay for none."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._shown: Shown | None = None

    def _show(self) -> Shown:
        if self._shown is None:
            self._shown = open_progress(quiet=self._quiet, eager=True)
        return self._shown

    def step(self, text: str) -> None:
        self._show().step(text)

    def start(self, key: str, label: str, total_bytes: int) -> None:
        self._show().start(key, label, total_bytes)

    def advance(self, key: str, done_bytes: int) -> None:
        self._show().advance(key, done_bytes)

    def finish(self, key: str, note: str = "") -> None:
        self._show().finish(key, note)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if self._shown is not None:
            self._shown.close(failed=kind is not None)


def can_redraw() -> bool:
    """Whether standard error is a terminal on which a line can be drawn over."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


class Shown:
    """Shows nothing; the others build on it. A context manager: leaving it puts the terminal right."""

    def step(self, text: str) -> None:
        """Take note of what is being done, in a line's worth of words."""

    def start(self, key: str, label: str, total_bytes: int) -> None:
        """Something of `total_bytes` (0 = unknown) begins to arrive."""

    def advance(self, key: str, done_bytes: int) -> None:
        """So much of it is here by now."""

    def finish(self, key: str, note: str = "") -> None:
        """It is complete."""

    def close(self, *, failed: bool) -> None:
        """No more will come."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self.close(failed=kind is not None)


class Lines(Shown):
    """One line for each step and each thing that has arrived."""

    def __init__(self, *, eager: bool) -> None:
        self._lock = allocate_lock()
        self._eager = eager
        self._held: list[str] = []
        self._labels: dict[str, tuple[str, int]] = {}
        self._done: dict[str, int] = {}

    def step(self, text: str) -> None:
        with self._lock:
            self._say(printable(text), hold=not self._eager)

    def start(self, key: str, label: str, total_bytes: int) -> None:
        with self._lock:
            self._labels[key] = (printable(label), total_bytes)

    def advance(self, key: str, done_bytes: int) -> None:
        self._done[key] = done_bytes

    def finish(self, key: str, note: str = "") -> None:
        with self._lock:
            label, total = self._labels.pop(key, (printable(key), 0))
            done = self._done.pop(key, 0)
            self._say(_finished(label, total or done, note), hold=False)

    def close(self, *, failed: bool) -> None:
        with self._lock:
            if failed:
                self._release()

    def _say(self, line: str, *, hold: bool) -> None:
        if hold and not self._held:
            self._held.append(line)
            return
        self._eager = True
        self._release()
        write_status(line + "\n")

    def _release(self) -> None:
        for line in self._held:
            write_status(line + "\n")
        self._held.clear()


class _Bar:
    __slots__ = ("began_s", "done", "label", "total")

    def __init__(self, label: str, total: int) -> None:
        self.label = label
        self.total = total
        self.done = 0
        self.began_s = time.monotonic()


class Bars(Shown):
    """A bar for each thing on its way, redrawn in place; steps and finished things scroll up above them."""

    def __init__(self, *, eager: bool) -> None:
        self._lock = allocate_lock()
        self._eager = eager
        self._held: list[str] = []
        self._bars: dict[str, _Bar] = {}
        self._drawn_lines = 0
        self._drawn_s = 0.0
        self._color = not os.environ.get("NO_COLOR")

    def step(self, text: str) -> None:
        with self._lock:
            if not self._eager and not self._held and not self._bars:
                self._held.append(printable(text))
                return
            self._draw([printable(text)])

    def start(self, key: str, label: str, total_bytes: int) -> None:
        with self._lock:
            self._bars[key] = _Bar(printable(label), total_bytes)
            self._draw([])

    def advance(self, key: str, done_bytes: int) -> None:
        bar = self._bars.get(key)
        if bar is None:
            return
        bar.done = done_bytes
        if time.monotonic() - self._drawn_s >= INTERVAL_S:
            with self._lock:
                self._draw([])

    def finish(self, key: str, note: str = "") -> None:
        with self._lock:
            bar = self._bars.pop(key, None)
            label, size = (bar.label, bar.total or bar.done) if bar else (printable(key), 0)
            self._draw([_finished(label, size, note)])

    def close(self, *, failed: bool) -> None:
        with self._lock:
            self._bars.clear()
            if failed or self._drawn_lines:
                self._draw([])

    def _draw(self, lines: list[str]) -> None:
        """Erase the bars, write `lines` where they stay, and the bars below them."""
        lines = self._held + lines
        self._held, self._eager = [], True
        columns, rows = terminal_size()
        bars = [self._render(bar, columns) for bar in list(self._bars.values())[: max(1, rows - 2)]]
        text = f"\x1b[{self._drawn_lines}A" if self._drawn_lines else ""
        text += "\r\x1b[J" + "".join(line + "\n" for line in lines) + "".join(bar + "\n" for bar in bars)
        self._drawn_lines = len(bars)
        self._drawn_s = time.monotonic()
        write_status(text)

    def _render(self, bar: _Bar, columns: int) -> str:
        label = bar.label if len(bar.label) <= LABEL_CELLS else bar.label[: LABEL_CELLS - 1] + "…"
        seconds = time.monotonic() - bar.began_s
        rate = f"  {format_size(int(bar.done / seconds))}/s" if seconds > 0.5 and bar.done else ""
        if not bar.total:
            return f"{label:<{LABEL_CELLS}}  {format_size(bar.done):>8}{rate}"[: columns - 1]
        share = min(1.0, bar.done / bar.total)
        numbers = f"{share:4.0%}  {format_size(bar.done):>7} / {format_size(bar.total)}{rate}"
        cells = min(BAR_CELLS, columns - 1 - LABEL_CELLS - len(numbers) - 6)
        if cells < 4:
            return f"{label}  {numbers}"[: columns - 1]
        full = int(share * cells)
        done, rest = "#" * full, "-" * (cells - full)
        if self._color:
            done = f"\x1b[36m{done}\x1b[0m"
        return f"{label:<{LABEL_CELLS}}  [{done}{rest}] {numbers}"


def _finished(label: str, size: int, note: str) -> str:
    about = ", ".join(part for part in (format_size(size) if size else "", printable(note)) if part)
    return f"{label}: {about or 'done'}"


def terminal_size() -> tuple[int, int]:
    """Columns and rows of standard error's terminal."""
    try:
        size = os.get_terminal_size(2)
    except OSError:
        return 80, 24
    return size.columns or 80, size.lines or 24


def write_status(text: str) -> None:
    """To standard error, whether or not anybody is there."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        return  # nobody looks: no reason to stop the work


if TYPE_CHECKING:
    _matches: Progress = Shown()
    _matches = Late()
