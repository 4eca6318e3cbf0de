"""virtio-blk through its transport, on a real file."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from nagaya.errors import Conflict, NotFound, UsageError
from nagaya.virtio import blk, mmio
from nagaya.virtio.blk import Blk
from nagaya.virtio.device import RING_EVENT_IDX, VERSION_1
from nagaya.virtio.queue import DESC_F_NEXT, DESC_F_WRITE
from tests.virtio_driver import BUFFERS_GPA, Driver

SECTORS = 64
SIZE_BYTES = SECTORS * 512


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(i % 251 for i in range(SIZE_BYTES)))
    return path


@pytest.fixture
def driver(disk: Path) -> Iterator[Driver]:
    made = Driver(Blk("blk0", str(disk), serial="a serial"))
    made.start(features=VERSION_1 | blk.F_FLUSH | blk.F_DISCARD | blk.F_WRITE_ZEROES)
    yield made
    made.close()


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def test_read(driver: Driver, disk: Path) -> None:
    written, (data, status) = driver.send([header(blk.T_IN, 3)], [1024, 1])
    assert (written, status) == (1025, b"\0")
    assert data == disk.read_bytes()[3 * 512 : 5 * 512]


def test_read_into_pieces_with_the_status_behind_the_data(driver: Driver, disk: Path) -> None:
    """Section 5.2.6: where a driver cuts its request is its own affair."""
    written, (first, second) = driver.send([header(blk.T_IN)[:5], header(blk.T_IN)[5:]], [100, 413])
    assert written == 513
    assert first + second[:-1] == disk.read_bytes()[:512]
    assert second[-1] == 0


def test_write(driver: Driver, disk: Path) -> None:
    data = os.urandom(1024)
    written, (status,) = driver.send([header(blk.T_OUT, 62) + data[:7], data[7:]], [1])
    assert (written, status) == (1, b"\0")
    assert disk.read_bytes()[62 * 512 :] == data
    assert disk.stat().st_size == SIZE_BYTES


def test_flush_and_identity(driver: Driver) -> None:
    assert driver.send([header(blk.T_FLUSH)], [1]) == (1, [b"\0"])
    written, (name, status) = driver.send([header(blk.T_GET_ID)], [20, 1])
    assert (written, status) == (21, b"\0")
    assert name == b"a serial".ljust(20, b"\0")


@pytest.mark.parametrize("kind", [blk.T_DISCARD, blk.T_WRITE_ZEROES])
def test_zeros(driver: Driver, disk: Path, kind: int) -> None:
    before = disk.read_bytes()
    ranges = struct.pack("<QII", 8, 8, 0) + struct.pack("<QII", 32, 0, 0) + struct.pack("<QII", 40, 8, 0)
    _, (status,) = driver.send([header(kind), ranges], [1])
    if status == bytes((blk.S_UNSUPP,)):
        pytest.skip("this file system cannot punch holes")
    assert status == b"\0"
    expected = bytearray(before)
    for sector in (8, 40):
        expected[sector * 512 : (sector + 8) * 512] = bytes(4096)
    assert disk.read_bytes() == expected


IOERR, UNSUPP = bytes((blk.S_IOERR,)), bytes((blk.S_UNSUPP,))


@pytest.mark.parametrize(
    ("request_", "writable", "status"),
    [
        ([header(blk.T_IN, SECTORS)], [512, 1], IOERR),
        ([header(blk.T_IN, SECTORS - 1)], [1024, 1], IOERR),
        ([header(blk.T_IN, 1 << 63)], [512, 1], IOERR),
        ([header(blk.T_IN)], [500, 1], IOERR),
        ([header(blk.T_OUT, SECTORS), bytes(512)], [1], IOERR),
        ([header(blk.T_OUT), bytes(511)], [1], IOERR),
        ([header(blk.T_GET_ID)], [19, 1], IOERR),
        ([header(99)], [1], UNSUPP),
        ([header(blk.T_DISCARD)], [1], IOERR),
        ([header(blk.T_DISCARD), bytes(15)], [1], IOERR),
        ([header(blk.T_DISCARD), struct.pack("<QII", 0, 1, 1)], [1], UNSUPP),
        ([header(blk.T_WRITE_ZEROES), struct.pack("<QII", 0, 1, 2)], [1], UNSUPP),
        ([header(blk.T_WRITE_ZEROES), struct.pack("<QII", SECTORS, 1, 0)], [1], IOERR),
        ([header(blk.T_WRITE_ZEROES), struct.pack("<QII", 0, 1 << 30, 0)], [1], IOERR),
        ([header(blk.T_WRITE_ZEROES), bytes(16 * 33)], [1], IOERR),
    ],
)
def test_refused(driver: Driver, disk: Path, request_: list[bytes], writable: list[int], status: bytes) -> None:
    before = disk.read_bytes()
    _, buffers = driver.send(request_, writable)
    assert buffers[-1][-1:] == status
    assert disk.read_bytes() == before
    assert driver.device.counters()["errors"] == 1
    assert driver.send([header(blk.T_IN)], [512, 1])[1][-1] == b"\0", "the disk goes on"


@pytest.mark.parametrize(("readable", "writable"), [([bytes(15)], [1]), ([], [1]), ([header(blk.T_FLUSH)], [])])
def test_no_header_or_no_status_is_a_fault(driver: Driver, readable: list[bytes], writable: list[int]) -> None:
    with pytest.raises(AssertionError, match="did not answer"):
        driver.send(readable, writable)
    assert driver.status & mmio.DEVICE_NEEDS_RESET


def test_read_only(disk: Path) -> None:
    driver = Driver(Blk("blk0", str(disk), read_only=True))
    try:
        assert driver.offered() & blk.F_RO
        assert not driver.offered() & (blk.F_DISCARD | blk.F_WRITE_ZEROES)
        driver.start()
        assert driver.send([header(blk.T_OUT), bytes(512)], [1])[1] == [IOERR]
        assert driver.send([header(blk.T_DISCARD), struct.pack("<QII", 0, 1, 0)], [1])[1] == [UNSUPP]
        other = Blk("blk1", str(disk), read_only=True)  # readers do not mind each other
        other.close()
    finally:
        driver.close()


def test_several_queues(disk: Path) -> None:
    driver = Driver(Blk("blk0", str(disk), queues=4))
    try:
        assert driver.offered() & blk.F_MQ
        assert driver.transport.read(mmio.CONFIG + 34, 2) == (4).to_bytes(2, "little")
        driver.start(features=VERSION_1 | blk.F_MQ)
        for queue in range(4):
            assert driver.send([header(blk.T_IN, queue)], [512, 1], queue=queue)[1][-1] == b"\0"
        assert driver.device.counters()["reads"] == 4
    finally:
        driver.close()


def test_configuration_is_the_headers_structure(driver: Driver) -> None:
    config = b"".join(driver.transport.read(mmio.CONFIG + at, 4) for at in range(0, 60, 4))
    assert struct.unpack_from("<Q", config) == (SECTORS,)
    assert struct.unpack_from("<I", config, 12) == (blk.SEGMENTS,)  # seg_max
    assert struct.unpack_from("<I", config, 20) == (512,)  # blk_size
    assert struct.unpack_from("<H", config, 34) == (1,)  # num_queues
    assert struct.unpack_from("<II", config, 36) == (1 << 22, 32)  # discard: sectors, segments
    assert struct.unpack_from("<IIB", config, 48) == (1 << 22, 32, 1)  # write zeroes: sectors, segments, may unmap


def test_a_disk_that_became_shorter_is_an_input_error(driver: Driver, disk: Path) -> None:
    os.truncate(disk, 512)
    assert driver.send([header(blk.T_IN, 4)], [512, 1])[1][-1] == IOERR


def test_two_writers_are_refused(driver: Driver, disk: Path) -> None:
    for read_only in (False, True):
        with pytest.raises(Conflict, match="in use by another machine"):
            Blk("blk1", str(disk), read_only=read_only)


def test_what_is_no_disk(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        Blk("blk0", str(tmp_path / "none"))
    (tmp_path / "odd").write_bytes(bytes(513))
    (tmp_path / "empty").write_bytes(b"")
    for path in (tmp_path, tmp_path / "odd", tmp_path / "empty", Path("/dev/null")):
        with pytest.raises(UsageError):
            Blk("blk0", str(path))
    with pytest.raises(UsageError, match="17 queues"):
        Blk("blk0", str(tmp_path / "odd"), queues=17)


def test_what_the_file_system_cannot_do_is_unsupported(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "fallocate")

    monkeypatch.setattr(blk, "fallocate", refuse)
    assert driver.send([header(blk.T_DISCARD), struct.pack("<QII", 0, 1, 0)], [1])[1] == [UNSUPP]


class Syncs:
    """What was asked of the host to make writes last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flags: list[int] = []
        self.flushes = 0
        self._pwritev, self._fdatasync = os.pwritev, os.fdatasync
        monkeypatch.setattr(os, "pwritev", self.pwritev)
        monkeypatch.setattr(os, "fdatasync", self.fdatasync)

    def pwritev(self, fd: int, views: list[memoryview], offset: int, flags: int = 0) -> int:
        self.flags.append(flags)
        return self._pwritev(fd, views, offset, flags)

    def fdatasync(self, fd: int) -> None:
        self.flushes += 1
        self._fdatasync(fd)


def test_a_driver_that_cannot_flush_gets_writes_that_last(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Section 5.2.6.2: without VIRTIO_BLK_F_FLUSH, what was answered is on the disk."""
    syncs = Syncs(monkeypatch)
    driver = Driver(Blk("blk0", str(disk)))
    try:
        driver.start(features=VERSION_1)
        driver.send([header(blk.T_OUT), bytes(512)], [1])
        assert syncs.flags == [os.RWF_DSYNC]
        _, (status,) = driver.send([header(blk.T_DISCARD), struct.pack("<QII", 0, 8, 0)], [1])
        assert syncs.flushes == (status == b"\0")
        driver.start(features=VERSION_1 | blk.F_FLUSH)
        driver.send([header(blk.T_OUT), bytes(512)], [1])
        assert syncs.flags[1:] == [0]
    finally:
        driver.close()


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | RING_EVENT_IDX])
def test_many_requests_leave_turns_to_others(driver: Driver, disk: Path, features: int) -> None:
    """A disk that always has one more request must not keep its loop from a reset."""
    driver.start(features=features, size=64)
    gpa = driver.place(header(blk.T_IN))
    for head in range(0, 64, 2):
        driver.put_descriptor(0, head, gpa, 16, DESC_F_NEXT, head + 1)
        driver.put_descriptor(0, head + 1, BUFFERS_GPA + 4096 + head * 520, 513, DESC_F_WRITE)
        driver.offer(0, head)
    driver.kick()
    first = driver.used_index()
    assert 0 < first < 32
    assert driver.interrupts(), "what is done is told before the turn ends"
    for _ in range(4):
        driver.pump()
    assert driver.used_index() == 32
    for head in range(0, 64, 2):
        assert driver.memory.read(BUFFERS_GPA + 4096 + head * 520, 513) == disk.read_bytes()[:512] + b"\0"


def test_a_reset_between_two_turns(driver: Driver) -> None:
    gpa = driver.place(header(blk.T_FLUSH))
    driver.put_descriptor(0, 0, gpa, 16, DESC_F_NEXT, 1)
    driver.put_descriptor(0, 1, BUFFERS_GPA + 4096, 1, DESC_F_WRITE)
    for _ in range(60):
        driver.offer(0, 0)
    driver.kick()
    driver.write(mmio.STATUS, 0)
    done = driver.device.counters()["flushes"]
    driver.pump()
    assert driver.device.counters()["flushes"] == done < 60


def test_a_host_error_is_the_drivers_and_is_counted(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, "bad sector")

    for name in ("preadv", "pwritev", "fdatasync"):
        monkeypatch.setattr(os, name, refuse)
    assert driver.send([header(blk.T_IN)], [512, 1])[1][-1] == IOERR
    assert driver.send([header(blk.T_OUT), bytes(512)], [1])[1] == [IOERR]
    assert driver.send([header(blk.T_FLUSH)], [1])[1] == [IOERR]
    counters = driver.device.counters()
    assert (counters["errors"], counters["reads"], counters["writes"], counters["flushes"]) == (3, 0, 0, 0)


def test_reads_and_writes_that_the_host_does_in_parts(
    driver: Driver, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, pwritev = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:100]], offset))
    monkeypatch.setattr(os, "pwritev", lambda fd, views, offset, flags=0: pwritev(fd, [views[0][:77]], offset, flags))
    data = os.urandom(1024)
    assert driver.send([header(blk.T_OUT, 1), data[:300], data[300:]], [1]) == (1, [b"\0"])
    written, (first, second) = driver.send([header(blk.T_IN, 1)], [700, 325])
    assert written == 1025 and first + second == data + b"\0"
    assert disk.read_bytes()[512:1536] == data
