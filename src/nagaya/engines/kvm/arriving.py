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
from nagaya.errors import HostError, NagayaError, RemoteError, Unsupported, from_wire
from nagaya.kernel.files import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from nagaya.memory import PAGE_BYTES
from nagaya.migration import frames
from nagaya.migration.frames import Frame
from nagaya.migration.report import Report
from nagaya.migration.stream import Stream
from nagaya.static import Any

_SECTOR_BYTES = 512
_ZEROS = bytes(PAGE_BYTES)
_COMMIT_WITHIN_S = 60.0
_SILENCE_S = 60.0


def arrive(machine: Machine, incoming: Incoming, userfault_fd: int = -1, *, process: int = 0) -> None:
    """Fill the machine, which has been made bare, and start it when the source hands it over.

    `userfault_fd`, which becomes ours: -1 = its memory has to come first. When this raises, the machine must end: the
    source's goes on. The supervisor hears it by way of `report_fd`. `process` is killed when the machine waits for memory
    that will never come, and so cannot be told: the one that it has to itself.
    """
    report = Report(incoming.report_fd)
    try:
        arriving = Arriving(machine, incoming, report, userfault_fd, process)
        try:
            arriving.run()
        except (OSError, ValueError) as error:
            problem = HostError.from_os(error, "cannot receive the machine") if isinstance(error, OSError) else None
            raise problem or RemoteError(f"the machine in the stream makes no sense: {error}") from None
        finally:
            arriving.close()
    except NagayaError as problem:
        report.fail("failed", problem)
        raise


class Arriving:
    """One machine that comes."""

    def __init__(self, machine: Machine, incoming: Incoming, report: Report, userfault_fd: int, process: int) -> None:
        self._machine = machine
        self._report = report
        self._stream = Stream(incoming.read_fd, incoming.write_fd, alarm=incoming.report_fd, on_alarm=report.look)
        self._stream.patience_s = _SILENCE_S
        self._disk_fd, self._disk_bytes = _find_disk(machine)
        self._unsynced = False
        self._userfault_fd = userfault_fd
        self._process = process
        self._strange: list[tuple[int, int]] = []  # what the source has written since it sent it

    def run(self) -> None:
        try:
            self._stream.send_json(frames.ACCEPT, {"version": frames.VERSION})
            state = self._receive()
            self._take_programs(state["programs"])
            if self._strange:
                pager = self._start_pager()
            else:
                self._machine.adopt(state["machine"])
        except NagayaError as problem:
            self._refuse(problem)
            raise
        if self._strange:
            self._run_early(pager, state["machine"])
            return
        self._stream.send_json(frames.READY, {"ready": True})
        self._stream.expect(frames.COMMIT, patience_s=_COMMIT_WITHIN_S)
        self._settle()
        self._machine.start()
        try:
            self._stream.send_json(frames.RUNNING, {"running": True})
        except RemoteError:
            pass  # the machine is ours all the same: the source is gone, or will ask
        self._report.tell("running")

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
        self._report.fail("failed", problem)
        if self._process:
            os.kill(self._process, signal.SIGKILL)

    def close(self) -> None:
        if self._userfault_fd >= 0:
            os.close(self._userfault_fd)

    def _run_early(self, pager: Pager, state: dict[str, Any]) -> None:
        """Run before the memory is there; when it is, and only then, the machine is ours. The stream is the pager's."""
        self._machine.adopt(state)
        self._report.tell("early")
        self._answer()
        self._machine.start()
        pager.tell(RAN)
        pager.wait()
        self._report.tell("committed")
        self._answer()
        pager.finish()
        self._report.tell("running")

    def _settle(self) -> None:
        """From here on the machine is ours, by what the supervisor has written down; or it was refused meanwhile."""
        self._report.tell("committed")
        try:
            self._answer()
        except NagayaError as problem:
            self._refuse(problem)  # it need not wait: nobody runs, and it can ask
            raise

    def _take_programs(self, programs: object) -> None:
        self._report.tell("programs", programs=programs)
        self._answer()

    def _answer(self) -> None:
        answer = self._report.hear()
        if "error" in answer:
            raise from_wire(answer["error"])

    def _refuse(self, problem: NagayaError) -> None:
        try:
            self._stream.send_json(frames.REFUSE, frames.refusal(problem))
        except NagayaError:
            return  # the source is gone

    # -- what comes while the machine runs elsewhere

    def _receive(self) -> dict[str, Any]:
        """Until the state has come: that. Raises `RemoteError`, `IntegrityError`, `OSError`."""
        while True:
            frame = self._stream.receive()
            if frame.type == frames.STATE:
                self._sync()
                return _parse_state(frame)
            if frame.type == frames.ABORT:
                raise frames.parse_refusal(frame)
            self._take(frame)

    def _take(self, frame: Frame) -> None:
        if frame.type == frames.PAGES:
            memory = self._machine.memory
            frames.check_place(frame, len(frame.payload), memory.size_bytes, unit=PAGE_BYTES)
            memory.whole[frame.where : frame.where + len(frame.payload)] = frame.payload
        elif frame.type == frames.ZEROS:
            self._clear(frame)
        elif frame.type == frames.BLOCKS:
            frames.check_place(frame, len(frame.payload), self._disk_bytes, unit=_SECTOR_BYTES)
            self._write(frame)
        elif frame.type == frames.HOLE:
            count = frames.parse_length(frame)
            frames.check_place(frame, count, self._disk_bytes, unit=_SECTOR_BYTES)
            fallocate(self._disk_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, frame.where, count)
            self._unsynced = True
        elif frame.type == frames.STRANGE:
            count = frames.parse_length(frame)
            frames.check_place(frame, count, self._machine.memory.size_bytes, unit=PAGE_BYTES)
            self._strange.append((frame.where, count))
            if len(self._strange) > self._machine.memory.size_bytes // PAGE_BYTES:
                raise frames.unexpected(frame)
        elif frame.type == frames.ROUND:
            self._sync()  # now, rather than while the machine stands
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

    def _write(self, frame: Frame) -> None:
        view, at = memoryview(frame.payload), frame.where
        while view:
            written = os.pwrite(self._disk_fd, view, at)
            view, at = view[written:], at + written
        self._unsynced = True

    def _sync(self) -> None:
        if self._unsynced:
            os.fdatasync(self._disk_fd)
            self._unsynced = False


def _find_disk(machine: Machine) -> tuple[int, int]:
    """The descriptor and the size of the disk that the machine writes."""
    for device in machine.devices:
        writes = writes_of(device)
        if writes is not None:
            return device.descriptors()[0], writes.size_bytes  # type: ignore[attr-defined]
    raise HostError("the machine has no disk that it writes")


def _parse_state(frame: Frame) -> dict[str, Any]:
    """Its form; what is in it is looked at where it is used. Raises `RemoteError`."""
    state = frames.parse_json(frame)
    machine = state.get("machine")
    kinds = {"hardware": dict, "kvm": str, "cpu": str, "leaves": list, "vm": dict, "vcpus": list, "devices": list}
    if not isinstance(machine, dict) or not all(isinstance(machine.get(name), kind) for name, kind in kinds.items()):
        raise RemoteError("migration protocol: the machine's state has not got all its parts")
    if not isinstance(state.get("programs"), dict):
        raise RemoteError("migration protocol: the machine's state does not say which programs run")
    return state
