"""The serial console of a whole machine, with the face that `programs` gives to the agent: it is the one "program".

Its output is logged and shown to whoever is attached; input is typed on it; and a signal is the power button.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

from nagaya.errors import NagayaError, Unsupported
from nagaya.model.policy import ProcessPolicy
from nagaya.model.spec import Process
from nagaya.supervisor.loop import Loop
from nagaya.supervisor.programs import Program
from nagaya.supervisor.stream import Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.storage.logs import LogWriter

MOST_QUEUED = 64 << 10  # of what is typed: a system that does not read its serial line holds it back


class _ConsoleProgram(Program):
    """A console does not wait for anybody: who reads too slowly misses what came meanwhile, and finds it in the log."""

    def output(self, stream: int, data: bytes) -> None:
        if self._log is not None:
            self._log.write(stream, data)
        for client in self.clients:
            if not client.congested:
                client.output(stream, data)


class Console:
    """See `Programs`, whose methods these are. `press` is called for a signal to the machine."""

    out_of_memory = False

    def __init__(
        self,
        loop: Loop,
        fd: int,
        *,
        press: Callable[[int], None],
        on_lost: Callable[[NagayaError | None], None],
        on_output: Callable[[bytes], None] | None = None,
    ) -> None:
        self.on_set_up: Callable[[tuple[str, ...]], None] = lambda warnings: None
        self._press = press
        self._on_lost = on_lost
        self._on_output = on_output
        self._main: Program | None = None
        self._told = False
        self._sending = False
        self._seen = 0
        self._stream = Stream(loop, fd, on_data=self._received, on_closed=self._closed, on_drained=self._drained)

    @property
    def link(self) -> Console:
        return self

    # -- what the supervisor asks of `Programs`

    def setup(self, payload: bytes, *, sent: bool = False) -> None:
        """There is nobody to set it up."""

    def set_clock(self, time_ns: int) -> None:
        """There is nobody to tell."""

    def spawn(
        self,
        process: Process,
        policy: ProcessPolicy,
        *,
        main: bool = False,
        applet: bool = False,
        discard: bool = False,
        data_disk: bool = False,
        log: LogWriter | None = None,
    ) -> Program:
        """The console itself, once. Raises `Unsupported` for any program."""
        if not main:
            raise Unsupported(
                "a whole machine runs a system of its own, in which Nagaya starts no programs",
                hint="nagaya attach MACHINE shows its serial console; nagaya ssh MACHINE logs in",
            )
        self._main = _ConsoleProgram(self, 0, wants_stdin=process.stdin, tty=process.tty, log=log)
        return self._main

    def running(self) -> list[Program]:
        return []

    def shutdown(self) -> None:
        """See `Powered`: the supervisor presses buttons instead."""

    def flush(self) -> None:
        """What there is to start has been started with the machine."""
        if self._main is not None and not self._told:
            self._told = True
            self._main.on_started(0)

    def close(self) -> None:
        """Take what the machine still said, then close."""
        before = -1
        while self._stream.open and before != self._seen:
            before = self._seen
            self._stream.receive()
        self._stream.close()

    # -- what a program asks of its link

    def grant(self, channel: int, count: int) -> None:
        """A console does not wait."""

    def send_stdin(self, channel: int, data: bytes) -> int:
        taken = data[: max(0, MOST_QUEUED - self._stream.queued)]
        if taken:
            self._sending = True  # what is written at once calls `_drained` from inside
            self._stream.send(taken)
            self._sending = False
        return len(taken)

    def close_stdin(self, channel: int) -> None:
        """A serial line has no end of input."""

    def signal(self, channel: int, number: int) -> None:
        self._press(number)

    def resize(self, channel: int, rows: int, columns: int) -> None:
        """A serial line does not tell."""

    # -- inside

    def _received(self, data: bytes) -> None:
        self._seen += len(data)
        if self._main is not None:
            self._main.output(1, data)
        if self._on_output is not None:
            self._on_output(data)

    def _drained(self) -> None:
        if self._main is not None and not self._sending:
            self._main.pump_stdin()

    def _closed(self) -> None:
        self._on_lost(None)


def is_power_button(number: int) -> bool:
    """Whether a signal means: end in good order."""
    return number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPWR)
