"""A machine on its way to another host, from the side that it leaves: a thread of its process. docs/migration.md.

Memory and disks are copied while the machine runs, then what it has written meanwhile, until so little is left that the
machine can stand for it. The target says when it has all; the supervisor writes down that the machine is handed over, and
only then the target hears that it may run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

from nagaya.engines.kvm.machine import Machine, merge_runs, writes_of
from nagaya.engines.kvm.missing import serve_missing, skip_wanted
from nagaya.errors import Conflict
from nagaya.kernel import backing
from nagaya.kernel.light_threads import Thread
from nagaya.kernel.reflink import data_runs
from nagaya.memory import PAGE_BYTES
from nagaya.migration import frames
from nagaya.migration.departure import Departure, Pace, Terms
from nagaya.static import NamedTuple
from nagaya.virtio.console import Console

_CHUNK_BYTES = frames.DATA_BYTES
_DISK_UNIT = 64 << 10
_ADOPT_S = 0.03
_READY_WITHIN_S = 120.0


Runs = list[tuple[int, int]]
"""(offset, bytes) of each."""


class _Disk(NamedTuple):
    fd: int
    backing: int  # -1 = it stands for itself
    take: Callable[[], Runs]

    def read(self, at: int, size_bytes: int) -> bytes:
        if self.backing < 0:
            return os.pread(self.fd, size_bytes, at)
        return backing.read(self.fd, self.backing, at, at + size_bytes)

    def extents(self) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of where it has something, in whole units. Raises `OSError`."""
        size, done = os.lseek(self.fd, 0, os.SEEK_END), 0
        for start, end in (
            data_runs(self.fd, 0, size) if self.backing < 0 else backing.runs(self.fd, self.backing, 0, size)
        ):
            start = max(done, start - start % _DISK_UNIT)
            done = min(end + -end % _DISK_UNIT, size)
            if start < done:
                yield start, done - start


def start(machine: Machine, stream_fds: tuple[int, int], report_fd: int, terms: Terms) -> None:
    """Begin; the descriptors belong to the thread. Everything else is said by way of `report_fd`."""
    leaving = Leaving(machine, stream_fds, report_fd, terms)
    Thread(leaving.run)


class Leaving:
    """One migration. It ends with the machine's process, or with the machine running here as before."""

    def __init__(self, machine: Machine, stream_fds: tuple[int, int], report_fd: int, terms: Terms) -> None:
        self._machine = machine
        self._post_copy = terms.post_copy
        self._pace = Pace(terms, adopt_s=_ADOPT_S, hint="use --post-copy, or try when it is quiet")
        self._departure = Departure(stream_fds, report_fd, self._pace)
        self._stream = self._departure.stream
        self._release: Callable[[], None] | None = None
        self._paused = False
        self._disk = _find_disk(machine)

    def run(self) -> None:
        """The thread."""
        self._departure.run(self._migrate, undo=self._undo)

    def _undo(self) -> None:
        if self._release is not None:
            self._release()
        self._machine.log_writes(False)
        if self._paused:
            self._machine.resume()

    # -- copying while it runs

    def _migrate(self) -> None:
        machine, pace = self._machine, self._pace
        machine.log_writes(True)
        memory, blocks = [(start, end - start) for start, end in machine.memory.used()], list(self._disk.extents())
        while True:
            self._copy(memory, blocks, first=pace.round == 0)
            self._departure.look()
            memory, blocks = machine.take_written(), self._disk.take()
            pace.left = _total(memory) + _total(blocks)
            self._departure.tell()
            if pace.is_little(pace.left):
                post_copy = False
                break
            if pace.does_not_converge(pace.left):
                if not self._post_copy:
                    raise pace.refuse()
                post_copy = True
                break
        self._hand_over(memory, blocks, post_copy=post_copy)

    def _copy(self, memory: Runs, blocks: Runs, *, first: bool) -> None:
        """One round: send it all, and wait until the target has it."""
        began_s, began = time.monotonic(), self._stream.sent_bytes
        for start, count in memory:
            self._send_memory(start, count, first=first)
        for start, count in blocks:
            self._send_disk(start, count, first=first)
        sent, took_s = self._stream.sent_bytes - began, time.monotonic() - began_s
        self._departure.end_round()
        self._pace.measure(sent, took_s)

    def _send_memory(self, start: int, count: int, *, first: bool) -> None:
        contents = self._machine.memory.whole
        for at in range(start, start + count, _CHUNK_BYTES):
            data = bytes(contents[at : min(at + _CHUNK_BYTES, start + count)])  # a copy: the guest writes to it
            for begin, end, is_zero in _segments(data, PAGE_BYTES):
                if not is_zero:
                    self._stream.send(frames.PAGES, at + begin, memoryview(data)[begin:end])
                elif not first:  # the target's memory begins with zeros
                    self._stream.send(frames.ZEROS, at + begin, frames.LENGTH.pack(end - begin))
            self._departure.tell_sometimes()

    def _send_disk(self, start: int, count: int, *, first: bool) -> None:
        for at in range(start, start + count, _CHUNK_BYTES):
            data = self._disk.read(at, min(_CHUNK_BYTES, start + count - at))
            for begin, end, is_zero in _segments(data, _DISK_UNIT):
                if not is_zero:
                    self._stream.send(frames.BLOCKS, at + begin, memoryview(data)[begin:end])
                elif not first:
                    self._stream.send(frames.HOLE, at + begin, frames.LENGTH.pack(end - begin))
            self._departure.tell_sometimes()

    # -- handing over

    def _hand_over(self, memory: Runs, blocks: Runs, *, post_copy: bool) -> None:
        machine, departure = self._machine, self._departure
        departure.report.tell("freeze")  # the agent's stream: what is said to it from now on waits
        departure.report.hear()
        departure.steps.begin()
        machine.pause()
        self._paused = True
        self._release = machine.hold_devices()
        departure.steps.end("pause")
        waiting = b"".join(
            port.take_waiting() for device in machine.devices if isinstance(device, Console) for port in device.ports
        )
        departure.report.tell("standing", waiting=waiting.hex())
        state = machine.save_standing()
        departure.steps.end("state")
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
        programs = departure.report.hear()["programs"]
        self._stream.send_json(frames.STATE, {"machine": state, "programs": programs})
        departure.steps.end("rest")
        if post_copy:
            serve_missing(self._stream, machine.memory.whole, memory, on_running=lambda: departure.steps.end("adopt"))
            skip_wanted(self._stream)
        else:
            self._stream.expect(frames.READY, patience_s=_READY_WITHIN_S)
            departure.steps.end("adopt")
        departure.hand_over(post_copy=post_copy)


def _find_disk(machine: Machine) -> _Disk:
    """The one that the machine writes."""
    for device in machine.devices:
        writes = writes_of(device)
        if writes is not None:
            fds: tuple[int, ...] = device.descriptors()  # type: ignore[attr-defined]
            return _Disk(fds[0], fds[1] if len(fds) > 1 else -1, writes.take)
    raise Conflict("the machine has ended", state="ended", required="running")


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
