"""The agent's functions on the disks of a virtual machine that does not run.

What a guest wrote is not for the host's kernel to mount: a machine is booted for it, without network, whose only program
is the applet. It takes as long as a boot.
"""

from __future__ import annotations

import os
import select
import time
from contextlib import ExitStack

from nagaya.engines.base import Booted, BootRequest, Engine
from nagaya.errors import LaunchError, NagayaError
from nagaya.kernel.process import close_all_but
from nagaya.model.policy import APPLET
from nagaya.model.spec import Limits, MachineSpec, Process
from nagaya.net.plan import NONE
from nagaya.protocol import agent
from nagaya.storage.paths import make_directory
from nagaya.storage.plan import DiskPlan
from nagaya.storage.tree import remove_tree

MEMORY_BYTES = 128 << 20
CHUNK = 64 << 10
FAILED = 1
_PLATFORMS = {"x86_64": "linux/amd64", "aarch64": "linux/arm64"}


def start_applet(
    engine: Engine, disks: DiskPlan, argv: tuple[str, ...], stdin: int, stdout: int, stderr: int, *, data_disk: bool
) -> int:
    """See `Offline.start_applet`."""
    pid = os.fork()
    if pid:
        return pid
    status = FAILED
    try:
        for source, target in ((stdin, 0), (stdout, 1), (stderr, 2)):
            os.dup2(source, target)
        close_all_but(())
        status = _Applet(engine, disks, argv, data_disk=data_disk).run()
    except NagayaError as error:
        os.write(2, f"{error.message}\n".encode())
    except OSError as error:
        os.write(2, f"{error.strerror}\n".encode())
    finally:
        os._exit(status)


class _Applet:
    """One boot for one applet, whose streams are ours."""

    def __init__(self, engine: Engine, disks: DiskPlan, argv: tuple[str, ...], *, data_disk: bool) -> None:
        self._engine = engine
        self._disks = disks
        self._argv = argv
        self._data_disk = data_disk
        self._link = agent.AgentLink()
        self._channel = 0
        self._status = -1
        self._poll = select.poll()

    def run(self) -> int:
        """The applet's exit status. Raises when it could not be run."""
        directory = f"{os.path.dirname(self._disks.data)}/offline"
        remove_tree(directory)  # of one that was killed
        make_directory(directory)
        try:
            with ExitStack() as stack:
                booted = self._engine.boot(_plan_request(self._disks, directory), stack)
                try:
                    self._talk(booted)
                finally:
                    self._end(booted)
        finally:
            remove_tree(directory)
        return self._status

    def _talk(self, booted: Booted) -> None:
        self._link.setup(booted.setup, sent=booted.told)
        process = Process(self._argv, stdin=True)
        self._channel = self._link.spawn(process, APPLET, applet=True, data_disk=self._data_disk)
        calls = dict(booted.watch)
        for fd in (booted.pidfd, *calls):
            self._poll.register(fd, select.POLLIN)
        deadline_s = time.monotonic() + booted.start_timeout_s
        started = False
        while self._status < 0:
            self._watch(booted.agent)
            ready = self._poll.poll(None if started else max(0, deadline_s - time.monotonic()) * 1000)
            if not ready:
                raise LaunchError(f"the machine's agent did not start within {booted.start_timeout_s:.0f} s")
            for fd, _ in ready:
                if fd == booted.agent:
                    started = self._exchange(fd) or started
                elif fd == 0:
                    self._feed()
                elif fd in calls:
                    calls[fd]()
                elif self._status < 0:
                    raise LaunchError("the machine for it ended before it was done")

    def _watch(self, fd: int) -> None:
        """Read what there is room for, write what there is to write."""
        self._poll.register(fd, select.POLLIN | (select.POLLOUT if self._link.outgoing() else 0))
        if self._link.stdin_room(self._channel):
            self._poll.register(0, select.POLLIN)
        else:
            try:
                self._poll.unregister(0)
            except KeyError:
                return

    def _feed(self) -> None:
        data = os.read(0, min(CHUNK, self._link.stdin_room(self._channel)))
        if data:
            self._link.send_stdin(self._channel, data)
        else:
            self._link.close_stdin(self._channel)

    def _exchange(self, fd: int) -> bool:
        """Move bytes both ways; whether the applet has started."""
        started = False
        try:
            data = self._link.outgoing()
            if data:
                self._link.sent(os.write(fd, data))
        except OSError:
            pass  # its buffer is full: the poll tells when it is not; or it is gone, and may have said something before
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return False
        except ConnectionResetError:  # it was gone before it had read what it was told
            data = b""
        if not data:
            raise LaunchError("the machine for it ended before it was done")
        for event in self._link.receive(data):
            started = isinstance(event, agent.Started) or started
            self._take(event)
        return started

    def _take(self, event: agent.Event) -> None:
        if isinstance(event, agent.Hello):
            self._link.stamp(time.time_ns())
        elif isinstance(event, agent.Output):
            _write(event.stream, event.data)
            self._link.grant(self._channel, len(event.data))
        elif isinstance(event, agent.Exited):
            self._status = event.status
        elif isinstance(event, (agent.SpawnFailed, agent.SetupFailed)):
            raise LaunchError(event.text)

    def _end(self, booted: Booted) -> None:
        """Let it write back what it has changed; then it is gone, one way or the other."""
        poll = select.poll()
        poll.register(booted.pidfd, select.POLLIN)
        try:
            if self._status >= 0:
                self._link.shutdown()
                data = memoryview(self._link.outgoing())
                os.set_blocking(booted.agent, True)
                while data:
                    data = data[os.write(booted.agent, data) :]
                deadline_s = time.monotonic() + booted.end_timeout_s
                while not poll.poll(50) and time.monotonic() < deadline_s:
                    for _, call in booted.watch:
                        call()
        except OSError:
            pass  # it has ended
        finally:
            self._engine.kill()
            poll.poll()
            os.close(booted.agent)
            os.waitid(os.P_PIDFD, booted.pidfd, os.WEXITED)
            os.close(booted.pidfd)


def _write(stream: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(stream, view) :]


def _plan_request(disks: DiskPlan, directory: str) -> BootRequest:
    machine_id = os.path.basename(os.path.dirname(disks.data))
    spec = MachineSpec(
        id=machine_id, name=machine_id, type="", image="", image_id="", platform=_PLATFORMS.get(os.uname().machine, ""), process=Process(()),
        hostname="offline", created_ns=0, network="none", limits=Limits(memory_bytes=MEMORY_BYTES),
    )  # fmt: skip
    return BootRequest(
        spec=spec, rootfs=disks, mounts=(), network=NONE, etc=(), runtime_dir=directory
    )  # fmt: skip
