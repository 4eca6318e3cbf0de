"""Snapshots, files of them and forks of machines of type kvm, by the command."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nagaya.kernel.backing import keeps_holes
from nagaya.kernel.reflink import can_clone
from tests.conftest import remove_all
from tests.e2e.command import Cli
from tests.e2e.kvm_place import await_builds, make_place
from tests.e2e.snapshot_files import damaged, rewrite
from tests.e2e.test_lifecycle import state_of, wait_for
from tests.e2e.test_snapshots import machine_dir, numbers, shell, snapshots_of

BUILD_S, PATIENCE_S = 600.0, 120.0
KILLS = int(os.environ.get("NAGAYA_SNAPSHOT_ROUNDS", "6"))
SEED = int(os.environ.get("NAGAYA_SNAPSHOT_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
STANDS_MS = 500.0
"""At most, whatever else the host does: less than a hundred on a quiet one, and by far less than writing all of it takes."""
COUNT = "i=0; trap 'exit 7' TERM; while :; do i=$((i+1)); echo $i; sleep 0.3; done"

pytestmark = pytest.mark.timeout(BUILD_S + 10 * PATIENCE_S)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, busybox_root: str) -> Iterator[Cli]:
    """With busybox, and a template for machines of it."""
    place = make_place(tmp_path_factory, "kvm-snapshots")
    env = {"XDG_CACHE_HOME": str(place / "cache"), "NAGAYA_TEMPLATES": "1", "NAGAYA_TYPE": "kvm"}
    os.mkdir(place / "store")
    subprocess.run(["cp", "-a", f"{busybox_root}/images", str(place / "store")], check=True)
    made = Cli(str(place / "store"), env=env)
    made.ok("template", "build", "-q", "--network", "none", "busybox", timeout_s=BUILD_S)
    yield made
    remove_all(made)
    await_builds(made, BUILD_S)


@pytest.fixture
def cli(store: Cli) -> Iterator[Cli]:
    """With a machine "m" that counts."""
    store.ok("run", "-d", "--network", "none", "--name", "m", "busybox", "sh", "-c", COUNT, timeout_s=PATIENCE_S)
    wait_for(lambda: len(numbers(store, "m")) > 2, PATIENCE_S)
    yield store
    remove_all(store)


def goes_on(cli: Cli, name: str) -> None:
    wait_for(lambda: bool(numbers(cli, name)), PATIENCE_S)  # a fork may not have counted yet
    before = numbers(cli, name)[-1]
    wait_for(lambda: numbers(cli, name)[-1] > before, PATIENCE_S)


def create(cli: Cli, snapshot: str, *flags: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(
        cli.ok("snapshot", "create", "--json", *flags, "m", snapshot, timeout_s=PATIENCE_S)
    )
    return made


def used_bytes(snapshot: dict[str, object]) -> int:
    return (Path(str(snapshot["directory"])) / "memory" / "memory").stat().st_blocks * 512


def test_a_chain_of_differences(cli: Cli) -> None:
    taken = []
    for number in range(3):
        shell(cli, "m", f"echo {number} > /n")
        taken.append(create(cli, f"s{number}"))
        goes_on(cli, "m")
    assert [one["base"] for one in taken] == [None, taken[0]["id"], taken[1]["id"]]
    assert 0 < min(one["paused_ms"] for one in taken) <= STANDS_MS, taken
    print(
        "paused for",
        [one["paused_ms"] for one in taken],
        "ms; programs stood for",
        [one["programs_stood_ms"] for one in taken],
    )
    sizes = [used_bytes(one) for one in taken]
    assert sizes[0] < 100 << 20 and max(sizes[1:]) < sizes[0] // 2, sizes
    for name in ("s2", "s1"):
        cli.ok("snapshot", "restore", "m", name, timeout_s=PATIENCE_S)
        goes_on(cli, "m")
        assert shell(cli, "m", "cat /n") == f"{name[1]}\n"
    cli.ok("snapshot", "rm", "m", "s0")  # what the others need of it becomes the next one's
    assert cli.json("snapshot", "inspect", "m", "s1")[0]["base"] is None
    cli.ok("snapshot", "restore", "m", "s2", timeout_s=PATIENCE_S)
    goes_on(cli, "m")
    cli.ok("snapshot", "rm", "m", "s1")
    cli.ok("snapshot", "restore", "m", "s2", timeout_s=PATIENCE_S)
    goes_on(cli, "m")
    assert shell(cli, "m", "cat /n") == "2\n"
    assert create(cli, "s3", "--whole")["base"] is None


def test_a_damaged_base_is_refused(cli: Cli) -> None:
    for name in ("a", "b"):
        cli.ok("snapshot", "create", "m", name, timeout_s=PATIENCE_S)
    pid = state_of(cli, "m")["pid"]
    memory = Path(cli.json("snapshot", "inspect", "m", "a")[0]["directory"]) / "memory" / "memory"
    with memory.open("r+b") as file:
        at = os.lseek(file.fileno(), 64 << 20, os.SEEK_DATA)
        byte = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes((byte[0] ^ 1,)), at)
    for argv in (("restore", "m", "b"), ("restore", "m", "a"), ("save", "m", "b", "/dev/null")):
        ran = cli("snapshot", *argv)
        assert ran.code == 1 and "damaged" in ran.err, ran
    refused = cli("snapshot", "rm", "m", "a")
    assert refused.code == 1 and "others build on its memory" in refused.err, refused
    assert state_of(cli, "m")["pid"] == pid
    goes_on(cli, "m")
    cli.ok("snapshot", "rm", "m", "b")
    cli.ok("snapshot", "rm", "m", "a")


def test_kills_leave_the_machine_running_and_no_half(cli: Cli) -> None:
    """Of the command, at any moment."""
    dice = random.Random(SEED)
    print(f"NAGAYA_SNAPSHOT_SEED={SEED}")
    cli.ok("snapshot", "create", "m", "a", timeout_s=PATIENCE_S)
    pid = state_of(cli, "m")["pid"]
    for number in range(KILLS):
        command = cli.popen(
            "snapshot", "create", "m", f"k{number}", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(dice.uniform(0.05, 1.5))
        command.send_signal(signal.SIGKILL)
        command.wait(20)
        goes_on(cli, "m")
        assert cli.machines()[0]["state"] == "running"  # and the next command mends
        assert state_of(cli, "m")["pid"] == pid
        left = os.listdir(machine_dir(cli, "m") / "snapshots")
        assert not [name for name in left if name.startswith(".")], left
    names = snapshots_of(cli, "m")
    cli.ok("snapshot", "restore", "m", names[-1], timeout_s=PATIENCE_S)  # each that is there is whole
    goes_on(cli, "m")


def test_files_of_them(cli: Cli, tmp_path: Path) -> None:
    """Into another store, as of another host; and what is refused leaves a running machine alone."""
    cli.ok("snapshot", "create", "m", "a", timeout_s=PATIENCE_S)
    shell(cli, "m", "echo mine > /f")
    cli.ok("snapshot", "create", "m", "b", timeout_s=PATIENCE_S)
    at = numbers(cli, "m")[-1]
    file = tmp_path / "b.snapshot"
    cli.ok("snapshot", "save", "-q", "m", "b", str(file))
    other = Cli(str(tmp_path / "other"), env=cli.env)
    other.env["NAGAYA_ROOT"] = other.root
    try:
        assert other.ok("snapshot", "restore", "-q", "--from", str(file), timeout_s=PATIENCE_S) == "m\n"
        goes_on(other, "m")
        assert 2 < numbers(other, "m")[0] <= at + 1
        assert shell(other, "m", "cat /f") == "mine\n"
        assert shell(other, "m", "hostname") != shell(cli, "m", "hostname")
    finally:
        remove_all(other)
    pid = state_of(cli, "m")["pid"]
    paths = damaged(file, tmp_path)
    for number, (what, change) in enumerate(
        {
            "another version": {"record": lambda one: one._replace(version="99.0")},
            "another CPU": {
                "state": lambda state: state["leaves"][1][3].__setitem__(2, state["leaves"][1][3][2] ^ 512)
            },
            "another KVM": {"state": lambda state: state.__setitem__("kvm", "imaginary")},
            "another VMM": {"state": lambda state: state.__setitem__("version", "99.0")},
        }.items()
    ):
        (tmp_path / f"work{number}").mkdir()
        paths[what] = tmp_path / f"changed{number}"
        rewrite(file, paths[what], tmp_path / f"work{number}", **change)  # type: ignore[arg-type]
    for what, path in paths.items():
        ran = cli("snapshot", "restore", "-q", "--from", str(path), "other")
        assert ran.code == 1 and "Traceback" not in ran.err, (what, ran)
        if what.startswith("another") and what != "another format":
            assert what.split()[1] in ran.err or "99.0" in ran.err, (what, ran)
    assert [row["name"] for row in cli.machines()] == ["m"] and state_of(cli, "m")["pid"] == pid
    goes_on(cli, "m")


def test_forks(cli: Cli) -> None:
    at = numbers(cli, "m")[-1]
    names = cli.ok("fork", "-n", "3", "--name", "f", "m", timeout_s=2 * PATIENCE_S).split()
    assert names == ["f-1", "f-2", "f-3"]
    seen = []
    for name in ("m", *names):
        goes_on(cli, name)
        assert numbers(cli, name)[0] >= min(at, 1)
        seen.append((shell(cli, name, "hostname"), shell(cli, name, "head -c 16 /dev/urandom | od -An -tx1")))
    assert all(len(set(column)) == 4 for column in zip(*seen, strict=True)), seen
    shell(cli, "f-1", "echo mine > /mine")
    assert cli("exec", "f-2", "ls", "/mine").code == 1
    cli.ok("rm", "-f", "m")
    goes_on(cli, "f-1")


def test_a_fork_that_is_killed_leaves_none_that_did_not_run(cli: Cli) -> None:
    dice = random.Random(SEED)
    print(f"NAGAYA_SNAPSHOT_SEED={SEED}")
    for _ in range(max(2, KILLS // 2)):
        command = cli.popen("fork", "-n", "4", "--name", "f", "m", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(dice.uniform(0.2, 4.0))
        command.kill()
        command.wait(20)
        wait_for(lambda: {row["state"] for row in cli.machines()} == {"running"}, PATIENCE_S)
        goes_on(cli, "m")
        assert not list(machine_dir(cli, "m").glob("snapshots/.*"))
        for row in cli.machines():
            if row["name"] != "m":
                goes_on(cli, row["name"])  # what runs is whole
                cli.ok("rm", "-f", row["name"])


FILL = "head -c 1048576 /dev/urandom > /r; i=0; while [ $i -lt 40 ]; do cat /r; i=$((i+1)); done > /big; sync"
WRITE = """
i=0; mkdir -p /w
while :; do
  i=$((i+1)); head -c 262144 /dev/urandom > /w/data; { md5sum < /w/data; cat /w/data; } > /w/new; sync; mv /w/new /w/$((i%4)); sleep 0.02
done
"""
CHECK = 'for f in /w/?; do cp $f /c; [ "$(tail -c 262144 /c | md5sum)" = "$(head -n 1 /c)" ] || echo bad $f; done; md5sum /big'


def test_a_full_disk_is_copied_before_the_machine_stands(store: Cli) -> None:
    """40 MiB of it, while it is written to. Where blocks are shared nothing is copied, and the same is true."""
    store.ok("run", "-d", "--network", "none", "--name", "m", "busybox", "sh", "-c", WRITE, timeout_s=PATIENCE_S)
    try:
        shell(store, "m", FILL)
        sum_ = shell(store, "m", "md5sum /big")
        assert (machine_dir(store, "m") / "data.img").stat().st_blocks * 512 > 40 << 20
        taken = [create(store, f"s{number}") for number in range(2)]
        print(
            "paused for",
            [one["paused_ms"] for one in taken],
            "programs stood for",
            [one["programs_stood_ms"] for one in taken],
        )
        assert min(one["paused_ms"] for one in taken) <= STANDS_MS, taken
        killed = store.popen("snapshot", "create", "m", "gone", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.3)  # at the disk
        killed.kill()
        killed.wait(20)
        for name, flags in (("s0", ()), ("s1", ()), ("s1", ("--no-memory",))):  # the second time from the disk alone
            store.ok("snapshot", "restore", *flags, "m", name, timeout_s=PATIENCE_S)
            wait_for(lambda: store("exec", "m", "ls", "/w/3").code == 0, PATIENCE_S)
            assert shell(store, "m", CHECK) == sum_, name
    finally:
        remove_all(store)


DROP = "sync; echo 3 > /proc/sys/vm/drop_caches; "
CHANGE = (
    "dd if=/r of=/big bs=4096 seek=3000 count=200 conv=notrunc 2>/dev/null; echo mine > /mine; rm /r; sync; md5sum /big"
)


def test_forks_of_a_full_disk_share_it(store: Cli, tmp_path: Path) -> None:
    """40 MiB, which no fork copies: not where the file system shares blocks, and not where it does not."""
    store.ok("run", "-d", "--network", "none", "--name", "m", "busybox", "sh", "-c", COUNT, timeout_s=PATIENCE_S)
    other = Cli(str(tmp_path / "other"), env=store.env)
    other.env["NAGAYA_ROOT"] = other.root
    try:
        shell(store, "m", FILL)
        sum_ = shell(store, "m", "md5sum /big")
        store.ok("fork", "-n", "2", "--name", "f", "m", timeout_s=PATIENCE_S)
        places = [machine_dir(store, name) for name in ("f-1", "f-2")]
        shared = [place / "data.backing" for place in places]
        if not can_clone(str(places[0])) and keeps_holes(str(places[0])):
            assert [path.stat().st_nlink for path in shared] == [2, 2]
            assert all((place / "data.img").stat().st_blocks * 512 < 8 << 20 for place in places)
        # A fork writes on what it shares, and nobody else sees it.
        assert shell(store, "f-1", "md5sum /big") == sum_
        changed = shell(store, "f-1", CHANGE)
        assert changed != sum_
        for name in ("m", "f-2"):
            assert shell(store, name, f"{DROP}md5sum /big") == sum_
            assert store("exec", name, "ls", "/mine").code == 1
        # All that can be done with a machine can be done with one whose disk stands on another.
        store.ok("snapshot", "create", "f-1", "s", timeout_s=PATIENCE_S)
        shell(store, "f-1", "rm /big /mine; sync")
        store.ok("snapshot", "restore", "f-1", "s", timeout_s=PATIENCE_S)
        goes_on(store, "f-1")
        assert shell(store, "f-1", f"{DROP}md5sum /big") == changed
        store.ok("fork", "--name", "g", "f-1", timeout_s=PATIENCE_S)
        assert shell(store, "g", f"{DROP}md5sum /big; cat /mine") == f"{changed}mine\n"
        store.ok("rm", "-f", "m", "f-2", "g")
        store.ok("stop", "-t", "1", "f-1", timeout_s=PATIENCE_S)
        store.ok("cp", "f-1:/mine", str(tmp_path / "mine"), timeout_s=PATIENCE_S)
        assert (tmp_path / "mine").read_text() == "mine\n"
        store.ok("start", "f-1", timeout_s=PATIENCE_S)
        assert shell(store, "f-1", "md5sum /big") == changed
        file = tmp_path / "s.snapshot"
        store.ok("snapshot", "save", "-q", "f-1", "s", str(file), timeout_s=PATIENCE_S)
        other.ok("snapshot", "restore", "-q", "--from", str(file), timeout_s=PATIENCE_S)
        assert shell(other, "f-1", f"{DROP}md5sum /big") == changed
        # To QEMU's, which reads one file, and to directories.
        store.ok("stop", "-t", "1", "f-1", timeout_s=PATIENCE_S)
        store.ok("update", "--type", "emulated", "f-1", timeout_s=PATIENCE_S)
        assert not shared[0].exists()
        store.ok("start", "f-1", timeout_s=PATIENCE_S)
        assert shell(store, "f-1", "md5sum /big") == changed
        # And back to the snapshot, from when it stood on the other one.
        store.ok("stop", "-t", "1", "f-1", timeout_s=PATIENCE_S)
        store.ok("update", "--type", "kvm", "f-1", timeout_s=PATIENCE_S)
        store.ok("snapshot", "restore", "f-1", "s", timeout_s=PATIENCE_S)
        goes_on(store, "f-1")
        assert shell(store, "f-1", f"{DROP}md5sum /big") == changed
    finally:
        remove_all(store)
        remove_all(other)
