"""A virtual machine for the agent's tests: the shipped kernel and our initramfs under QEMU's own processor."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from nagaya.engines.vm.initramfs import make_initramfs
from nagaya.engines.vm.setup import AGENT_PORT, DATA_SERIAL, ROOT_SERIAL
from nagaya.protocol.agent import Hello, SetUp, SetupFailed
from nagaya.protocol.setup import GuestSetup, setup_payload
from tests.kernel.agent_machine import Host, Lost

BOOT_S = 60.0
END_S = 20.0
MAC = "02:4e:67:79:00:01"


class Disks:
    """An image's disk and a machine's own."""

    def __init__(self, root: Path | None, data: Path | None) -> None:
        self.root = root
        self.data = data


class VirtualMachine(Host):
    """One boot. The console's text is in `console`; leaving the context ends the machine, which must end by itself."""

    def __init__(
        self,
        kernel: str,
        agent: str,
        disks: Disks,
        place: Path,
        *,
        arguments: tuple[str, ...] = (),
        modules: tuple[tuple[str, bytes], ...] = (),
    ) -> None:
        ours, theirs = socket.socketpair()
        super().__init__(ours)
        self.console = place / f"console-{time.monotonic_ns()}"
        initramfs = place / "initramfs"
        initramfs.write_bytes(make_initramfs(agent, modules=modules))
        command = [
            "qemu-system-x86_64", "-M", "microvm,acpi=off,isa-serial=off", "-accel", "tcg", "-cpu", "max",
            "-m", "256", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-global", "virtio-mmio.force-legacy=false",
            "-kernel", kernel, "-initrd", str(initramfs),
            "-append", f"console=hvc0 quiet reboot=t tsc_early_khz={tsc_khz()}",
            "-device", "virtio-serial-device", "-chardev", f"file,id=console,path={self.console}",
            "-device", "virtconsole,chardev=console", "-chardev", f"socket,id=agent,fd={theirs.fileno()}",
            "-device", f"virtserialport,chardev=agent,name={AGENT_PORT}",
            *_disk(disks.root, ROOT_SERIAL, "readonly=on"), *_disk(disks.data, DATA_SERIAL, "discard=unmap"), *arguments,
        ]  # fmt: skip
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self._pidfd = os.pidfd_open(self.process.pid)

    def __enter__(self) -> VirtualMachine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def set_up(self, setup: GuestSetup) -> SetUp | SetupFailed:
        self.link.setup(setup_payload(setup))
        self.wait_for(lambda event: isinstance(event, Hello), BOOT_S)
        answer = self.wait_for(lambda event: isinstance(event, (SetUp, SetupFailed)), BOOT_S)
        assert isinstance(answer, (SetUp, SetupFailed))
        return answer

    def ended(self, timeout_s: float = END_S) -> bool:
        """Wait for the machine's end."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def shut_down(self) -> None:
        """Ask the machine to end, and see it through."""
        self.link.shutdown()
        try:
            while True:
                self.step(END_S)
        except Lost:
            assert self.ended()

    def cut(self) -> None:
        """As a power failure."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        self._socket.close()
        ended = self.ended()
        if not ended:
            self.cut()
        self.process.wait()
        os.close(self._pidfd)
        assert ended, f"the machine did not end when its host's stream ended:\n{self.console.read_text()}"


def _disk(path: Path | None, serial: str, options: str) -> list[str]:
    if path is None:
        return []
    drive = f"if=none,id={serial},format=raw,file={path},{options}"
    return ["-drive", drive, "-device", f"virtio-blk-device,drive={serial},serial={serial}"]


def tsc_khz() -> int:
    """QEMU's guest counts as the host does; with no other clock described, the kernel has to be told how fast."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("cpu MHz"):
            return int(float(line.split(":")[1]) * 1000)
    pytest.skip("/proc/cpuinfo does not say the CPU's frequency")
