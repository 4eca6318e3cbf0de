"""virtio-rng: random bytes where the driver asked for them, and nowhere else; no driver has the loop for itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nagaya.virtio import mmio
from nagaya.virtio.device import RING_EVENT_IDX, VERSION_1
from nagaya.virtio.queue import DESC_F_WRITE
from nagaya.virtio.rng import MOST_BYTES, Rng
from tests.virtio_driver import BUFFERS_GPA, Driver


@pytest.fixture
def driver() -> Iterator[Driver]:
    made = Driver(Rng("rng0"))
    made.start()
    yield made
    made.close()


def test_bytes_differ_from_one_request_to_the_next(driver: Driver) -> None:
    answers = {driver.send([], [32])[1][0] for _ in range(20)}
    assert len(answers) == 20
    assert driver.device.counters() == {"requests": 20, "bytes": 640}


@pytest.mark.parametrize("size", [1, 63, MOST_BYTES - 1, MOST_BYTES, MOST_BYTES + 1, 3 * MOST_BYTES])
def test_a_request_gets_what_it_asked_for_or_a_page(driver: Driver, size: int) -> None:
    written, (data,) = driver.send([], [size])
    assert written == min(size, MOST_BYTES)
    assert data[written:] == b"\xee" * (size - written)


def test_all_values_come(driver: Driver) -> None:
    data = b"".join(driver.send([], [MOST_BYTES])[1][0] for _ in range(4))
    assert set(data) == set(range(256))  # 16 KiB: one of 10^25 misses a value


def test_what_the_driver_gave_to_read_is_left_alone(driver: Driver) -> None:
    gpa = driver._next_buffer
    written, _ = driver.send([b"mine"], [8, 8])
    assert written == 8
    assert driver.memory.read(gpa, 4) == b"mine"


def test_nowhere_to_write_is_a_fault(driver: Driver) -> None:
    with pytest.raises(AssertionError, match="did not answer"):
        driver.send([b"mine"], [])
    assert driver.status & mmio.DEVICE_NEEDS_RESET
    driver.start()
    assert driver.send([], [4])[0] == 4


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | RING_EVENT_IDX])
def test_many_requests_leave_turns_to_others(driver: Driver, features: int) -> None:
    """A driver that always has one more request must not keep the loop from a reset, or from the other devices."""
    driver.start(features=features)
    for number in range(64):
        driver.put_descriptor(0, number, BUFFERS_GPA + 16 * number, 16, DESC_F_WRITE)
        driver.offer(0, number)
    driver.kick()
    first = driver.used_index()
    assert 0 < first < 64
    assert driver.interrupts() == 1, "what is done is told before the turn ends"
    driver.pump()
    assert first < driver.used_index() <= 64
    driver.pump()
    driver.pump()
    assert driver.used_index() == 64
    assert sorted(driver.used_element(0, number)[0] for number in range(64)) == list(range(64))


def test_a_reset_between_two_turns(driver: Driver) -> None:
    for number in range(64):
        driver.put_descriptor(0, number, BUFFERS_GPA + 16 * number, 16, DESC_F_WRITE)
        driver.offer(0, number)
    driver.kick()
    driver.write(mmio.STATUS, 0)
    before = driver.memory.read(BUFFERS_GPA, 1024)
    driver.pump()
    assert driver.memory.read(BUFFERS_GPA, 1024) == before
    driver.start()
    assert driver.send([], [4])[0] == 4


def test_a_fault_in_a_later_turn(driver: Driver) -> None:
    for number in range(64):
        driver.put_descriptor(0, number, BUFFERS_GPA, 16, DESC_F_WRITE if number < 40 else 0)
        driver.offer(0, number)
    driver.kick()
    assert not driver.status & mmio.DEVICE_NEEDS_RESET
    driver.pump()
    assert driver.status & mmio.DEVICE_NEEDS_RESET
    assert driver.used_index() == 40
