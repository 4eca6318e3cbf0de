"""What every engine's migrations have in common at the target: what is said to whom, and when, and the machine's disk.

docs/migration.md has the order of it; supervisor/arriving.py the words of the report.
"""

from __future__ import annotations

import os

from nagaya.errors import HostError, NagayaError, RemoteError, from_wire
from nagaya.kernel.files import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from nagaya.migration import frames
from nagaya.migration.frames import Frame
from nagaya.migration.report import Report
from nagaya.migration.stream import Stream
from nagaya.static import Any

_SECTOR_BYTES = 512
_COMMIT_WITHIN_S = 60.0
_SILENCE_S = 60.0


class Arrival:
    """One machine that comes. The descriptors are the caller's."""

    def __init__(self, read_fd: int, write_fd: int, report_fd: int) -> None:
        self.report = Report(report_fd)
        self.stream = Stream(read_fd, write_fd, alarm=report_fd, on_alarm=self.report.look)
        self.stream.patience_s = _SILENCE_S

    def accept(self) -> None:
        self.stream.send_json(frames.ACCEPT, {"version": frames.VERSION})

    def take_programs(self, programs: object) -> None:
        """Have the supervisor look at which programs run. Raises what it answers with."""
        self.report.tell("programs", programs=programs)
        self.hear()

    def hear(self) -> None:
        """The supervisor's answer. Raises what it refuses with."""
        answer = self.report.hear()
        if "error" in answer:
            raise from_wire(answer["error"])

    def refuse(self, problem: NagayaError) -> None:
        """Tell the source why not."""
        try:
            self.stream.send_json(frames.REFUSE, frames.refusal(problem))
        except NagayaError:
            return  # it is gone

    def await_commit(self) -> None:
        """All is there: until the source hands the machine over, and it is ours by what the supervisor has written down.

        Raises what it was refused with meanwhile, and `RemoteError`.
        """
        self.stream.send_json(frames.READY, {"ready": True})
        self.stream.expect(frames.COMMIT, patience_s=_COMMIT_WITHIN_S)
        self.report.tell("committed")
        try:
            self.hear()
        except NagayaError as problem:
            self.refuse(problem)  # it need not wait: nobody runs, and it can ask
            raise

    def say_that_it_runs(self) -> None:
        try:
            self.stream.send_json(frames.RUNNING, {"running": True})
        except RemoteError:
            pass  # the machine is ours all the same: the source is gone, or will ask
        self.report.tell("running")


class ArrivingDisk:
    """A disk that is filled by frames, each checked. The descriptor is the caller's."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd, self._size_bytes = fd, size_bytes
        self._unsynced = False

    def take(self, frame: Frame) -> bool:
        """Do what a frame says; False for one that is about something else. Raises `RemoteError`, `OSError`."""
        if frame.type == frames.BLOCKS:
            frames.check_place(frame, len(frame.payload), self._size_bytes, unit=_SECTOR_BYTES)
            view, at = memoryview(frame.payload), frame.where
            while view:
                written = os.pwrite(self._fd, view, at)
                view, at = view[written:], at + written
        elif frame.type == frames.HOLE:
            count = frames.parse_length(frame)
            frames.check_place(frame, count, self._size_bytes, unit=_SECTOR_BYTES)
            fallocate(self._fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, frame.where, count)
        else:
            return False
        self._unsynced = True
        return True

    def sync(self) -> None:
        if self._unsynced:
            os.fdatasync(self._fd)
            self._unsynced = False


def describe(problem: Exception) -> NagayaError:
    """What to say of it."""
    if isinstance(problem, NagayaError):
        return problem
    if isinstance(problem, OSError):
        return HostError.from_os(problem, "cannot receive the machine")
    return RemoteError(f"the machine in the stream makes no sense: {problem}")


def parse_state(frame: Frame, kinds: dict[str, type]) -> dict[str, Any]:
    """The form of STATE; what is in it is looked at where it is used. Raises `RemoteError`."""
    state = frames.parse_json(frame)
    machine = state.get("machine")
    if not isinstance(machine, dict) or not all(isinstance(machine.get(name), kind) for name, kind in kinds.items()):
        raise RemoteError("migration protocol: the machine's state has not got all its parts")
    if not isinstance(state.get("programs"), dict):
        raise RemoteError("migration protocol: the machine's state does not say which programs run")
    return state
