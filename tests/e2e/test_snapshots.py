"""Snapshots and forks by the command: what comes back, what is refused, and what a kill leaves."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conformance.types import find_obstacle
from tests.conftest import require_program
from tests.e2e.command import Cli
from tests.e2e.processes import supervisors
from tests.e2e.test_lifecycle import state_of, wait_for

ROUNDS = int(os.environ.get("NAGAYA_SNAPSHOT_ROUNDS", "12"))
SEED = int(os.environ.get("NAGAYA_SNAPSHOT_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
TREE = (
    "mkdir -p /d/sub; echo one > /d/a; ln /d/a /d/hard; ln -s a /d/soft; mkfifo /d/pipe; chmod 4751 /d/a;"
    " chown 7:8 /d/a; rm /etc/group; rm -rf /var; mkdir /var; dd if=/dev/zero of=/d/holes bs=1 count=1 seek=5000000"
)
LOOK = "find /d /var -exec stat -c '%n %F %a %u %g %h %s %Y' {} + | sort; cat /d/a; readlink /d/soft"


def snapshots_of(cli: Cli, name: str) -> list[str]:
    return cli.ok("snapshot", "ls", "-q", name).split()


def machine_dir(cli: Cli, name: str) -> Path:
    return Path(cli.json("inspect", name)[0]["directory"])


def snapshot_dir(cli: Cli, name: str, snapshot: str) -> Path:
    return Path(cli.json("snapshot", "inspect", name, snapshot)[0]["directory"])


def shell(cli: Cli, name: str, command: str) -> str:
    return cli.ok("exec", name, "sh", "-c", command)


def need_emulated() -> None:
    obstacle = find_obstacle("emulated")
    if obstacle:
        pytest.skip(f"needs emulated machines: {obstacle}")


# -- containers


def test_a_running_container_goes_back(cli: Cli) -> None:
    cli.start(flags=("--name", "m"))
    shell(cli, "m", TREE)
    before = shell(cli, "m", LOOK)
    assert cli.ok("snapshot", "create", "-m", "as it was", "m", "clean") == "clean\n"
    shell(cli, "m", "rm -rf /d; echo mine > /etc/group; echo new > /var/new")
    assert cli.ok("snapshot", "restore", "m", "clean") == "clean\n"
    assert state_of(cli, "m")["phase"] == "running"
    assert shell(cli, "m", LOOK) == before
    assert cli("exec", "m", "ls", "/etc/group").code == 1  # a whiteout is one again
    first = cli.json("snapshot", "inspect", "m", "clean")[0]
    assert (first["description"], first["memory"], first["state"], first["current"]) == (
        "as it was", False, "running", True,
    )  # fmt: skip


def test_a_stopped_container_stays_stopped(cli: Cli) -> None:
    cli.ok("create", "--network", "none", "--name", "m", "busybox", "sh", "-c", "echo x >> /n; cat /n")
    cli.ok("snapshot", "create", "m", "never-started")
    assert cli.ok("start", "-a", "m") == "x\n"
    cli.ok("snapshot", "create", "m")
    assert cli.ok("start", "-a", "m") == "x\nx\n"
    cli.ok("snapshot", "restore", "m", "snap1")
    assert cli.machines()[0]["state"] == "exited"
    assert cli.ok("start", "-a", "m") == "x\nx\n"
    cli.ok("snapshot", "restore", "m", "never-started")
    assert cli.ok("start", "-a", "m") == "x\n"


def test_configuration_comes_back_and_identity_stays(cli: Cli) -> None:
    id_ = cli.start(flags=("--name", "m", "-m", "64m"))
    cli.ok("snapshot", "create", "m", "small")
    cli.ok("update", "-m", "128m", "--restart", "on-failure", "m")
    cli.ok("rename", "m", "other")
    cli.ok("snapshot", "restore", "other", "small")
    found = cli.json("inspect", "other")[0]
    assert (found["id"], found["name"], found["limits"]["memory_bytes"]) == (id_, "other", 64 << 20)
    assert found["restart"]["policy"] == "on-failure"
    assert found["snapshots"] == ["small"]


def test_the_tree_and_its_pruning(cli: Cli) -> None:
    cli.ok("create", "--network", "none", "--name", "m", "busybox", "true")
    for name in ("a", "b"):
        cli.ok("snapshot", "create", "m", name)
    cli.ok("snapshot", "restore", "m", "a")
    cli.ok("snapshot", "create", "-m", "beside b", "m", "c")
    assert cli.ok("snapshot", "tree", "m").splitlines() == [
        "m", "└── a", "    ├── b", "    └── c*  beside b",
    ]  # fmt: skip
    cli.ok("snapshot", "rm", "m", "a")
    assert cli.ok("snapshot", "tree", "m").splitlines() == ["m", "├── b", "└── c*  beside b"]
    cli.ok("snapshot", "restore", "m", "b")  # what is left of a tree is whole
    cli.ok("snapshot", "rename", "m", "b", "first")
    assert cli("snapshot", "rename", "m", "c", "first").code == 1
    cli.ok("snapshot", "create", "--keep", "2", "m", "d")
    assert snapshots_of(cli, "m") == ["c", "d"]
    assert cli("snapshot", "prune", "m").code == 2  # nobody to ask
    assert cli.ok("snapshot", "prune", "-f", "--keep", "1", "m") == "m/c\n"
    cli.ok("snapshot", "rm", "--all", "m")
    assert snapshots_of(cli, "m") == []


def test_a_machine_of_rm_survives_its_restore(cli: Cli) -> None:
    cli.start(flags=("--name", "m", "--rm"))
    cli.ok("snapshot", "create", "m")
    shell(cli, "m", "touch /new")
    cli.ok("snapshot", "restore", "m")
    assert cli("exec", "m", "ls", "/new").code == 1
    cli.ok("kill", "m")
    assert cli.machines() == []


def test_twenty_times_with_checksums(cli: Cli) -> None:
    # Each file has the sum of its other lines as its first, and gets its name when it is whole.
    script = "mkdir -p /w; i=0; while :; do i=$((i+1)); dd if=/dev/urandom bs=4k count=16 2>/dev/null | base64 > /data;"
    script += " { md5sum < /data; cat /data; } > /new; sync /new; mv /new /w/$((i%8)); done"
    cli.start("sh", "-c", script, flags=("--name", "m"))
    wait_for(lambda: cli("exec", "m", "ls", "/w/0").code == 0)
    for number in range(20):
        cli.ok("snapshot", "create", "--keep", "3", "m", f"s{number}")
        cli.ok("snapshot", "restore", "m", f"s{number}")
        bad = 'for f in /w/?; do [ "$(tail -n +2 $f | md5sum)" = "$(head -n 1 $f)" ] || echo $f; done; ls /w/? | wc -l'
        cli.ok("pause", "m")
        upper = machine_dir(cli, "m") / "upper"
        ran = subprocess.run(
            ["sh", "-c", bad.replace("/w/", f"{upper}/w/")], capture_output=True, text=True, check=True
        )
        assert ran.stdout == "8\n"
        cli.ok("unpause", "m")
    assert len(snapshots_of(cli, "m")) == 3


def test_a_criu_that_does_not_work_is_told_of(cli: Cli, tmp_path: Path) -> None:
    """The snapshot has the disks alone then, and the container goes on."""
    says = 'while [ "$1" != --work-dir ]; do shift; done; echo "(00.1) Error (criu/x.c:1): no such luck" > "$2/criu.log"; exit 1'
    (tmp_path / "criu").write_text(f"#!/bin/sh\n{says}\n")
    (tmp_path / "criu").chmod(0o755)
    broken = Cli(cli.root, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    broken.start("sh", "-c", "while :; do echo on; sleep 0.1; done", flags=("--name", "m"))
    refused = broken("snapshot", "create", "--memory", "m", "a")
    assert refused.code == 1 and "CRIU cannot save this container's programs: no such luck" in refused.err
    made = broken("snapshot", "create", "m", "b")
    assert made.code == 0 and "disks alone" in made.err and "no such luck" in made.err
    assert not broken.json("snapshot", "inspect", "m", "b")[0]["memory"]
    said = len(cli.ok("logs", "m"))
    wait_for(lambda: len(cli.ok("logs", "m")) > said)
    broken.ok("snapshot", "restore", "m", "b")


def test_a_paused_container_stays_paused(cli: Cli) -> None:
    cli.start(flags=("--name", "m"))
    cli.ok("pause", "m")
    cli.ok("snapshot", "create", "m")
    assert state_of(cli, "m")["phase"] == "paused"


REFUSED = {
    ("snapshot", "create", "m", "--memory"): (1, "cannot be saved"),
    ("snapshot", "create", "m", "a"): (1, "already"),
    ("snapshot", "create", "m", "-x"): (2, ""),
    ("snapshot", "create", "m", "../up"): (2, "not a valid snapshot name"),
    ("snapshot", "create", "--memory", "--no-memory", "m"): (2, "exclude"),
    ("snapshot", "create", "nobody"): (1, "no machine"),
    ("snapshot", "restore", "m", "nosuch"): (1, "has no snapshot"),
    ("snapshot", "restore", "--memory", "m", "a"): (1, "was not saved"),
    ("snapshot", "rm", "m", "nosuch"): (1, "has no snapshot"),
    ("snapshot", "rm", "m"): (2, "--all"),
    ("fork", "m"): (1, "cannot be forked"),
    ("fork", "-n", "0", "--disk-only", "m"): (2, "not a number"),
}


def test_what_is_refused(cli: Cli) -> None:
    cli.start(flags=("--name", "m"))
    cli.ok("snapshot", "create", "m", "a")
    for argv, (code, words) in REFUSED.items():
        ran = cli(*argv)
        assert ran.code == code and words in ran.err and "Traceback" not in ran.err, (argv, ran)
    assert state_of(cli, "m")["phase"] == "running"
    assert snapshots_of(cli, "m") == ["a"]


# -- damage


def _edit(record: Path, change: Callable[[dict[str, object]], None]) -> None:
    data = json.loads(record.read_text())
    change(data)
    record.write_text(json.dumps(data))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "another content": lambda place: (place / "upper/f").write_text("other\n"),
    "another owner": lambda place: os.chown(place / "upper/f", 1, 1),
    "another attribute": lambda place: os.setxattr(place / "upper/f", "user.x", b"1"),
    "one file less": lambda place: (place / "upper/f").unlink(),
    "one file more": lambda place: (place / "upper/g").touch(),
    "one part more": lambda place: (place / "data.img").touch(),
    "no parts": lambda place: os.rename(place / "upper", place.parent.parent / "gone"),
    "a record cut short": lambda place: os.truncate(place / "snapshot.json", 100),
    "a record of nonsense": lambda place: (place / "snapshot.json").write_bytes(b"[" * 100_000),
    "another format": lambda place: _edit(place / "snapshot.json", lambda data: data.update(format=99)),
    "another name": lambda place: _edit(place / "snapshot.json", lambda data: data.update(name="b")),
    "no record": lambda place: (place / "snapshot.json").unlink(),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused_and_the_machine_runs_on(cli: Cli, what: str) -> None:
    cli.start(flags=("--name", "m"))
    shell(cli, "m", "echo then > /f")
    cli.ok("snapshot", "create", "m", "a")
    shell(cli, "m", "echo now > /f")
    place = snapshot_dir(cli, "m", "a")
    pid = state_of(cli, "m")["pid"]
    DAMAGE[what](place)
    for name in ("a", place.name[:6]):
        ran = cli("snapshot", "restore", "m", name)
        assert ran.code == 1 and ran.err.count("\n") == 2 and "Traceback" not in ran.err, ran
    assert state_of(cli, "m")["pid"] == pid
    assert shell(cli, "m", "cat /f") == "now\n"
    cli("snapshot", "ls", "m")
    cli.ok("snapshot", "rm", "m", place.name)
    assert not place.exists()


# -- SIGKILL


VERBS = (
    ("snapshot", "create", "m", "new"),
    ("snapshot", "restore", "m", "a"),
    ("snapshot", "rm", "m", "a"),
)


@pytest.mark.timeout(60 + 10 * ROUNDS)
def test_kills_leave_nothing_half_made(cli: Cli) -> None:
    """The command or the supervisor, at any moment of each command, on a running machine and on one that does not."""
    dice = random.Random(SEED)
    print(f"NAGAYA_SNAPSHOT_SEED={SEED}")
    for number in range(ROUNDS):
        verb, running, victim = (
            VERBS[number % 3],
            number // 3 % 2 == 0,
            dice.choice(("command", "command", "supervisor")),
        )
        cli.start(flags=("--name", "m"))
        shell(cli, "m", "echo one > /f; for i in 1 2 3 4 5 6 7 8; do mkdir /d$i; echo $i > /d$i/f; done")
        cli.ok("snapshot", "create", "m", "a")
        cli.ok("snapshot", "create", "m", "b")
        shell(cli, "m", "echo two > /f; rm -r /d1")
        if not running:
            cli.ok("stop", "-t", "0", "m")
        command = cli.popen(*verb, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(dice.uniform(0.02, 0.35))
        for pid in [command.pid] if victim == "command" else supervisors(cli.root):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        command.wait(20)
        told = (verb, running, victim)
        rows = cli.machines()  # the next command mends
        assert len(rows) == 1 and rows[0]["state"] in ("running", "exited"), (told, rows)
        names = snapshots_of(cli, "m")
        assert set(names) <= {"a", "b", "new"} and "b" in names, told
        if rows[0]["state"] != "running":
            cli.ok("start", "m")
        content = shell(cli, "m", "cat /f; ls -d /d1 2>/dev/null || echo gone")
        assert content in ("one\n/d1\n", "two\ngone\n"), (told, content)  # one or the other, and never some of each
        if verb[1] != "restore":
            assert content == "two\ngone\n", told
        place = machine_dir(cli, "m")
        left = {*os.listdir(place / "snapshots"), *os.listdir(place)}
        assert not [name for name in left if name.startswith((".tmp", ".trash", "restore"))], (told, left)
        for name in names:
            cli.ok("snapshot", "restore", "m", name)  # each that is shown is whole
        cli.ok("rm", "-f", "m")


# -- virtual machines


COUNT = "i=0; trap 'exit 7' TERM; while :; do i=$((i+1)); echo $i; echo $i > /n; sleep 0.1; done"


def numbers(cli: Cli, name: str) -> list[int]:
    return [int(line) for line in cli.ok("logs", name).split()]


def run_counter(cli: Cli, type_: str, *flags: str) -> None:
    cli.ok("run", "-d", "--type", type_, *flags, "--name", "m", "busybox", "sh", "-c", COUNT, timeout_s=120)
    wait_for(lambda: len(numbers(cli, "m")) > 2, 60)


def went_back(counted: list[int], at: int) -> list[int]:
    """What was counted since the machine went back to where it was when it had counted to `at`: until then it had run on."""
    for index, number in enumerate(counted):
        if number <= at or (index and number < counted[index - 1]):
            return counted[index:]
    return []


def check_memory(cli: Cli) -> None:
    """A counter that runs as "m" goes on from where it was, under a new supervisor; and its disk is that of then."""
    low = numbers(cli, "m")[-1]
    cli.ok("snapshot", "create", "m", "s", timeout_s=120)
    assert cli.json("snapshot", "inspect", "m", "s")[0]["memory"] is True
    at = numbers(cli, "m")[-1]
    wait_for(lambda: numbers(cli, "m")[-1] > at + 2, 60)  # it went on
    shell(cli, "m", "touch /later; sync")
    before = len(numbers(cli, "m"))
    pid = state_of(cli, "m")["pid"]
    cli.ok("snapshot", "restore", "m", "s", timeout_s=120)
    assert state_of(cli, "m")["phase"] == "running" and state_of(cli, "m")["pid"] != pid
    wait_for(lambda: len(went_back(numbers(cli, "m")[before:], at)) > 4, 60)
    after = went_back(numbers(cli, "m")[before:], at)
    assert low <= after[0] <= at + 2 and after == list(range(after[0], after[0] + len(after)))
    assert cli("exec", "m", "ls", "/later").code == 1
    guest_s = int(shell(cli, "m", "date +%s"))
    assert abs(guest_s - time.time()) < 5
    assert cli.ok("exec", "-i", "m", "cat", input="through\n") == "through\n"
    cli.ok("pause", "m")
    refused = cli("snapshot", "create", "m")
    assert refused.code == 1 and "paused" in refused.err
    cli.ok("unpause", "m")
    cli.ok("stop", "-t", "20", "m", timeout_s=60)
    assert cli.machines()[0]["exit_code"] == 7  # of the program that was saved


def test_an_emulated_machine_goes_on(cli: Cli) -> None:
    need_emulated()
    run_counter(cli, "emulated", "--network", "none")
    check_memory(cli)
    cli.ok("snapshot", "restore", "m", "s", timeout_s=60)  # of one that does not run, too
    assert state_of(cli, "m")["phase"] == "running"
    cli.ok("snapshot", "restore", "--no-memory", "m", "s", timeout_s=60)
    wait_for(lambda: bool(numbers(cli, "m")) and numbers(cli, "m")[-1] < 5, 60)  # begun anew
    cli.ok("stop", "-t", "0", "m", timeout_s=60)
    cli.ok("snapshot", "create", "m", "off")
    assert cli.json("snapshot", "inspect", "m", "off")[0]["memory"] is False


def test_damaged_memory_is_refused(cli: Cli) -> None:
    need_emulated()
    run_counter(cli, "emulated", "--network", "none")
    cli.ok("snapshot", "create", "m", "s")
    place = snapshot_dir(cli, "m", "s")
    pid = state_of(cli, "m")["pid"]
    whole = (place / "memory/state").read_bytes()
    for damage in (whole[:-1], whole[: len(whole) // 2] + b"\0\1\2" + whole[len(whole) // 2 + 3 :], b""):
        (place / "memory/state").write_bytes(damage)
        ran = cli("snapshot", "restore", "m", "s")
        assert ran.code == 1 and "is damaged" in ran.err, ran
    (place / "memory/state").write_bytes(whole)
    with (place / "data.img").open("r+b") as disk:
        disk.seek(1 << 20)
        disk.write(b"damage")
    ran = cli("snapshot", "restore", "m", "s")
    assert ran.code == 1 and "data.img is not what was saved" in ran.err, ran
    assert state_of(cli, "m")["pid"] == pid


def test_another_size_is_refused(cli: Cli) -> None:
    """The record says how large the machine was; whoever changes that and its sums still gets nothing that could run."""
    need_emulated()
    run_counter(cli, "emulated", "--network", "none", "-m", "128m")
    cli.ok("snapshot", "create", "m", "s")
    program = (
        "import sys; from nagaya.storage import snapshots as s\n"
        "m, i = sys.argv[1:]; one = s.load(m, i)\n"
        "s.store(s.directory(m, i), one._replace(spec=one.spec._replace(limits=one.spec.limits._replace(memory_bytes=256<<20))))"
    )
    place = snapshot_dir(cli, "m", "s")
    subprocess.run(
        [os.path.join(os.path.dirname(cli.argv()[0]), "python"), "-c", program, str(machine_dir(cli, "m")), place.name],
        check=True,
    )  # fmt: skip
    pid = state_of(cli, "m")["pid"]
    ran = cli("snapshot", "restore", "m", "s")
    assert ran.code == 1 and "another memory bytes" in ran.err, ran
    assert state_of(cli, "m")["pid"] == pid


def test_forks_are_machines_of_their_own(cli: Cli) -> None:
    need_emulated()
    require_program("busybox")
    run_counter(cli, "emulated", "--network", "none")
    shell(cli, "m", f"echo {'0' * 32} > /etc/machine-id")
    at = numbers(cli, "m")[-1]
    assert cli.ok("fork", "-n", "2", "--name", "f", "m", timeout_s=120) == "f-1\nf-2\n"
    seen: list[tuple[str, ...]] = []
    for name in ("m", "f-1", "f-2"):
        seen.append(
            (
                shell(cli, name, "hostname"), shell(cli, name, "cat /etc/machine-id"),
                shell(cli, name, "head -c 16 /dev/urandom | od -An -tx1"), shell(cli, name, "tail -1 /etc/hosts"),
            )
        )  # fmt: skip
        assert numbers(cli, name)[-1] > at
    assert all(len(set(column)) == 3 for column in list(zip(*seen, strict=True))[:3]), seen
    shell(cli, "f-1", "echo mine > /mine")
    assert cli("exec", "f-2", "ls", "/mine").code == 1 and cli("exec", "m", "ls", "/mine").code == 1
    cli.ok("rm", "-f", "m")
    before = numbers(cli, "f-1")[-1]
    wait_for(lambda: numbers(cli, "f-1")[-1] > before)  # without the one that they came from
    cli.ok("stop", "-t", "20", "f-1", timeout_s=60)
    assert {row["name"]: row["exit_code"] for row in cli.machines() if row["state"] == "exited"} == {"f-1": 7}


def test_forks_of_a_container_from_its_disks(cli: Cli) -> None:
    cli.start(flags=("--name", "m"))
    shell(cli, "m", "echo there > /f")
    (name,) = cli.ok("fork", "--disk-only", "m").split()
    assert shell(cli, name, "cat /f") == "there\n"
    cli.ok("stop", "-t", "0", "m")
    (other,) = cli.ok("fork", "--disk-only", "--name", "o", "m").split()
    assert [row["state"] for row in cli.machines() if row["name"] == other] == ["created"]
