"""An emulated machine on its way to another host, from the side that it leaves: QEMU's own migration, in our stream.

QEMU writes the disk to an NBD server (`mirror.py`) while the machine runs, and memory and devices into a pipe while it stands;
a thread each makes frames of it. This one tells QEMU what to do, by a monitor of its own. docs/migration.md.

Memory is not copied before that: with QEMU 7.2's log of what a translated guest writes, machines stopped working after 3 to 16
moves (tasks that the guest's kernel had lost). With none, none of 40 in a row did.
"""

from __future__ import annotations

import fcntl
import os
import select
import threading
import time
from collections.abc import Callable

from nagaya.engines.qemu.mirror import MirrorServer
from nagaya.engines.qemu.monitor import Monitor, MonitorClosed
from nagaya.errors import Conflict, NagayaError, RemoteError
from nagaya.kernel import unix
from nagaya.migration import frames
from nagaya.migration.departure import Departure, Pace, Terms
from nagaya.migration.stream import Stream
from nagaya.protocol.qmp import QmpError
from nagaya.static import Any, NamedTuple

DISK, MIRROR, STREAM = "data", "mirror", "stream"
_ADOPT_S = 0.02
_READY_WITHIN_S = 120.0
_LOOK_EVERY_S, _SOON_S = 0.05, 0.002
_GREETED_WITHIN_S = 10.0
_MIRRORED_WITHIN_S = 24 * 3600.0  # of a disk of any size, as long as something moves
_ENDED_WITHIN_S = 120.0
_REST_WITHIN_S = 5.0
_RECOVERED_WITHIN_S = 10.0
_FASTEST = 1 << 40  # bytes a second
_SIOCOUTQ = 0x5411  # linux include/uapi/asm-generic/ioctls.h, TIOCOUTQ: of a Unix socket, what its peer has not read


class Ends(NamedTuple):
    """What the process keeps of its supervisor's descriptors. `agent` is our end of the agent's stream, to look at."""

    read: int
    write: int
    report: int
    monitor: int
    agent: int


class Leaving:
    """One migration, in a process of its own."""

    def __init__(self, ends: Ends, disk_bytes: int, terms: Terms) -> None:
        self._ends, self._disk_bytes = ends, disk_bytes
        self._max_downtime_s = terms.max_downtime_ms / 1000
        self._pace = Pace(terms, adopt_s=_ADOPT_S, hint="or try when it is quiet")
        self._feed = _Feed(ends.read, ends.write)
        self._departure = Departure(
            (ends.read, ends.write), ends.report, self._pace, also_sent=lambda: self._feed.stream.sent_bytes
        )
        self._stream = self._departure.stream
        self._monitor = Monitor(ends.monitor)

    def run(self) -> None:
        self._departure.run(self._migrate, undo=lambda: None)  # the supervisor undoes it, for a dead one too

    def _migrate(self) -> None:
        try:
            self._monitor.negotiate(_GREETED_WITHIN_S)
            self._copy_disk()
            self._hand_over()
        except MonitorClosed:
            raise Conflict("the machine ended while it was being migrated") from None

    # -- while it runs

    def _copy_disk(self) -> None:
        """All of it; from here on what the guest writes is written there, too, before it is told so."""
        monitor = self._monitor
        ours, theirs = unix.socket_pair()
        try:
            monitor.command("getfd", fdname=MIRROR, descriptor=theirs)
        finally:
            os.close(theirs)
        self._feed.start("disk", lambda: MirrorServer(ours, self._disk_bytes, self._feed.stream).serve(), ours)
        monitor.command(
            "blockdev-add",
            timeout_s=_GREETED_WITHIN_S,
            driver="nbd",
            node_name=MIRROR,
            server={"type": "fd", "str": MIRROR},
        )
        monitor.command(
            "blockdev-mirror", job_id=MIRROR, device=DISK, target=MIRROR, sync="full", copy_mode="write-blocking",
            on_source_error="report", on_target_error="report",
        )  # fmt: skip
        self._wait(lambda: self._find_event("BLOCK_JOB_READY"), _MIRRORED_WITHIN_S)
        self._end_round()

    # -- handing over

    def _hand_over(self) -> None:
        departure, monitor = self._departure, self._monitor
        departure.report.tell("freeze")  # what is said to the agent from now on waits; the rest has to get there
        departure.report.hear()
        deadline_s = time.monotonic() + _REST_WITHIN_S
        while self._unread_by_agent():
            if time.monotonic() > deadline_s:
                raise Conflict(
                    "the machine's agent does not read what it has been told", hint="try again when it is quiet"
                )
            self._rest(_SOON_S)
        departure.steps.begin()
        began_s = time.monotonic()
        monitor.command("stop")
        departure.steps.end("pause")
        monitor.command("block-job-cancel", device=MIRROR)  # which is the end of one that is ready
        self._wait(lambda: self._find_event("BLOCK_JOB_COMPLETED"), _ENDED_WITHIN_S, every_s=_SOON_S)
        monitor.command("blockdev-del", node_name=MIRROR)
        departure.steps.end("disk")
        self._send_memory(began_s)
        departure.report.tell("standing", waiting="")
        programs = departure.report.hear()["programs"]
        self._stream.send_json(frames.STATE, {"machine": {}, "programs": programs})
        departure.steps.end("rest")
        self._stream.expect(frames.READY, patience_s=_READY_WITHIN_S)
        departure.steps.end("adopt")
        departure.hand_over()

    def _send_memory(self, began_s: float) -> None:
        """Memory and devices of a machine that stands since then; for as long as it may, and no longer."""
        monitor, pace = self._monitor, self._pace
        reads, writes = os.pipe()
        try:
            monitor.command("getfd", fdname=STREAM, descriptor=writes)
        finally:
            os.close(writes)
        sent, sending_s = self._feed.stream.sent_bytes, time.monotonic()
        self._feed.start("memory", lambda: self._carry(reads), reads)
        monitor.command("migrate-set-parameters", max_bandwidth=_FASTEST)
        monitor.command("migrate", uri=f"fd:{STREAM}")
        while (told := self._query()).get("status") != "completed":
            pace.left = int(told.get("ram", {}).get("remaining", 0))
            pace.measure(self._feed.stream.sent_bytes - sent, time.monotonic() - sending_s)
            stood_s = time.monotonic() - began_s
            if stood_s + _ADOPT_S > self._max_downtime_s and pace.rate:
                needs_ms = 1000 * (stood_s + pace.left / pace.rate + _ADOPT_S)
                raise Conflict(
                    f"the machine cannot be sent in the time that it may stand: {pace.left >> 10} KiB of its memory were left, the"
                    f" stream moves {pace.rate / (1 << 20):.0f} MiB/s, and it would stand for {needs_ms:.0f} ms",
                    hint=f"let it stand that long (--max-downtime {int(needs_ms * 1.5) + 1}): an emulated machine's memory is sent"
                    " while it stands",
                )
            self._departure.tell_sometimes()
            self._rest(_SOON_S)
        pace.round += 1
        self._feed.join()

    def _carry(self, pipe: int) -> None:
        """QEMU's bytes, as they come."""
        at = 0
        while data := os.read(pipe, frames.DATA_BYTES):
            self._feed.stream.send(frames.ENGINE, at, data)
            at += len(data)

    def _query(self) -> dict[str, Any]:
        told = self._monitor.command("query-migrate")
        if not isinstance(told, dict) or told.get("status") in ("failed", "cancelled", "cancelling"):
            why = told.get("error-desc") if isinstance(told, dict) else ""
            raise RemoteError(f"QEMU does not migrate the machine: {why or 'it does not say why'}")
        return told

    def _unread_by_agent(self) -> bool:
        count = bytearray(4)
        fcntl.ioctl(self._ends.agent, _SIOCOUTQ, count)
        return any(count)

    def _end_round(self) -> None:
        self._feed.pause()
        try:
            self._departure.end_round()
        finally:
            self._feed.resume()

    # -- waiting

    def _wait(self, condition: Callable[[], object], timeout_s: float, *, every_s: float = _LOOK_EVERY_S) -> None:
        """Raises what makes it senseless to wait, and `RemoteError` after all that time."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline_s:
                raise RemoteError(f"QEMU did not get on with the migration within {timeout_s:.0f} s")
            self._rest(every_s)

    def _rest(self, seconds: float = _LOOK_EVERY_S) -> None:
        """Until something happens, and so long at most. Raises when nothing shall come of it, or the copying has failed."""
        poll = select.poll()
        for fd in (self._ends.report, self._ends.monitor, self._ends.read):
            poll.register(fd, select.POLLIN)
        ready = dict(poll.poll(seconds * 1000))
        if self._ends.report in ready:
            self._departure.report.look()
        if self._ends.read in ready:
            self._departure.look()
        if self._ends.monitor in ready and not self._monitor.drain():
            raise Conflict("the machine ended while it was being migrated")
        self._feed.check()
        failed = self._find_event("BLOCK_JOB_COMPLETED")
        if failed is not None and failed.get("error"):
            raise RemoteError(f"QEMU does not copy the machine's disk: {failed['error']}")

    def _find_event(self, name: str) -> dict[str, Any] | None:
        """Of the disk's copying."""
        for event in self._monitor.events:
            if event.name == name and event.data.get("device") == MIRROR:
                return event.data
        return None


class _Feed:
    """Threads that send: memory and the disk at once, a frame at a time."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.stream = _Locked(read_fd, write_fd)
        self._threads: list[threading.Thread] = []
        self._problem: NagayaError | None = None

    @property
    def sent_bytes(self) -> int:
        return self.stream.sent_bytes

    def start(self, name: str, work: Callable[[], None], fd: int) -> None:
        """`fd` is closed behind it: QEMU hears then that nobody takes any more."""

        def run() -> None:
            try:
                work()
            except NagayaError as problem:
                self._problem = self._problem or problem
            except OSError as problem:
                self._problem = self._problem or RemoteError(f"QEMU's {name} cannot be read: {problem.strerror}")
            finally:
                os.close(fd)

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def check(self) -> None:
        """Raise what one of them has met."""
        if self._problem is not None:
            raise self._problem

    def pause(self) -> None:
        self.stream.lock.acquire()

    def resume(self) -> None:
        self.stream.lock.release()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()
        self.check()


class _Locked(Stream):
    """A stream that several threads send by."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        super().__init__(read_fd, write_fd)
        self.lock = threading.Lock()

    def send(self, type_: int, where: int = 0, payload: bytes | memoryview = b"") -> None:
        with self.lock:
            super().send(type_, where, payload)


def recover(monitor: Monitor) -> None:
    """Let a machine go on whose migration has failed, wherever that was. Raises `RemoteError` when QEMU is gone."""
    _try(monitor, "migrate_cancel")
    _try(monitor, "block-job-cancel", device=MIRROR, force=True)
    deadline_s = time.monotonic() + _RECOVERED_WITHIN_S
    while time.monotonic() < deadline_s:
        status = monitor.command("query-migrate").get("status", "none")
        if status in ("none", "completed", "failed", "cancelled") and not monitor.command("query-block-jobs"):
            break
        time.sleep(0.01)
    _try(monitor, "blockdev-del", node_name=MIRROR)
    if monitor.command("query-status").get("status") != "running":
        monitor.command("cont")


def _try(monitor: Monitor, command: str, **arguments: Any) -> None:
    """What there may be nothing for to do."""
    try:
        monitor.command(command, **arguments)
    except QmpError:
        return
