"""What a whole machine has of trust: a TPM, a firmware that starts only what is signed; and a QEMU that is trusted with nothing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nagaya import Machine
from nagaya.engines.vm.bounds import group_name, plan_bounds
from nagaya.errors import NotFound, Unsupported, UsageError
from nagaya.manager.hardware import DriveOptions
from tests.conformance.types import group_of
from tests.conftest import require_program
from tests.kernel.linux_guest import find_kernel
from tests.kernel.test_whole_machines import qemu_of, said, wait_until

pytestmark = pytest.mark.timeout(600)
EFI_WITHIN_S = 250  # UEFI with its management mode takes its time under TCG


def status_of(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/status").read_text()
    return {name: value.strip() for name, _, value in (line.partition(":\t") for line in text.splitlines())}


def limits_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {line[:26].strip(): line[26:].split()[0] for line in lines}


def check_shut_in(pid: int) -> None:
    status, limits = status_of(pid), limits_of(pid)
    if not os.geteuid():
        for name in ("Uid", "Gid"):
            ids = set(status[name].split())
            assert len(ids) == 1 and not ids & {"0", "65534"}
        assert status["Groups"] == ""
        for name in ("net", "ipc"):
            assert os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(status[name], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert limits["Max core file size"] == "0" and int(limits["Max open files"]) <= 1024
    assert os.readlink(f"/proc/{pid}/cwd") == "/"


def check_bounded(machine: Machine, *pids: int) -> None:
    """In a control group of the machine's own, and the supervisor is not."""
    group = group_of(machine)
    assert group is not None
    name = group_name(machine.id, machine.runtime_dir)
    for pid in pids:
        assert Path(f"/proc/{pid}/cgroup").read_text().count(f"/nagaya/{name}\n") >= 1
    assert name not in Path(f"/proc/{status_of(pids[0])['PPid']}/cgroup").read_text()
    bounds = plan_bounds(machine.spec, translates=machine.spec.type == "emulated")
    assert group.stats().memory_limit_bytes in (-1, bounds.memory_bytes)  # -1: a host without that controller
    assert len(pids) <= group.stats().pids < bounds.pids


def test_its_qemu_and_its_tpm_are_trusted_with_nothing(make: Callable[..., Machine]) -> None:
    require_program("swtpm")
    machine = make(tpm=True)
    machine.start()
    wait_until(machine, "READY")
    qemu = qemu_of(machine)
    check_shut_in(qemu)
    command = Path(f"/proc/{qemu}/cmdline").read_bytes().split(b"\0")
    assert command[command.index(b"-sandbox") + 1].startswith(b"on,") and b"-nodefaults" in command
    # Files that it has open: the machine's own, QEMU's, and nothing of anybody else's.
    opened = {os.path.realpath(f"/proc/{qemu}/fd/{fd}") for fd in os.listdir(f"/proc/{qemu}/fd")}
    files = {path for path in opened if path.startswith("/") and os.path.isfile(path)}
    assert all(
        path.startswith((machine.directory, os.path.dirname(machine.directory), "/usr/share", "/tmp")) for path in files
    )
    assert os.stat(machine.directory).st_mode & 0o777 == 0o700
    assert os.stat(machine.runtime_dir).st_mode & 0o077 == 0
    parent = status_of(qemu)["PPid"]
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    helpers = [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().strip() == "swtpm"]
    assert len(helpers) == 1
    check_shut_in(helpers[0])
    if not os.geteuid():
        check_bounded(machine, qemu, helpers[0])
    state = os.stat(f"{machine.directory}/tpm-state")
    assert state.st_mode & 0o777 == 0o600 and state.st_size > 0
    taken = machine.snapshots.create("with-tpm")
    assert "tpm-state" in [part.name for part in taken.snapshot.parts] and taken.snapshot.memory
    machine.snapshots.restore("with-tpm")
    assert machine.state.phase == "running" and said(machine).count("READY") == 1
    machine.stop()
    assert not os.path.exists(f"/proc/{helpers[0]}")


@pytest.mark.parametrize("secure", [False, True])
def test_only_what_is_signed_is_started(make: Callable[..., Machine], tmp_path: Path, secure: bool) -> None:
    """Debian's kernel starts by itself under UEFI, and is not signed by a key of Microsoft's."""
    for program in ("/usr/sbin/mkfs.vfat", "mcopy", "mmd"):
        require_program(program)
    if not os.path.exists("/usr/share/OVMF/OVMF_CODE_4M.ms.fd"):
        pytest.skip("needs ovmf")
    kernel = sorted((find_kernel(tmp_path) / "boot").glob("vmlinuz-*cloud-amd64"))[-1]
    disk = tmp_path / "efi.raw"
    disk.touch()
    os.truncate(disk, 32 << 20)
    subprocess.run(["/usr/sbin/mkfs.vfat", disk], check=True)
    subprocess.run(["mmd", "-i", disk, "::/EFI", "::/EFI/BOOT"], check=True)
    subprocess.run(["mcopy", "-i", disk, kernel, "::/EFI/BOOT/BOOTX64.EFI"], check=True)
    machine = make(drives=(DriveOptions(str(disk), clone=True),), firmware="uefi", secure_boot=secure)
    machine.start()
    if secure:
        wait_until(machine, "Access Denied", within_s=EFI_WITHIN_S)
        before, _, _ = said(machine).partition("Access Denied")
        assert "BdsDxe: starting Boot" not in before  # the firmware's own shell is next
    else:
        wait_until(machine, "BdsDxe: starting Boot", within_s=EFI_WITHIN_S)
        assert "Access Denied" not in said(machine)
    machine.kill()


def test_what_this_host_cannot_pass_on(
    make: Callable[..., Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nagaya.engines.qemu import host_pci, host_usb

    for wrong in ("mouse", "12:34", "1.x"):
        with pytest.raises(UsageError):
            make(usb=(wrong,))
    for wrong in ("card", "1:2:3"):
        with pytest.raises(UsageError):
            make(pci=(wrong,))
    monkeypatch.setattr(host_usb, "USB_DEVICES", str(tmp_path / "usb"))
    monkeypatch.setattr(host_pci, "GROUPS", str(tmp_path / "groups"))
    with pytest.raises(Unsupported, match="no USB devices"):
        make(usb=("046d:c077",))
    with pytest.raises(Unsupported, match="no IOMMU"):
        make(pci=("01:00.0",))
    (tmp_path / "groups" / "1").mkdir(parents=True)
    with pytest.raises(NotFound, match="fe:1f"):
        make(pci=("fe:1f.7",))
    device = tmp_path / "usb" / "1-4"
    device.mkdir(parents=True)
    for name, text in (("idVendor", "046d"), ("idProduct", "c077"), ("busnum", "1"), ("devnum", "12")):
        (device / name).write_text(f"{text}\n")
    assert host_usb.find_usb("046D:C077") == host_usb.find_usb("1.12")
    assert host_usb.find_usb("1.12").node == "/dev/bus/usb/001/012"
    with pytest.raises(NotFound):
        make(usb=("1.13",))
    with pytest.raises(UsageError, match="UEFI"):
        make(secure_boot=True)
    with pytest.raises(Unsupported):
        make(architecture="riscv64", tpm=True)
