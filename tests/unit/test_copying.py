"""A disk that is copied while it is written: what has been written since is copied again, until the copy is the same."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nagaya.errors import NagayaError
from nagaya.kernel import reflink
from nagaya.kernel.files import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from nagaya.memory import WriteLog
from nagaya.supervisor import copying
from nagaya.supervisor.copying import Disks
from nagaya.supervisor.loop import Loop

BLOCK = 64 << 10
SIZE = 48 << 20


class Disk:
    """A machine's, with its log: `DiskLogging`."""

    def __init__(self, machine_dir: Path) -> None:
        self.path = machine_dir / "data.img"
        self.log = WriteLog(SIZE, BLOCK)
        self.dice = random.Random(7)
        self.taken = 0
        self.on_take = lambda: None
        with self.path.open("wb") as file:
            file.truncate(SIZE)
            file.seek(BLOCK)
            file.write(self.dice.randbytes(SIZE // 2))

    def log_disk(self, on: bool) -> None:
        if on:
            self.log.start()
            self.on_take()
        else:
            self.log.stop()

    def take_disk_log(self) -> list[tuple[int, int]]:
        self.taken += 1
        runs = self.log.take()
        self.on_take()
        return runs

    def write(self, blocks: int) -> None:
        fd = os.open(self.path, os.O_WRONLY)
        for _ in range(blocks):
            at = self.dice.randrange(SIZE // BLOCK) * BLOCK
            if self.dice.random() < 0.3:
                fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, BLOCK)
            else:
                os.pwrite(fd, self.dice.randbytes(BLOCK), at)
            self.log.mark(at, BLOCK)
        os.close(fd)


class Saved:
    """What `Saving` does with disks."""

    def __init__(self, loop: Loop, machine_dir: Path, disk: Disk, *, log: bool = True) -> None:
        self.place = machine_dir / "snapshots" / "one"
        self.place.mkdir(parents=True)
        self.problem: NagayaError | None = None
        self.loop = loop
        self.disks = Disks(loop, str(machine_dir), str(self.place), log=disk if log else None, on_failed=self.failed)

    def failed(self, problem: NagayaError) -> None:
        self.problem = problem
        self.loop.stop()

    def do(self, step: str) -> None:
        done: list[int] = []

        def then() -> None:
            done.append(1)
            self.loop.stop()

        getattr(self.disks, step)(then)
        while not done and self.problem is None:
            self.loop._running = True
            self.loop.run()

    def is_same(self, disk: Disk) -> bool:
        copy = self.place / "data.img"
        return copy.read_bytes() == disk.path.read_bytes() and copy.stat().st_blocks <= disk.path.stat().st_blocks + 64


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.setattr(reflink, "can_clone", lambda directory: False)
    monkeypatch.setattr(reflink, "clone", lambda source, target: False)
    return Disk(tmp_path)


def test_all_that_was_written_meanwhile_is_in_the_copy(loop: Loop, disk: Disk, tmp_path: Path) -> None:
    saved = Saved(loop, tmp_path, disk)
    disk.on_take = lambda: disk.write(max(2, 200 // (1 + disk.taken) ** 2))  # after each look something more
    saved.do("begin")
    assert disk.log.on and disk.taken > 1
    disk.write(100)  # what the machine's kernel writes out when it is held
    saved.do("catch_up")
    disk.on_take = lambda: None
    disk.write(3)
    saved.do("finish")
    assert saved.is_same(disk)
    saved.disks.close()
    assert not disk.log.on


def test_a_writer_that_is_quicker_is_copied_when_it_stands(
    loop: Loop, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Saved(loop, tmp_path, disk)
    disk.on_take = lambda: disk.write(150)
    saved.do("begin")
    assert disk.taken == copying._MOST_PASSES
    saved.do("catch_up")
    assert disk.taken == copying._MOST_PASSES + 1
    disk.on_take = lambda: None
    saved.do("finish")
    assert saved.is_same(disk)
    saved.disks.close()


@pytest.mark.parametrize("log", [True, False])
def test_little_is_copied_at_once(loop: Loop, tmp_path: Path, disk: Disk, log: bool) -> None:
    with disk.path.open("r+b") as file:
        file.truncate(1 << 20)
        file.truncate(SIZE)
    saved = Saved(loop, tmp_path, disk, log=log)
    saved.do("begin")
    saved.do("catch_up")
    assert not disk.log.on and not (saved.place / "data.img").exists()
    saved.do("finish")
    assert saved.is_same(disk)


def test_without_a_log_it_is_copied_while_the_machine_stands(loop: Loop, disk: Disk, tmp_path: Path) -> None:
    saved = Saved(loop, tmp_path, disk, log=False)
    saved.do("begin")
    saved.do("catch_up")
    assert not (saved.place / "data.img").exists()
    saved.do("finish")
    assert saved.is_same(disk)


def test_a_copy_that_fails_is_told(loop: Loop, disk: Disk, tmp_path: Path) -> None:
    saved = Saved(loop, tmp_path, disk)
    (saved.place / "data.img").write_text("in the way")
    saved.do("begin")
    assert saved.problem is not None and "File exists" in saved.problem.message
    saved.disks.close()


def test_a_copy_that_is_given_up_leaves_no_child(loop: Loop, disk: Disk, tmp_path: Path) -> None:
    saved = Saved(loop, tmp_path, disk)
    saved.disks.begin(lambda: pytest.fail("it was given up"))
    saved.disks.close()
    saved.disks.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert not disk.log.on
