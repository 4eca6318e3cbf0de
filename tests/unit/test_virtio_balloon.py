"""virtio-balloon: pages go back to the host, statistics come, and page numbers are the guest's word only."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from nagaya.errors import GuestFault
from nagaya.virtio.balloon import DEFLATE, INFLATE, STATISTICS, Balloon, merge_pages
from tests.virtio_rig import Rig

REPORTING_QUEUES = (3, 4)
PAGE = 4096


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(Balloon("balloon0"), memory_bytes=16 << 20).start()
    yield made
    assert made.faults == []
    made.close()


def resident_bytes(rig: Rig) -> int:
    return os.fstat(rig.memory.fd).st_blocks * 512


def pages(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def test_the_target(rig: Rig) -> None:
    assert rig.device.read_config(0, 64) == bytes(16)
    rig.call(lambda: rig.device.set_target((5 << 20) + 1))
    assert rig.config_changes == 1
    assert rig.device.read_config(0, 4) == struct.pack("<I", 5 << 8)
    rig.device.write_config(4, struct.pack("<I", 256))
    assert rig.device.actual_bytes == 1 << 20
    rig.device.write_config(0, bytes(4))
    rig.device.write_config(4, bytes(2))
    assert rig.device.read_config(0, 8) == struct.pack("<II", 5 << 8, 256)


def test_inflated_pages_are_the_hosts(rig: Rig) -> None:
    start = 8 << 20
    rig.memory.write(start, b"\xaa" * (1 << 20))
    rig.add(DEFLATE, pages(1))  # touches the memory that our requests are in
    before = resident_bytes(rig)
    first = start // PAGE
    rig.add(INFLATE, pages(*range(first, first + 128)), pages(*range(first + 128, first + 200)))
    assert len(rig.taken(INFLATE)) == 1
    assert before - resident_bytes(rig) == 200 * PAGE
    assert rig.memory.read(start + 199 * PAGE, PAGE) == bytes(PAGE)
    assert rig.memory.read(start + 200 * PAGE, PAGE) == b"\xaa" * PAGE
    rig.add(DEFLATE, pages(first))
    assert rig.device.counters() == {
        "inflated_bytes": 200 * PAGE, "deflated_bytes": 2 * PAGE, "reported_bytes": 0, "discard_errors": 0,
    }  # fmt: skip


@pytest.mark.parametrize("number", REPORTING_QUEUES)
def test_reported_pages_are_the_hosts(rig: Rig, number: int) -> None:
    rig.add(DEFLATE, pages(1))  # touches the memory that our requests are in
    rig.memory.write(8 << 20, b"\xaa" * (4 << 20))
    before = resident_bytes(rig)
    rig.add_at(number, [(8 << 20, 2 << 20), (11 << 20, 1 << 20)])
    assert before - resident_bytes(rig) == 3 << 20
    assert len(rig.taken(number)) == 1
    assert rig.memory.read(10 << 20, 4) == b"\xaa" * 4


def test_statistics(rig: Rig) -> None:
    assert not rig.call(rig.device.request_statistics)
    rig.add(STATISTICS, struct.pack("<HQHQ", 4, 1 << 20, 5, 1 << 30))
    assert rig.device.statistics == {"free_bytes": 1 << 20, "total_bytes": 1 << 30}
    assert rig.taken(STATISTICS) == []
    assert rig.call(rig.device.request_statistics)
    assert len(rig.taken(STATISTICS)) == 1
    assert not rig.call(rig.device.request_statistics)
    rig.add(STATISTICS, struct.pack("<HQ", 6, 7), struct.pack("<HQ", 999, 1) + b"odd")
    assert rig.device.statistics == {"available_bytes": 7}
    assert rig.device.statistics_received == 2


def test_a_driver_without_statistics_counts_its_queues_otherwise() -> None:
    balloon = Balloon("balloon0")
    rig = Rig(balloon, features=1 << 5, memory_bytes=16 << 20, without=(3, 4)).start()
    rig.memory.write(8 << 20, b"\xaa" * PAGE)
    rig.add_at(2, [(8 << 20, PAGE)])
    assert balloon.counters()["reported_bytes"] == PAGE
    rig.close()


def test_more_than_a_turns_worth(rig: Rig) -> None:
    for number in range(100):
        rig.add(INFLATE, pages(2048 + number), kick=False)
    rig.kick(INFLATE)
    assert len(rig.taken(INFLATE, count=100)) == 100


def test_reset_empties_the_balloon(rig: Rig) -> None:
    rig.device.write_config(4, struct.pack("<I", 256))
    rig.add(STATISTICS, bytes(10))
    rig.restart()
    assert rig.device.actual_bytes == 0
    assert not rig.call(rig.device.request_statistics)


def test_wrong_requests_are_the_guests_fault(rig: Rig) -> None:
    for wrong in (pages(4096), pages(0xFFFF_FFFF), b"123", bytes(4 * 65536 + 4)):
        with pytest.raises(GuestFault):
            rig.add(INFLATE, wrong)
        rig.restart()
    with pytest.raises(GuestFault, match="whole pages"):
        rig.add_at(4, [((8 << 20) + 8, PAGE)])
    rig.restart()
    with pytest.raises(GuestFault, match="two buffers"):
        for _ in range(2):
            rig.add(STATISTICS, bytes(10))


def test_runs_of_pages() -> None:
    assert merge_pages([]) == []
    assert merge_pages([5, 3, 4, 4, 9, 10, 10, 12]) == [(3, 3), (9, 2), (12, 1)]
