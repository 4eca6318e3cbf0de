"""QEMU's command line as data: what is in it, and what must never be."""

from __future__ import annotations

import pytest

from nagaya.engines.qemu.arguments import SANDBOX, Card, Machine, Share, devices, plan_command
from nagaya.engines.qemu.boards import BOARDS, X86_64, Board, find_board
from nagaya.engines.qemu.counter import parse_khz
from nagaya.errors import Unsupported

PLAIN = Machine(
    board=X86_64, name="0123456789abcdef", cpus=1, memory_bytes=512 << 20, kernel=6, initrd=7, root=8, data=9,
    monitor=3, agent=4, console=5,
)  # fmt: skip


def value(command: list[str], option: str) -> str:
    assert command.count(option) == 1, option
    return command[command.index(option) + 1]


def values(command: list[str], option: str) -> list[str]:
    return [command[at + 1] for at, word in enumerate(command) if word == option]


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.architecture)
def test_it_gets_what_it_needs_and_nothing_else(board: Board) -> None:
    command = plan_command(PLAIN._replace(board=board))
    assert command[0] == board.program
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(command)
    assert value(command, "-sandbox") == SANDBOX
    for family in ("obsolete", "elevateprivileges", "spawn", "resourcecontrol"):
        assert f"{family}=deny" in SANDBOX
    assert value(command, "-display") == "none"
    assert value(command, "-accel").startswith("tcg,")
    assert value(command, "-kernel") == "/proc/self/fd/6" and value(command, "-initrd") == "/proc/self/fd/7"
    assert not any(word in command for word in ("-netdev", "-nic", "-monitor", "-serial", "-drive", "-vnc", "-object"))


def test_without_acpi_which_hangs_in_one_boot_of_seven() -> None:
    assert "acpi=off" in value(plan_command(PLAIN), "-machine")
    assert "reboot=t" in value(plan_command(PLAIN), "-append")


def test_disks() -> None:
    command = plan_command(PLAIN)
    assert values(command, "-add-fd") == ["fd=8,set=1", "fd=9,set=2"]
    root, data = (dict(pair.split("=", 1) for pair in disk.split(",")) for disk in values(command, "-blockdev"))
    assert (root["filename"], root["read-only"], root["auto-read-only"]) == ("/dev/fdset/1", "on", "off")
    assert (data["filename"], data.get("read-only", "off"), data["discard"]) == ("/dev/fdset/2", "off", "unmap")
    for disk in (root, data):
        assert disk["cache.no-flush"] == "off"  # a guest's flush reaches the host's disk
    found = values(command, "-device")
    assert "virtio-blk-device,drive=root,serial=root" in found
    assert "virtio-blk-device,drive=data,serial=data" in found


def test_sockets() -> None:
    command = plan_command(PLAIN)
    assert values(command, "-chardev") == [
        "socket,id=monitor,fd=3", "socket,id=console,fd=5", "socket,id=agent,fd=4",
    ]  # fmt: skip
    assert value(command, "-mon") == "chardev=monitor,mode=control"
    found = values(command, "-device")
    # The console's port comes first: a kernel makes hvc0 of it.
    assert found.index("virtconsole,chardev=console") < found.index("virtserialport,chardev=agent,name=nagaya.agent")


def test_whoever_moves_it_has_a_monitor_of_its_own() -> None:
    command = plan_command(PLAIN._replace(moves=9, incoming=True))
    assert "socket,id=moves,fd=9,server=on,wait=off" in values(command, "-chardev")
    assert values(command, "-mon") == ["chardev=monitor,mode=control", "chardev=moves,mode=control"]
    assert "-S" in command and value(command, "-incoming") == "defer"


def test_sizes_in_units_that_lose_nothing() -> None:
    command = plan_command(PLAIN._replace(cpus=3, memory_bytes=(70 << 20) + 4096))
    assert value(command, "-m") == f"{(70 << 10) + 4}k"
    assert value(command, "-smp") == "3"
    assert "noreplace-smp" not in value(command, "-append")
    assert "noreplace-smp" in value(plan_command(PLAIN), "-append")


def test_networks() -> None:
    command = plan_command(PLAIN._replace(cards=(Card("02:00:00:00:00:01", tap=10), Card("06:00:00:00:00:01", tap=11))))
    assert values(command, "-netdev") == ["tap,id=net0,fd=10,vhost=off", "tap,id=net1,fd=11,vhost=off"]
    assert "virtio-net-device,netdev=net0,mac=02:00:00:00:00:01" in values(command, "-device")
    assert "virtio-net-device,netdev=net1,mac=06:00:00:00:00:01" in values(command, "-device")
    command = plan_command(PLAIN._replace(cards=(Card("02:00:00:00:00:01"),)))
    assert value(command, "-netdev").startswith("user,id=net0,net=10.0.2.0/24")


def test_a_share_has_the_guests_memory_shared() -> None:
    machine = PLAIN._replace(shares=(Share("volumes", 10),))
    command = plan_command(machine)
    assert value(command, "-object") == f"memory-backend-memfd,id=ram,size={512 << 10}k,share=on"
    assert value(command, "-machine").endswith(",memory-backend=ram")
    assert "vhost-user-fs-device,chardev=share0,tag=volumes" in values(command, "-device")
    on_the_bus = [word for word in values(command, "-device") if word.split(",")[0].endswith("-device")]
    assert devices(machine) == len(on_the_bus)
    assert devices(machine._replace(cards=(Card("02:00:00:00:00:01", 10),) * 2)) <= X86_64.transports


def test_the_users_kernel_arguments_come_last_and_are_one_word() -> None:
    append = value(plan_command(PLAIN._replace(append="reboot=k -drive file=/etc/shadow,if=virtio")), "-append")
    assert append.endswith(" reboot=k -drive file=/etc/shadow,if=virtio")
    assert append.index("reboot=t") < append.index("reboot=k")


def test_platforms() -> None:
    assert find_board("linux/amd64") is X86_64
    assert find_board("linux/amd64/v2") is X86_64
    with pytest.raises(Unsupported, match="linux/s390x") as caught:
        find_board("linux/s390x")
    assert "linux/amd64" in caught.value.hint


CPUINFO = """processor\t: 0
cpu MHz\t\t: 3891.220
flags\t\t: fpu tsc constant_tsc rep_good nonstop_tsc
bogomips\t: 5192.19
power management:

processor\t: 1
bogomips\t: 1.00
"""


def test_the_counters_frequency_is_not_the_cpus() -> None:
    assert parse_khz(CPUINFO) == 2_596_095


@pytest.mark.parametrize(
    "text",
    [
        "",
        CPUINFO.replace("constant_tsc", ""),
        CPUINFO.replace("nonstop_tsc", ""),
        CPUINFO.replace("bogomips", "BogoMIPS"),
        CPUINFO.replace("5192.19", "nan"),
        CPUINFO.replace("5192.19", "0.00"),
        CPUINFO.replace("5192.19", "9" * 400),
    ],
)
def test_a_counter_that_tells_no_time_is_left_to_the_guest(text: str) -> None:
    assert parse_khz(text) == 0
    assert "tsc" not in value(plan_command(PLAIN), "-append")


def test_a_known_frequency_is_told() -> None:
    append = value(plan_command(PLAIN._replace(tsc_khz=2_596_095)), "-append")
    assert "tsc_early_khz=2596095 tsc=reliable" in append
