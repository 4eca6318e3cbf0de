"""The mmio transport: registers, negotiation, and a guest that does what no driver does."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from nagaya.virtio import mmio
from nagaya.virtio.device import RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1
from nagaya.virtio.queue import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE
from nagaya.virtio.rng import MOST_BYTES, Rng
from tests.virtio_driver import RINGS_GPA, Driver

FINE = mmio.ACKNOWLEDGE | mmio.DRIVER | mmio.FEATURES_OK | mmio.DRIVER_OK


@pytest.fixture
def driver() -> Iterator[Driver]:
    made = Driver(Rng())
    yield made
    made.close()


def test_it_says_what_it_is(driver: Driver) -> None:
    assert driver.transport.read(mmio.MAGIC_VALUE, 4) == b"virt"
    assert driver.read(mmio.DEVICE_VERSION) == 2
    assert driver.read(mmio.DEVICE_ID) == 4
    assert driver.offered() == VERSION_1 | RING_EVENT_IDX | RING_INDIRECT_DESC
    assert driver.read(mmio.QUEUE_NUM_MAX) == 64
    driver.write(mmio.QUEUE_SEL, 1)
    assert driver.read(mmio.QUEUE_NUM_MAX) == 0
    assert driver.read(mmio.SHM_LEN_LOW) == 0xFFFF_FFFF


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (0, 8), (2, 4), (0xF0, 4), (0x1F8, 8)])
def test_other_accesses_read_as_zero(driver: Driver, offset: int, size: int) -> None:
    assert driver.transport.read(offset, size) == bytes(size)
    driver.transport.write(offset, b"\xff" * size)


@pytest.mark.parametrize("features", [0, RING_EVENT_IDX, VERSION_1 | 1, VERSION_1 | 1 << 40])
def test_features_that_cannot_be_are_refused(driver: Driver, features: int) -> None:
    assert not driver.accept(features)
    driver.write(mmio.STATUS, mmio.ACKNOWLEDGE | mmio.DRIVER | mmio.DRIVER_OK)
    assert not driver.transport._active


def test_a_request(driver: Driver) -> None:
    driver.start()
    written, (data,) = driver.send([], [32])
    assert written == 32
    assert data != b"\xee" * 32
    assert driver.interrupts() == 1
    assert driver.read(mmio.INTERRUPT_STATUS) == mmio.USED_BUFFER
    driver.write(mmio.INTERRUPT_ACK, mmio.USED_BUFFER)
    assert driver.read(mmio.INTERRUPT_STATUS) == 0
    assert driver.transport.counters() == {"requests": 1, "bytes": 32, "kicks": 1, "interrupts": 1, "faults": 0}


def test_a_request_for_much_gets_a_page(driver: Driver) -> None:
    driver.start()
    written, (data,) = driver.send([], [2 * MOST_BYTES])
    assert written == MOST_BYTES
    assert data[MOST_BYTES:] == b"\xee" * MOST_BYTES


def test_an_indirect_request(driver: Driver) -> None:
    driver.start(features=VERSION_1 | RING_INDIRECT_DESC)
    target = driver.place(bytes(64))
    table = driver.place(target.to_bytes(8, "little") + (64).to_bytes(4, "little") + DESC_F_WRITE.to_bytes(4, "little"))
    driver.put_descriptor(0, 0, table, 16, DESC_F_INDIRECT)
    driver.offer(0, 0)
    driver.kick()
    assert driver.used_element(0, 0) == (0, 64)
    assert driver.memory.read(target, 64) != bytes(64)


def test_a_driver_that_wants_no_interrupt_gets_none(driver: Driver) -> None:
    driver.start()
    driver.memory.write(RINGS_GPA + 0x2000, b"\1\0")
    driver.send([], [8])
    assert driver.interrupts() == 0


FAULTS = {
    "out of memory": (1 << 40, 16, DESC_F_WRITE, 0),
    "no bytes": (0x80000, 0, DESC_F_WRITE, 0),
    "wraps": ((1 << 64) - 8, 16, DESC_F_WRITE, 0),
    "loop": (0x80000, 16, DESC_F_WRITE | DESC_F_NEXT, 0),
    "next beyond the table": (0x80000, 16, DESC_F_WRITE | DESC_F_NEXT, 64),
    "indirect that was not agreed on": (0x80000, 16, DESC_F_INDIRECT, 0),
    "nothing to write to": (0x80000, 16, 0, 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_stops_the_device_until_a_reset(driver: Driver, fault: str) -> None:
    driver.start()
    gpa, size, flags, following = FAULTS[fault]
    driver.put_descriptor(0, 0, gpa, size, flags, following)
    driver.offer(0, 0)
    driver.kick()
    assert driver.status == FINE | mmio.DEVICE_NEEDS_RESET
    assert driver.read(mmio.INTERRUPT_STATUS) & mmio.CONFIG_CHANGE
    assert driver.transport.fault
    assert driver.used_index() == 0
    driver.kick()  # into the void
    assert driver.used_index() == 0
    driver.write(mmio.STATUS, 0)
    assert driver.status == 0
    driver.start()
    assert driver.send([], [8])[0] == 8


@pytest.mark.parametrize("index", [65, 0x8000, 0xFFFF])
def test_more_chains_than_there_can_be(driver: Driver, index: int) -> None:
    driver.start()
    driver.memory.write(RINGS_GPA + 0x2002, index.to_bytes(2, "little"))
    driver.kick()
    assert driver.status & mmio.DEVICE_NEEDS_RESET


@pytest.mark.parametrize(
    ("size", "descriptors", "available", "used"),
    [
        (128, 0x10000, 0x12000, 0x13000),
        (0, 0x10000, 0x12000, 0x13000),
        (3, 0x10000, 0x12000, 0x13000),
        (64, 0x10008, 0x12000, 0x13000),
        (64, 0x10000, 0x12001, 0x13000),
        (64, 0x10000, 0x12000, 0x13002),
        (64, 0x10000, 0x12000, 0xFFFFF000),
        (64, 1 << 63, 0x12000, 0x13000),
    ],
)
def test_rings_that_cannot_be(driver: Driver, size: int, descriptors: int, available: int, used: int) -> None:
    assert driver.accept(VERSION_1)
    driver.set_queue(0, size=size, descriptors=descriptors, available=available, used=used)
    driver.write(mmio.STATUS, FINE)
    assert driver.status & mmio.DEVICE_NEEDS_RESET
    assert not driver.transport._active


def test_a_queue_does_not_move_under_the_device(driver: Driver) -> None:
    driver.start()
    driver.write(mmio.QUEUE_SEL, 0)
    driver.write(mmio.QUEUE_READY, 0)
    driver.write(mmio.QUEUE_DESC_LOW, 0)
    driver.write(mmio.QUEUE_NUM, 2)
    assert driver.send([], [8])[0] == 8


def test_kicks_by_eventfd_and_by_register_are_one(driver: Driver) -> None:
    driver.start()
    os.eventfd_write(driver.transport.kick_fds[0], 3)
    driver.put_descriptor(0, 0, driver.place(bytes(8)), 8, DESC_F_WRITE)
    driver.offer(0, 0)
    driver.kick()
    assert driver.used_index() == 1
    assert driver.transport.kicks == 1
    driver.write(mmio.QUEUE_NOTIFY, 77)  # no such queue
