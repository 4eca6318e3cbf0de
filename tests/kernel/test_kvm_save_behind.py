"""Machines saved behind their backs, and differences between saves, with kernels of a few bytes on the real /dev/kvm."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nagaya.engines.kvm import saved
from nagaya.engines.kvm.behind import Order
from nagaya.engines.kvm.machine import Machine
from nagaya.engines.kvm.saved import Saved
from nagaya.errors import IntegrityError
from nagaya.kernel import unix
from nagaya.memory import PAGE_BYTES
from tests.e2e.leftovers import own_children
from tests.kernel.test_kvm_machine import COUNTER_GPA, PATIENCE_S
from tests.kernel.test_kvm_snapshot import (
    count_of,
    devices,
    directory,
    disk,
    go_on,
    hardware,
    kernel,
    kvm_and_nothing_left,
    memory_of,
    wait_for,
)

__all__ = ["directory", "disk", "kernel", "kvm_and_nothing_left"]  # fixtures
LARGE = 512 << 20
FILLED = 96 << 20
SCRATCH_PAGE = 3000  # of the guest's memory: nobody's
IDS = tuple(f"{number:016x}" for number in range(8))


def place_of(root: Path, number: int) -> Path:
    place = root / IDS[number] / "memory"
    place.mkdir(parents=True)
    return place


class Behind:
    """One save under way."""

    def __init__(self, machine: Machine, place: Path, base: Path | None = None, notes: dict[str, Any] | None = None):
        self.place = place
        self.fd, theirs = unix.socket_pair()
        files = saved.create(str(place))
        found: Saved | None = saved.read(str(base)) if base is not None else None
        try:
            where = os.path.relpath(base, place) if base is not None else ""
            machine.save_behind(Order(files, theirs, notes or {}, found, where))
        finally:
            os.close(theirs)
            files.close()
            if found is not None:
                found.close()

    def finish(self) -> dict[str, Any]:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        assert poll.poll(PATIENCE_S * 1000)
        data = os.read(self.fd, 1 << 16)
        os.close(self.fd)
        message: dict[str, Any] = json.loads(data) if data else {}
        if "done" in message:
            saved.commit(str(self.place))
        return message


def save(machine: Machine, place: Path, base: Path | None = None) -> int:
    """Pause, save behind, go on at once; what it had counted then."""
    machine.pause()
    count = count_of(machine)
    under_way = Behind(machine, place, base)
    machine.resume()
    wait_for(lambda: count_of(machine) > count)
    assert "done" in under_way.finish()
    return count


def counted_in(place: Path) -> int:
    found = saved.read(str(place))
    memory = found.map_memory(shared=False)
    try:
        return int.from_bytes(memory.read(COUNTER_GPA, 8), "little")
    finally:
        memory.close()
        found.close()


@pytest.fixture(params=["new", "gone on", "shared"])
def machine(request: pytest.FixtureRequest, directory: Path, kernel: str, disk: Path) -> Iterator[Machine]:
    """One that booted, one that has its memory copy-on-write, and one whose memory others have."""
    if request.param == "new":
        with Machine(hardware(kernel), devices(disk)) as made:
            made.start()
            yield made
    else:
        with go_on(directory, kernel, disk, shared=request.param == "shared") as made:
            yield made


def test_what_is_written_is_what_was(machine: Machine, tmp_path: Path, kernel: str, disk: Path) -> None:
    wait_for(lambda: count_of(machine) > 1000)
    place = place_of(tmp_path, 0)
    count = save(machine, place)
    assert counted_in(place) == count
    again = place_of(tmp_path, 1)  # and once more, when its memory is copy-on-write by now
    count = save(machine, again)
    assert counted_in(again) == count > counted_in(place)
    machine.close()
    with go_on(again, kernel, disk) as other:
        wait_for(lambda: count_of(other) > count + 1000)


def test_a_difference_has_what_changed(machine: Machine, tmp_path: Path, kernel: str, disk: Path) -> None:
    memory_of(machine).write(SCRATCH_PAGE * PAGE_BYTES, os.urandom(64 * PAGE_BYTES))
    whole, first, second = (place_of(tmp_path, number) for number in range(3))
    save(machine, whole)
    mine = os.urandom(PAGE_BYTES)
    memory_of(machine).write((SCRATCH_PAGE + 1) * PAGE_BYTES, mine)
    memory_of(machine).discard((SCRATCH_PAGE + 5) * PAGE_BYTES, PAGE_BYTES)
    save(machine, first, whole)
    count = save(machine, second, first)
    state = saved.read_state(str(first))
    held = {page for at, number in state["held"] for page in range(at, at + number)}
    assert SCRATCH_PAGE + 1 in held and state["used_bytes"] == len(held) * PAGE_BYTES
    assert len(held) < 16  # and the one that it counts in, and the devices' rings
    assert [SCRATCH_PAGE + 5, 1] in state["zeros"]
    assert SCRATCH_PAGE + 1 not in {at for at, _ in saved.read_state(str(second))["held"]}
    machine.close()
    with go_on(second, kernel, disk) as other:
        assert memory_of(other).read((SCRATCH_PAGE + 1) * PAGE_BYTES, PAGE_BYTES) == mine
        assert not any(memory_of(other).read((SCRATCH_PAGE + 5) * PAGE_BYTES, PAGE_BYTES))
        wait_for(lambda: count_of(other) > count)


def content(place: Path) -> bytes:
    found = saved.read(str(place))
    memory = found.map_memory(shared=False)
    try:
        return memory.whole.tobytes()
    finally:
        memory.close()
        found.close()


def test_bases_can_be_merged_in_any_order(machine: Machine, tmp_path: Path) -> None:
    """Five saves in a row, with pages written, zeroed and written again between them; three of four bases go."""
    chance = random.Random(5)
    places = [place_of(tmp_path, number) for number in range(5)]
    pages = range(SCRATCH_PAGE, SCRATCH_PAGE + 200)
    for number, place in enumerate(places):
        for page in chance.sample(pages, 40):
            data = bytes(PAGE_BYTES) if chance.random() < 0.3 else chance.randbytes(PAGE_BYTES)
            memory_of(machine).write(page * PAGE_BYTES, data)
        save(machine, place, places[number - 1] if number else None)
    before = [content(place) for place in places]
    order = [0, 1, 2, 3]
    chance.shuffle(order)
    above = {number: number + 1 for number in range(4)}
    for gone in order[:3]:
        upper = above[gone]
        while not places[upper].exists():
            upper += 1
        merged = tmp_path / "merged"
        merged.mkdir()
        saved.fold_base(str(places[upper]), str(merged))
        for name in ("memory", "state"):
            os.replace(merged / name, places[upper] / name)
        merged.rmdir()
        for name in ("memory", "state"):
            (places[gone] / name).unlink()
        places[gone].rmdir()
        for number, place in enumerate(places):
            if place.exists():
                assert content(place) == before[number]
    assert saved.find_base(str(min(place for place in places if place.exists()))) == ""


def test_a_base_that_is_missing_damaged_or_another_is_told(
    directory: Path, kernel: str, disk: Path, tmp_path: Path
) -> None:
    base, upper, other = (place_of(tmp_path, number) for number in range(3))
    with go_on(directory, kernel, disk) as machine:
        save(machine, base)
        save(machine, upper, base)
        save(machine, other)
    kept = {name: (base / name).read_bytes() for name in ("memory", "state")}
    flipped = bytearray(kept["memory"])
    flipped[kept["memory"].index(b"\xbb" + COUNTER_GPA.to_bytes(4, "little"))] ^= 1
    (base / "memory").write_bytes(flipped)
    with pytest.raises(IntegrityError, match="damaged"):
        saved.read(str(upper))
    for name in kept:
        (base / name).write_bytes((other / name).read_bytes())
    with pytest.raises(IntegrityError, match="not there any more"):
        saved.read(str(upper))
    (base / "state").unlink()
    with pytest.raises(IntegrityError):
        saved.read(str(upper))
    for name, data in kept.items():
        (base / name).write_bytes(data)
    saved.read(str(upper)).close()


@pytest.mark.parametrize("end", ["killed", "given up"])
def test_a_writer_that_ends_leaves_nothing_whole_and_the_machine_running(
    directory: Path, kernel: str, disk: Path, tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_of(tmp_path, 0)
    writers: list[int] = []
    fork = os.fork

    def watched() -> int:
        writers.append(fork())
        return writers[-1]

    with go_on(directory, kernel, disk) as machine:
        memory_of(machine).write(0x100000, os.urandom(8 << 20))
        machine.pause()
        with monkeypatch.context() as patched:
            patched.setattr(os, "fork", watched)
            under_way = Behind(machine, place)
        (writer,) = writers
        machine.resume()
        if end == "killed":
            with contextlib.suppress(ProcessLookupError):  # it may have ended, and a thread of ours have waited for it
                os.kill(writer, signal.SIGKILL)
            under_way.finish()
        else:
            os.close(under_way.fd)
        wait_for(lambda: str(writer) not in own_children())
        count = count_of(machine)
        wait_for(lambda: count_of(machine) > count)
        again = place_of(tmp_path, 1)
        assert counted_in_save(machine, again)
    if end == "given up":
        assert not (place / "state").exists()


def test_what_a_machine_has_replaced_is_not_kept_twice(kernel: str, disk: Path, tmp_path: Path) -> None:
    """Memory that was a file of its own is copied on a write from a save on: the file's page goes when nobody reads it."""
    filled = os.urandom(8 << 20)
    with Machine(hardware(kernel), devices(disk)) as machine:
        machine.start()
        memory = memory_of(machine)
        memory.write(0x100000, filled)
        save(machine, place_of(tmp_path, 0))
        wait_for(lambda: not own_children())
        assert os.fstat(memory.fd).st_blocks * 512 >= len(filled)
        changed = filled[::-1]
        memory.write(0x100000, changed)
        save(machine, place_of(tmp_path, 1))
        wait_for(lambda: os.fstat(memory.fd).st_blocks * 512 < len(filled) // 2)
        assert memory.read(0x100000, len(changed)) == changed
        count = count_of(machine)
        wait_for(lambda: count_of(machine) > count)
    for number, data in ((0, filled), (1, changed)):
        found = saved.read(str(tmp_path / IDS[number] / "memory"))
        again = found.map_memory(shared=False)
        try:
            assert again.read(0x100000, len(data)) == data
        finally:
            again.close()
            found.close()


def counted_in_save(machine: Machine, place: Path) -> bool:
    return save(machine, place) == counted_in(place)


def test_the_machine_stands_for_a_few_milliseconds(kernel: str, disk: Path, tmp_path: Path) -> None:
    """512 MiB, of which 96 are in use: 50 ms of this thread's CPU time, for the host is shared."""
    stood_ms, worked_ms = [], []
    with Machine(hardware(kernel, memory_bytes=LARGE), devices(disk)) as machine:
        machine.start()
        memory_of(machine).write(100 << 20, os.urandom(FILLED))
        for number in range(3):
            began_s, worked_s = time.monotonic(), time.thread_time()
            machine.pause()
            count = count_of(machine)
            place = place_of(tmp_path, number)
            under_way = Behind(machine, place)
            machine.resume()
            worked_ms.append((time.thread_time() - worked_s) * 1000)
            wait_for(lambda count=count: count_of(machine) > count)  # type: ignore[misc]
            stood_ms.append((time.monotonic() - began_s) * 1000)
            assert "done" in under_way.finish()
        assert FILLED <= saved.read_state(str(place))["used_bytes"] < FILLED + (4 << 20)
    print("stood for", [f"{ms:.1f} ms" for ms in stood_ms], "of which work", [f"{ms:.1f} ms" for ms in worked_ms])
    assert min(worked_ms) <= 50
