"""Copying what a machine has written into a snapshot: by a child, so that the supervisor serves its clients meanwhile.

Where blocks cannot be shared and the engine says where the disk is written, most of it is copied before the machine stands:
again and again what was written meanwhile, until that is little. What is left then takes milliseconds.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from nagaya.errors import HostError, NagayaError
from nagaya.kernel.process import close_all_but, die_with
from nagaya.static import NoReturn
from nagaya.storage import shared_disks, snapshots

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.engines.base import DiskLogging
    from nagaya.supervisor.loop import Loop

_LITTLE_BYTES = 4 << 20
_MOST_PASSES = 8
_MOST_TEXT = 4096


class Copying:
    """One child that does `work`; `on_end` hears what it complained of, "" of nothing. Raises `OSError`."""

    def __init__(self, loop: Loop, work: Callable[[], None], on_end: Callable[[str], None]) -> None:
        self._loop = loop
        self._on_end = on_end
        read, write = os.pipe2(os.O_CLOEXEC)
        self._said = read
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            _run(work, write, parent)
        os.close(write)
        self._pidfd = os.pidfd_open(self._pid)
        loop.watch(self._pidfd, self._ended)

    def _ended(self, events: int) -> None:
        self._on_end(self._reap())

    def kill(self) -> None:
        """Nobody wants it any more: nothing follows. May be called when it has ended."""
        if not self._pid:
            return
        try:
            os.killpg(self._pid, signal.SIGKILL)  # with what it has executed
        except ProcessLookupError:
            os.kill(self._pid, signal.SIGKILL)  # it has no group of its own yet
        self._reap()

    def _reap(self) -> str:
        self._loop.forget(self._pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        os.set_blocking(self._said, False)
        try:
            complaint = os.read(self._said, _MOST_TEXT).decode(errors="replace")
        except BlockingIOError:
            complaint = ""
        os.close(self._said)
        os.close(self._pidfd)
        self._pid, self._pidfd, self._said = 0, -1, -1
        return complaint or ("" if status == 0 else f"status {status}")


def _run(work: Callable[[], None], said: int, parent: int) -> NoReturn:
    """In the child; never returns."""
    status = 1
    try:
        os.setpgid(0, 0)
        die_with(parent, status)
        close_all_but((said,))
        work()
        status = 0
    except NagayaError as problem:
        os.write(said, problem.message.encode(errors="replace")[:_MOST_TEXT])
    except OSError as error:
        os.write(said, f"{error.strerror or error}".encode(errors="replace")[:_MOST_TEXT])
    except BaseException as error:
        os.write(said, repr(error).encode(errors="replace")[:_MOST_TEXT])
    finally:
        os._exit(status)


class Disks:
    """The disks of the machine in `machine_dir`, into the snapshot `place`. `on_failed` hears of what goes wrong in a child.

    `begin`, while the machine runs; `catch_up`, when its programs stand; `finish`, when it stands. Each calls what it is given
    when it is done, at once or later. They raise `OSError` and `NagayaError`.
    """

    def __init__(
        self, loop: Loop, machine_dir: str, place: str, *, log: DiskLogging | None, on_failed: Callable[[NagayaError], None]
    ) -> None:  # fmt: skip
        """`log` tells where the data disk is written; None = the machine stands for as long as copying takes."""
        self._loop = loop
        self._machine_dir, self._place = machine_dir, place
        self._log = log if log is not None and shared_disks.is_copied_slowly(machine_dir, place) else None
        self._on_failed = on_failed
        self._logging = False
        self._passes = 0
        self._copying: Copying | None = None

    def begin(self, then: Callable[[], None]) -> None:
        if self._log is None:
            then()
            return
        self._log.log_disk(True)
        self._logging = True

        def work() -> None:
            snapshots.copy_disks(self._machine_dir, self._place)
            snapshots.sync_disk(self._place)

        self._copy(work, lambda: self._again(_MOST_PASSES, then))

    def catch_up(self, then: Callable[[], None]) -> None:
        if self._log is None:
            then()
        else:
            self._again(self._passes + 1, then)  # what its kernel has just written out

    def finish(self, then: Callable[[], None]) -> None:
        if self._log is not None:
            self._again(0, then)
        elif snapshots.copy_quickly(self._machine_dir, self._place):
            then()
        else:
            self._copy(lambda: snapshots.copy_disks(self._machine_dir, self._place), then)

    def close(self) -> None:
        """May be called at any time, and again."""
        if self._copying is not None:
            self._copying.kill()
            self._copying = None
        if self._logging and self._log is not None:
            self._logging = False
            try:
                self._log.log_disk(False)
            except NagayaError:
                return  # the machine has ended

    def _again(self, most: int, then: Callable[[], None]) -> None:
        """Copy what has been written since; once more as long as that is much, and there have been fewer than `most` passes."""
        assert self._log is not None
        runs = self._log.take_disk_log()
        self._passes += 1

        def work() -> None:
            snapshots.copy_again(self._machine_dir, self._place, runs)

        if sum(size for _, size in runs) <= _LITTLE_BYTES:
            work()
            then()
        else:
            self._copy(work, then if self._passes >= most else lambda: self._again(most, then))

    def _copy(self, work: Callable[[], None], then: Callable[[], None]) -> None:
        def ended(complaint: str) -> None:
            self._copying = None
            if complaint:
                self._on_failed(HostError(f"cannot copy the machine's disks: {complaint}"))
                return
            try:
                then()
            except NagayaError as problem:
                self._on_failed(problem)
            except OSError as error:
                self._on_failed(HostError.from_os(error, "cannot copy the machine's disks"))

        self._copying = Copying(self._loop, work, ended)
