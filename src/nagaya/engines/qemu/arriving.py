"""An emulated machine on its way from another host, from the side that it comes to: QEMU's own migration, out of our stream.

A process of its own, with the rights of the machine's QEMU: what the stream says of the disk it writes there, and what QEMU's
own bytes are it hands on to that. docs/migration.md.
"""

from __future__ import annotations

import os
import select
import time

from nagaya.engines.base import Incoming
from nagaya.engines.qemu.monitor import Monitor, MonitorClosed
from nagaya.errors import NagayaError, RemoteError
from nagaya.migration import frames
from nagaya.migration.arrival import Arrival, ArrivingDisk, describe, parse_state
from nagaya.migration.frames import Frame
from nagaya.static import Any

_STREAM = "stream"
_GREETED_WITHIN_S = 10.0
_LOADED_WITHIN_S = 60.0
_TAKEN_WITHIN_S = 60.0


def arrive(incoming: Incoming, monitor_fd: int, disk_fd: int) -> None:
    """Fill the machine, whose QEMU waits for it, and let it run when the source hands it over.

    The supervisor hears of all by `incoming.report_fd`, and ends the machine when it fails.
    """
    arriving = Arriving(Arrival(*incoming.fds), Monitor(monitor_fd), disk_fd)
    try:
        arriving.run()
    except (NagayaError, OSError, ValueError) as error:
        arriving.arrival.report.fail("failed", describe(error))


class Arriving:
    """One machine that comes."""

    def __init__(self, arrival: Arrival, monitor: Monitor, disk_fd: int) -> None:
        self.arrival = arrival
        self._stream = arrival.stream
        self._monitor = monitor
        self._disk = ArrivingDisk(disk_fd, os.fstat(disk_fd).st_size)
        self._pipe = -1
        self._at = 0

    def run(self) -> None:
        arrival = self.arrival
        try:
            self._open()
            arrival.accept()
            state = self._receive()
            self._await_loaded()
            arrival.take_programs(state["programs"])
        except NagayaError as error:
            problem = RemoteError("QEMU has ended on the target") if isinstance(error, MonitorClosed) else error
            arrival.refuse(problem)
            raise problem from None
        arrival.await_commit()
        self._monitor.command("cont")
        arrival.say_that_it_runs()

    def _open(self) -> None:
        """Have QEMU read from a pipe of ours."""
        monitor = self._monitor
        monitor.negotiate(_GREETED_WITHIN_S)
        monitor.command("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        reads, self._pipe = os.pipe()
        try:
            monitor.command("getfd", fdname=_STREAM, descriptor=reads)
        finally:
            os.close(reads)
        os.set_blocking(self._pipe, False)
        monitor.command("migrate-incoming", uri=f"fd:{_STREAM}")

    def _receive(self) -> dict[str, Any]:
        """Until the state has come, which QEMU has read all of its own by then: that."""
        while True:
            frame = self._stream.receive()
            if frame.type == frames.STATE:
                self._disk.sync()
                return parse_state(frame, {})
            if frame.type == frames.ABORT:
                raise frames.parse_refusal(frame)
            if frame.type == frames.ENGINE:
                self._hand_on(frame)
            elif frame.type == frames.ROUND:
                self._disk.sync()  # now, rather than while the machine stands
                self._stream.send(frames.ROUND, frame.where)
            elif not self._disk.take(frame):
                raise frames.unexpected(frame)

    def _hand_on(self, frame: Frame) -> None:
        if frame.where != self._at:
            raise RemoteError("migration protocol: the machine's memory comes in another order")
        self._at += len(frame.payload)
        view = memoryview(frame.payload)
        deadline_s = time.monotonic() + _TAKEN_WITHIN_S
        poll = select.poll()
        poll.register(self._pipe, select.POLLOUT)
        while view:
            try:
                view = view[os.write(self._pipe, view) :]
            except BlockingIOError:
                if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
                    raise RemoteError("QEMU does not take the machine's memory") from None
            except BrokenPipeError:
                self._await_loaded()  # which says why not
                raise RemoteError("QEMU takes no more of the machine's memory") from None

    def _await_loaded(self) -> None:
        """Until QEMU has made the machine of it. Raises `RemoteError` with what it says instead."""
        monitor = self._monitor
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        while (status := monitor.await_event("MIGRATION", _LOADED_WITHIN_S).data.get("status")) != "completed":
            if status == "failed":
                told = monitor.command("query-migrate")
                why = told.get("error-desc", "") if isinstance(told, dict) else ""
                raise RemoteError(
                    f"QEMU cannot go on with the machine that came: {why or 'it does not say why; its log may'}"
                )
