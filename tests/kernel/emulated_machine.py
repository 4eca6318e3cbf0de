"""A machine that the emulated engine has booted, for tests: a busybox image, a disk, and the host's end of its agent."""

from __future__ import annotations

import os
import secrets
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nagaya.engines.base import BootRequest
from nagaya.engines.qemu.engine import EmulatedEngine
from nagaya.model.spec import MachineSpec, Process
from nagaya.net.plan import NetworkPlan
from nagaya.protocol.agent import Hello, SetUp, SetupFailed
from nagaya.storage.plan import DiskPlan, MountPlan
from tests.kernel.agent_machine import Host, Lost

BOOT_S = 60.0
END_S = 20.0


def make_spec(**options: object) -> MachineSpec:
    """A machine without a network; `options` are fields of MachineSpec."""
    plain = MachineSpec(
        id=secrets.token_hex(16), name="test", type="emulated", image="box", image_id="sha256:0", platform="linux/amd64",
        process=Process(argv=("true",)), hostname="lodger", created_ns=0, network="none",
    )  # fmt: skip
    return plain._replace(**options)  # type: ignore[arg-type]


class EmulatedMachine(Host):
    """One boot. Leaving the context shuts the machine down, unless it has ended."""

    def __init__(
        self,
        disks: DiskPlan,
        place: Path,
        spec: MachineSpec,
        *,
        network: NetworkPlan | None = None,
        mounts: tuple[MountPlan, ...] = (),
        etc: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self.engine = EmulatedEngine()
        self.spec = spec
        self.runtime = place / f"run-{spec.id}"
        self.runtime.mkdir()
        self._stack = ExitStack()
        self._hung_up = False
        request = BootRequest(spec, disks, mounts, network or NetworkPlan("none"), etc, str(self.runtime))
        try:
            self.booted = self.engine.boot(request, self._stack)
        except BaseException:
            self._stack.close()
            raise
        super().__init__(socket.socket(fileno=self.booted.agent))
        self.link.setup(self.booted.setup)

    def __enter__(self) -> EmulatedMachine:
        self.wait_for(lambda event: isinstance(event, Hello), BOOT_S)
        self.link.stamp(time.time_ns())
        answer = self.wait_for(lambda event: isinstance(event, (SetUp, SetupFailed)), BOOT_S)
        assert answer == SetUp(())
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.link.shutdown()
            while not self._hung_up:
                self.step(END_S)
        except (Lost, BrokenPipeError):
            pass  # it has ended
        finally:
            self.close()

    def hang_up(self) -> None:
        """Close the agent's stream."""
        self._hung_up = True
        self._socket.close()

    def sh(self, command: str) -> str:
        """What a shell command wrote. It must succeed."""
        result = self.run("/bin/sh", "-c", command)
        assert result.status == 0, result
        return result.out.decode()

    def ended(self, timeout_s: float = END_S) -> bool:
        poll = select.poll()
        poll.register(self.booted.pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def close(self) -> None:
        """As the supervisor does: reap, then undo."""
        ended = self.ended()
        if not ended:
            self.engine.kill()
        os.waitid(os.P_PIDFD, self.booted.pidfd, os.WEXITED)
        os.close(self.booted.pidfd)
        self._socket.close()
        self._stack.close()
        assert ended, "the machine did not end"

    def console(self) -> str:
        self.engine.listen()
        return (self.runtime / "console.log").read_text(errors="replace")

    def status(self, name: str) -> list[str]:
        """A line of QEMU's /proc/PID/status."""
        for line in Path(f"/proc/{self.booted.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return line.split()[1:]
        raise AssertionError(name)


@contextmanager
def bridge(name: str, address: str) -> Iterator[None]:
    """A bridge of a test's own, in the network namespace of this process."""
    for words in (f"link add {name} type bridge", f"addr add {address} dev {name}", f"link set {name} up"):
        subprocess.run(["ip", *words.split()], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "link", "delete", name], check=True)
