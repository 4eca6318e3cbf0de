"""What the standard asks of every virtio device, asked of every one of ours by the same driver (virtio 1.2, 2, 3.1, 4.2)."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nagaya.virtio import mmio
from nagaya.virtio.apart import DeviceProcess
from nagaya.virtio.blk import Blk
from nagaya.virtio.device import ENTROPY, NET, RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1, Device
from nagaya.virtio.queue import AVAIL_F_NO_INTERRUPT, DESC_F_NEXT, DESC_F_WRITE
from tests.fuzz.test_virtio_fuzz import SUBJECTS, DiskSubject, Subject
from tests.virtio_driver import BUFFERS_GPA, MEMORY_BYTES, RING_STEP, RINGS_GPA, ApartDriver, Driver

FINE = mmio.ACKNOWLEDGE | mmio.DRIVER | mmio.FEATURES_OK | mmio.DRIVER_OK
RINGS = pytest.mark.parametrize("rings", [0, RING_EVENT_IDX, RING_INDIRECT_DESC, RING_EVENT_IDX | RING_INDIRECT_DESC])


class ApartSubject(DiskSubject):
    """A disk in a process of its own."""

    def make(self) -> Device:
        disk = super().make()
        assert isinstance(disk, Blk)
        self.process = DeviceProcess((disk,))
        self.process.start()
        return self.process.devices[0]

    def close(self) -> None:
        super().close()
        self.process.close()


@pytest.fixture(params=[*SUBJECTS, ApartSubject], ids=lambda subject: subject.__name__.removesuffix("Subject") or "Rng")
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    made: Subject = request.param(random.Random(7), tmp_path)
    yield made
    made.close()


@pytest.fixture
def driver(subject: Subject) -> Iterator[Driver]:
    made = (ApartDriver if isinstance(subject, ApartSubject) else Driver)(subject.device)
    yield made
    made.close()


def ask(subject: Subject, driver: Driver, *, times: int = 1) -> None:
    """Requests that are answered at once; the daemon of a file system answers its own."""
    proof = subject.proof()
    for _ in range(times if proof is not None else 0):
        assert proof is not None
        queue, request = proof
        driver._next_buffer = BUFFERS_GPA
        driver.send(*request, queue=queue)
        for held in subject.sockets:
            subject.drain(held)
    assert driver.status == FINE, driver.transport.fault


def test_it_says_what_it_is(driver: Driver) -> None:
    assert driver.read(mmio.MAGIC_VALUE) == int.from_bytes(b"virt", "little")
    assert driver.read(mmio.DEVICE_VERSION) == 2
    assert driver.read(mmio.DEVICE_ID) == driver.device.device_id > 0
    assert driver.status == 0
    offered = driver.offered()
    assert offered & VERSION_1 and offered & driver.device.features == driver.device.features
    driver.write(mmio.DEVICE_FEATURES_SEL, 2)
    assert driver.read(mmio.DEVICE_FEATURES) == 0


def test_its_queues_are_powers_of_two_and_the_next_one_is_none(driver: Driver) -> None:
    for number, most in enumerate(driver.device.queue_sizes):
        driver.write(mmio.QUEUE_SEL, number)
        assert driver.read(mmio.QUEUE_NUM_MAX) == most and most & (most - 1) == 0
        assert driver.read(mmio.QUEUE_READY) == 0
    driver.write(mmio.QUEUE_SEL, len(driver.device.queue_sizes))
    assert driver.read(mmio.QUEUE_NUM_MAX) == 0


@pytest.mark.parametrize("missing", ["version", "unknown bit"])
def test_features_that_cannot_be_are_refused(driver: Driver, missing: str) -> None:
    offered = driver.offered()
    unknown = next(1 << bit for bit in range(63, -1, -1) if not offered >> bit & 1)
    assert not driver.accept(offered & ~VERSION_1 if missing == "version" else offered | unknown)
    driver.write(mmio.STATUS, FINE)
    assert not driver.status & mmio.FEATURES_OK
    assert driver.accept(offered)


def test_its_configuration_reads_the_same_by_every_width(driver: Driver) -> None:
    whole = b"".join(driver.transport.read(mmio.CONFIG + at, 1) for at in range(0x100))
    for width in (2, 4, 8):
        assert whole == b"".join(driver.transport.read(mmio.CONFIG + at, width) for at in range(0, 0x100, width))
    for at in range(0x100):
        driver.transport.write(mmio.CONFIG + at, b"\xff")
    driver.start(features=driver.offered())
    assert driver.status == FINE


@RINGS
def test_it_works_with_every_kind_of_ring(subject: Subject, driver: Driver, rings: int) -> None:
    features = driver.offered() & ~(RING_EVENT_IDX | RING_INDIRECT_DESC) | rings
    driver.start(features=features)
    ask(subject, driver, times=3)


def test_it_works_with_nothing_but_the_version(subject: Subject, driver: Driver) -> None:
    driver.start(features=VERSION_1, size=16)
    ask(subject, driver)


def test_indices_come_round(subject: Subject, driver: Driver) -> None:
    """The ring's all of them; the 16 bits' of two, for the queue is the same one in every device."""
    driver.start(features=driver.offered(), size=4)
    ask(subject, driver, times=65536 + 9 if driver.device.device_id in (NET, ENTROPY) else 100)


def test_a_reset_forgets_everything_and_a_fresh_start_works(subject: Subject, driver: Driver) -> None:
    for _ in range(3):
        driver.start(features=driver.offered())
        ask(subject, driver)
        for queue in range(len(driver.device.queue_sizes)):  # given, and never kicked
            driver.put_descriptor(queue, 0, BUFFERS_GPA, 4096, DESC_F_WRITE)
            driver.offer(queue, 0)
        driver.write(mmio.STATUS, 0)
        assert driver.status == 0 and driver.read(mmio.INTERRUPT_STATUS) == 0
        for number in range(len(driver.device.queue_sizes)):
            driver.write(mmio.QUEUE_SEL, number)
            assert driver.read(mmio.QUEUE_READY) == 0
        driver.pump()
    assert not driver.transport.faults


@pytest.mark.parametrize("event_index", [False, True])
def test_interrupts_that_the_driver_does_not_want_do_not_come(
    subject: Subject, driver: Driver, event_index: bool
) -> None:
    """Sections 2.7.7.1 and 2.7.7.2: by a flag, or by the index of the used element that it wants to hear of."""
    proof = subject.proof()
    if proof is None:
        pytest.skip("its daemon interrupts")
    queue = proof[0]
    available = RINGS_GPA + queue * RING_STEP + 0x2000
    driver.start(features=driver.offered() & ~RING_EVENT_IDX | (RING_EVENT_IDX if event_index else 0), size=16)

    def want(*, soon: bool) -> None:
        if event_index:
            at = driver.used_index(queue) if soon else driver.used_index(queue) - 1 & 0xFFFF
            driver.poke(available + 4 + 2 * driver.size, struct.pack("<H", at))
        else:
            driver.poke(available, struct.pack("<H", 0 if soon else AVAIL_F_NO_INTERRUPT))

    for soon in (False, True, False, False, True):
        driver.interrupts()
        want(soon=soon)
        ask(subject, driver)
        assert driver.interrupts() == int(soon)


def test_a_reset_under_load_is_the_end_of_all_requests(subject: Subject, driver: Driver) -> None:
    """The device works on a thread meanwhile: once the reset is answered, it touches the guest's memory no more."""
    proof = subject.proof()
    if proof is None:
        pytest.skip("its daemon works on the rings")
    queue, (readable, writable) = proof
    driver.loop.start()
    answered = 0
    for number in range(30):
        driver.start(features=driver.offered(), size=64)
        driver._next_buffer = BUFFERS_GPA
        parts = [(driver.place(data), len(data), 0) for data in readable]
        parts += [(driver.place(b"\xee" * size), size, DESC_F_WRITE) for size in writable]
        for at, (gpa, size, flags) in enumerate(parts):
            last = at == len(parts) - 1
            driver.put_descriptor(queue, at, gpa, size, flags | (0 if last else DESC_F_NEXT), 0 if last else at + 1)
        for _ in range(60):
            driver.offer(queue, 0)
        driver.write(mmio.QUEUE_NOTIFY, queue)
        time.sleep(number % 10 * 0.0001)
        driver.write(mmio.STATUS, 0)
        driver.interrupts()
        answered += driver.used_index(queue)
        driver.poke(BUFFERS_GPA, b"\x5a" * 4096)
        before = driver.memory.read(0, MEMORY_BYTES)
        time.sleep(0.002)
        assert driver.memory.read(0, MEMORY_BYTES) == before
        assert driver.interrupts() == 0 and driver.status == 0
    assert answered and not driver.transport.faults
    driver.start(features=driver.offered(), size=64)
    for at, (gpa, size, flags) in enumerate(parts):
        last = at == len(parts) - 1
        driver.put_descriptor(queue, at, gpa, size, flags | (0 if last else DESC_F_NEXT), 0 if last else at + 1)
    for (gpa, _, flags), data in zip(parts, readable, strict=False):
        assert not flags
        driver.poke(gpa, data)
    driver.offer(queue, 0)
    driver.write(mmio.QUEUE_NOTIFY, queue)
    deadline = time.monotonic() + 5
    while not driver.used_index(queue):
        assert time.monotonic() < deadline, "it did not come back"
        for held in subject.sockets:  # full of what the requests before the resets said
            subject.drain(held)
        time.sleep(0.001)


def test_queues_may_be_left_off(driver: Driver) -> None:
    assert driver.accept(driver.offered())
    driver.write(mmio.STATUS, FINE)
    for queue in range(len(driver.device.queue_sizes)):
        driver.kick(queue)
    driver.pump()
    driver.write(mmio.STATUS, 0)
    assert driver.status == 0


def test_a_broken_chain_stops_it_until_its_reset(subject: Subject, driver: Driver) -> None:
    proof = subject.proof()
    if proof is None:
        pytest.skip("its daemon reads the rings")
    queue = proof[0]
    driver.start(features=driver.offered())
    driver.put_descriptor(queue, 0, BUFFERS_GPA, 16, DESC_F_NEXT, 0)  # a loop
    driver.offer(queue, 0)
    driver.kick(queue)
    assert driver.status & mmio.DEVICE_NEEDS_RESET and driver.transport.fault
    assert driver.read(mmio.INTERRUPT_STATUS) & mmio.CONFIG_CHANGE
    driver.kick(queue)
    assert driver.transport.faults == 1
    driver.start(features=driver.offered())
    ask(subject, driver)


@pytest.mark.parametrize("gpa", [MEMORY_BYTES, MEMORY_BYTES - 16, 1 << 40, (1 << 64) - 16])
def test_rings_outside_of_memory_are_refused(driver: Driver, gpa: int) -> None:
    assert driver.accept(driver.offered())
    driver.set_queue(0, size=16, descriptors=gpa, available=RINGS_GPA, used=RINGS_GPA + RING_STEP)
    driver.write(mmio.STATUS, FINE)
    assert driver.status & mmio.DEVICE_NEEDS_RESET
    driver.write(mmio.STATUS, 0)
    driver.start(features=driver.offered())
    assert driver.status == FINE


def test_it_counts(subject: Subject, driver: Driver) -> None:
    driver.start(features=driver.offered())
    before = driver.transport.counters()
    ask(subject, driver, times=2)
    after = driver.transport.counters()
    assert before.keys() == after.keys() and all(after[key] >= before[key] for key in after)
    if subject.proof() is not None:
        assert after["kicks"] == before["kicks"] + 2
