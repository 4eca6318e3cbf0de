"""A machine with thin walls for the agent's tests: new PID and mount namespaces, the host's files, the real agent."""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest

from nagaya.kernel import mount, namespaces
from nagaya.model.policy import ProcessPolicy
from nagaya.model.spec import Process
from nagaya.protocol.agent import AgentLink, Event, Exited, Hello, Output, SpawnFailed, Started

ALL_CAPABILITIES = (1 << 64) - 1
LAX = ProcessPolicy(capabilities=ALL_CAPABILITIES, no_new_privileges=False)
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TIMEOUT_S = 20.0


class Result(NamedTuple):
    status: int
    out: bytes
    err: bytes
    failed: SpawnFailed | None = None


class Lost(Exception):
    """The agent has closed its stream."""


class Host:
    """The host's end of one agent's stream."""

    def __init__(self, stream: socket.socket) -> None:
        self.link = AgentLink()
        self.grants = True  # whether output is consumed at once
        self.events: list[Event] = []
        self._socket = stream
        self._socket.setblocking(False)

    # -- moving bytes

    def step(self, timeout_s: float = TIMEOUT_S) -> list[Event]:
        """Write what waits, read once; the new events. Raises `Lost` at the end of the stream, `TimeoutError`."""
        while data := self.link.outgoing():
            try:
                self.link.sent(self._socket.send(data))
            except BlockingIOError:
                break
        events = select.POLLIN | (select.POLLOUT if self.link.outgoing() else 0)
        poll = select.poll()
        poll.register(self._socket, events)
        if not poll.poll(timeout_s * 1000):
            raise TimeoutError("the agent says nothing")
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            data = b""
        if not data:
            raise Lost
        new = self.link.receive(data)
        for event in new:
            if isinstance(event, Output) and self.grants:
                self.link.grant(event.channel, len(event.data))
        self.events += new
        return new

    def wait_for(self, found: Callable[[Event], bool], timeout_s: float = TIMEOUT_S) -> Event:
        """The first event, old or new, that `found` accepts."""
        deadline = time.monotonic() + timeout_s
        at = 0
        while True:
            for event in self.events[at:]:
                at += 1
                if found(event):
                    return event
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("the agent does not answer")
            self.step(left)

    def quiet(self, seconds: float) -> bool:
        """Whether the agent says nothing for so long."""
        try:
            while True:
                if self.step(seconds):
                    return False
        except TimeoutError:
            return True

    def send_raw(self, data: bytes) -> None:
        self._socket.setblocking(True)
        self._socket.sendall(data)
        self._socket.setblocking(False)

    # -- programs

    def spawn(self, *argv: str, policy: ProcessPolicy = LAX, main: bool = False, applet: bool = False,
              discard: bool = False, data_disk: bool = False, env: tuple[str, ...] = (PATH,),
              **process: object) -> int:  # fmt: skip
        wanted = Process(argv=argv, env=env)._replace(**process)  # type: ignore[arg-type]
        return self.link.spawn(wanted, policy, main=main, applet=applet, discard=discard, data_disk=data_disk)

    def output(self, channel: int, stream: int = 1) -> bytes:
        return b"".join(
            e.data for e in self.events if isinstance(e, Output) and e.channel == channel and e.stream == stream
        )

    def wait_output(self, channel: int, text: bytes, timeout_s: float = TIMEOUT_S) -> None:
        self.wait_for(lambda event: text in self.output(channel), timeout_s)

    def started(self, channel: int) -> int:
        event = self.wait_for(lambda e: isinstance(e, (Started, SpawnFailed)) and e.channel == channel)
        assert isinstance(event, Started), event
        return event.pid

    def finish(self, channel: int, *, stdin: bytes = b"", timeout_s: float = TIMEOUT_S) -> Result:
        """Feed `stdin` and its end, and wait for the program's."""
        deadline = time.monotonic() + timeout_s
        at = 0
        while True:
            for event in self.events[at:]:
                at += 1
                if isinstance(event, (Exited, SpawnFailed)) and event.channel == channel:
                    failed = event if isinstance(event, SpawnFailed) else None
                    return Result(event.status, self.output(channel), self.output(channel, 2), failed)
            stdin = stdin[self.link.send_stdin(channel, stdin) :] if stdin else stdin
            if not stdin:
                self.link.close_stdin(channel)
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("the program does not end")
            self.step(left)

    def run(self, *argv: str, stdin: bytes | None = None, timeout_s: float = TIMEOUT_S, **options: object) -> Result:
        """Start a program and see it through."""
        channel = self.spawn(*argv, stdin=stdin is not None, **options)  # type: ignore[arg-type]
        return self.finish(channel, stdin=stdin or b"", timeout_s=timeout_s)


class Machine(Host):
    """The host's end. `binds` are (source, target) files to show in the machine, for example its own /etc/passwd.

    `enter` runs in the new mount namespace, before anything is executed: it may change the root.
    """

    def __init__(
        self,
        agent: str,
        *,
        init: bool = True,
        binds: tuple[tuple[str, str], ...] = (),
        enter: Callable[[], None] = lambda: None,
    ) -> None:
        ours, theirs = socket.socketpair()
        super().__init__(ours)
        self._outer = os.fork()
        if self._outer == 0:
            try:
                self._socket.close()
                _outer(agent, theirs.detach(), init=init, binds=binds, enter=enter)
            except BaseException as error:
                os.write(2, f"agent_machine: {error!r}\n".encode())
            finally:
                os._exit(99)
        theirs.close()
        self.pidfd = os.pidfd_open(self._outer)

    def __enter__(self) -> Machine:
        self.wait_for(lambda event: isinstance(event, Hello))
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> int:
        """Hang up; answers the wait status of the machine, which must end by itself."""
        self._socket.close()
        if self._outer < 0:
            return 0
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        ended = bool(poll.poll(TIMEOUT_S * 1000))
        if not ended:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        _, status = os.waitpid(self._outer, 0)
        os.close(self.pidfd)
        self._outer = -1
        assert ended, "the agent did not end the machine when its stream ended"
        return status

    @property
    def agent_pid(self) -> int:
        """The agent as the host sees it (it is the outer process's only child)."""
        with open(f"/proc/{self._outer}/task/{self._outer}/children") as file:
            return int(file.read().split()[0])

    def kill_agent(self) -> None:
        os.kill(
            self.agent_pid, signal.SIGKILL
        )  # our own grandchild, which its parent has not reaped: it cannot be another


def _outer(agent: str, fd: int, *, init: bool, binds: tuple[tuple[str, str], ...], enter: Callable[[], None]) -> None:
    """In the forked child: the namespaces, then PID 1, then wait for it (or, without init, become the agent)."""
    os.setsid()
    namespaces.unshare(namespaces.CLONE_NEWNS | namespaces.CLONE_NEWPID)
    mount.mount("", "/", "", mount.MS_PRIVATE | mount.MS_REC)
    for source, target in binds:
        mount.mount(source, target, "", mount.MS_BIND)
    program = fcntl.fcntl(os.open(agent, os.O_RDONLY), fcntl.F_DUPFD_CLOEXEC, 40)  # above what dup2 overwrites below
    enter()
    ours, stub = socket.socketpair()
    ready, tell = os.pipe()
    inner = os.fork()
    if inner == 0:
        mount.mount("proc", "/proc", "proc", 0)
        os.write(tell, b"x")
        os.dup2(fd if init else stub.fileno(), 3 if init else 30, inheritable=True)
        if not init:
            os.dup2(30, 3)
        os.execve(program, ["nagaya-agent", "--serve" if init else "--stub", "--fd=3"], os.environ)
    os.read(ready, 1)
    if init:
        os.closerange(3, 1024)
        _, status = os.waitpid(inner, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    for source_fd, target_fd in ((fd, 30), (ours.fileno(), 31)):
        os.dup2(source_fd, target_fd, inheritable=True)
    arguments = ["--serve", "--fd=30", "--program-fd=31", f"--program-pid={inner}"]
    os.execve(program, ["nagaya-agent", *arguments], os.environ)


def build_agent(*, checked: bool = False) -> str:
    """The agent as `make -C guest` (`checked`: `asan`) builds it; skips where that cannot run."""
    if os.geteuid() != 0:
        pytest.skip("namespaces take root")
    if not shutil.which("make") or not (shutil.which("musl-gcc") or shutil.which("cc")):
        pytest.skip("make or a C compiler is missing")
    guest = os.path.join(os.path.dirname(__file__), "..", "..", "guest")
    if checked and not shutil.which("gcc"):
        pytest.skip("gcc, for its sanitizers, is missing")
    subprocess.run(["make", "-s", "-C", guest, "asan" if checked else "all"], check=True, timeout=120)
    return os.path.abspath(f"{guest}/build/nagaya-agent{'-asan' if checked else ''}")
