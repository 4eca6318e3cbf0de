"""Whole machines without firmware: our own VMM starts the kernel that is on the machine's disk."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nagaya import Host, Machine
from nagaya.engines.vm.initramfs import make_initramfs
from nagaya.errors import NotFound, Unsupported, UsageError
from nagaya.manager.hardware import DIRECT, DriveOptions, HardwareOptions
from nagaya.manager.options import CreateOptions
from nagaya.model.spec import Limits
from tests.kernel.direct_disk import MIB, ROOT, START, make_disk, require_kernel

WITHIN_S = 150.0
SOURCE = os.path.join(os.path.dirname(__file__), "direct_init.c")
LIMITS = Limits(memory_bytes=128 * MIB)
# Our kernel knows no serial port but for its first messages: let the worst of them all go there.
COMMON = CreateOptions(
    image="", network="none", stop_timeout_s=60, limits=LIMITS, append="loglevel=2 earlyprintk=ttyS0,keep"
)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a partition of ext4, and on it our kernel and direct_init.c."""
    kernel = require_kernel("cc")
    place = tmp_path_factory.mktemp("direct")
    subprocess.run(["cc", "-static", "-O1", "-o", place / "init", SOURCE], check=True)
    return make_disk(place, kernel, make_initramfs(str(place / "init")))


@pytest.fixture
def make(host: Host, disk: Path) -> Callable[..., Machine]:
    def create(name: str = "m", **changes: object) -> Machine:
        options = HardwareOptions(
            name=name, firmware=DIRECT, drives=(DriveOptions(str(disk), clone=True),), common=COMMON
        )
        return host.machines.create_whole(options._replace(**changes))[0]  # type: ignore[arg-type]

    return create


def said(machine: Machine) -> str:
    return b"".join(line.data + (b"" if line.partial else b"\n") for line in machine.logs()).decode(errors="replace")


def wait_until(machine: Machine, text: str, times: int = 1) -> None:
    deadline_s = time.monotonic() + WITHIN_S
    while said(machine).count(text) < times:
        assert time.monotonic() < deadline_s and machine.state.phase == "running", (text, said(machine), machine.state)
        time.sleep(0.1)


@pytest.mark.timeout(600)
def test_a_whole_life(make: Callable[..., Machine]) -> None:
    machine = make()
    assert machine.spec.type == "kvm" and machine.spec.hardware is not None
    assert [drive.format for drive in machine.spec.hardware.drives] == ["raw"]
    machine.start()
    wait_until(machine, "READY")  # it has restarted itself before: the same machine went on
    assert said(machine).count("restarting") == 1 and said(machine).count(f"root=UUID={ROOT} ro console=ttyS0") == 2
    reading = machine.stats()
    assert reading.memory_bytes > MIB and reading.block_write_bytes >= 4096 and reading.block_read_bytes >= 4096
    machine.pause()
    before = machine.stats().cpu_ns
    time.sleep(0.3)
    assert machine.stats().cpu_ns - before < 150_000_000
    machine.unpause()
    with pytest.raises(Unsupported):
        machine.front.take_picture()
    machine.stop()
    assert (machine.state.phase, machine.state.exit_code, machine.state.error) == ("exited", 0, "")
    assert "BYE" in said(machine)


@pytest.mark.timeout(300)
def test_one_that_is_killed_leaves_its_disk_free(make: Callable[..., Machine]) -> None:
    machine = make()
    for _ in range(2):
        machine.start()
        machine.kill()
        assert (machine.state.phase, machine.state.exit_code) == ("exited", 137)


def end_abruptly(machine: Machine, what: str) -> None:
    """By killing the VMM, its supervisor, or both and all that a host forgets when it restarts."""
    pid = machine.state.pid or machine.inspect()["state"]["pid"]  # type: ignore[index]
    parent = int(re.search(r"^PPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)[1])  # type: ignore[index]
    place = machine.runtime_dir
    for victim in {"vmm": (pid,), "supervisor": (parent,), "host": (parent, pid)}[what]:
        with contextlib.suppress(ProcessLookupError):  # it dies with its supervisor
            os.kill(victim, signal.SIGKILL)
    deadline_s = time.monotonic() + WITHIN_S
    while machine.state.phase == "running" or os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline_s, machine.state
        time.sleep(0.05)
    if what == "host":
        shutil.rmtree(place, ignore_errors=True)


@pytest.mark.timeout(900)
def test_a_machine_that_stays(make: Callable[..., Machine], host: Host) -> None:
    """Whatever ends it: it comes back as it was made, with what was written, on a sound file system."""
    machine = make()
    made = machine.spec
    for number, what in enumerate(("vmm", "supervisor", "host", ""), start=1):
        machine = Host(root=host.paths.root).machines.get("m")
        assert machine.spec == made
        machine.start()
        wait_until(machine, "READY", times=number)
        assert f"kept {number} times" in said(machine)
        if what:
            end_abruptly(machine, what)
            assert (machine.state.phase, machine.state.exit_code) == ("exited", 137)
    machine.stop()
    assert machine.state.exit_code == 0
    disk = f"{machine.directory}/disk0.raw?offset={START}"
    checked = subprocess.run(["e2fsck", "-f", "-n", disk], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_a_disk_without_a_kernel(make: Callable[..., Machine], host: Host) -> None:
    host.disks.create("empty", MIB, format="raw")
    machine = make(drives=(DriveOptions("empty"),))
    with pytest.raises(NotFound, match="no ext4 file system with a kernel"):
        machine.start()
    assert machine.state.phase == "exited"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"type": "emulated"}, UsageError),
        ({"compat": True}, Unsupported),
        ({"boot": "cdrom"}, Unsupported),
        ({"architecture": "aarch64"}, Unsupported),
        ({"drives": (DriveOptions("qcow2"),)}, Unsupported),
        ({"common": COMMON._replace(append="two\nlines")}, UsageError),
        ({"firmware": "bios"}, UsageError),  # which takes no arguments for a kernel
        ({"drives": (DriveOptions("qcow2", clone=True), DriveOptions(cdrom=True))}, Unsupported),
        ({"drives": tuple(DriveOptions(size_bytes=MIB) for _ in range(9))}, Unsupported),
        ({"common": COMMON._replace(network="host")}, Unsupported),
    ],
)
def test_what_it_cannot_be(make: Callable[..., Machine], host: Host, changes: dict, problem: type) -> None:
    host.disks.create("qcow2", MIB)
    with pytest.raises(problem):
        make(**changes)
    assert host.machines.list() == []
