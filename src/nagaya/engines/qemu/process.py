"""One QEMU process: how it is launched, heard, asked, measured and ended, whatever machine it runs."""

from __future__ import annotations

import os
import select
import signal

from nagaya.engines.base import Stats
from nagaya.engines.qemu.inherited import Inherited
from nagaya.engines.qemu.last_words import launch_error
from nagaya.engines.qemu.measures import block_bytes
from nagaya.engines.qemu.monitor import Monitor, MonitorClosed
from nagaya.engines.vm import child
from nagaya.engines.vm.bounds import Bounds
from nagaya.engines.vm.console import TextLog
from nagaya.errors import LaunchError, RemoteError
from nagaya.kernel.process import read_sharing, read_usage
from nagaya.net import links

STARTED_WITHIN_S = 30.0  # QEMU itself, not its guest


class QemuProcess:
    """A child of the supervisor's, and the helpers beside it. Everything is closed and reaped by `clean_up`."""

    def __init__(self) -> None:
        self.pid = -1
        self.pidfd = -1
        self.memory_bytes = 0
        self.links: tuple[str, ...] = ()  # the host's ends
        self.helpers: list[int] = []  # children of ours beside QEMU
        self.bounds = Bounds()  # of all of them
        self.console: TextLog | None = None  # where nobody but a log reads it
        self._log: TextLog | None = None
        self._monitor: Monitor | None = None

    @property
    def monitor(self) -> Monitor:
        assert self._monitor is not None  # of a machine that has been launched
        return self._monitor

    @property
    def log(self) -> TextLog:
        assert self._log is not None
        return self._log

    @property
    def runs(self) -> bool:
        """Whether there is one, or was one that has not been cleaned up after."""
        return self._log is not None

    # -- its beginning

    def open_log(self, directory: str) -> int:
        """Where QEMU and its helpers write: never blocks, so what does not fit is lost."""
        log, end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._log = TextLog(log, f"{directory}/qemu.log")
        return end

    def open_monitor(self, inherited: Inherited) -> int:
        """The number that QEMU's end of its monitor will have."""
        monitor, number = inherited.connect()
        self._monitor = Monitor(monitor)
        return number

    def start(self, launch: child.Launch) -> None:
        self.pid = child.start(launch)
        self.pidfd = os.pidfd_open(self.pid)

    def greet(self) -> None:
        """Until QEMU has made the machine. Raises `LaunchError` with its last words when it ends instead."""
        try:
            self.monitor.negotiate(STARTED_WITHIN_S)
        except MonitorClosed:
            raise self.last_words("QEMU did not start the machine") from None

    def last_words(self, message: str) -> LaunchError:
        """Of one that has closed its monitor, and so ends."""
        return launch_error(self.log, message, os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOWAIT))

    # -- while it runs

    def pause(self) -> None:
        """Have the CPUs stand. Raises `RemoteError`: a QEMU that did not answer in time has them go on again when it can."""
        try:
            self.monitor.command("stop")
        except RemoteError:
            self.monitor.post("cont")  # nobody would know that they stand
            raise

    def stats(self) -> Stats:
        """CPU time of QEMU's process and its helpers, memory of the first; counters of the guest's devices."""
        cpu_ns, resident_bytes = read_usage(self.pid)
        counted_ns = self.bounds.read_cpu_ns()
        cpu_ns = counted_ns if counted_ns >= 0 else cpu_ns + sum(read_usage(pid)[0] for pid in self.helpers)
        reading = Stats(
            cpu_ns=cpu_ns, memory_bytes=resident_bytes, memory_limit_bytes=self.memory_bytes, **read_sharing((self.pid,))
        )  # fmt: skip
        read, written = block_bytes(self.monitor.command("query-blockstats", query_nodes=False))
        reading = reading._replace(block_read_bytes=read, block_write_bytes=written)
        if self.links:  # what they send is what the machine receives
            sent, received = links.link_bytes(self.links)
            reading = reading._replace(net_rx_bytes=sent, net_tx_bytes=received)
        return reading

    def listen(self, ends_within_s: float) -> None:
        """Take what the console, QEMU and its monitor have said. A QEMU that closes one of them is ending, and has that
        long for it; or it has been taken over, and is not to live on.
        """
        for source in self.sources():
            if not source.drain() and not self._ends_within(ends_within_s):
                self.signal(signal.SIGKILL)

    def _ends_within(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def sources(self) -> list[TextLog | Monitor]:
        return [source for source in (self.console, self._log, self._monitor) if source is not None]

    # -- its end

    def explain_end(self, ended: os.waitid_result | None) -> LaunchError | None:
        """Why it ended, where that is not what somebody wanted."""
        if not self.runs or ended is None:
            return None
        if (ended.si_code, ended.si_status) in ((os.CLD_EXITED, 0), (os.CLD_KILLED, signal.SIGKILL)):
            return None
        how = "ended with status" if ended.si_code == os.CLD_EXITED else "was killed by signal"
        return launch_error(self.log, f"QEMU {how} {ended.si_status}", ended)

    def signal(self, number: signal.Signals) -> None:
        if self.pidfd >= 0:
            try:
                signal.pidfd_send_signal(self.pidfd, number)
            except ProcessLookupError:
                return

    def abandon(self) -> None:
        """A boot that failed: nothing runs on."""
        if self.pid > 0:
            child.end(self.pid)
        self.clean_up()

    def clean_up(self) -> None:
        """Behind its end."""
        for source in self.sources():
            source.drain()
            source.close()
        self.console = self._log = self._monitor = None
        if self.pidfd >= 0:
            os.close(self.pidfd)
        self.pid = self.pidfd = -1
        for pid in self.helpers:  # each has ended when QEMU had, for nobody speaks with it any more
            child.end(pid)
        self.helpers = []
