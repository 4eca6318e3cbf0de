"""What both sides of a migration have in a supervisor: the stream, as a command hands it over, and the process that works on it."""

from __future__ import annotations

import os
from collections.abc import Callable

from nagaya.errors import NagayaError
from nagaya.kernel import unix
from nagaya.migration import report
from nagaya.static import Any
from nagaya.supervisor.loop import Loop
from nagaya.supervisor.stream import Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    Made = TypeVar("Made")


class Worker:
    """The process that moves a machine: it says something, and is answered."""

    def __init__(
        self,
        *,
        on_message: Callable[[dict[str, Any]], None],
        on_broken: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> None:
        """`on_broken`: what it says makes no sense. `on_lost`: it has ended, or will say nothing any more."""
        self._on_message, self._on_broken, self._on_lost = on_message, on_broken, on_lost
        self._lines = report.Lines()
        self._ours = -1
        self._stream: Stream | None = None

    def start(self, place: str, socket: str, begin: Callable[[tuple[int, int], int], Made]) -> Made:
        """Have it begin with the stream that somebody hands us at the socket of that name in `place`.

        `begin` gets the stream and the end to say things at; they are closed here afterwards. Raises what it raises, and
        `OSError`: nothing has begun then.
        """
        where = unix.connect(place, socket)
        try:
            read, write = unix.receive_fds(where, 2)
        finally:
            os.close(where)
        ours, theirs = unix.socket_pair()
        try:
            begun = begin((read, write), theirs)
        except BaseException:
            os.close(ours)
            raise
        finally:
            for fd in (read, write, theirs):
                os.close(fd)
        self._ours = ours
        return begun

    def listen(self, loop: Loop) -> None:
        """From here on what it says is heard."""
        self._stream = Stream(loop, self._ours, on_data=self._received, on_closed=self._closed)

    @property
    def is_there(self) -> bool:
        return self._stream is not None and self._stream.open

    def answer(self, what: str, **details: object) -> None:
        if self._stream is not None:
            self._stream.send(report.encode({"what": what, **details}))

    def close(self) -> None:
        """Nothing that it says is of any interest any more."""
        self._on_lost = lambda: None
        if self._stream is not None:
            self._stream.close()

    def _closed(self) -> None:
        self._on_lost()

    def _received(self, data: bytes) -> None:
        try:
            for message in self._lines.feed(data):
                self._on_message(message)
        except NagayaError:
            self._on_broken()
