"""What every engine's migrations have in common at the source: how their pace is judged, what is said to whom, and when.

docs/migration.md has the order of it; supervisor/leaving.py the words of the report.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from nagaya.errors import Conflict, HostError, NagayaError, RemoteError
from nagaya.migration import frames
from nagaya.migration.report import Report
from nagaya.migration.stream import Stream
from nagaya.static import NamedTuple

_WORTH_MEASURING_BYTES = 1 << 20
_TELL_EVERY_S = 0.5
_MOST_ROUNDS = 60
_MOST_STALLED = 5
"""Rounds after which not less is left than before: it will not become less."""
_PROGRESS = 0.9
_RUNNING_WITHIN_S = 30.0


class Terms(NamedTuple):
    """What the user wants of it."""

    max_downtime_ms: int = 100
    post_copy: bool = False


class Steps:
    """Where the time goes while a machine stands: pause (its CPUs and devices), state (reading it), rest (sending that, and
    what had been left; of an emulated machine disk, the end of its copying, in place of state), adopt (until the target has made the machine of it), note (that it is handed over, on disk), run.
    """

    def __init__(self) -> None:
        self.took_ms: dict[str, float] = {}
        self._since_s = 0.0

    def begin(self) -> None:
        self._since_s = time.monotonic()

    def end(self, name: str) -> None:
        now_s = time.monotonic()
        self.took_ms[name] = round(1000 * (now_s - self._since_s), 1)
        self._since_s = now_s

    @property
    def total_ms(self) -> float:
        return round(sum(self.took_ms.values()), 1)


class Pace:
    """Whether what is left can be sent while the machine stands, and whether it ever will."""

    def __init__(self, terms: Terms, *, adopt_s: float, hint: str) -> None:
        """`adopt_s` is what the target takes to bring the machine to life, beside the last bytes' way."""
        self.rate = 0.0  # bytes per second, of the last time that was worth measuring
        self.round = 0
        self.left = 0
        self._terms, self._adopt_s, self._hint = terms, adopt_s, hint
        self._least, self._stalled = 0, 0

    def measure(self, sent_bytes: int, took_s: float) -> None:
        if sent_bytes >= _WORTH_MEASURING_BYTES or not self.rate:
            self.rate = sent_bytes / max(took_s, 1e-6)

    def is_little(self, left: int) -> bool:
        """Whether the machine can stand for so much."""
        return left <= max(0.0, self._terms.max_downtime_ms / 1000 - self._adopt_s) * self.rate

    def does_not_converge(self, left: int) -> bool:
        """After a round that has left so much."""
        self._stalled = self._stalled + 1 if self._least and left >= _PROGRESS * self._least else 0
        self._least = min(self._least, left) if self._least else left
        return self._stalled >= _MOST_STALLED or self.round >= _MOST_ROUNDS

    def refuse(self) -> Conflict:
        pause_ms = 1000 * (self.left / self.rate + self._adopt_s) if self.rate else 0
        return Conflict(
            f"the migration does not converge: after {self.round} rounds {self.left >> 10} KiB are still to be sent again,"
            f" the stream moves {self.rate / (1 << 20):.0f} MiB/s, and the machine would stand for {pause_ms:.0f} ms",
            hint=f"let it stand that long (--max-downtime {int(pause_ms * 1.5) + 1}), {self._hint}",
        )


class Departure:
    """One migration. It ends with the machine gone, or running here as before."""

    def __init__(
        self, stream_fds: tuple[int, int], report_fd: int, pace: Pace, *, also_sent: Callable[[], int] = lambda: 0
    ) -> None:
        """The descriptors become its own, until `run` ends. `also_sent`: bytes that others send by the same stream."""
        self.pace = pace
        self.steps = Steps()
        self.report = Report(report_fd)
        self.stream = Stream(*stream_fds, alarm=report_fd, on_alarm=self.report.look)
        self._also_sent = also_sent
        self._fds = {*stream_fds, report_fd}
        self._handed_over = False
        self._told_s = 0.0

    def run(self, migrate: Callable[[], None], *, undo: Callable[[], None]) -> None:
        """Do it, and say how it ends; `undo` lets the machine go on here."""
        try:
            try:
                migrate()
                return
            except NagayaError as problem:
                error = problem
            except OSError as problem:
                error = HostError.from_os(problem, "cannot migrate the machine")
            except ValueError:  # its memory is released: it has ended
                error = Conflict("the machine ended while it was being migrated")
            except BaseException:
                sys.excepthook(*sys.exc_info())
                error = HostError("the migration met a defect of Nagaya's own", hint="the VMM's log has it")
            self._give_up(error, undo)
        except (OSError, NagayaError):  # the supervisor is gone, and this process with it
            return
        finally:
            for fd in self._fds:
                os.close(fd)

    # -- while the machine runs

    def look(self) -> None:
        """Raise when the target has given up meanwhile, or nothing shall come of it."""
        if self.stream.is_readable():
            frame = self.stream.receive()
            raise (
                frames.parse_refusal(frame) if frame.type in (frames.REFUSE, frames.ABORT) else frames.unexpected(frame)
            )

    def end_round(self) -> None:
        """Wait until the target has all that was sent, and has written its disk."""
        self.stream.send(frames.ROUND, self.pace.round)
        if self.stream.expect(frames.ROUND).where != self.pace.round:
            raise RemoteError("migration protocol: the other side answered for another round")
        self.pace.round += 1

    @property
    def sent_bytes(self) -> int:
        return self.stream.sent_bytes + self._also_sent()

    def tell_sometimes(self) -> None:
        if time.monotonic() - self._told_s >= _TELL_EVERY_S:
            self.tell()

    def tell(self) -> None:
        self._told_s = time.monotonic()
        self.report.tell(
            "progress", round=self.pace.round, sent_bytes=self.sent_bytes, left_bytes=self.pace.left,
            bytes_per_s=int(self.pace.rate),
        )  # fmt: skip

    # -- at its end

    def hand_over(self, *, post_copy: bool = False) -> None:
        """The target is ready for it: from here on it may run there. `post_copy`: it does already."""
        self.report.tell("ready")
        self.report.hear()  # that it is written down
        self._handed_over = True
        if not post_copy:
            self.steps.end("note")
        self.stream.send(frames.COMMIT)
        self.stream.expect(frames.RUNNING, patience_s=_RUNNING_WITHIN_S)
        if not post_copy:
            self.steps.end("run")
        self.report.tell(
            "gone", paused_ms=self.steps.total_ms, steps_ms=self.steps.took_ms, rounds=self.pace.round,
            sent_bytes=self.sent_bytes, post_copy=post_copy,
        )  # fmt: skip

    def _give_up(self, problem: NagayaError, undo: Callable[[], None]) -> None:
        """It goes on here, unless it may run there: then nobody but the user, or the target, can tell."""
        if self._handed_over:
            self.report.fail("doubt", problem)
            while True:
                try:
                    if self.report.hear().get("what") == "stay":
                        break
                except Conflict:
                    continue  # it is too late to call it off
        else:
            try:
                self.stream.patience_s = 1.0
                self.stream.send_json(frames.ABORT, frames.refusal(problem))
            except NagayaError:
                pass  # the other side is gone, and knows by that
        try:
            undo()
        except (NagayaError, OSError, ValueError):
            pass  # it has ended: its supervisor hears of that otherwise
        self.report.fail("stayed", problem)
