"""A machine on its way from another host, from the side that it comes to. docs/migration.md.

The process has given up its rights by now: what the stream says is believed in nothing, and can reach no further than the
machine's own memory, disk and state.
"""

from __future__ import annotations

import os
import signal

from nagaya.engines.base import Incoming
from nagaya.engines.kvm.machine import Machine, merge_runs, writes_of
from nagaya.engines.kvm.missing import RAN, Pager
from nagaya.errors import HostError, NagayaError, Unsupported
from nagaya.memory import PAGE_BYTES
from nagaya.migration import frames
from nagaya.migration.arrival import Arrival, ArrivingDisk, describe, parse_state
from nagaya.migration.frames import Frame
from nagaya.static import Any

_ZEROS = bytes(PAGE_BYTES)
_STATE: dict[str, type] = {
    "hardware": dict, "kvm": str, "cpu": str, "leaves": list, "vm": dict, "vcpus": list, "devices": list,
}  # fmt: skip


def arrive(machine: Machine, incoming: Incoming, userfault_fd: int = -1, *, process: int = 0) -> None:
    """Fill the machine, which has been made bare, and start it when the source hands it over.

    `userfault_fd`, which becomes ours: -1 = its memory has to come first. When this raises, the machine must end: the
    source's goes on. The supervisor hears it by way of `report_fd`. `process` is killed when the machine waits for memory
    that will never come, and so cannot be told: the one that it has to itself.
    """
    arriving = Arriving(machine, Arrival(*incoming.fds), userfault_fd, process)
    try:
        arriving.run()
    except (NagayaError, OSError, ValueError) as error:
        problem = describe(error)
        arriving.arrival.report.fail("failed", problem)
        raise problem from None
    finally:
        arriving.close()


class Arriving:
    """One machine that comes."""

    def __init__(self, machine: Machine, arrival: Arrival, userfault_fd: int, process: int) -> None:
        self.arrival = arrival
        self._machine = machine
        self._stream = arrival.stream
        self._disk = _find_disk(machine)
        self._userfault_fd = userfault_fd
        self._process = process
        self._strange: list[tuple[int, int]] = []  # what the source has written since it sent it

    def run(self) -> None:
        arrival = self.arrival
        try:
            arrival.accept()
            state = self._receive()
            arrival.take_programs(state["programs"])
            if self._strange:
                pager = self._start_pager()
            else:
                self._machine.adopt(state["machine"])
        except NagayaError as problem:
            arrival.refuse(problem)
            raise
        if self._strange:
            self._run_early(pager, state["machine"])
            return
        arrival.await_commit()
        self._machine.start()
        arrival.say_that_it_runs()

    def _start_pager(self) -> Pager:
        if self._userfault_fd < 0:
            raise Unsupported(
                "the target cannot let a machine run before its memory is there", hint="leave --post-copy away",
                finding="userfaultfd: this user may not use it",
            )  # fmt: skip
        self._machine.memory.keep_from_children()
        pager = Pager(
            self._userfault_fd, self._machine.memory, merge_runs(self._strange), self._stream, on_lost=self._lost
        )
        pager.start()
        self._userfault_fd = -1
        return pager

    def _lost(self, problem: NagayaError) -> None:
        """In the pager: no thread of the machine's process can be relied on to say it, or to end."""
        self.arrival.report.fail("failed", problem)
        if self._process:
            os.kill(self._process, signal.SIGKILL)

    def close(self) -> None:
        if self._userfault_fd >= 0:
            os.close(self._userfault_fd)

    def _run_early(self, pager: Pager, state: dict[str, Any]) -> None:
        """Run before the memory is there; when it is, and only then, the machine is ours. The stream is the pager's."""
        report = self.arrival.report
        self._machine.adopt(state)
        report.tell("early")
        self.arrival.hear()
        self._machine.start()
        pager.tell(RAN)
        pager.wait()
        report.tell("committed")
        self.arrival.hear()
        pager.finish()
        report.tell("running")

    # -- what comes while the machine runs elsewhere

    def _receive(self) -> dict[str, Any]:
        """Until the state has come: that. Raises `RemoteError`, `IntegrityError`, `OSError`."""
        while True:
            frame = self._stream.receive()
            if frame.type == frames.STATE:
                self._disk.sync()
                return parse_state(frame, _STATE)
            if frame.type == frames.ABORT:
                raise frames.parse_refusal(frame)
            if not self._disk.take(frame):
                self._take(frame)

    def _take(self, frame: Frame) -> None:
        if frame.type == frames.PAGES:
            memory = self._machine.memory
            frames.check_place(frame, len(frame.payload), memory.size_bytes, unit=PAGE_BYTES)
            memory.whole[frame.where : frame.where + len(frame.payload)] = frame.payload
        elif frame.type == frames.ZEROS:
            self._clear(frame)
        elif frame.type == frames.STRANGE:
            count = frames.parse_length(frame)
            frames.check_place(frame, count, self._machine.memory.size_bytes, unit=PAGE_BYTES)
            self._strange.append((frame.where, count))
            if len(self._strange) > self._machine.memory.size_bytes // PAGE_BYTES:
                raise frames.unexpected(frame)
        elif frame.type == frames.ROUND:
            self._disk.sync()  # now, rather than while the machine stands
            self._stream.send(frames.ROUND, frame.where)
        else:
            raise frames.unexpected(frame)

    def _clear(self, frame: Frame) -> None:
        memory, count = self._machine.memory, frames.parse_length(frame)
        frames.check_place(frame, count, memory.size_bytes, unit=PAGE_BYTES)
        contents = memory.whole
        for at in range(frame.where, frame.where + count, PAGE_BYTES):
            if contents[at : at + PAGE_BYTES].tobytes() != _ZEROS:  # else it would take a page for nothing
                contents[at : at + PAGE_BYTES] = _ZEROS


def _find_disk(machine: Machine) -> ArrivingDisk:
    """The one that the machine writes."""
    for device in machine.devices:
        writes = writes_of(device)
        if writes is not None:
            return ArrivingDisk(device.descriptors()[0], writes.size_bytes)  # type: ignore[attr-defined]
    raise HostError("the machine has no disk that it writes")
