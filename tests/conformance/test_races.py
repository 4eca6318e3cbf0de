"""Two commands at a time, a launcher killed at the worst moment, damaged records: the store stays right."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nagaya import CreateOptions, Host, Machine, Mount, Restart
from nagaya.errors import Conflict, IntegrityError, NotFound, UsageError
from nagaya.manager import machine as machine_module
from nagaya.storage import machines as records
from nagaya.supervisor.launch import allow_fork, launch
from tests.conformance.types import PATIENCE_S, group_of

Start = Callable[..., Machine]


def _wait_for(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _assert_gone(host: Host, machine: Machine) -> None:
    assert not os.path.exists(machine.directory)
    assert not os.path.exists(host.paths.runtime(machine.id))
    assert group_of(machine) is None
    assert records.names_of(host.paths, machine.id) == []


# -- one command right behind another


def test_a_start_right_behind_a_stop(start: Start) -> None:
    """Whoever hears that it has ended may start it at once."""
    machine = start("sleep", "600")
    for _ in range(12):
        machine.stop(timeout_s=0)
        machine.start()
    assert machine.state.phase == "running"


def test_a_start_right_behind_an_end_that_was_seen(create: Start) -> None:
    """`exited` can be read a moment before its supervisor has let go: a start waits for that moment."""
    machine = create("true")
    for _ in range(12):
        machine.start()
        while machine.state.phase != "exited":
            pass
    assert machine.state.exit_code == 0


@pytest.mark.parametrize("end", ["stop", "kill", "remove"])
def test_the_end_of_a_machine_that_just_restarts(create: Start, end: str) -> None:
    """A restart policy boots again and again: a stop meets every phase of that, and none refuses it."""
    for delay_ms in range(0, 60, 6):
        machine = create("true", restart=Restart("always"))
        machine.start()
        _wait_for(lambda machine=machine: machine.state.restarts >= 1)  # type: ignore[misc]
        time.sleep(delay_ms / 1000)
        if end == "remove":
            machine.remove(force=True)
            with pytest.raises(NotFound):
                _ = machine.state
            continue
        machine.stop(timeout_s=0) if end == "stop" else machine.kill()
        assert machine.state.phase == "exited"
        assert not records.is_alive(machine.paths, machine.id)


# -- a launcher that is killed


def _launch_and_die(host: Host, machine: Machine, *, fork: bool) -> None:
    """Start the machine's supervisor in a process that is killed before it hears anything."""
    pid = os.fork()
    if pid == 0:
        try:
            lock = machine.lock()
            if fork:
                allow_fork()
            launch(host.paths, machine.id, command=lock, attach=False, size=(0, 0))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("fork", [True, False])
@pytest.mark.parametrize("command", ["start", "remove", "remove -f", "look"])
def test_a_launcher_killed_behind_the_fork(host: Host, create: Start, command: str, fork: bool) -> None:
    for _ in range(6):
        machine = create("sleep", "600")
        _launch_and_die(host, machine, fork=fork)
        if command == "look":
            assert machine.state.phase in ("created", "starting", "running")
        elif command == "remove -f":
            machine.remove(force=True)
            _assert_gone(host, machine)
            continue
        else:
            # The supervisor that it left has the command lock until the start is on record: no second one, no removal.
            with pytest.raises(Conflict, match=r"starting|running"):
                machine.start() if command == "start" else machine.remove()
        _wait_for(lambda machine=machine: machine.state.phase == "running")  # type: ignore[misc]
        assert machine.run(["true"]).exit_code == 0
        machine.remove(force=True)
        _assert_gone(host, machine)


# -- what cannot be started


def _environment(count: int) -> tuple[str, ...]:
    return tuple(f"V{number}={'x' * 1000}" for number in range(count))


def test_a_record_that_could_not_be_read_again(host: Host, create: Start) -> None:
    machines, volumes = sorted(records.ids(host.paths)), host.volumes.list()
    with pytest.raises(UsageError, match="MiB"):
        create("true", env=_environment(20_000), mounts=(Mount("volume", "", "/v"),))
    assert (sorted(records.ids(host.paths)), host.volumes.list()) == (machines, volumes)


@pytest.mark.parametrize("policy", ["no", "always"])
def test_a_program_that_fits_no_frame(host: Host, create: Start, policy: str) -> None:
    environment = _environment(2000)
    machine = create("true", env=environment, restart=Restart(policy))
    with pytest.raises(UsageError):
        machine.start()
    assert machine.state.phase == "exited"
    assert group_of(machine) is None
    machine.remove()
    _assert_gone(host, machine)


# -- creators and removers that were killed


def test_a_creator_killed_before_the_record(host: Host, create: Start) -> None:
    """Its name is free for the next one, at once, and the volumes that it made are gone."""
    half = "5" * 32
    os.makedirs(host.paths.machine(half))
    records.claim_name(host.paths, "contested", half)
    machine = create("true", name="contested", mounts=(Mount("volume", "", "/v"),))
    assert not os.path.exists(host.paths.machine(half))
    # The same, later: volumes are there, the state is not.
    os.unlink(f"{machine.directory}/state.json")
    (volume, *_) = [mount.source for mount in machine.spec.mounts if mount.anonymous]
    assert host.volumes.get(volume)
    again = create("true", name="contested")
    assert host.machines.get("contested").id == again.id
    with pytest.raises(NotFound):
        host.volumes.get(volume)


def test_a_rename_that_was_cut_off(host: Host, create: Start) -> None:
    machine = create("true", name="before")
    records.claim_name(host.paths, "after", machine.id)
    assert sorted(records.names_of(host.paths, machine.id)) == ["after", "before"]
    host.machines.list()
    assert records.names_of(host.paths, machine.id) == ["before"]


def test_an_anonymous_volume_that_another_uses_stays(host: Host, create: Start) -> None:
    first = create("true", mounts=(Mount("volume", "", "/v"),))
    name = next(mount.source for mount in first.spec.mounts if mount.target == "/v")
    second = create("true", mounts=(Mount("volume", name, "/v"),))
    first.remove(volumes=True)
    assert host.volumes.get(name)
    second.remove()
    host.volumes.remove(name)


# -- damage


@pytest.mark.parametrize("text", ["", "{", "[[[[", '{"phase":"dancing"}', '{"phase":7}'])
def test_a_damaged_state_is_mended(start: Start, text: str) -> None:
    machine = start("sleep", "600")
    machine.stop(timeout_s=0)
    Path(f"{machine.directory}/state.json").write_text(text)
    state = machine.state
    assert (state.phase, state.error) == ("exited", "its state record was damaged")
    machine.start()
    assert machine.state.phase == "running"


@pytest.mark.parametrize("running", [True, False])
def test_a_damaged_record_stands_in_nobody_s_way(host: Host, create: Start, running: bool) -> None:
    good, bad = create("true"), create("sleep", "600", name="damaged")
    if running:
        bad.start()
    Path(f"{bad.directory}/spec.json").write_text('{"id": "x"}')
    assert good.id in [machine.id for machine in host.machines.list()]
    (problem,) = host.machines.damaged()
    assert bad.id[:12] in problem.message and f"rm -f {bad.id[:12]}" in problem.hint
    with pytest.raises(IntegrityError):
        host.machines.get("damaged")
    with pytest.raises(IntegrityError):  # whose images it needs is not known: none is removed
        host.machines.image_ids()
    host.machines.remove_damaged("damaged")
    _assert_gone(host, bad)
    assert host.machines.damaged() == []


FULL = """
import os, subprocess, sys
from nagaya import CreateOptions, Host
from nagaya.errors import HostError

root, tree = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", root], check=True)
host = Host(root=root)
host.images.import_rootfs(tree, "box")
def run(name):
    script = "dd if=/dev/zero of=/big bs=4k 2>/dev/null; exit 7"
    machine = host.machines.create(CreateOptions("box", command=("sh", "-c", script), network="none", name=name))
    with machine.start(attach=True) as attachment:
        return machine, attachment.communicate(timeout_s=60)[0]
machine, status = run("first")
print(status, os.statvfs(root).f_bavail, machine.state.phase, machine.state.exit_code, machine.state.error or "-")
try:
    machine.start()
except HostError as error:
    print(error.message)
print(machine.state.phase)
machine.remove()
machine, status = run("second")
print(status, [other.name for other in host.machines.list()])
machine.remove(force=True)
print(os.listdir(host.paths.machines), os.listdir(host.paths.run))
"""


def test_a_machine_that_fills_the_disk_ends_and_goes(tmp_path: Path, busybox_tree: Path) -> None:
    """Its own status is told and kept, and it can be removed, which is what makes room again."""
    argv = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        sys.executable,
        "-c",
        FULL,
        str(tmp_path),
        str(busybox_tree),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == [
        "7 0 exited 7 -",
        "cannot start the machine: No space left on device",
        "exited",
        "7 ['second']",
        "[] []",
    ], done


# -- the handle


def test_a_start_that_hears_nothing_leaves_the_lock_free(
    host: Host, create: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = create("sleep", "600")

    def refuse(*arguments: object, **options: object) -> int:
        raise OSError(11, "fork: no more processes")

    monkeypatch.setattr(machine_module, "launch", refuse)
    with pytest.raises(OSError, match="no more"):
        machine.start()
    monkeypatch.undo()
    assert not records.is_being_changed(host.paths, machine.id)
    machine.start()
    assert machine.state.phase == "running"


def test_a_taken_name_makes_nothing(host: Host) -> None:
    """A name that is taken is refused before anything is made."""
    before = sorted(records.ids(host.paths))
    first = host.machines.create(CreateOptions("box", name="taken", network="none"))
    with pytest.raises(Conflict, match="in use"):
        host.machines.create(CreateOptions("box", name="taken", network="none"))
    first.remove()
    assert sorted(records.ids(host.paths)) == before
