"""Names, trash and trees: what must hold whatever is interrupted."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nagaya.errors import Conflict, IntegrityError, UsageError
from nagaya.model.state import ACCEPTS, PHASES, MachineState, require
from nagaya.storage import machines, records
from nagaya.storage.paths import Paths, find_paths
from nagaya.storage.tree import remove_tree

A, B = "a" * 32, "b" * 32


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    made = Paths(str(tmp_path / "root"), str(tmp_path / "run"))
    for machine_id in (A, B):
        os.makedirs(made.machine(machine_id))
    return made


def test_a_name_has_one_owner(paths: Paths) -> None:
    machines.claim_name(paths, "x", A)
    with pytest.raises(Conflict, match="in use"):
        machines.claim_name(paths, "x", B)
    assert machines.find_by_name(paths, "x") == A
    machines.release_name(paths, "x", B)
    assert machines.find_by_name(paths, "x") == A
    machines.release_name(paths, "x", A)
    assert machines.find_by_name(paths, "x") == ""


def test_a_dead_owner_s_name_is_taken_over(paths: Paths) -> None:
    os.makedirs(paths.names)
    os.symlink("c" * 32, f"{paths.names}/x")
    machines.claim_name(paths, "x", B)
    assert machines.find_by_name(paths, "x") == B


def test_of_many_claims_one_wins(paths: Paths) -> None:
    ids = [f"{number:032x}" for number in range(16)]
    for machine_id in ids:
        os.makedirs(paths.machine(machine_id))

    def claim(machine_id: str) -> bool:
        try:
            machines.claim_name(paths, "x", machine_id)
        except Conflict:
            return False
        return True

    os.makedirs(paths.names)
    os.symlink("c" * 32, f"{paths.names}/x")
    with ThreadPoolExecutor(8) as pool:
        won = [machine_id for machine_id, ok in zip(ids, pool.map(claim, ids), strict=True) if ok]
    assert won == [machines.find_by_name(paths, "x")]


@pytest.mark.parametrize("name", ["", ".", "..", "../names/x", "a/b"])
def test_paths_are_no_names(paths: Paths, name: str) -> None:
    assert machines.find_by_name(paths, name) == ""


def test_discard_is_finished_by_the_next_sweep(paths: Paths) -> None:
    os.makedirs(f"{paths.machines}/.trash-{A}/upper/x")
    machines.sweep_trash(paths)
    assert sorted(os.listdir(paths.machines)) == [A, B]
    machines.claim_name(paths, "x", A)
    machines.discard(paths, A, "x")
    assert os.listdir(paths.machines) == [B]
    assert os.listdir(paths.names) == []
    machines.discard(paths, A, "x")


def test_a_record_of_another_machine_is_refused(paths: Paths) -> None:
    from tests.unit.test_storage_records import SPEC

    records.store(f"{paths.machine(B)}/spec.json", SPEC)
    with pytest.raises(IntegrityError, match="another"):
        machines.load_spec(paths, B)
    records.store(f"{paths.machine(A)}/state.json", machines.MachineState(phase="asleep"))
    with pytest.raises(IntegrityError, match="asleep"):
        machines.load_state(paths, A)


def test_trees_go_without_following_links(tmp_path: Path) -> None:
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "file").write_text("x")
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "link").symlink_to(keep)
    (tree / "a" / "file").symlink_to(keep / "file")
    os.chmod(tree / "a" / "b", 0)
    remove_tree(str(tree))
    remove_tree(str(tree))
    assert not tree.exists()
    assert (keep / "file").read_text() == "x"


def test_every_command_knows_every_phase() -> None:
    for command, accepted in ACCEPTS.items():
        assert set(accepted) <= set(PHASES)
        for phase in PHASES:
            if phase in accepted:
                require(command, phase, "m")
            else:
                with pytest.raises(Conflict) as caught:
                    require(command, phase, "m")
                assert caught.value.state == phase


def test_a_store_of_its_own_has_run_time_files_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NAGAYA_ROOT", raising=False)
    monkeypatch.delenv("NAGAYA_RUN_DIR", raising=False)
    assert find_paths("/x").run == "/x/run"
    assert find_paths("/x", "/y").run == "/y"
    monkeypatch.setenv("NAGAYA_ROOT", "/z")
    assert find_paths() == Paths("/z", "/z/run")
    with pytest.raises(UsageError):
        find_paths("a\0b")


TURNS, PATIENCE_S = 25, 60.0


def _take_turns(paths: Paths, machine_id: str, seconds: float) -> int:
    """Claim, look, and remove as a machine that ends does: directory first, then the name. How often it was ours."""
    directory, held = paths.machine(machine_id), 0
    until = time.monotonic() + seconds
    while (now := time.monotonic()) < until or (held < TURNS and now < until + PATIENCE_S):
        try:
            machines.claim_name(paths, "x", machine_id)
        except Conflict:
            continue
        for _ in range(20):
            if machines.find_by_name(paths, "x") != machine_id:
                return -1
        held += 1
        os.rename(directory, f"{directory}.gone")
        machines.release_name(paths, "x", machine_id)
        os.rename(f"{directory}.gone", directory)
    return held


def test_a_name_never_changes_hands_under_its_owner(paths: Paths) -> None:
    """Claims that take over a dead owner's link, and that owner's own release, meet in every order."""
    owners = (A, B, "c" * 32, "d" * 32)
    for machine_id in owners:
        os.makedirs(paths.machine(machine_id), exist_ok=True)
    context = multiprocessing.get_context("fork")
    with context.Pool(len(owners)) as pool:
        counts = pool.starmap(_take_turns, [(paths, machine_id, 0.4) for machine_id in owners])
    assert min(counts) >= 0 and sum(counts) >= TURNS * len(owners)  # however busy the host is


def test_a_state_finds_room_on_a_full_disk(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    long = MachineState(phase="running", error="a long sentence " * 20)
    machines.store_state(paths, A, long)
    monkeypatch.setattr(records, "write_file", refuse)
    for state in (MachineState(phase="exited", exit_code=7), long):
        machines.store_state(paths, A, state)
        assert machines.load_state(paths, A) == state
    with pytest.raises(OSError, match="No space"):  # there is none to write over
        machines.store_state(paths, B, long)
    assert os.listdir(paths.machine(B)) == []
