"""Whole machines that change while they run: disks, cards and memory; with a system of 512 bytes, and with a Linux."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nagaya import Host, Machine
from nagaya.errors import Conflict, NotFound, Unsupported, UsageError
from nagaya.manager.attachment import Attachment
from nagaya.manager.hardware import DriveOptions, HardwareOptions
from nagaya.manager.networks import NetworkOptions
from nagaya.manager.options import UpdateOptions
from nagaya.model.spec import Attachment as Attached
from tests.e2e.command import Cli
from tests.kernel.conftest import MKFS, QUIET
from tests.kernel.linux_guest import make_disc
from tests.kernel.test_whole_machines import qemu_of, talk, wait_until

pytestmark = pytest.mark.timeout(1500)
GIB = 1 << 30


def open_files(machine: Machine) -> set[str]:
    place = f"/proc/{qemu_of(machine)}/fd"
    return {os.path.realpath(f"{place}/{fd}") for fd in os.listdir(place)}


def test_disks_are_put_in_while_it_runs(host: Host, make: Callable[..., Machine], boot_disk: Path) -> None:
    host.disks.create("data", 1 << 20)
    path = host.disks.locate("data")
    machine = make()
    machine.start()
    wait_until(machine, "READY")
    assert machine.front.bay.attach(DriveOptions("data")) == path
    assert path in open_files(machine)
    assert machine.front.bay.attach(DriveOptions(size_bytes=2 << 20)) == "disk1"
    with pytest.raises(Conflict, match="in use"):
        host.disks.check("data")
    for wrong, problem in (
        (DriveOptions("data"), Conflict), (DriveOptions("none"), NotFound), (DriveOptions("/etc"), UsageError),
    ):  # fmt: skip
        with pytest.raises(problem):
            machine.front.bay.attach(wrong)
    assert [drive.slot for drive in machine.spec.hardware.drives] == [0, 1, 2]  # type: ignore[union-attr]
    # A system that knows nothing of PCI lets go of nothing; and what it boots from is not behind a port.
    with pytest.raises(Conflict, match="not let go"):
        machine.front.bay.detach("data")
    with pytest.raises(Conflict, match="was made"):
        machine.front.bay.detach("disk0", remove=True)
    with pytest.raises(Conflict, match="own, and goes"):
        machine.front.bay.detach("disk1")
    machine.stop()
    machine.start()  # it is born with them now
    wait_until(machine, "READY", times=2)
    assert path in open_files(machine)
    machine.stop()
    machine.front.bay.detach("data")
    machine.front.bay.detach("disk1", remove=True)
    assert not os.path.exists(f"{machine.directory}/disk1.qcow2")
    with pytest.raises(Conflict, match="last one"):
        machine.front.bay.detach("disk0", remove=True)
    assert host.disks.check("data").clean


def test_disks_grow_while_it_runs(
    host: Host, make: Callable[..., Machine], boot_disk: Path, nagaya_root: str, cli: Cli
) -> None:
    host.disks.convert(str(boot_disk), "system")
    machine = make(drives=(DriveOptions("system"), DriveOptions(size_bytes=1 << 20)))
    machine.start()
    wait_until(machine, "READY")
    assert machine.front.bay.resize("disk1", "+", 1 << 20) == 2 << 20
    assert machine.front.bay.resize("system", "", 8 << 20) == 8 << 20
    with pytest.raises(Conflict, match="smaller"):
        machine.front.bay.resize("system", "-", 1 << 20)
    with pytest.raises(NotFound):
        machine.front.bay.resize("disk7", "+", 1 << 20)
    with machine.attach() as attachment:
        talk(attachment, "w", "stored")
    machine.stop()
    assert host.disks.get("system").virtual_bytes == 8 << 20
    assert host.disks.check("system").clean
    assert machine.front.bay.resize("disk1", "-", 1 << 20, shrink=True) == 1 << 20


def test_compat_gets_disks_while_it_is_off(host: Host, make: Callable[..., Machine]) -> None:
    machine = make(compat=True)
    machine.start()
    wait_until(machine, "READY")
    with pytest.raises(Unsupported, match="compat"):
        machine.front.bay.attach(DriveOptions(size_bytes=1 << 20))
    assert not os.path.exists(f"{machine.directory}/disk1.qcow2")
    with pytest.raises(Unsupported, match="compat"):
        machine.update(UpdateOptions(memory_bytes=512 << 20))
    machine.stop()
    assert machine.front.bay.attach(DriveOptions(size_bytes=1 << 20)) == "disk1"
    machine.start()
    wait_until(machine, "READY", times=2)
    machine.kill()


def test_memory_needs_a_driver(make: Callable[..., Machine]) -> None:
    machine = make()
    machine.start()
    wait_until(machine, "READY")
    for options, text in (
        (UpdateOptions(memory_bytes=512 << 20), "no driver"),
        (UpdateOptions(memory_bytes=4 * GIB), "cannot get more"),
        (UpdateOptions(pids=2000), "alone can be changed"),
    ):
        with pytest.raises(Unsupported, match=text):
            machine.update(options)
    assert machine.spec.limits.memory_bytes == GIB
    machine.kill()


def _need_two_cpus() -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two CPUs")


def test_cpus_are_put_in_while_it_runs(make: Callable[..., Machine]) -> None:
    """Beneath a system that knows nothing of them: it uses none, and lets go of none."""
    _need_two_cpus()
    machine = make()
    machine.start()
    wait_until(machine, "READY")
    with pytest.raises(Unsupported, match="parts of CPUs"):
        machine.update(UpdateOptions(cpus_milli=1500))
    told = machine.update(UpdateOptions(cpus_milli=2000))
    assert "(now)" in told[0] and "online" in told[1]
    with pytest.raises(Conflict, match="knows nothing of CPUs that go"):
        machine.update(UpdateOptions(cpus_milli=1000))
    assert machine.spec.limits.cpus_milli == 2000
    machine.snapshots.create("two")
    machine.kill()
    machine.update(UpdateOptions(cpus_milli=1000))
    machine.snapshots.restore("two")  # with its memory: as many CPUs, in the same places
    with machine.attach() as attachment:
        assert "xyz" in talk(attachment, "xyz", "xyz")
    assert machine.spec.limits.cpus_milli == 2000
    machine.stop()
    machine.update(UpdateOptions(cpus_milli=1000))
    machine.start()
    wait_until(machine, "READY", times=2)
    machine.kill()


def test_cards_come_and_go_while_it_runs(make: Callable[..., Machine], host: Host) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    for name in ("one", "two"):
        host.networks.create(name, NetworkOptions())
    machine = make(common=QUIET._replace(network="bridge", attachments=(Attached("one"),)))
    machine.start()
    wait_until(machine, "READY")

    def networks() -> list[object]:
        links = machine.inspect()["links"]
        assert isinstance(links, list)
        return [link["network"] for link in links]

    for _ in range(2):
        assert host.networks.connect("two", "m", Attached("two")) == "now"
        assert networks() == ["one", "two"] and machine.stats().net_rx_bytes >= 0
        assert host.networks.disconnect("two", "m") == "now"
        assert networks() == ["one"]
    assert host.networks.connect("two", "m", Attached("two")) == "now"
    assert host.networks.disconnect("one", "m") == "now"  # what it was born with, too
    assert networks() == ["two"]
    machine.stop()
    assert machine.state.exit_code == 0
    machine.start()
    wait_until(machine, "READY", times=2)
    assert networks() == ["two"]
    machine.remove(force=True)
    for name in ("one", "two"):
        host.networks.remove(name)


# -- with a Linux inside


@pytest.fixture(scope="module")
def disc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_disc(tmp_path_factory.mktemp("linux"))


@pytest.fixture
def linux(host: Host, disc: Path, tmp_path: Path) -> Iterator[Machine]:
    """A machine that has booted it, with a disk of 64 MiB at /disk."""
    data = tmp_path / "data.raw"
    data.touch()
    os.truncate(data, 64 << 20)
    subprocess.run([MKFS, "-q", data], check=True)
    options = HardwareOptions(
        name="linux", type="emulated", common=QUIET, boot="cdrom",
        drives=(DriveOptions(str(data), clone=True), DriveOptions(str(disc), cdrom=True)),
    )  # fmt: skip
    machine, _ = host.machines.create_whole(options)
    machine.start()
    wait_until(machine, "LINUX-UP", within_s=800)
    yield machine


def shell(attachment: Attachment, command: str) -> str:
    """What a command of the guest's shell says."""
    said = talk(attachment, f"{command}; echo DO''NE\n", "DONE", within_s=120)
    return said.replace("\r", "").partition("DONE")[0].strip()


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline_s


def recovery_needed(host: Host, path: str, place: Path) -> bool:
    """Whether the file system in a snapshot's disk would have to be repaired from its journal."""
    raw = place / f"{os.path.basename(os.path.dirname(path))}.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, raw], check=True)
    shown = subprocess.run(["/usr/sbin/dumpe2fs", "-h", raw], capture_output=True, text=True, check=True).stdout
    return "needs_recovery" in shown


def test_a_linux_takes_and_gives(linux: Machine, host: Host, tmp_path: Path) -> None:
    """One boot for all of it, which is what takes the time."""
    host.disks.create("data", 32 << 20)
    path = host.disks.locate("data")

    def freeze_and_look(name: str) -> tuple[bool, tuple[str, ...]]:
        taken = linux.snapshots.create(name, memory=False)
        disk = f"{linux.snapshots.directory(taken.snapshot)}/disk0.qcow2"
        return recovery_needed(host, disk, tmp_path), taken.warnings

    with linux.attach() as console:
        # Its agent
        wait_for(lambda: linux.inspect()["guest_links"] is not None)  # on a busy host it may be slow to answer
        links = linux.inspect()["guest_links"]
        assert isinstance(links, list) and links[0]["name"] == "lo" and "127.0.0.1/8" in links[0]["addresses"]
        shell(console, "echo one > /disk/file")
        assert freeze_and_look("frozen") == (False, ())
        assert shell(console, "echo two > /disk/file; cat /disk/file") == "two"  # thawed
        # The agent is a child of this shell, which is the guest's init: to hear of it at its prompt would be its end.
        shell(console, "kill -STOP $(cat /run/ga.pid); sleep 1")
        needed, warnings = freeze_and_look("stopped")
        assert needed and "could not be frozen" in warnings[0]
        shell(console, "kill -CONT $(cat /run/ga.pid); sleep 1")
        assert shell(console, "sleep 5; echo three > /disk/file; cat /disk/file") == "three"  # it was thawed in the end
        # Its memory
        shell(console, "X=42")
        linux.snapshots.create("whole")
        shell(console, "X=1; echo four > /disk/file; sync")
    linux.snapshots.restore("whole")
    with linux.attach() as console:
        assert shell(console, "cat /disk/file; echo $X") == "three\n42"
        # Its disks
        assert "vda" in shell(console, "ls /sys/block")
        linux.front.bay.attach(DriveOptions("data"))
        wait_for(lambda: shell(console, "cat /sys/block/vdb/size") == str((32 << 20) // 512))
        linux.front.bay.resize("data", "+", 32 << 20)
        wait_for(lambda: shell(console, "cat /sys/block/vdb/size") == str((64 << 20) // 512))
        linux.front.bay.resize("disk0", "+", 64 << 20)
        wait_for(lambda: shell(console, "cat /sys/block/vda/size") == str((128 << 20) // 512))
        linux.front.bay.detach("data")
        assert path not in open_files(linux)
        assert host.disks.check("data").clean  # and nobody has it
        assert "vdb" not in shell(console, "ls /sys/block")

        # The size of its memory
        def free_kib() -> int:
            return int(re.search(r"MemFree:\s+(\d+)", shell(console, "sleep 2; cat /proc/meminfo"))[1])  # type: ignore[index]

        before = free_kib()
        linux.update(UpdateOptions(memory_bytes=768 << 20))
        wait_for(lambda: before - free_kib() > 128 << 10)  # it gives what it is asked for over some time
        linux.snapshots.create("less")
    linux.snapshots.restore("less")  # with the balloon as it was
    with linux.attach() as console:
        assert linux.spec.limits.memory_bytes == 768 << 20 and before - free_kib() > 128 << 10
        linux.update(UpdateOptions(memory_bytes=GIB))
        wait_for(lambda: before - free_kib() < 64 << 10)
        # Its CPUs
        _need_two_cpus()
        assert shell(console, "nproc") == "1"
        assert len(linux.update(UpdateOptions(cpus_milli=2000))) == 1  # the agent has taken it into use
        assert shell(console, "nproc") == "2"
        linux.snapshots.create("two")
        linux.update(UpdateOptions(cpus_milli=1000))
        assert shell(console, "nproc") == "1"
    linux.snapshots.restore("two")
    with linux.attach() as console:
        assert shell(console, "nproc") == "2"
        linux.update(UpdateOptions(cpus_milli=1000))  # one that it was born with goes, too
        assert shell(console, "nproc") == "1"
    linux.kill()
