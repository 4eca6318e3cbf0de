"""Devices in a process of their own, where that process is real: what is left of it, and what its end means."""

from __future__ import annotations

import os
import select
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nagaya.engines.kvm.machine import Hardware, Machine
from nagaya.errors import Conflict
from nagaya.virtio import blk, mmio
from nagaya.virtio.apart import DeviceProcess
from nagaya.virtio.blk import Blk
from nagaya.virtio.queue import DESC_F_NEXT
from tests.kernel_images import Load, make_elf
from tests.virtio_driver import Driver

SPIN = b"\xf4\xeb\xfd"  # again: hlt; jmp again
PATIENCE_S = 10.0


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def process(disk: Path) -> Iterator[DeviceProcess]:
    made = DeviceProcess((Blk("blk0", str(disk)),))
    yield made
    made.close()


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def descriptors(pid: int) -> set[str]:
    held = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            held.add(os.readlink(f"/proc/{pid}/fd/{name}"))
        except FileNotFoundError:  # closed meanwhile
            pass
    return held


def test_it_holds_its_disk_and_little_else(process: DeviceProcess, disk: Path) -> None:
    secret = os.open("/etc/passwd", os.O_RDONLY)
    try:
        process.start()
        deadline = time.monotonic() + PATIENCE_S
        while "/etc/passwd" in descriptors(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        held = descriptors(process.pid)
    finally:
        os.close(secret)
    assert str(disk) in held
    assert not {name for name in held if name.startswith("/etc/") or "kvm" in name}


def test_requests_and_interrupts_do_not_pass_through_us(process: DeviceProcess, disk: Path) -> None:
    process.start()
    driver = Driver(process.devices[0])
    try:
        driver.start()
        header = driver.place(struct.pack("<IIQ", blk.T_OUT, 0, 3))
        data = driver.place(b"written apart".ljust(512))
        status = driver.place(b"\xee")
        for number, (gpa, size, flags) in enumerate(((header, 16, 1), (data, 512, 1), (status, 1, 2))):
            driver.put_descriptor(0, number, gpa, size, flags, number + 1)
        driver.offer(0, 0)
        driver.write(mmio.QUEUE_NOTIFY, 0)
        ready, _, _ = select.select([driver.interrupt_fd], [], [], PATIENCE_S)
        assert ready, "no interrupt came"
        assert driver.read(mmio.INTERRUPT_STATUS) == mmio.USED_BUFFER
        driver.write(mmio.INTERRUPT_ACK, mmio.USED_BUFFER)
        assert driver.read(mmio.INTERRUPT_STATUS) == 0
        assert driver.memory.read(status, 1) == b"\0"
        assert disk.read_bytes()[3 * 512 :].startswith(b"written apart")
        assert driver.transport.kicks == driver.transport.interrupts == 0
        counters = driver.transport.counters()
        assert counters["writes"] == counters["kicks"] == counters["interrupts"] == 1
    finally:
        driver.close()


def test_the_disk_is_free_when_it_is_closed(process: DeviceProcess, disk: Path) -> None:
    process.start()
    pid = process.pid
    with pytest.raises(Conflict):
        Blk("second", str(disk))
    process.close()
    assert is_gone(pid)
    Blk("second", str(disk)).close()


def test_a_fault_does_not_outlive_the_reset(process: DeviceProcess) -> None:
    """The driver resets before the news of its fault is heard: the next activation has no part in it."""
    process.start()
    remote = process.devices[0]
    driver = Driver(remote)
    try:
        driver.start()
        driver.put_descriptor(0, 0, 0x80000, 16, DESC_F_NEXT, 0)  # a loop
        driver.offer(0, 0)
        driver.write(mmio.QUEUE_NOTIFY, 0)
        deadline = time.monotonic() + PATIENCE_S
        while not select.select([remote._news], [], [], 0)[0] and time.monotonic() < deadline:
            remote.counters()
        driver.start()
        driver.pump()
        assert not driver.status & mmio.DEVICE_NEEDS_RESET and not driver.transport.fault
        remote._hear()  # as a loop does that had seen the news before the reset took it away
        assert not driver.status & mmio.DEVICE_NEEDS_RESET
    finally:
        driver.close()


def test_its_end_stops_the_device_until_for_ever(process: DeviceProcess) -> None:
    process.start()
    lost: list[str] = []
    process.devices[0].on_lost = lost.append
    driver = Driver(process.devices[0])
    try:
        driver.start()
        os.kill(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE_S
        while not lost and time.monotonic() < deadline:
            driver.pump()
            time.sleep(0.01)
        assert lost == ["the process of blk0 has ended"]
        assert driver.status & mmio.DEVICE_NEEDS_RESET
        with pytest.raises(AssertionError):
            driver.start()
            assert not driver.status & mmio.DEVICE_NEEDS_RESET
    finally:
        driver.close()


def test_it_ends_with_a_killed_parent(disk: Path) -> None:
    told, tell = os.pipe()
    parent = os.fork()
    if parent == 0:
        process = DeviceProcess((Blk("blk0", str(disk)),))
        process.start()
        os.write(tell, struct.pack("i", process.pid))
        signal.pause()
    child = struct.unpack("i", os.read(told, 4))[0]
    os.close(told)
    os.close(tell)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + PATIENCE_S
    while not is_gone(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_gone(child)
    Blk("second", str(disk)).close()  # which waits a moment by itself


def test_the_machine_fails_when_it_does(process: DeviceProcess, tmp_path: Path) -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/kvm")
    kernel = tmp_path / "kernel"
    kernel.write_bytes(make_elf([Load(SPIN, 0x10_0000)], entry=0x10_0000, notes=b""))
    hardware = Hardware(kernel=str(kernel), memory_bytes=64 << 20)
    with Machine(hardware, process.devices, apart=process) as machine:
        machine.start()
        (pid,) = machine.processes()
        counters = machine.counters()
        assert counters["blk0"]["reads"] == 0
        os.kill(pid, signal.SIGKILL)
        machine.counters()  # whoever asks it notices; a driver's next request does not, and the loop does once it is active
        ending = machine.wait(PATIENCE_S)
    assert ending is not None and (ending.kind, ending.reason) == ("failed", "the process of blk0 has ended")
