"""How a long build looks: one line that is redrawn on a terminal, a line now and then elsewhere, nothing with -q."""

from __future__ import annotations

import time

from nagaya.cli.failures import printable
from nagaya.cli.progress import can_redraw, terminal_size, write_status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.kernels.build import Progress

DRAW_S = 0.1
SAY_S = 20.0
BAR_CELLS = 24


def open_build_progress(*, quiet: bool) -> Quiet:
    """The progress for this standard error."""
    if quiet:
        return Quiet()
    if can_redraw():
        return Line()
    return Lines()


class Quiet:
    """Shows nothing; the others build on it."""

    def step(self, text: str) -> None:
        """A part of the work begins."""

    def count(self, done: int, expected: int, what: str) -> None:
        """So many files of about so many are made."""

    def close(self) -> None:
        """No more will come: the line below is somebody else's."""


class Lines(Quiet):
    """A line for each part, and every twenty seconds one that says how far it is."""

    def __init__(self) -> None:
        self._said_s = time.monotonic()

    def step(self, text: str) -> None:
        self._said_s = time.monotonic()
        write_status(f"{printable(text)}\n")

    def count(self, done: int, expected: int, what: str) -> None:
        if time.monotonic() - self._said_s >= SAY_S:
            self._said_s = time.monotonic()
            write_status(f"{done} of about {expected} files\n")


class Line(Quiet):
    """A bar with the latest file, redrawn in place."""

    def __init__(self) -> None:
        self._drawn_s = 0.0
        self._open = False

    def step(self, text: str) -> None:
        self.close()
        write_status(f"{printable(text)}\n")

    def count(self, done: int, expected: int, what: str) -> None:
        now_s = time.monotonic()
        if now_s - self._drawn_s < DRAW_S and done < expected:
            return
        self._drawn_s, self._open = now_s, True
        full = BAR_CELLS * done // max(expected, 1)
        text = f"[{'#' * full}{'-' * (BAR_CELLS - full)}] {done}/{expected} {printable(what)}"
        write_status("\r\x1b[K" + text[: terminal_size()[0] - 1])

    def close(self) -> None:
        if self._open:
            self._open = False
            write_status("\r\x1b[K")


if TYPE_CHECKING:
    _matches: Progress = Quiet()
