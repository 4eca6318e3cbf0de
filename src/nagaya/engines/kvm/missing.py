"""Post-copy: a machine runs on the target before all of its memory is there. docs/migration.md.

The source sends what is missing, what is asked for first. On the target a process of its own brings the pages
(userfaultfd(2)): a thread would need the interpreter, which whoever waits for a page may be holding.
"""

from __future__ import annotations

import os
import select
import sys
import time

from nagaya.errors import HostError, NagayaError, RemoteError
from nagaya.kernel import userfaultfd
from nagaya.kernel.process import die_with
from nagaya.memory import PAGE_BYTES, GuestMemory
from nagaya.migration import frames
from nagaya.migration.stream import Stream
from nagaya.static import Callable, NoReturn

_PUSH_BYTES = 64 << 10
_SILENCE_S = 10.0
"""Less than what the source waits: when the target has given up, the source may let its machine go on."""
_COMMIT_WITHIN_S = 20.0
RAN, COMMITTED, DONE = b"r", b"c", b"d"


# -- the source


def serve_missing(
    stream: Stream, whole: memoryview, runs: list[tuple[int, int]], *, on_running: Callable[[], None]
) -> None:
    """Send what is in `runs`, and what is wanted before the rest. `on_running`: the machine has begun to run there.

    Raises `RemoteError`, and what the target refuses with.
    """
    runs_there = False
    left = {
        at: min(_PUSH_BYTES, start + count - at)
        for start, count in runs
        for at in range(start, start + count, _PUSH_BYTES)
    }
    # Pieces begin where their runs do: whoever wants a page is sent the piece that has it.
    piece_of = {page: at for at, count in left.items() for page in range(at, at + count, PAGE_BYTES)}
    while left or not runs_there:
        if not left or stream.is_readable():
            frame = stream.receive()
            if frame.type == frames.RUNNING:
                runs_there = True
                on_running()
                continue
            if frame.type in (frames.REFUSE, frames.ABORT):
                raise frames.parse_refusal(frame)
            if frame.type != frames.WANT:
                raise frames.unexpected(frame)
            at = piece_of.get(frame.where, -1)
            if at not in left:
                continue  # it is on its way
        else:
            at = next(iter(left))
        count = left.pop(at)
        stream.send(frames.PAGES, at, bytes(whole[at : at + count]))


def skip_wanted(stream: Stream) -> None:
    """Until the target has it all: what it still asks for has been sent. Raises as `serve_missing`."""
    while True:
        frame = stream.receive()
        if frame.type == frames.READY:
            return
        if frame.type in (frames.REFUSE, frames.ABORT):
            raise frames.parse_refusal(frame)
        if frame.type != frames.WANT:
            raise frames.unexpected(frame)


# -- the target


class Pager:
    """The process that brings a machine's pages. `start` it before anything looks at the memory; it dies with ours."""

    def __init__(
        self, userfault_fd: int, memory: GuestMemory, runs: list[tuple[int, int]], stream: Stream, *,
        on_lost: Callable[[NagayaError], None],
    ) -> None:  # fmt: skip
        """Of `runs`, what the memory has is forgotten. Raises `OSError`.

        `on_lost` is called in that process, when the pages will never come: whoever waits for one may be holding all else.
        """
        self._fd = userfault_fd
        self._on_lost = on_lost
        self._base = memory.regions[0].hva
        self._size_bytes = memory.size_bytes
        self._stream = Stream(stream.read_fd, stream.write_fd)  # without the alarm, which stays our process's
        self._pid = 0
        self._missing = {page for start, count in runs for page in range(start, start + count, PAGE_BYTES)}
        for start, count in runs:
            memory.forget(start, count)
        userfaultfd.register(userfault_fd, self._base, self._size_bytes)
        self._reads, self._writes = os.pipe(), os.pipe()

    def start(self) -> None:
        """Fork. From here on the stream is the process's, and the descriptor: were it open here too, whoever waits for a page
        of a process that was killed would wait for ever. Raises `OSError`.
        """
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            self._run(parent)
        os.close(self._fd)
        os.close(self._reads[1])
        os.close(self._writes[0])

    def tell(self, what: bytes) -> None:
        """RAN: that the machine runs; DONE: that it is ours. A process that is gone is not told: `wait` says so."""
        try:
            os.write(self._writes[1], what)
        except BrokenPipeError:
            return

    def finish(self) -> None:
        """Let it say that the machine runs, and end. Should it be gone, the source asks."""
        self.tell(DONE)
        self._close()

    def _close(self) -> None:
        os.waitpid(self._pid, 0)
        for fd in (self._reads[0], self._writes[1]):
            os.close(fd)

    def wait(self) -> None:
        """Until all is there and the source has said COMMIT. Raises `RemoteError` when that will never be."""
        if os.read(self._reads[0], 1) != COMMITTED:
            self._close()
            raise RemoteError("the stream broke before all of the machine's memory was there")

    # -- in the process

    def _run(self, parent: int) -> NoReturn:
        try:
            die_with(parent)
            os.close(self._reads[0])
            os.close(self._writes[1])
            try:
                self._bring_all()
                self._stream.send_json(frames.READY, {"ready": True})
                self._stream.expect(frames.COMMIT, patience_s=_COMMIT_WITHIN_S)
            except NagayaError as problem:
                self._on_lost(problem)
            except OSError as problem:
                self._on_lost(HostError.from_os(problem, "cannot bring the machine's memory"))
            else:
                os.write(self._reads[1], COMMITTED)
                if os.read(self._writes[0], 1) == DONE:
                    self._stream.send_json(frames.RUNNING, {"running": True})
        except NagayaError:
            pass  # it cannot be said that the machine runs: the source asks
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(0)

    def _bring_all(self) -> None:
        """Pages that somebody waits for, and all others that are missing. Raises `NagayaError`, `OSError`."""
        poll = select.poll()
        for fd in (self._fd, self._stream.read_fd, self._writes[0]):
            poll.register(fd, select.POLLIN)
        heard_s = time.monotonic()
        ran = False
        while self._missing or not ran:
            ready = dict(poll.poll(1000))
            if self._fd in ready:
                self._answer()
            if self._stream.read_fd in ready:
                self._take()
                heard_s = time.monotonic()
            if self._writes[0] in ready and not ran:
                if os.read(self._writes[0], 1) != RAN:
                    raise RemoteError("the machine ended before all of its memory was there")
                self._stream.send_json(frames.RUNNING, {"running": True})
                poll.unregister(self._writes[0])
                ran = True
            if self._missing and time.monotonic() - heard_s > _SILENCE_S:
                raise RemoteError(f"the source has been silent for {_SILENCE_S:.0f} s")
        userfaultfd.unregister(self._fd, self._base, self._size_bytes)

    def _answer(self) -> None:
        address = userfaultfd.fault_address(self._fd)
        page = (address - self._base) // PAGE_BYTES * PAGE_BYTES
        if address < 0 or not 0 <= page < self._size_bytes:
            return
        if page in self._missing:
            self._stream.send(frames.WANT, page)
        else:  # it has been zeros so far
            userfaultfd.bring_zeros(self._fd, self._base + page, PAGE_BYTES)

    def _take(self) -> None:
        frame = self._stream.receive()
        if frame.type == frames.ABORT:
            raise frames.parse_refusal(frame)
        if frame.type != frames.PAGES:
            raise frames.unexpected(frame)
        frames.check_place(frame, len(frame.payload), self._size_bytes, unit=PAGE_BYTES)
        for at in range(0, len(frame.payload), PAGE_BYTES):
            page = frame.where + at
            if page in self._missing:  # else the machine may have written to it by now
                userfaultfd.bring(self._fd, self._base + page, frame.payload[at : at + PAGE_BYTES])
                self._missing.discard(page)
