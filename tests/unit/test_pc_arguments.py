"""The command lines of whole machines: what every one has, and what differs."""

from __future__ import annotations

import itertools
import json

import pytest

from nagaya.cli.commands.hardware import instead, parse_disk
from nagaya.engines.qemu.arguments import Card
from nagaya.engines.qemu.pc_arguments import PcDrive, PcFirmware, PcMachine, plan_pc
from nagaya.engines.qemu.pc_boards import AARCH64, BOARDS, RISCV64, X86_64, PcBoard
from nagaya.errors import UsageError
from nagaya.manager.hardware import DriveOptions

NODE = {"driver": "qcow2", "file": {"driver": "file", "filename": "/dev/fdset/3"}, "backing": None}
DISK = PcDrive("disk0", NODE, ((9, 3),), cdrom=False, boot_index=1)
CD = PcDrive("cd1", None, (), cdrom=True, boot_index=2)


def plan(board: PcBoard = X86_64, **changes: object) -> list[str]:
    machine = PcMachine(
        board=board, id="0123456789abcdef" * 2, kvm=False, cpus=2, memory_bytes=1 << 30, compat=False,
        firmware=PcFirmware(), drives=(DISK, CD), monitor=3, console=4, cards=(Card("02:00:00:00:00:01", 5),),
    )  # fmt: skip
    return plan_pc(machine._replace(**changes))  # type: ignore[arg-type]


def values(command: list[str], flag: str) -> list[str]:
    return [value for name, value in itertools.pairwise(command) if name == flag]


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.architecture)
@pytest.mark.parametrize("compat", [False, True])
def test_every_machine_is_shut_in(board: PcBoard, compat: bool) -> None:
    command = plan(board, compat=compat and board.vga)
    assert command[0] == board.program
    assert {"-no-user-config", "-nodefaults"} <= set(command)
    assert values(command, "-sandbox") == ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    assert values(command, "-vnc") == values(command, "-display") == ["none"]
    for value in values(command, "-blockdev"):
        files = [json.loads(value)]
        while files:
            node = files.pop()
            assert str(node.get("filename", "/dev/fdset/")).startswith("/dev/fdset/")
            files += [part for part in node.values() if isinstance(part, dict)]
    assert not any(" " in word or word.startswith("/") for word in command if not word.startswith("{"))


def test_devices() -> None:
    modern, old = plan(), plan(compat=True)
    assert any(value.startswith("virtio-blk-pci,") for value in values(modern, "-device"))
    assert any(value.startswith("ide-cd,") and "drive=" not in value for value in values(modern, "-device"))
    assert values(modern, "-machine")[0].startswith("q35") and values(old, "-machine")[0].startswith("pc,")
    assert not any("virtio" in value for value in values(old, "-device"))
    assert any(value.startswith("e1000,") for value in values(old, "-device"))
    assert [value.split("bus=")[1] for value in values(old, "-device") if "ide-" in value] == [
        "ide.0,unit=0",
        "ide.0,unit=1",
    ]
    assert any(value.startswith("scsi-cd,") for value in values(plan(AARCH64), "-device"))


def test_what_runs_the_cpus() -> None:
    assert values(plan(), "-accel") == ["tcg,thread=multi"]
    kvm = plan(kvm=True)
    assert values(kvm, "-accel") == ["kvm"] and values(kvm, "-cpu") == ["host"]


def test_places_for_cpus() -> None:
    """A machine of one number of CPUs and of another are the same beside that: what a saved one goes on in."""
    assert values(plan(), "-smp") == ["cpus=2,maxcpus=16"]
    assert values(plan(cpus=20), "-smp") == ["cpus=20,maxcpus=20"]
    assert values(plan(AARCH64), "-smp") == ["cpus=2,maxcpus=2"]
    for compat in (False, True):
        one, more = (plan(cpus=cpus, compat=compat) for cpus in (1, 16))
        assert [pair for pair in zip(one, more, strict=True) if pair[0] != pair[1]] == [
            ("cpus=1,maxcpus=16", "cpus=16,maxcpus=16")
        ]
    disks = [value for value in values(plan(), "-device") if value.startswith("virtio-blk-pci,")]
    assert all(",num-queues=4" in value for value in disks)  # QEMU's default is the number of CPUs


def test_firmware() -> None:
    uefi = plan(firmware=PcFirmware(code=6, variables=7))
    assert values(uefi, "-machine")[0].endswith(",pflash0=firmware,pflash1=variables")
    nodes = [json.loads(value) for value in values(uefi, "-blockdev")][:2]
    assert [(node["node-name"], node["read-only"]) for node in nodes] == [("firmware", True), ("variables", False)]
    assert values(plan(RISCV64, firmware=PcFirmware(loader=8)), "-kernel") == ["/proc/self/fd/8"]
    assert "-kernel" not in plan()


def test_networks() -> None:
    assert values(plan(), "-netdev") == ["tap,id=net0,fd=5,vhost=off"]
    assert values(plan(cards=(Card("02:00:00:00:00:01"),)), "-netdev") == ["user,id=net0,net=10.0.2.0/24,ipv6=off"]
    assert values(plan(cards=()), "-netdev") == []


def test_disks_that_users_write() -> None:
    assert parse_disk("20g") == DriveOptions(size_bytes=20 << 30)
    assert parse_disk("web") == DriveOptions("web")
    assert parse_disk("/srv/a.qcow2,clone,size=40g") == DriveOptions("/srv/a.qcow2", 40 << 30, clone=True)
    assert parse_disk("a.img,format=raw,ro,allow-backing") == DriveOptions(
        "a.img", format="raw", read_only=True, allow_backing=True
    )
    for wrong in ("", ",ro", "20g,ro", "a,b=c", "a,format=", "a,clone=yes"):
        with pytest.raises(UsageError):
            parse_disk(wrong)


def test_which_command_is_meant() -> None:
    assert instead(["web", "--disk", "20g"]) is None
    assert instead(["--disk=20g"]) is None
    assert instead(["--help"]) is None
    found = instead(["--name", "x", "debian", "sleep", "1"])
    assert found is not None and found.usage.startswith("IMAGE")


def test_devices_of_the_host() -> None:
    given: dict[str, object] = {"usb": (11,), "pci": ("0000:01:00.0", "0000:01:00.1")}
    modern, old = plan(**given), plan(compat=True, **given)
    for command in (modern, old):
        assert "fd=11,set=4096" in values(command, "-add-fd")
        assert "usb-host,bus=usb.0,hostdevice=/dev/fdset/4096" in values(command, "-device")
    assert "vfio-pci,host=0000:01:00.1,id=pci1,bus=passed1" in values(modern, "-device")
    assert "vfio-pci,host=0000:01:00.1,id=pci1,bus=pci.0" in values(old, "-device")
    ports = [value for value in values(modern, "-device") if value.startswith("pcie-root-port,")]
    chassis = [value.split("chassis=")[1] for value in ports]
    assert len(ports) == len(set(chassis)) == 18 and not any("pcie-root-port" in word for word in old)
