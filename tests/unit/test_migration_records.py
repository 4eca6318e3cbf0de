"""What both sides of a migration keep on disk: only one of two renames finds the machine, and a source that gave it away waits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nagaya.engines.kvm.machine import merge_runs
from nagaya.engines.kvm.vm import find_runs
from nagaya.errors import Conflict
from nagaya.memory import GuestMemory, WriteLog
from nagaya.net.announce import make_announcement
from nagaya.storage import migrations
from nagaya.storage.migrations import Leaving
from nagaya.storage.paths import Paths

MACHINE, MIGRATION = "a" * 32, "b" * 32


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    made = Paths(str(tmp_path / "root"), str(tmp_path / "run"))
    os.makedirs(made.machine(MACHINE))
    return made


@pytest.fixture
def place(paths: Paths) -> str:
    migrations.begin_arrival(paths.machine(MACHINE), MIGRATION, MACHINE, '{"kvm": "x"}')
    return paths.machine(MACHINE)


def test_a_machine_that_arrives_is_known_even_when_it_is_gone(paths: Paths, place: str) -> None:
    assert migrations.is_incoming(place)
    assert migrations.load_described(f"{place}/{migrations.INCOMING}") == '{"kvm": "x"}'
    assert migrations.commit_arrival(place)
    assert not migrations.is_incoming(place)
    assert migrations.settle_arrival(paths, MIGRATION, MACHINE)
    migrations.note_arrival(paths, place)
    os.rename(place, f"{place}.gone")
    assert migrations.settle_arrival(paths, MIGRATION, MACHINE)
    assert not migrations.settle_arrival(paths, "c" * 32, MACHINE)
    assert not migrations.settle_arrival(paths, MIGRATION, "d" * 32)


def test_who_asks_first_keeps_it_from_arriving(paths: Paths, place: str) -> None:
    assert not migrations.settle_arrival(paths, MIGRATION, MACHINE)
    assert not migrations.commit_arrival(place)
    assert migrations.is_incoming(place)  # and goes with its supervisor
    assert not migrations.settle_arrival(paths, MIGRATION, MACHINE)


def test_another_migration_of_the_same_machine_is_left_alone(paths: Paths, place: str) -> None:
    assert not migrations.settle_arrival(paths, "c" * 32, MACHINE)
    assert migrations.commit_arrival(place)


def test_a_machine_that_was_handed_over_is_not_started(tmp_path: Path) -> None:
    migrations.refuse_left(str(tmp_path), "m")
    migrations.store_leaving(str(tmp_path), Leaving(MIGRATION, "unix:/x", 1))
    assert migrations.find_leaving(str(tmp_path)) == Leaving(MIGRATION, "unix:/x", 1)
    with pytest.raises(Conflict, match="handed over to unix:/x") as caught:
        migrations.refuse_left(str(tmp_path), "m")
    assert "resolve m --to unix:/x" in caught.value.hint
    (tmp_path / migrations.LEAVING).write_bytes(b"{")
    with pytest.raises(Conflict, match="handed over"):
        migrations.refuse_left(str(tmp_path), "m")
    migrations.remove_leaving(str(tmp_path))
    migrations.remove_leaving(str(tmp_path))
    migrations.refuse_left(str(tmp_path), "m")


# -- logs of writes


def test_a_log_tells_what_was_marked_once() -> None:
    log = WriteLog(10 * 4096 + 100, 4096)
    log.start()
    for offset, count in ((0, 1), (4095, 2), (5 * 4096, 4096), (10 * 4096, 100), (4096, 0)):
        log.mark(offset, count)
    assert log.take() == [(0, 8192), (5 * 4096, 4096), (10 * 4096, 100)]
    assert log.take() == []
    log.mark(0, 1)
    log.start()
    assert log.take() == []


def test_a_log_is_shared_with_children() -> None:
    log = WriteLog(1 << 20, 4096)
    log.start()
    pid = os.fork()
    if pid == 0:
        log.mark(8192, 4096)
        os._exit(0)
    os.waitpid(pid, 0)
    assert log.take() == [(8192, 4096)]


def test_memory_marks_what_is_written_through_it() -> None:
    memory = GuestMemory.allocate(16 * 4096)
    memory.writes = WriteLog(memory.size_bytes, 4096)
    memory.write(0, b"x")
    assert memory.writes.take() == []  # nobody wants to know
    memory.writes.start()
    memory.write(4095, b"xy")
    memory.mark_views([memory.slice(5 * 4096 + 7, 10)])
    memory.discard(9 * 4096, 4096)
    assert memory.writes.take() == [(0, 8192), (5 * 4096, 4096), (9 * 4096, 4096)]
    memory.close()


@pytest.mark.parametrize(
    ("bits", "runs"),
    [
        ([], []),
        ([0], [(0, 1)]),
        ([63, 64, 65], [(63, 3)]),
        (list(range(64, 192)), [(64, 128)]),
        ([0, 2, 3, 191], [(0, 1), (2, 2), (191, 1)]),
        (list(range(192)), [(0, 192)]),
    ],
)
def test_runs_of_bits(bits: list[int], runs: list[tuple[int, int]]) -> None:
    assert find_runs(sum(1 << bit for bit in bits).to_bytes(24, "little")) == runs


def test_runs_are_merged() -> None:
    assert merge_runs([(8, 4), (0, 4), (4, 2), (9, 1), (20, 1)]) == [(0, 6), (8, 4), (20, 1)]


def test_an_announcement_says_who_has_the_address() -> None:
    mac, address = bytes(range(6)), bytes((172, 31, 77, 1))
    frame = make_announcement(mac, address)
    assert len(frame) == 42 and frame[:6] == b"\xff" * 6 and frame[6:12] == frame[22:28] == mac
    assert frame[12:14] == b"\x08\x06" and frame[28:32] == frame[38:42] == address
