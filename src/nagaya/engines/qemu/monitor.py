"""One monitor connection: QMP over a socket pair whose other end QEMU was born with."""

from __future__ import annotations

import os
import select
import time

from nagaya.errors import RemoteError
from nagaya.protocol.qmp import Answer, Event, QmpError, QmpLink, Refusal
from nagaya.static import Any

COMMAND_TIMEOUT_S = 5.0
MAX_EVENTS = 64


class MonitorClosed(RemoteError):
    """QEMU has ended, or closed its end."""


class Monitor:
    """Blocks for answers, for as long as its timeouts allow. `fd` is a non-blocking stream socket and becomes ours."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.events: list[Event] = []  # the latest, at most MAX_EVENTS
        self._link = QmpLink()

    def negotiate(self, timeout_s: float) -> None:
        """Say that we are there. When QEMU has answered, the machine is made and its CPUs run.

        Raises `MonitorClosed` when QEMU ended before that, `RemoteError`.
        """
        self.command("qmp_capabilities", timeout_s=timeout_s)

    def command(
        self, name: str, *, timeout_s: float = COMMAND_TIMEOUT_S, descriptor: int = -1, **arguments: object
    ) -> Any:
        """Run one command; its result. Raises `QmpError` when QEMU refuses or does not answer in time.

        QEMU is given a copy of `descriptor` with it.
        """
        if descriptor >= 0:
            self._give(descriptor)
        wanted = self._link.execute(name, **arguments)
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._send()
            self._wait(deadline_s)
            for answer in self._take(self._read()):
                if answer.id != wanted:
                    continue  # to a command that was given up
                if isinstance(answer, Refusal):
                    raise answer.error()
                return answer.value

    def post(self, name: str) -> None:
        """A command whose answer nobody waits for. What QEMU does not take yet goes with the next one."""
        self._link.execute(name)
        try:
            self._send()
        except MonitorClosed:
            return

    def forget(self, name: str) -> None:
        """Drop the events of that name that have come."""
        self.events = [event for event in self.events if event.name != name]

    def await_event(self, name: str, timeout_s: float) -> Event:
        """The next event of that name, which is then dropped. Raises `QmpError` when none comes in time."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            for event in self.events:
                if event.name == name:
                    self.events = [one for one in self.events if one is not event]
                    return event
            self._wait(deadline_s)
            self._take(self._read())

    def _give(self, descriptor: int) -> None:
        """A byte that QEMU's parser skips, and a descriptor with it, for the next command's (`getfd`) use."""
        import array
        import socket  # lazy: only who saves a machine

        with socket.socket(fileno=os.dup(self.fd)) as stream:
            rights = array.array("i", [descriptor])
            stream.sendmsg([b"\n"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])

    def drain(self) -> bool:
        """Take the events that have come; False when QEMU has closed its end, or broken the protocol."""
        while True:
            try:
                data = os.read(self.fd, 65536)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            try:
                self._take(data)
            except QmpError:
                return False

    def close(self) -> None:
        os.close(self.fd)

    def _take(self, data: bytes) -> list[Answer | Refusal]:
        """Keep the events; the answers among the messages."""
        answers: list[Answer | Refusal] = []
        for message in self._link.receive(data):
            if isinstance(message, Event):
                self.events = [*self.events, message][-MAX_EVENTS:]
            elif isinstance(message, Answer | Refusal):
                answers.append(message)
        return answers

    def _send(self) -> None:
        data = self._link.outgoing()
        if data:
            try:
                self._link.sent(os.write(self.fd, data))
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError):
                raise MonitorClosed("QEMU has closed its monitor") from None

    def _wait(self, deadline_s: float) -> None:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN | (select.POLLOUT if self._link.outgoing() else 0))
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            raise QmpError("QEMU does not answer on its monitor", sent=self._link.pending())

    def _read(self) -> bytes:
        try:
            data = os.read(self.fd, 65536)
        except BlockingIOError:
            return b""
        except ConnectionResetError:
            data = b""
        if not data:
            raise MonitorClosed("QEMU has closed its monitor")
        return data
