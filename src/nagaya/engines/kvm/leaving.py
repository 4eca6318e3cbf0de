"""A machine on its way to another host, from the side that it leaves: a thread of its process. docs/migration.md.

Memory and disks are copied while the machine runs, then what it has written meanwhile, until so little is left that the
machine can stand for it. The target says when it has all; the supervisor writes down that the machine is handed over, and
only then the target hears that it may run.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from nagaya.engines.kvm.machine import Machine, merge_runs, writes_of
from nagaya.engines.kvm.missing import serve_missing, skip_wanted
from nagaya.errors import Conflict, HostError, NagayaError, RemoteError
from nagaya.memory import PAGE_BYTES
from nagaya.migration import frames
from nagaya.migration.report import Report
from nagaya.migration.stream import Stream
from nagaya.static import NamedTuple
from nagaya.virtio.console import Console

_CHUNK_BYTES = frames.DATA_BYTES
_DISK_UNIT = 64 << 10
_TELL_EVERY_S = 0.5
_MOST_ROUNDS = 60
_MOST_STALLED = 5
"""Rounds after which not less is left than before: it will not become less."""
_PROGRESS = 0.9
_ADOPT_S = 0.03
"""What the target takes to bring the machine to life, beside the last bytes' way."""
_RUNNING_WITHIN_S = 30.0
_READY_WITHIN_S = 120.0


class Terms(NamedTuple):
    """What the user wants of it."""

    max_downtime_ms: int = 100
    post_copy: bool = False


Runs = list[tuple[int, int]]
"""(offset, bytes) of each."""


class _Disk(NamedTuple):
    fd: int
    take: Callable[[], Runs]


def start(machine: Machine, stream_fds: tuple[int, int], report_fd: int, terms: Terms) -> None:
    """Begin; the descriptors belong to the thread. Everything else is said by way of `report_fd`."""
    leaving = Leaving(machine, stream_fds, report_fd, terms)
    threading.Thread(target=leaving.run, name="leaving", daemon=True).start()


class Steps:
    """Where the time goes while a machine stands: pause (its CPUs and devices), state (reading it), rest (sending that, and
    what had been left), adopt (until the target has made the machine of it), note (that it is handed over, on disk), run.
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


class Leaving:
    """One migration. It ends with the machine's process, or with the machine running here as before."""

    def __init__(self, machine: Machine, stream_fds: tuple[int, int], report_fd: int, terms: Terms) -> None:
        self._machine = machine
        self._terms = terms
        self._report = Report(report_fd)
        self._stream = Stream(*stream_fds, alarm=report_fd, on_alarm=self._report.look)
        self._fds = {*stream_fds, report_fd}
        self._release: Callable[[], None] | None = None
        self._paused = False
        self._steps = Steps()
        self._handed_over = False
        self._told_s = 0.0
        self._rate = 0.0  # bytes per second, of the last round that was worth measuring
        self._round = 0
        self._left = 0
        self._disk = _find_disk(machine)

    def run(self) -> None:
        """The thread."""
        try:
            try:
                self._migrate()
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
            self._give_up(error)
        except (OSError, NagayaError):  # the supervisor is gone, and this process with it
            return
        finally:
            for fd in self._fds:
                os.close(fd)

    # -- copying while it runs

    def _migrate(self) -> None:
        machine = self._machine
        machine.log_writes(True)
        memory, blocks = [(start, end - start) for start, end in machine.memory.used()], list(_extents(self._disk.fd))
        least, stalled = 0, 0
        while True:
            self._copy(memory, blocks, first=self._round == 0)
            self._look()
            memory, blocks = machine.take_written(), self._disk.take()
            self._left = left = _total(memory) + _total(blocks)
            self._tell()
            if self._is_little(left):
                break
            stalled = stalled + 1 if least and left >= _PROGRESS * least else 0
            least = min(least, left) if least else left
            if stalled >= _MOST_STALLED or self._round >= _MOST_ROUNDS:
                if self._terms.post_copy:
                    break
                self._say_that_it_does_not(left)
        self._hand_over(memory, blocks, post_copy=self._terms.post_copy and not self._is_little(self._left))

    def _is_little(self, left: int) -> bool:
        """Whether the machine can stand for the rest."""
        return left <= max(0.0, self._terms.max_downtime_ms / 1000 - _ADOPT_S) * self._rate

    def _say_that_it_does_not(self, left: int) -> None:
        pause_ms = 1000 * (left / self._rate + _ADOPT_S) if self._rate else 0
        raise Conflict(
            f"the migration does not converge: after {self._round} rounds {left >> 10} KiB are still to be sent again, the"
            f" stream moves {self._rate / (1 << 20):.0f} MiB/s, and the machine would stand for {pause_ms:.0f} ms",
            hint=f"let it stand that long (--max-downtime {int(pause_ms * 1.5) + 1}), use --post-copy, or try when it is quiet",
        )

    def _copy(self, memory: Runs, blocks: Runs, *, first: bool) -> None:
        """One round: send it all, and wait until the target has it."""
        began_s, began = time.monotonic(), self._stream.sent_bytes
        for start, count in memory:
            self._send_memory(start, count, first=first)
        for start, count in blocks:
            self._send_disk(start, count, first=first)
        sent, took_s = self._stream.sent_bytes - began, time.monotonic() - began_s
        self._stream.send(frames.ROUND, self._round)
        if self._stream.expect(frames.ROUND).where != self._round:  # it has written its disk by then, too
            raise RemoteError("migration protocol: the other side answered for another round")
        self._round += 1
        if sent >= _CHUNK_BYTES or not self._rate:
            self._rate = sent / max(took_s, 1e-6)

    def _send_memory(self, start: int, count: int, *, first: bool) -> None:
        contents = self._machine.memory.whole
        for at in range(start, start + count, _CHUNK_BYTES):
            data = bytes(contents[at : min(at + _CHUNK_BYTES, start + count)])  # a copy: the guest writes to it
            for begin, end, is_zero in _segments(data, PAGE_BYTES):
                if not is_zero:
                    self._stream.send(frames.PAGES, at + begin, memoryview(data)[begin:end])
                elif not first:  # the target's memory begins with zeros
                    self._stream.send(frames.ZEROS, at + begin, frames.LENGTH.pack(end - begin))
            self._tell_sometimes()

    def _send_disk(self, start: int, count: int, *, first: bool) -> None:
        for at in range(start, start + count, _CHUNK_BYTES):
            data = os.pread(self._disk.fd, min(_CHUNK_BYTES, start + count - at), at)
            for begin, end, is_zero in _segments(data, _DISK_UNIT):
                if not is_zero:
                    self._stream.send(frames.BLOCKS, at + begin, memoryview(data)[begin:end])
                elif not first:
                    self._stream.send(frames.HOLE, at + begin, frames.LENGTH.pack(end - begin))
            self._tell_sometimes()

    def _look(self) -> None:
        """Raise when the target has given up meanwhile, or nothing shall come of it."""
        if self._stream.is_readable():
            frame = self._stream.receive()
            raise (
                frames.parse_refusal(frame) if frame.type in (frames.REFUSE, frames.ABORT) else frames.unexpected(frame)
            )

    def _tell_sometimes(self) -> None:
        if time.monotonic() - self._told_s >= _TELL_EVERY_S:
            self._tell()

    def _tell(self) -> None:
        self._told_s = time.monotonic()
        self._report.tell(
            "progress", round=self._round, sent_bytes=self._stream.sent_bytes, left_bytes=self._left,
            bytes_per_s=int(self._rate),
        )  # fmt: skip

    # -- handing over

    def _hand_over(self, memory: Runs, blocks: Runs, *, post_copy: bool) -> None:
        machine = self._machine
        self._report.tell("freeze")  # the agent's stream: what is said to it from now on waits
        self._report.hear()
        self._steps.begin()
        machine.pause()
        self._paused = True
        self._release = machine.hold_devices()
        self._steps.end("pause")
        waiting = b"".join(
            port.take_waiting() for device in machine.devices if isinstance(device, Console) for port in device.ports
        )
        self._report.tell("standing", waiting=waiting.hex())
        state = machine.save_standing()
        self._steps.end("state")
        memory = merge_runs(memory + machine.take_written())
        for start, count in merge_runs(blocks + self._disk.take()):
            self._send_disk(start, count, first=False)
        post_copy = post_copy and bool(memory)
        if post_copy:
            for start, count in memory:
                self._stream.send(frames.STRANGE, start, frames.LENGTH.pack(count))
        else:
            for start, count in memory:
                self._send_memory(start, count, first=False)
        programs = self._report.hear()["programs"]
        self._stream.send_json(frames.STATE, {"machine": state, "programs": programs})
        self._steps.end("rest")
        if post_copy:
            serve_missing(self._stream, machine.memory.whole, memory, on_running=lambda: self._steps.end("adopt"))
            skip_wanted(self._stream)
        else:
            self._stream.expect(frames.READY, patience_s=_READY_WITHIN_S)
            self._steps.end("adopt")
        self._report.tell("ready")
        self._report.hear()  # that it is written down
        self._handed_over = True
        if not post_copy:
            self._steps.end("note")
        self._stream.send(frames.COMMIT)
        self._stream.expect(frames.RUNNING, patience_s=_RUNNING_WITHIN_S)
        if not post_copy:
            self._steps.end("run")
        self._report.tell(
            "gone", paused_ms=self._steps.total_ms, steps_ms=self._steps.took_ms, rounds=self._round,
            sent_bytes=self._stream.sent_bytes, post_copy=post_copy,
        )  # fmt: skip

    def _give_up(self, problem: NagayaError) -> None:
        """It goes on here, unless it may run there: then nobody but the user, or the target, can tell."""
        if self._handed_over:
            self._report.fail("doubt", problem)
            while True:
                try:
                    if self._report.hear().get("what") == "stay":
                        break
                except Conflict:
                    continue  # it is too late to call it off
        else:
            try:
                self._stream.patience_s = 1.0
                self._stream.send_json(frames.ABORT, frames.refusal(problem))
            except NagayaError:
                pass  # the other side is gone, and knows by that
        try:
            if self._release is not None:
                self._release()
            self._machine.log_writes(False)
            if self._paused:
                self._machine.resume()
        except (NagayaError, OSError, ValueError):
            pass  # it has ended: its supervisor hears of that otherwise
        self._report.fail("stayed", problem)


def _find_disk(machine: Machine) -> _Disk:
    """The one that the machine writes."""
    for device in machine.devices:
        writes = writes_of(device)
        if writes is not None:
            return _Disk(device.descriptors()[0], writes.take)  # type: ignore[attr-defined]
    raise Conflict("the machine has ended", state="ended", required="running")


def _extents(fd: int) -> Iterator[tuple[int, int]]:
    """Where a disk has something, in whole units. Raises `OSError`."""
    size = os.lseek(fd, 0, os.SEEK_END)
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # nothing but a hole follows
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        start -= start % _DISK_UNIT
        at = min(end + -end % _DISK_UNIT, size)
        yield start, at - start


def _segments(data: bytes, unit: int) -> list[tuple[int, int, bool]]:
    """(start, end, whether it is all zeros) of each run of units that are alike in that."""
    zeros = bytes(unit)
    found: list[tuple[int, int, bool]] = []
    for at in range(0, len(data), unit):
        part = data[at : at + unit]
        is_zero = part == zeros or (len(part) < unit and not any(part))
        if found and found[-1][2] == is_zero:
            found[-1] = (found[-1][0], at + len(part), is_zero)
        else:
            found.append((at, at + len(part), is_zero))
    return found


def _total(runs: list[tuple[int, int]]) -> int:
    return sum(count for _, count in runs)
