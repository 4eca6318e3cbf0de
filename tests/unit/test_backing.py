"""Files on backing files, and disks of such: compared with a plain file to which the same is done."""

from __future__ import annotations

import fcntl
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from nagaya.errors import Conflict
from nagaya.kernel import backing
from nagaya.storage import shared_disks
from nagaya.storage.shared_disks import QUICK_BYTES
from nagaya.virtio import blk
from nagaya.virtio.backed_blk import BackedBlk
from nagaya.virtio.device import VERSION_1
from tests.virtio_driver import Driver

SIZE = 1 << 20
GROWN = SIZE + (64 << 10)
SEED = int(os.environ.get("NAGAYA_FUZZ_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
MANY_OPERATIONS = 600


@pytest.fixture
def below(tmp_path: Path) -> Path:
    """Data, zeros that are data, and holes, some of them not at a block's edge."""
    if not backing.keeps_holes(str(tmp_path)):
        pytest.skip("this file system has no exact holes")
    path = tmp_path / "below"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for start, size in ((0, 20000), (90000, 4096), (300000, 150000), (SIZE - 8192, 8192)):
            file.seek(start)
            file.write(os.urandom(size))
        file.seek(600000)
        file.write(bytes(8192))
    return path


@pytest.fixture
def upper(below: Path) -> Path:
    path = below.parent / "upper"
    path.touch()
    os.truncate(path, GROWN)  # it has been grown since
    return path


def contents(upper: Path, below: Path) -> bytes:
    with upper.open("rb") as one, below.open("rb") as other:
        return backing.read(one.fileno(), other.fileno(), 0, GROWN)


def test_a_disk_is_what_a_plain_one_would_be(upper: Path, below: Path) -> None:
    print("seed", SEED)
    chance = random.Random(SEED)
    model = bytearray(below.read_bytes().ljust(GROWN, b"\0"))
    untouched = below.read_bytes()
    driver = Driver(BackedBlk("blk0", str(upper), os.open(below, os.O_RDONLY)), memory_bytes=64 << 20)
    try:
        driver.start(features=VERSION_1 | blk.F_FLUSH | blk.F_DISCARD | blk.F_WRITE_ZEROES)
        for _ in range(MANY_OPERATIONS):
            sectors = chance.choice((1, 3, 8, 16, 24, chance.randrange(1, 48)))
            sector = chance.randrange(GROWN // 512 - sectors)
            if chance.random() < 0.5:
                sector, sectors = sector // 8 * 8, -(-sectors // 8) * 8
                sectors = min(sectors, GROWN // 512 - sector)
            at, size = sector * 512, sectors * 512
            header = struct.pack(
                "<IIQ", kind := chance.choice((blk.T_IN, blk.T_OUT, blk.T_WRITE_ZEROES, blk.T_DISCARD)), 0, sector
            )
            if kind == blk.T_IN:
                _, (*pieces, status) = driver.send([header], [512, size - 512, 1] if size > 512 else [size, 1])
                assert b"".join(pieces) == model[at : at + size]
            elif kind == blk.T_OUT:
                data = chance.choice((chance.randbytes(size), bytes(size)))
                _, (status,) = driver.send([header + data[:100], data[100:]], [1])
                model[at : at + size] = data
            else:
                unmap = chance.randrange(2) if kind == blk.T_WRITE_ZEROES else 0
                range_ = struct.pack("<QII", sector, sectors, unmap)
                _, (status,) = driver.send([struct.pack("<IIQ", kind, 0, 0), range_], [1])
                if kind == blk.T_WRITE_ZEROES:
                    model[at : at + size] = bytes(size)
                else:  # whatever is there now is there for good
                    now = contents(upper, below)[at : at + size]
                    assert all(new in (0, old) for new, old in zip(now, model[at : at + size], strict=True))
                    model[at : at + size] = now
            assert status == b"\0"
        assert driver.send([struct.pack("<IIQ", blk.T_FLUSH, 0, 0)], [1])[1] == [b"\0"]
    finally:
        driver.close()
    assert contents(upper, below) == model
    assert below.read_bytes() == untouched
    with upper.open("rb") as one, below.open("rb") as other:
        found = bytearray(GROWN)
        for start, end in backing.runs(one.fileno(), other.fileno(), 0, GROWN):
            found[start:end] = model[start:end]
        assert found == model  # nothing lies outside of the runs
    with upper.open("r+b") as one, below.open("rb") as other:
        backing.fill(one.fileno(), other.fileno())
    assert upper.read_bytes() == model


def test_a_block_that_is_written_in_part_keeps_the_rest(upper: Path, below: Path) -> None:
    before = contents(upper, below)
    with upper.open("r+b") as one, below.open("rb") as other:
        for at, size in ((301000, 512), (4096, 512), (12288 - 512, 1024), (303104, 4096)):
            backing.lift(one.fileno(), other.fileno(), at, size)
            assert contents(upper, below) == before
            os.pwrite(one.fileno(), b"x" * size, at)
            before = before[:at] + b"x" * size + before[at + size :]
            assert contents(upper, below) == before


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    made = tmp_path / "place"
    made.mkdir()
    with (made / "data.img").open("wb") as file:
        file.truncate(64 << 20)
        file.seek(1 << 20)
        file.write(os.urandom(QUICK_BYTES + (1 << 20)))
        file.seek(0)
        file.write(os.urandom(4096))
    return made


def test_disks_that_share_one_file(place: Path, tmp_path: Path) -> None:
    if not shared_disks.is_worth_it(str(place), str(tmp_path)):
        pytest.skip("this file system shares blocks, or has no exact holes")
    whole = (place / "data.img").read_bytes()
    machines = [tmp_path / f"m{number}" for number in range(3)]
    for machine in machines:
        machine.mkdir()
        assert shared_disks.stand_on(str(place), str(machine))
        assert (machine / "data.img").stat().st_blocks * 512 <= 8192
        assert (machine / "data.img").read_bytes()[:4096] == whole[:4096]
    os.unlink(place / "data.img")  # what is left of it are the machines' names
    for machine in machines:
        shared_disks.make_whole(str(machine))
        assert (machine / "data.img").read_bytes() == whole
        assert not (machine / "data.backing").exists()
        shared_disks.make_whole(str(machine))  # nothing is to be done


def test_a_disk_that_is_in_use_is_not_made_whole(place: Path, tmp_path: Path) -> None:
    if not shared_disks.is_worth_it(str(place), str(tmp_path)):
        pytest.skip("this file system shares blocks, or has no exact holes")
    machine = tmp_path / "m"
    machine.mkdir()
    shared_disks.stand_on(str(place), str(machine))
    with (machine / "data.img").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Conflict, match="in use"):
            shared_disks.make_whole(str(machine))
    assert (machine / "data.backing").exists()


def test_little_is_copied(place: Path, tmp_path: Path) -> None:
    os.truncate(place / "data.img", 4 << 20)
    assert not shared_disks.is_worth_it(str(place), str(tmp_path))
    (place / "data.img").unlink()
    assert not shared_disks.is_worth_it(str(place), str(tmp_path))


def test_zeros_are_data_where_holes_are_exact() -> None:
    assert backing.keeps_holes("/dev/shm")  # a tmpfs
