"""A snapshot whose memory builds on another's, and that other being removed, cut off at every step."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nagaya.errors import IntegrityError
from nagaya.model.spec import MachineSpec, Process
from nagaya.storage import snapshots
from nagaya.storage.rootfs import Layers
from nagaya.storage.snapshots import Snapshot

SPEC = MachineSpec(
    id="1" * 32, name="m", type="kvm", image="busybox", image_id="", platform="linux/amd64", process=Process(("true",)), hostname="m", created_ns=1
)  # fmt: skip
STEPS = ("rename", "link", "mkdir", "unlink", "rmdir")


class Cut(Exception):
    """A kill."""


def make(machine: str, name: str, parent: str, base: str, memory: str) -> str:
    snapshot_id, place = snapshots.begin(machine)
    Path(place, "data.img").write_text(f"disk of {name}")
    os.mkdir(f"{place}/memory")
    Path(place, "memory", "memory").write_text(memory)
    Path(place, "memory", "state").write_text(base)
    record = Snapshot(
        snapshots.FORMAT, snapshot_id, name, parent, 1, "", SPEC, Layers(()), "running", True, "1",
        snapshots.sum_parts(place), base,
    )  # fmt: skip
    return snapshots.finish(machine, place, record).id


def fold(directory: str, target: str) -> None:
    """As an engine would: a memory is a text, and a difference goes behind its base."""
    base = Path(directory, "state").read_text()
    below = Path(directory, "..", "..", base, "memory")
    Path(target, "memory").write_text((below / "memory").read_text() + Path(directory, "memory").read_text())
    Path(target, "state").write_text((below / "state").read_text())


def content(machine: str, snapshot_id: str) -> str:
    place = Path(snapshots.directory(machine, snapshot_id), "memory")
    base = (place / "state").read_text()
    return (content(machine, base) if base else "") + (place / "memory").read_text()


@pytest.fixture
def machine(tmp_path: Path) -> str:
    return str(tmp_path)


def test_what_others_need_becomes_theirs(machine: str) -> None:
    first = make(machine, "a", "", "", "A")
    second = make(machine, "b", first, first, "B")
    third = make(machine, "c", second, second, "C")
    beside = make(machine, "d", first, first, "D")
    snapshots.remove(machine, first, parent="", fold=fold)
    assert [content(machine, one) for one in (second, third, beside)] == ["AB", "ABC", "AD"]
    snapshots.remove(machine, second, parent="", fold=fold)
    assert content(machine, third) == "ABC" and snapshots.load(machine, third).base == ""
    for one in (third, beside):
        record = snapshots.load(machine, one)
        snapshots.verify(snapshots.directory(machine, one), record)
        assert record.parent == "" and snapshots.bases(machine, record) == []


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step(machine: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(machine, "a", "", "", "A")
    second = make(machine, "b", first, first, "B")
    third = make(machine, "c", second, second, "C")
    real: Callable[..., object] = getattr(os, step)
    cuts = 0
    for allowed in range(40):
        left = allowed

        def cut(*arguments: object, **options: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise Cut
            return real(*arguments, **options)

        monkeypatch.setattr(os, step, cut)
        try:
            snapshots.remove(machine, first, parent="", fold=fold)
            done = True
        except Cut:
            cuts += 1
            done = False
        finally:
            monkeypatch.setattr(os, step, real)
        if snapshots.needs_mending(machine):
            snapshots.mend(machine)
        assert not snapshots.needs_mending(machine)
        found, damaged = snapshots.load_all(machine)
        assert damaged == [] and {second, third} <= {one.id for one in found}
        assert [content(machine, one) for one in (second, third)] == ["AB", "ABC"]
        for one in found:
            snapshots.verify(snapshots.directory(machine, one.id), one)
            snapshots.bases(machine, one)
        if done or first not in {one.id for one in found}:
            break
    else:
        pytest.fail("it never came to its end")
    assert first not in {one.id for one in snapshots.load_all(machine)[0]}


def test_one_whose_base_is_gone(machine: str) -> None:
    first = make(machine, "a", "", "", "A")
    second = make(machine, "b", first, first, "B")
    snapshots.remove(machine, first, parent="")
    with pytest.raises(IntegrityError, match="is missing"):
        snapshots.bases(machine, snapshots.load(machine, second))
