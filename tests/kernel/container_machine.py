"""A booted container for tests: a busybox root file system, the engine, and a blocking client of its agent."""

from __future__ import annotations

import os
import secrets
import select
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import pytest

from nagaya.engines.base import Booted, BootRequest
from nagaya.engines.container.engine import ContainerEngine, agent_path
from nagaya.model.policy import ProcessPolicy
from nagaya.model.spec import MachineSpec, Process
from nagaya.net.plan import NetworkPlan
from nagaya.protocol import agent
from nagaya.storage.plan import MountPlan, RootfsPlan
from nagaya.storage.tree import remove_tree

BUSYBOX = "/bin/busybox"
PATH = "PATH=/bin:/sbin:/usr/bin"
TIMEOUT_S = 10.0


def require_facilities() -> None:
    """Skip, saying why, where a container cannot be booted at all."""
    if os.geteuid() != 0:
        pytest.skip("booting a container takes root")
    if not os.path.exists(BUSYBOX):
        pytest.skip("busybox-static is not installed")
    if not os.access(agent_path(), os.X_OK):
        pytest.skip(f"the guest agent is not built ({agent_path()}): make agent")


def make_layer(directory: str) -> str:
    """A root file system of busybox alone, with a link for each of its commands."""
    for name in ("bin", "etc", "proc", "sys", "dev", "tmp", "root", "var"):
        os.makedirs(f"{directory}/{name}", exist_ok=True)
    os.chmod(directory, 0o755)
    os.chmod(f"{directory}/tmp", 0o1777)
    shutil.copy2(BUSYBOX, f"{directory}/bin/busybox")
    for name in [
        "sh",
        "cat",
        "echo",
        "ls",
        "id",
        "mount",
        "umount",
        "mkdir",
        "mknod",
        "dd",
        "chroot",
        "ps",
        "sleep",
        "true",
        "false",
        "stat",
        "hostname",
        "ip",
        "touch",
    ]:
        os.symlink("busybox", f"{directory}/bin/{name}")
    with open(f"{directory}/etc/passwd", "w", encoding="ascii") as file:
        file.write("root:x:0:0:root:/root:/bin/sh\nguest:x:1000:1000::/tmp:/bin/sh\n")
    with open(f"{directory}/etc/group", "w", encoding="ascii") as file:
        file.write("root:x:0:\nguest:x:1000:\n")
    return directory


class Ended(NamedTuple):
    """How a program ended: its status, output, or why it could not be executed."""

    status: int
    stdout: str
    stderr: str
    error: str = ""


class Container:
    """A running container. `run` executes one program and waits for it."""

    def __init__(self, engine: ContainerEngine, booted: Booted, request: BootRequest) -> None:
        self.engine = engine
        self.booted = booted
        self.request = request
        self._link = agent.AgentLink()
        self._pending: list[agent.Event] = []
        os.set_blocking(booted.agent, False)

    def start(self, *argv: str, policy: ProcessPolicy | None = None, main: bool = False, user: str = "") -> int:
        process = Process(argv=argv, env=(PATH,), user=user)
        return self._link.spawn(process, policy or self.booted.policy, main=main)

    def run(
        self,
        *argv: str,
        policy: ProcessPolicy | None = None,
        main: bool = False,
        user: str = "",
        timeout_s: float = TIMEOUT_S,
    ) -> Ended:
        channel = self.start(*argv, policy=policy, main=main, user=user)
        return self.wait(channel, timeout_s=timeout_s)

    def shell(self, script: str, **options: Any) -> Ended:
        return self.run("sh", "-c", script, **options)

    def wait_started(self, channel: int) -> None:
        for event in self._events(TIMEOUT_S):
            if isinstance(event, agent.Started) and event.channel == channel:
                return
            assert not isinstance(event, agent.SpawnFailed), event
        raise AssertionError("the agent went away")

    def wait(self, channel: int, *, timeout_s: float = TIMEOUT_S) -> Ended:
        output = {1: b"", 2: b""}
        for event in self._events(timeout_s):
            if isinstance(event, agent.Output) and event.channel == channel:
                output[event.stream] += event.data
                self._link.grant(channel, len(event.data))
            elif isinstance(event, agent.SpawnFailed) and event.channel == channel:
                return Ended(event.status, "", "", event.text)
            elif isinstance(event, agent.Exited) and event.channel == channel:
                return Ended(event.status, output[1].decode(), output[2].decode())
        raise AssertionError("the agent went away")

    def _events(self, timeout_s: float) -> Iterator[agent.Event]:
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self.booted.agent, select.POLLIN)
        while True:
            while out := self._link.outgoing():
                self._link.sent(os.write(self.booted.agent, out))
            left = deadline - time.monotonic()
            assert left > 0 and poll.poll(left * 1000), "the agent did not answer in time"
            data = os.read(self.booted.agent, 65536)
            if not data:
                return
            yield from self._link.receive(data)

    def wait_for_end(self, timeout_s: float = TIMEOUT_S) -> None:
        poll = select.poll()
        poll.register(self.booted.pidfd, select.POLLIN)
        assert poll.poll(timeout_s * 1000), "the machine did not end in time"


def make_spec(**changes: Any) -> MachineSpec:
    spec = MachineSpec(
        id=secrets.token_hex(16),
        name="test",
        type="container",
        image="busybox",
        image_id="sha256:0",
        platform="linux/amd64",
        process=Process(argv=("true",)),
        hostname="test-machine",
        created_ns=0,
        network="none",
    )
    return spec._replace(**changes)


def make_request(
    spec: MachineSpec,
    directory: str,
    lower: tuple[str, ...],
    *,
    mounts: tuple[MountPlan, ...] = (),
    etc: tuple[tuple[str, str], ...] = (),
) -> BootRequest:
    os.makedirs(directory, exist_ok=True)
    return BootRequest(
        spec=spec,
        rootfs=RootfsPlan(lower, f"{directory}/upper", f"{directory}/work", spec.read_only),
        mounts=mounts,
        network=NetworkPlan("host" if spec.network == "host" else "none"),
        etc=etc,
        runtime_dir=directory,
    )


@contextmanager
def boot(request: BootRequest) -> Iterator[Container]:
    """Boot, and at the end kill, reap and check that nothing of the machine is left on the host."""
    engine = ContainerEngine()
    before = look()
    with ExitStack() as stack:
        booted = engine.boot(request, stack)
        try:
            yield Container(engine, booted, request)
        finally:
            engine.kill()
            try:
                os.waitid(os.P_PIDFD, booted.pidfd, os.WEXITED)
            except ChildProcessError:
                pass
            os.close(booted.pidfd)
            os.close(booted.agent)
    assert_nothing_left(request, before)


class Belongings(NamedTuple):
    """What this process has at one moment."""

    descriptors: dict[int, str]
    children: set[str]


def look() -> Belongings:
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # listdir's own
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return Belongings(descriptors, set(file.read().split()))


def assert_nothing_left(request: BootRequest, before: Belongings) -> None:
    """No process, control group, mount or descriptor of the machine survives."""
    assert not leftover_cgroups(request.spec.id)
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        assert os.path.dirname(request.rootfs.upper) not in file.read()
    now = look()
    assert now.children <= before.children
    assert {fd: target for fd, target in now.descriptors.items() if before.descriptors.get(fd) != target} == {}


def leftover_cgroups(machine_id: str) -> list[str]:
    found = []
    for place, directories, _ in os.walk("/sys/fs/cgroup"):
        if os.path.basename(place) == machine_id:
            found.append(place)
        if place.count("/") >= 6:
            directories.clear()
    return found


def remove_machine(request: BootRequest) -> None:
    remove_tree(os.path.dirname(request.rootfs.upper))
