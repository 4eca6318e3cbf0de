"""Copying directories of the host into a machine before its program starts: where nothing can share them with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from nagaya.engines.base import Copy
from nagaya.errors import HostError, LaunchError, NagayaError
from nagaya.kernel.process import close_all_but, die_with
from nagaya.model.policy import APPLET
from nagaya.model.spec import Process
from nagaya.static import NoReturn
from nagaya.supervisor.loop import Loop
from nagaya.supervisor.programs import Program, Programs

CHUNK = 64 << 10
MOST_OUTSTANDING = 1 << 20
_MOST_TEXT = 4096


class Filling:
    """One copy after the other: a child makes the archive, the agent's `fill` unpacks it. A client of that program's."""

    def __init__(
        self,
        loop: Loop,
        programs: Programs,
        copies: tuple[Copy, ...],
        *,
        on_progress: Callable[[str, str, int, bool], None],
        on_done: Callable[[], None],
        on_failed: Callable[[NagayaError], None],
    ) -> None:
        """`on_progress(source, target, bytes, done)` is called whenever the machine has taken more of one.

        Then either of the others, once. By then `warnings` has a sentence for each copy that is not of all that was there.
        """
        self.program: Program | None = None
        self.warnings: list[str] = []
        self.wants_stdin = True
        self.congested = False
        self._loop, self._programs = loop, programs
        self._left = list(copies)
        self._on_progress, self._on_done, self._on_failed = on_progress, on_done, on_failed
        self._read = self._complaints = -1
        self._pid = 0
        self._outstanding = self._taken = 0
        self._text = b""
        self._over = False

    def begin(self) -> None:
        """Start the next copy. Raises `OSError`."""
        if not self._left:
            self._on_done()
            return
        copy = self._left[0]
        self._read, write = os.pipe2(os.O_CLOEXEC)
        self._complaints, complain = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            _make_archive(copy, write, complain, parent)
        os.close(write)
        os.close(complain)
        os.set_blocking(self._read, False)
        self._outstanding, self._taken, self._text = 0, 0, b""
        kind, mode = "dir" if copy.is_directory else "file", "ro" if copy.read_only else "rw"
        process = Process(argv=("fill", copy.target, kind, mode), stdin=True)
        program = self._programs.spawn(process, APPLET, applet=True)
        program.on_failed, program.on_exited = self._fail, self._exited
        program.join(self, stdin=True)
        self._loop.watch(self._read, self._readable)
        self._programs.flush()

    def abandon(self) -> None:
        """The machine has ended, or the copy has failed: nothing more comes of it."""
        self._over = True
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
        self._end_archive()

    def _end_archive(self) -> tuple[bool, str]:
        """Let go of the archive and its maker: whether that one was done, and what it says."""
        if not self._pid:
            return False, ""
        self._loop.forget(self._read)
        os.close(self._read)  # a maker that is not done ends by it
        _, status = os.waitpid(self._pid, 0)
        text = os.read(self._complaints, _MOST_TEXT).decode(errors="replace")
        os.close(self._complaints)
        self._pid, self._read, self._complaints = 0, -1, -1
        return status == 0, text

    # -- what a program asks of its clients

    def output(self, stream: int, data: bytes) -> None:
        """What `fill` complains about."""
        self._text = (self._text + data)[:_MOST_TEXT]

    def consumed_stdin(self, count: int) -> None:
        """The machine took some."""
        was_full = self._outstanding >= MOST_OUTSTANDING
        self._outstanding -= count
        self._taken += count
        copy = self._left[0]
        self._on_progress(copy.source, copy.target, self._taken, False)  # at most once a frame, of 64 KiB
        if self._read >= 0 and was_full and self._outstanding < MOST_OUTSTANDING:
            self._loop.watch(self._read, self._readable)

    # -- the archive

    def _readable(self, events: int) -> None:
        try:
            data = os.read(self._read, CHUNK)
        except BlockingIOError:
            return
        assert self.program is not None
        if not data:
            self._loop.forget(self._read)
            self.program.end_stdin(self)
            return
        self._outstanding += len(data)
        if self._outstanding >= MOST_OUTSTANDING:
            self._loop.forget(self._read)
        self.program.feed(self, data)

    def _exited(self, status: int) -> None:
        if self._over:
            return
        copy = self._left.pop(0)
        done, text = self._end_archive()
        if status or not done:
            said = self._text.decode(errors="replace").strip().splitlines()
            reason = ("" if done else text) or (said[-1] if said else f"status {status}")
            hint = "give it a larger --storage, or less to copy" if "No space" in reason else ""
            self._fail(LaunchError(f"cannot copy {copy.source} to {copy.target} in the machine: {reason}", hint=hint))
            return
        if text:
            self.warnings.append(f"the copy of {copy.source} at {copy.target} is not whole: {text}")
        self._on_progress(copy.source, copy.target, self._taken, True)
        try:
            self.begin()
        except OSError as error:
            self._fail(HostError.from_os(error, "cannot copy into the machine"))

    def _fail(self, problem: NagayaError) -> None:
        if not self._over:
            self.abandon()
            self._on_failed(problem)


def _make_archive(copy: Copy, write: int, complain: int, parent: int) -> NoReturn:
    """In a child: `copy.source` as a tar stream; never returns."""
    status = 1
    try:
        die_with(parent, status)
        close_all_but((write, complain))
        from nagaya.supervisor.archive import write_archive  # lazy: brings tarfile, for the child alone

        with os.fdopen(write, "wb", buffering=1 << 20) as stream:
            gone = write_archive(copy, stream)
        if gone:
            os.write(complain, gone.encode(errors="replace")[:_MOST_TEXT])
        status = 0
    except BrokenPipeError:
        pass  # the agent gave up, and says why itself
    except OSError as error:
        where = f" ({os.fsdecode(error.filename)})" if error.filename else ""
        os.write(complain, f"{error.strerror or error}{where}".encode(errors="replace"))
    except Exception as error:
        os.write(complain, str(error).encode(errors="replace")[:_MOST_TEXT])
    finally:
        os._exit(status)
