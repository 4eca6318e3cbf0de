"""A machine's process as its supervisor has it: started, asked, listened to, and reaped."""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from nagaya.engines.base import Stats
from nagaya.engines.kvm import child
from nagaya.engines.vm.bounds import Bounds
from nagaya.engines.vm.child import end
from nagaya.engines.vm.console import TextLog
from nagaya.errors import LaunchError, RemoteError, from_wire
from nagaya.kernel import unix
from nagaya.static import Any

STARTED_WITHIN_S = 30.0
ANSWER_WITHIN_S = 10.0
SAVED_WITHIN_S = 300.0  # a full memory onto a slow disk


class Vmm:
    """One run of one machine. What it says on its outputs is kept in `log_path`."""

    def __init__(self, log_path: str, local: ExitStack, bounds: Bounds) -> None:
        """`bounds` are those of its processes and its helpers'. `local` closes what is the child's once that has been started."""
        self.pid = self.pidfd = -1
        self.helpers: list[int] = []  # children of ours beside it
        self._bounds = bounds
        self._unread = b""
        self._number = 0  # of requests
        log, self.log_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        local.callback(os.close, self.log_end)
        self.log = TextLog(log, log_path)
        self._control, self.control_end = unix.socket_pair()
        local.callback(os.close, self.control_end)

    def start(self, plan: child.Plan) -> None:
        self.pid = child.start(plan)
        self.pidfd = os.pidfd_open(self.pid)

    def greet(self) -> None:
        """Until the machine runs. Raises what the child says instead, or `LaunchError` when it says nothing."""
        try:
            message = self._hear(STARTED_WITHIN_S)
        except RemoteError:
            self.log.drain()
            raise LaunchError("the machine's VMM ended before the machine ran", log_tail=self.log.tail()) from None
        if "failed" in message:
            raise from_wire(message["failed"])

    def ask(self, what: str, *, fds: tuple[int, ...] = (), **details: object) -> dict[str, Any]:
        """One request, and its answer. Raises what it answers with, or `RemoteError` when it is gone."""
        number = self._say(what, fds, details)
        deadline_s = time.monotonic() + (SAVED_WITHIN_S if fds else ANSWER_WITHIN_S)
        while True:
            message = self._hear(deadline_s - time.monotonic())
            if message.get("to", number) == number:
                break  # else it answers one that was given up
        if "error" in message:
            raise from_wire(message["error"])
        if "done" not in message:
            raise RemoteError("the machine has just ended")
        return message["done"] or {}

    def pause(self) -> None:
        """Have the machine stand. Raises as `ask`: one that did not answer in time goes on again when it can."""
        try:
            self.ask("pause")
        except RemoteError:
            self._say("resume", (), {})  # nobody would know that it stands
            raise

    def _say(self, what: str, fds: tuple[int, ...], details: dict[str, Any]) -> int:
        self._number += 1
        request = json.dumps({"do": what, "number": self._number, **details})
        try:
            unix.send_with_fds(self._control, request.encode() + b"\n", fds)
        except OSError:
            raise RemoteError("the machine's VMM has ended") from None
        return self._number

    def last_words(self) -> str:
        """Why the machine ended, in a sentence, once it has; "" when its process was killed before it could say so."""
        try:
            while True:
                message = self._hear(0)
                if "failed" in message:
                    return from_wire(message["failed"]).message
                if "ended" in message:
                    return str(message.get("reason", ""))
        except RemoteError:
            return ""

    def kill(self) -> None:
        """SIGKILL. What its guest has written is in the host's page cache by then, and stays."""
        if self.pidfd >= 0:
            try:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                return

    def read_stats(self, disks: Iterable[str], cards: Sequence[str], *, memory_bytes: int) -> Stats:
        """CPU time of all its processes and helpers, memory of the first; what its `disks` have moved, and its `cards`.

        `disks` by their devices' names, `cards` by the host's links; `memory_bytes` is what the guest has at most.
        """
        from nagaya.kernel.process import read_sharing, read_usage  # lazy: only who asks
        from nagaya.net import links

        answer = self.ask("counters")
        cpu_ns, resident_bytes = read_usage(self.pid)
        # Of those beside it, virtiofsd too, the CPU time alone: their memory is nearly all the machine's.
        counted_ns = self._bounds.read_cpu_ns()
        others = (*answer["processes"], *self.helpers)
        cpu_ns = counted_ns if counted_ns >= 0 else cpu_ns + sum(read_usage(pid)[0] for pid in others)
        counted = [answer["counters"].get(name, {}) for name in disks]
        reading = Stats(
            cpu_ns=cpu_ns, memory_bytes=resident_bytes, memory_limit_bytes=memory_bytes,
            block_read_bytes=sum(disk.get("read_bytes", 0) for disk in counted),
            block_write_bytes=sum(disk.get("written_bytes", 0) for disk in counted),
            **read_sharing((self.pid, *answer["processes"])),
        )  # fmt: skip
        if cards:  # the host's ends: what they send is what the machine receives
            sent, received = links.link_bytes(tuple(cards))
            reading = reading._replace(net_rx_bytes=sent, net_tx_bytes=received)
        return reading

    def close(self, *, reap: bool = False) -> None:
        """Give everything back. `reap`: the boot failed, and the process, should it run, is ours to end."""
        if reap and self.pid > 0:
            end(self.pid)
        for pid in self.helpers:  # each has ended when the VMM had, for nobody speaks with it any more
            end(pid)
        self.log.drain()
        self.log.close()
        for fd in (self.pidfd, self._control):
            if fd >= 0:
                os.close(fd)
        self.pid = self.pidfd = self._control = -1
        self.helpers = []

    def _hear(self, within_s: float) -> dict[str, Any]:
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        deadline_s = time.monotonic() + within_s
        while b"\n" not in self._unread:
            left_s = deadline_s - time.monotonic()
            if not poll.poll(max(0.0, left_s) * 1000):
                raise RemoteError(f"the machine's VMM did not answer within {within_s:.0f} s")
            try:
                data = os.read(self._control, 1 << 16)
            except ConnectionResetError:  # it was killed before it had read what it was asked
                data = b""
            if not data:
                raise RemoteError("the machine's VMM has ended")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message
