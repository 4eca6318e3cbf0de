"""A non-blocking byte stream in the loop, with a queue for what the peer does not take yet."""

from __future__ import annotations

import os
from collections.abc import Callable

from nagaya.supervisor.loop import READ, WRITE, Loop

CHUNK = 256 << 10


class Stream:
    """Owns `fd`. `on_data(bytes)`; `on_closed()` once, at end of stream or error; `on_drained()` after a flush.

    Nothing is ever written or called back from inside `__init__`. A peer that takes no more may have said something
    before it went: it is heard to its end, and what is sent to it meanwhile is dropped.
    """

    def __init__(
        self,
        loop: Loop,
        fd: int,
        *,
        on_data: Callable[[bytes], None],
        on_closed: Callable[[], None],
        on_drained: Callable[[], None] | None = None,
    ) -> None:
        self._loop = loop
        self._fd = fd
        self._on_data = on_data
        self._on_closed = on_closed
        self._on_drained = on_drained
        self._queue = bytearray()
        self._ending = False
        self._frozen = False
        self._refused = False  # the peer takes no more
        os.set_blocking(fd, False)
        loop.watch(fd, self._ready)

    @property
    def open(self) -> bool:
        return self._fd >= 0

    @property
    def queued(self) -> int:
        """Bytes that wait for the peer to read."""
        return len(self._queue)

    def send(self, data: bytes) -> None:
        """Write now what fits, queue the rest. After the end it does nothing."""
        if self._fd < 0 or self._ending or self._refused:
            return
        self._queue += data
        self._flush()

    def freeze(self) -> None:
        """Write nothing until `thaw`; what is sent meanwhile waits."""
        self._frozen = True
        if self._fd >= 0:
            self._loop.watch(self._fd, self._ready, READ)

    def waiting(self) -> bytes:
        """What waits to be written."""
        return bytes(self._queue)

    def thaw(self, first: bytes = b"") -> None:
        """Go on, with `first` before all else that waits."""
        self._frozen = False
        self._queue[:0] = first
        if self._fd >= 0:
            self._flush()

    def end(self) -> None:
        """Close once everything queued is written (or the peer is gone)."""
        self._ending = True
        if not self._queue:
            self.close()

    def close(self) -> None:
        """Close now, dropping what is queued. Calls `on_closed` the first time."""
        if self._fd < 0:
            return
        self._loop.forget(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._queue.clear()
        self._on_closed()

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if events & READ and self._fd >= 0:
            self.receive()

    def receive(self) -> None:
        """Read one chunk if there is one; also called to drain what is left before a deliberate close."""
        try:
            data = os.read(self._fd, CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._on_data(data)
        else:
            self.close()

    def _flush(self) -> None:
        if self._frozen:
            return
        while self._queue:
            try:
                with memoryview(self._queue) as view:
                    written = os.write(self._fd, view[:CHUNK])
            except BlockingIOError:
                break
            except OSError:
                self._refuse()
                return
            del self._queue[:written]
        self._loop.watch(self._fd, self._ready, READ | WRITE if self._queue else READ)
        if self._queue:
            return
        if self._ending:
            self.close()
        elif self._on_drained is not None:
            self._on_drained()

    def _refuse(self) -> None:
        """The peer is gone, but what it had said is not: closing here would lose what was typed before a detach."""
        self._refused = True
        self._queue.clear()
        if self._ending:
            self.close()
        else:
            self._loop.watch(self._fd, self._ready, READ)  # its hang-up is reported behind its last words
