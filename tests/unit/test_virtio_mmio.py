"""The mmio transport: registers, negotiation, and a guest that does what no driver does."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from nagaya.errors import GuestFault
from nagaya.virtio import mmio
from nagaya.virtio.device import RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1, Activated
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
    assert driver.read(mmio.QUEUE_READY) == 1
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


class Fake:
    """A device of three queues that notes what is asked of it, and does what a test says."""

    name, device_id, features = "fake0", 42, 1 << 5 | 1 << 33
    queue_sizes = (16, 64, 4)

    def __init__(self) -> None:
        self.said: list[str] = []
        self.config = bytearray(b"abcdefghij")
        self.live: Activated | None = None
        self.threads: set[int] = set()
        self.on_activate: Callable[[], None] = lambda: None
        self.on_kick: Callable[[], None] = lambda: None

    def note(self, what: str) -> None:
        self.said.append(what)
        self.threads.add(threading.get_ident())

    def read_config(self, offset: int, size: int) -> bytes:
        return bytes(self.config[offset : offset + size])

    def write_config(self, offset: int, data: bytes) -> None:
        self.config[offset : offset + len(data)] = data

    def activate(self, live: Activated) -> None:
        self.note("activate")
        self.live = live
        self.on_activate()

    def kicked(self, queue: int) -> None:
        self.note(f"kicked {queue}")
        self.on_kick()

    def reset(self) -> None:
        self.note("reset")
        self.live = None

    def close(self) -> None:
        self.note("close")

    def counters(self) -> dict[str, int]:
        return {"said": len(self.said)}


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def fakes(fake: Fake) -> Iterator[Driver]:
    """The driver of a `Fake`."""
    made = Driver(fake)
    yield made
    made.close()


def refuse() -> None:
    raise GuestFault("the device did not like it")


def wait(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 3
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.001)


def test_features_are_in_words_of_32_bits(fakes: Driver) -> None:
    assert fakes.offered() == Fake.features | VERSION_1 | RING_EVENT_IDX | RING_INDIRECT_DESC
    for word in (2, 77, 0xFFFF_FFFF):
        fakes.write(mmio.DEVICE_FEATURES_SEL, word)
        assert fakes.read(mmio.DEVICE_FEATURES) == 0
    assert fakes.accept(VERSION_1 | 1 << 33)
    fakes.write(mmio.STATUS, FINE)
    assert fakes.transport._features == VERSION_1 | 1 << 33


def test_features_of_words_that_are_not_there_go_nowhere(fakes: Driver) -> None:
    assert fakes.accept(VERSION_1)
    fakes.write(mmio.STATUS, 0)
    fakes.write(mmio.STATUS, mmio.ACKNOWLEDGE | mmio.DRIVER)
    fakes.write(mmio.DRIVER_FEATURES_SEL, 1)
    fakes.write(mmio.DRIVER_FEATURES, 1)
    fakes.write(mmio.DRIVER_FEATURES_SEL, 2)
    fakes.write(mmio.DRIVER_FEATURES, 0xFFFF_FFFF)
    fakes.write(mmio.STATUS, mmio.ACKNOWLEDGE | mmio.DRIVER | mmio.FEATURES_OK)
    assert fakes.status & mmio.FEATURES_OK


def test_a_refused_driver_may_ask_for_less(fakes: Driver, fake: Fake) -> None:
    assert not fakes.accept(VERSION_1 | 1 << 7)
    fakes.write(mmio.DRIVER_FEATURES_SEL, 0)
    fakes.write(mmio.DRIVER_FEATURES, 1 << 5)
    fakes.write(mmio.STATUS, mmio.ACKNOWLEDGE | mmio.DRIVER | mmio.FEATURES_OK)
    assert fakes.status & mmio.FEATURES_OK
    fakes.write(mmio.STATUS, FINE)
    assert fake.live is not None and fake.live.features == VERSION_1 | 1 << 5


def test_what_was_agreed_on_stays(fakes: Driver, fake: Fake) -> None:
    assert fakes.accept(VERSION_1)
    fakes.write(mmio.DRIVER_FEATURES_SEL, 0)
    fakes.write(mmio.DRIVER_FEATURES, 1 << 5)
    fakes.write(mmio.STATUS, FINE)
    assert fake.live is not None and fake.live.features == VERSION_1


def test_the_status_grows_until_a_reset(fakes: Driver, fake: Fake) -> None:
    fakes.start(size=4)
    fakes.write(mmio.STATUS, mmio.ACKNOWLEDGE)  # bits are not the driver's to take back
    assert fakes.status == FINE
    fakes.write(mmio.STATUS, FINE)
    assert fake.said == ["activate"]
    fakes.write(mmio.STATUS, FINE | mmio.DEVICE_NEEDS_RESET)  # nor is this one the driver's to set
    assert fakes.status == FINE
    fakes.write(mmio.STATUS, FINE | mmio.FAILED)
    assert fakes.status == FINE | mmio.FAILED
    fakes.write(mmio.STATUS, 0)
    fakes.write(mmio.STATUS, 0)
    assert fakes.status == 0
    assert fake.said == ["activate", "reset"]


def test_no_device_without_an_agreement(fakes: Driver, fake: Fake) -> None:
    fakes.write(mmio.STATUS, mmio.ACKNOWLEDGE | mmio.DRIVER | mmio.DRIVER_OK)
    fakes.kick(0)
    assert fake.said == []


def test_queues_that_the_driver_leaves_off(fakes: Driver, fake: Fake) -> None:
    assert fakes.accept(VERSION_1)
    fakes.set_queue(1, size=32, descriptors=0x10000, available=0x12000, used=0x13000)
    assert fakes.read(mmio.QUEUE_READY) == 1
    fakes.write(mmio.STATUS, FINE)
    assert fake.live is not None
    first, second, third = fake.live.queues
    assert first is None and third is None
    assert second is not None and (second.index, second.size) == (1, 32)
    assert (second.descriptors, second.available, second.used) == (0x10000, 0x12000, 0x13000)


def test_each_queue_has_registers_of_its_own(fakes: Driver) -> None:
    for number, most in enumerate(Fake.queue_sizes):
        fakes.write(mmio.QUEUE_SEL, number)
        assert fakes.read(mmio.QUEUE_NUM_MAX) == most
        assert fakes.read(mmio.QUEUE_READY) == 0
    fakes.write(mmio.QUEUE_READY, 1)
    fakes.write(mmio.QUEUE_SEL, 1)
    assert fakes.read(mmio.QUEUE_READY) == 0
    for number in (3, 0x8000_0000, 0xFFFF_FFFF):
        fakes.write(mmio.QUEUE_SEL, number)
        fakes.write(mmio.QUEUE_NUM, 2)
        fakes.write(mmio.QUEUE_READY, 1)
        assert (fakes.read(mmio.QUEUE_NUM_MAX), fakes.read(mmio.QUEUE_READY)) == (0, 0)


def test_a_ready_queue_moves_only_after_it_was_not_ready(fakes: Driver, fake: Fake) -> None:
    assert fakes.accept(VERSION_1)
    fakes.set_queue(0, size=8, descriptors=0x10000, available=0x12000, used=0x13000)
    fakes.write(mmio.QUEUE_DESC_LOW, 0x20000)
    fakes.write(mmio.QUEUE_NUM, 16)
    fakes.set_queue(1, size=8, descriptors=0x14000, available=0x16000, used=0x17000)
    fakes.write(mmio.QUEUE_READY, 0)
    fakes.write(mmio.QUEUE_DESC_LOW, 0x20000)
    fakes.write(mmio.QUEUE_READY, 1)
    fakes.write(mmio.STATUS, FINE)
    assert fake.live is not None
    first, second, _ = fake.live.queues
    assert first is not None and (first.size, first.descriptors) == (8, 0x10000)
    assert second is not None and (second.size, second.descriptors) == (8, 0x20000)


def test_halves_of_an_address_in_any_order(fakes: Driver) -> None:
    registers = fakes.transport._registers[0]
    lows = (mmio.QUEUE_DESC_LOW, mmio.QUEUE_DRIVER_LOW, mmio.QUEUE_DEVICE_LOW)
    for number, low in enumerate(lows):
        fakes.write(low + 4, 0x1111_1111 * (number + 1))
        fakes.write(low, 0xFFFF_FFFF)
        fakes.write(low, 0x8765_4320 + number)
    assert registers.addresses == [0x1111_1111_8765_4320, 0x2222_2222_8765_4321, 0x3333_3333_8765_4322]
    fakes.write(mmio.QUEUE_DESC_HIGH, 0)
    assert registers.addresses[0] == 0x8765_4320


def test_a_reset_forgets_everything(fakes: Driver) -> None:
    fakes.start(size=4)
    fakes.write(mmio.QUEUE_SEL, 2)
    fakes.transport._config_changed()
    fakes.write(mmio.STATUS, 0)
    assert fakes.read(mmio.QUEUE_NUM_MAX) == Fake.queue_sizes[0], "the selection is the first queue again"
    assert fakes.read(mmio.INTERRUPT_STATUS) == 0
    for number in range(3):
        fakes.write(mmio.QUEUE_SEL, number)
        assert fakes.read(mmio.QUEUE_READY) == 0
    fakes.write(mmio.STATUS, mmio.ACKNOWLEDGE | mmio.DRIVER | mmio.FEATURES_OK)
    assert not fakes.status & mmio.FEATURES_OK, "no features are left from before"


def test_configuration_space(fakes: Driver, fake: Fake) -> None:
    assert fakes.transport.read(mmio.CONFIG, 1) == b"a"
    assert fakes.transport.read(mmio.CONFIG + 1, 2) == b"bc"
    assert fakes.transport.read(mmio.CONFIG + 3, 8) == b"defghij\0"
    assert fakes.transport.read(mmio.CONFIG + 0xF8, 8) == bytes(8)
    fakes.transport.write(mmio.CONFIG + 2, b"XY")
    assert fake.config == b"abXYefghij"


def test_a_change_of_the_configuration_is_told(fakes: Driver, fake: Fake) -> None:
    fakes.start(size=4)
    before = fakes.read(mmio.CONFIG_GENERATION)
    assert fake.live is not None
    fake.live.config_changed()
    assert fakes.read(mmio.CONFIG_GENERATION) == before + 1
    assert fakes.read(mmio.INTERRUPT_STATUS) == mmio.CONFIG_CHANGE
    assert fakes.interrupts() == 1


def test_an_acknowledgement_is_for_what_it_names(fakes: Driver, fake: Fake) -> None:
    fakes.start(size=4)
    assert fake.live is not None and fake.live.queues[0] is not None
    fake.live.queues[0].interrupt()
    fake.live.config_changed()
    assert fakes.read(mmio.INTERRUPT_STATUS) == mmio.USED_BUFFER | mmio.CONFIG_CHANGE
    fakes.write(mmio.INTERRUPT_ACK, mmio.USED_BUFFER)
    assert fakes.read(mmio.INTERRUPT_STATUS) == mmio.CONFIG_CHANGE
    fakes.write(mmio.INTERRUPT_ACK, 0xFFFF_FFFC)
    assert fakes.read(mmio.INTERRUPT_STATUS) == mmio.CONFIG_CHANGE
    fakes.write(mmio.INTERRUPT_ACK, 0xFFFF_FFFF)
    assert fakes.read(mmio.INTERRUPT_STATUS) == 0
    assert fakes.interrupts() == 2


READ_ONLY = [
    mmio.MAGIC_VALUE, mmio.DEVICE_VERSION, mmio.DEVICE_ID, mmio.VENDOR_ID, mmio.DEVICE_FEATURES, mmio.QUEUE_NUM_MAX,
    mmio.INTERRUPT_STATUS, mmio.CONFIG_GENERATION, mmio.SHM_LEN_LOW,
]  # fmt: skip


@pytest.mark.parametrize("offset", READ_ONLY)
def test_registers_that_cannot_be_written(fakes: Driver, offset: int) -> None:
    before = fakes.read(offset)
    fakes.write(offset, ~before & 0xFFFF_FFFF)
    assert fakes.read(offset) == before


WRITE_ONLY = [
    mmio.DEVICE_FEATURES_SEL, mmio.DRIVER_FEATURES, mmio.DRIVER_FEATURES_SEL, mmio.QUEUE_SEL, mmio.QUEUE_NUM,
    mmio.QUEUE_NOTIFY, mmio.INTERRUPT_ACK, mmio.QUEUE_DESC_LOW, mmio.QUEUE_DEVICE_HIGH, mmio.SHM_SEL,
]  # fmt: skip


@pytest.mark.parametrize("offset", WRITE_ONLY)
def test_registers_that_cannot_be_read(fakes: Driver, offset: int) -> None:
    fakes.write(offset, 1)
    assert fakes.read(offset) == 0


@pytest.mark.parametrize("data", [b"\0", b"\0\0", bytes(8)])
def test_a_status_of_another_width_is_none(fakes: Driver, fake: Fake, data: bytes) -> None:
    fakes.start(size=4)
    fakes.transport.write(mmio.STATUS, data)
    fakes.transport.write(mmio.STATUS + 2, bytes(4))
    assert fakes.status == FINE
    assert fake.said == ["activate"]


def test_a_device_that_refuses_to_start(fakes: Driver, fake: Fake) -> None:
    fake.on_activate = refuse
    fakes.start(size=4)
    assert fakes.status == FINE | mmio.DEVICE_NEEDS_RESET
    assert fakes.transport.fault == "the device did not like it"
    assert fake.said == ["activate", "reset"]
    fake.on_activate = lambda: None
    fakes.start(size=4)
    assert fakes.status == FINE
    assert fake.said[2:] == ["activate"]


@pytest.mark.parametrize("by_back_end", [False, True])
def test_a_fault_and_what_follows(fakes: Driver, fake: Fake, by_back_end: bool) -> None:
    fakes.start(size=4)
    if by_back_end:
        assert fake.live is not None
        fake.live.fault(GuestFault("the device did not like it"))
    else:
        fake.on_kick = refuse
        fakes.kick(1)
    assert fakes.status == FINE | mmio.DEVICE_NEEDS_RESET
    assert fakes.read(mmio.INTERRUPT_STATUS) == mmio.CONFIG_CHANGE
    assert fakes.interrupts() == 1
    said = list(fake.said)
    assert said[-1] == "reset"
    for queue in range(3):
        fakes.kick(queue)
    fakes.write(mmio.STATUS, FINE)  # asking again is no reset
    assert fakes.status == FINE | mmio.DEVICE_NEEDS_RESET
    assert fake.said == said
    fakes.write(mmio.STATUS, 0)
    assert fake.said == said, "it was reset once"
    assert fakes.transport.counters()["faults"] == 1
    fake.on_kick = lambda: None
    fakes.start(size=4)
    fakes.kick(2)
    assert fake.said[-2:] == ["activate", "kicked 2"]


def test_what_the_machine_resets_is_as_new(fakes: Driver, fake: Fake) -> None:
    fakes.start(size=4)
    fakes.transport.reset()
    assert fakes.status == 0
    assert fake.said == ["activate", "reset"]
    fakes.transport.reset()
    assert fake.said == ["activate", "reset"]


# -- with the loop's own thread, as in a machine


def test_the_devices_business_is_the_loops(fakes: Driver, fake: Fake) -> None:
    fakes.loop.start()
    fakes.start(size=4)
    for queue in range(3):
        fakes.write(mmio.QUEUE_NOTIFY, queue)
    wait(lambda: len(fake.said) == 4)
    assert sorted(fake.said[1:]) == ["kicked 0", "kicked 1", "kicked 2"]
    fakes.write(mmio.STATUS, 0)
    assert fake.said[-1] == "reset"
    assert len(fake.threads) == 1 and threading.get_ident() not in fake.threads


def test_a_notification_by_ioeventfd_and_by_register(driver: Driver) -> None:
    driver.loop.start()
    driver.start()
    driver.put_descriptor(0, 0, driver.place(bytes(8)), 8, DESC_F_WRITE)
    driver.offer(0, 0)
    os.eventfd_write(driver.transport.kick_fds[0], 1)
    wait(lambda: driver.used_index() == 1)
    driver.offer(0, 0)
    driver.write(mmio.QUEUE_NOTIFY, 0)
    wait(lambda: driver.used_index() == 2)
    wait(lambda: driver.transport.interrupts == 2)


def test_a_kick_ahead_of_the_start_is_kept(fakes: Driver, fake: Fake) -> None:
    fakes.loop.start()
    fakes.write(mmio.QUEUE_NOTIFY, 1)
    fakes.start(size=4)
    wait(lambda: fake.said == ["activate", "kicked 1"])


def test_a_fault_on_the_loop_is_seen_by_the_driver(fakes: Driver, fake: Fake) -> None:
    fakes.loop.start()
    fake.on_kick = refuse
    fakes.start(size=4)
    fakes.write(mmio.QUEUE_NOTIFY, 0)
    wait(lambda: fakes.status & mmio.DEVICE_NEEDS_RESET)
    wait(lambda: fakes.read(mmio.INTERRUPT_STATUS) == mmio.CONFIG_CHANGE)
    fakes.write(mmio.QUEUE_NOTIFY, 0)
    for _ in range(3):  # rounds of the loop, in which a kick that is watched would be seen
        fakes.loop.call(lambda: None)
        time.sleep(0.005)
    assert fake.said == ["activate", "kicked 0", "reset"]
    assert fakes.transport.kicks == 1


def test_a_reset_waits_for_what_is_under_way(fakes: Driver, fake: Fake) -> None:
    """Section 2.1.1: once the status reads 0, the device is through with the driver's memory."""
    under_way, go_on, order = threading.Event(), threading.Event(), list[str]()

    def work() -> None:
        under_way.set()
        assert go_on.wait(3)
        order.append("the work's end")

    def reset() -> None:
        fakes.write(mmio.STATUS, 0)
        order.append("the reset's end")

    fakes.loop.start()
    fake.on_kick = work
    fakes.start(size=4)
    fakes.write(mmio.QUEUE_NOTIFY, 0)
    assert under_way.wait(3)
    thread = threading.Thread(target=reset)
    thread.start()
    try:
        thread.join(0.05)
        assert thread.is_alive() and fakes.status == FINE, "not before the device is through"
    finally:
        go_on.set()
        thread.join(3)
    assert order == ["the work's end", "the reset's end"]
    assert fake.said == ["activate", "kicked 0", "reset"]
    assert fakes.status == 0


def test_another_cpu_selects_another_queue_meanwhile(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right after the transport looked at the selection: it may look once only."""
    look = driver.transport._queue_registers

    def look_and_change() -> object:
        found = look()
        driver.write(mmio.QUEUE_SEL, 77)
        return found

    monkeypatch.setattr(driver.transport, "_queue_registers", look_and_change)
    assert driver.read(mmio.QUEUE_NUM_MAX) == 64


def test_another_cpu_changes_the_size_meanwhile(fakes: Driver, fake: Fake) -> None:
    """The size that was checked is the one that is used."""

    class Changing(mmio._QueueRegisters):
        looks = 0

        def __getattribute__(self, name: str) -> object:
            if name != "size":
                return super().__getattribute__(name)
            self.looks += 1
            return 16 if self.looks == 1 else 1 << 10

    assert fakes.accept(VERSION_1)
    fakes.transport._registers[0] = Changing(16)
    fakes.set_queue(0, size=16, descriptors=0x10000, available=0x14000, used=0x18000)
    fakes.write(mmio.STATUS, FINE)
    assert fake.live is not None and fake.live.queues[0] is not None
    assert fake.live.queues[0].size == 16


def test_many_threads_at_the_registers(driver: Driver) -> None:
    """vCPUs that fight over one device get nonsense, but no exception, and the device works afterwards."""
    driver.loop.start()
    errors: list[BaseException] = []
    end = time.monotonic() + 0.4
    interval = sys.getswitchinterval()

    def fight(seed: int) -> None:
        dice = random.Random(seed)
        try:
            while time.monotonic() < end:
                driver.write(
                    dice.choice((mmio.QUEUE_SEL, mmio.STATUS, *range(0, 0x100, 4))), dice.choice((0, 1, 77, FINE))
                )
                driver.write(mmio.QUEUE_SEL, dice.choice((0, 77)))
                driver.read(mmio.QUEUE_NUM_MAX)
                driver.read(dice.randrange(0, 0x100, 4))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=fight, args=(seed,)) for seed in range(3)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
    driver.start()
    driver.put_descriptor(0, 0, driver.place(bytes(8)), 8, DESC_F_WRITE)
    driver.offer(0, 0)
    driver.write(mmio.QUEUE_NOTIFY, 0)
    wait(lambda: driver.used_index() == 1)
