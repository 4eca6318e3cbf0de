"""A restore of a disk that stands on a backing file, or is to, cut off at every step."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nagaya.kernel import backing
from nagaya.model.spec import MachineSpec, Process
from nagaya.storage import rootfs, shared_disks, snapshots
from nagaya.storage.rootfs import Layers
from nagaya.storage.snapshots import Snapshot

SPEC = MachineSpec(
    id="1" * 32, name="m", type="kvm", image="busybox", image_id="", platform="linux/amd64", process=Process(("true",)), hostname="m", created_ns=1
)  # fmt: skip
SIZE, MUCH = 512 << 10, 64 << 10
STEPS = ("rename", "unlink", "open")


class Cut(Exception):
    """A kill."""


def write_disk(place: Path, letter: bytes, *, much: bool) -> None:
    with (place / "data.img").open("wb") as file:
        file.truncate(SIZE)
        file.write(letter * (SIZE - 4096 if much else 8192))


def put_on_top(place: Path, letter: bytes) -> None:
    """Have the machine's own disk stand on what it was, and be written to."""
    older = place / "older"
    older.mkdir()
    (place / "data.img").rename(older / "data.img")
    assert shared_disks.stand_on(str(older), str(place))
    (older / "data.img").unlink()
    older.rmdir()
    with (place / "data.img").open("r+b") as file:
        os.pwrite(file.fileno(), letter * 4096, 8192)


def content(place: Path) -> bytes:
    with (place / "data.img").open("rb") as disk:
        if not (place / "data.backing").exists():
            return disk.read()
        with (place / "data.backing").open("rb") as below:
            return backing.read(disk.fileno(), below.fileno(), 0, SIZE)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shared_disks, "QUICK_BYTES", MUCH)
    monkeypatch.setattr(
        "nagaya.kernel.reflink.sync_file_system", lambda path: None
    )  # others' writes, a second each time
    if not backing.keeps_holes(str(tmp_path)):
        pytest.skip("this file system has no exact holes")
    made = tmp_path / "machine"
    made.mkdir()
    rootfs.store_layers(str(made), ("layer",))
    return made


def take(machine: Path) -> Snapshot:
    snapshot_id, place = snapshots.begin(str(machine))
    snapshots.copy_disks(str(machine), place)
    record = Snapshot(
        snapshots.format_of(place), snapshot_id, "s", "", 1, "", SPEC, Layers(("layer",)), "exited", False, "1",
        snapshots.sum_parts(place),
    )  # fmt: skip
    return snapshots.finish(str(machine), place, record)


def make(machine: Path, saved: str) -> tuple[Snapshot, bytes]:
    """A snapshot whose disk is `saved`: little, much or shared."""
    write_disk(machine, b"a", much=saved != "little")
    if saved == "shared":
        put_on_top(machine, b"b")
    return take(machine), content(machine)


def change(machine: Path, now: str) -> None:
    for name in ("data.img", "data.backing"):
        (machine / name).unlink(missing_ok=True)
    write_disk(machine, b"x", much=now == "shared")
    if now == "shared":
        put_on_top(machine, b"y")


def restore(machine: Path, snapshot: Snapshot) -> None:
    place = snapshots.directory(str(machine), snapshot.id)
    snapshots.prepare_restore(str(machine), place, snapshot, SPEC, backed=True)
    snapshots.commit_restore(str(machine))


@pytest.mark.parametrize("now", ["little", "shared"])
@pytest.mark.parametrize("saved", ["little", "much", "shared"])
def test_it_is_what_was_saved(machine: Path, saved: str, now: str) -> None:
    snapshot, was = make(machine, saved)
    assert snapshot.format == (snapshots.SHARED_FORMAT if saved == "shared" else snapshots.FORMAT)
    assert snapshots.load(str(machine), snapshot.id) == snapshot
    change(machine, now)
    restore(machine, snapshot)
    assert content(machine) == was
    snapshots.verify(snapshots.directory(str(machine), snapshot.id), snapshot)
    assert not snapshots.needs_mending(str(machine))
    assert not list(machine.glob("*.none"))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("now", ["little", "shared"])
@pytest.mark.parametrize("saved", ["little", "much", "shared"])
def test_a_kill_at_any_step(machine: Path, saved: str, now: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot, was = make(machine, saved)
    real: Callable[..., object] = getattr(os, step)
    cuts = restored = 0
    while True:
        change(machine, now)
        before = content(machine)
        left = cuts

        def cut(*arguments: object, **named: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise Cut
            return real(*arguments, **named)

        with monkeypatch.context() as patched:
            patched.setattr(os, step, cut)
            try:
                restore(machine, snapshot)
                over = True
            except Cut:
                over = False
        snapshots.mend(str(machine))
        assert content(machine) in (before, was), (step, cuts)
        restored += content(machine) == was
        assert not snapshots.needs_mending(str(machine))
        snapshots.verify(snapshots.directory(str(machine), snapshot.id), snapshot)
        if over:
            break
        cuts += 1
    assert cuts and restored
