"""Machines that move between two stores in two network namespaces of this host, under load and under kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.types import find_obstacle
from tests.e2e.command import Cli, Ran
from tests.e2e.processes import below, supervisors
from tests.e2e.test_lifecycle import wait_for
from tests.e2e.two_stores import Two, open_two

KILLS = int(os.environ.get("NAGAYA_MIGRATION_KILLS", "3"))
SEED = int(os.environ.get("NAGAYA_MIGRATION_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
# Counts, and writes files that have the sum of their other lines as their first.
LOAD = (
    "mkdir -p /w; i=0; while :; do i=$((i+1)); echo $i > /dev/shm/n; seq $i $((i+500)) > /w/data;"
    " { md5sum < /w/data; cat /w/data; } > /w/new; mv /w/new /w/f$((i%4)); done"
)
# Of a copy: the file is replaced meanwhile.
CHECK = (
    'for f in /w/f?; do cat $f > /dev/shm/c; [ "$(tail -n +2 /dev/shm/c | md5sum)" = "$(head -n 1 /dev/shm/c)" ] || echo bad $f; done;'
    " cat /dev/shm/n"
)

EMULATED_STEPS = {"pause", "disk", "rest", "adopt", "note", "run"}
RELAY = str(Path(__file__).with_name("relay.py"))

pytestmark = pytest.mark.timeout(400)


def need(type_: str) -> None:
    obstacle = find_obstacle(type_)
    if obstacle:
        pytest.skip(f"needs {type_}: {obstacle}")


@pytest.fixture
def two(tmp_path_factory: pytest.TempPathFactory, busybox_root: str) -> Iterator[Two]:
    need("kvm")
    with open_two(tmp_path_factory.mktemp("two"), f"{busybox_root}/images") as made:
        yield made


def start(side: Cli, *program: str, flags: tuple[str, ...] = ("--network", "none"), type_: str = "kvm") -> str:
    words = (
        "run",
        "-d",
        "--type",
        type_,
        "-m",
        "128m",
        "--storage",
        "256m",
        "--name",
        "m",
        *flags,
        "busybox",
        *program,
    )
    return side.ok(*words, timeout_s=180).strip()


def shell(side: Cli, command: str) -> str:
    return side.ok("exec", "m", "sh", "-c", command, timeout_s=120)


def finish(receiver: subprocess.Popen[bytes]) -> tuple[int, str]:
    out, err = receiver.communicate(timeout=60)
    return receiver.returncode, (out + err).decode(errors="replace")


def test_there_and_back_with_its_address_and_its_programs(two: Two) -> None:
    id_ = start(two.here, "sh", "-c", LOAD, flags=("--network", "house", "--hostname", "wanderer"))
    before = two.here.json("inspect", "m")[0]
    wait_for(lambda: two.here("exec", "m", "ls", "/w/f1").code == 0, 120)
    count = 0
    for source, target in ((two.here, two.there), (two.there, two.here)):
        receiver = two.listen(to=target)
        sent = source("migrate", "send", "--json", "--max-downtime", "30000", "m", "--to", two.to, timeout_s=180)
        assert sent.code == 0, sent
        events = [json.loads(line) for line in sent.out.splitlines()]
        assert events[-1]["event"] == "moved" and events[-1]["machine_id"] == id_ and events[-1]["downtime_ms"] > 0
        assert abs(sum(events[-1]["downtime_steps_ms"].values()) - events[-1]["downtime_ms"]) < 1
        assert finish(receiver)[0] == 0
        assert source.machines() == []
        now = shell(target, CHECK)
        assert "bad" not in now and int(now.split()[-1]) > count
        count = int(now.split()[-1])
        wait_for(lambda target=target, count=count: int(shell(target, "cat /dev/shm/n")) > count, 60)  # type: ignore[misc]
        after = target.json("inspect", "m")[0]
        assert (after["id"], after["name"], after["hostname"]) == (id_, "m", "wanderer")
        assert after["state"]["origin"] == "migrated"
        assert [(link["address"], link["mac"]) for link in after["links"]] == [
            (link["address"], link["mac"]) for link in before["links"]
        ]
        gateway = after["links"][0]["gateway"]
        pinged = target("exec", "m", "ping", "-c", "3", "-W", "5", gateway, timeout_s=60)
        assert pinged.code == 0, pinged
        clock = int(shell(target, "date +%s"))
        assert abs(clock - time.time()) < 60
    two.here.ok("stop", "-t", "0", "m", timeout_s=120)
    assert shell_after_restart(two.here) == "0\n"


def shell_after_restart(side: Cli) -> str:
    """How many files are bad on the disk that came along, after a boot from it."""
    side.ok("start", "m", timeout_s=180)
    return shell(side, CHECK.rpartition(";")[0] + " | wc -l")


def test_a_fork_whose_disk_stands_on_another_takes_all_of_it_along(two: Two) -> None:
    start(two.here, "sleep", "600")
    fill = "head -c 16777216 /dev/urandom > /big; sync; md5sum /big"
    sum_ = shell(two.here, fill)
    two.here.ok("rename", "m", "original")
    two.here.ok("fork", "--name", "m", "original", timeout_s=120)
    two.here.ok("rm", "-f", "original")
    changed = shell(
        two.here, "dd if=/dev/urandom of=/big bs=1024 seek=2001 count=50 conv=notrunc 2>/dev/null; sync; md5sum /big"
    )
    assert changed != sum_
    receiver = two.listen()
    sent = two.here("migrate", "send", "-q", "--max-downtime", "30000", "m", "--to", two.to, timeout_s=180)
    assert sent.code == 0, sent
    assert finish(receiver)[0] == 0
    assert shell(two.there, "echo 3 > /proc/sys/vm/drop_caches; md5sum /big") == changed
    assert not list(Path(two.there.root).glob("machines/*/data.backing"))


def test_it_is_refused_before_anything_is_sent(two: Two) -> None:
    start(two.here, "sleep", "600", flags=("--network", "house"))
    address = two.here.json("inspect", "m")[0]["links"][0]["address"]

    def refused(says: str) -> None:
        receiver = two.listen()
        ran = two.here("migrate", "send", "m", "--to", two.to, timeout_s=120)
        assert ran.code == 1 and says in ran.err, ran
        code, said = finish(receiver)
        assert code == 1 and says in said
        assert two.states("m")[0] == "running"

    two.there.ok("create", "--network", "none", "--name", "m", "busybox", "true")
    refused("the name 'm' is in use")
    two.there.ok("rm", "m")
    two.there.ok("run", "-d", "--name", "squatter", "--network", "house", "--ip", address, "busybox", "sleep", "600")
    refused(address)
    two.there.ok("rm", "-f", "squatter")
    assert two.there.machines() == []
    assert two.here("migrate", "send", "m", "--to", "unix:/nowhere/s").code == 1
    assert two.here("migrate", "send", "m").code == 2
    assert two.here("migrate", "send", "m", "--to", "host").code == 2
    two.here.ok("snapshot", "create", "--no-memory", "m", timeout_s=120)
    assert "snapshots" in two.here("migrate", "send", "m", "--to", two.to).err
    two.here.ok("run", "-d", "--network", "none", "--name", "box", "busybox", "sleep", "600")
    ran = two.here("migrate", "send", "box", "--to", two.to)
    assert ran.code == 1 and "type 'container'" in ran.err
    two.here.ok("stop", "-t", "0", "box")
    assert two.here("migrate", "send", "box", "--to", two.to).code == 1


def test_its_image_comes_along_where_it_is_missing_by_way_of_a_command(two: Two) -> None:
    start(two.here, "sh", "-c", LOAD)
    two.there.ok("rmi", "busybox")
    command = " ".join(two.there.argv("--root", two.there.root, "migrate", "receive", "-"))
    sent = two.here("migrate", "send", "m", "--to", f"exec:{command}", "--max-downtime", "30000", timeout_s=180)
    assert sent.code == 0, sent
    assert two.here.machines() == []
    assert "bad" not in shell(two.there, CHECK)
    assert "busybox" in two.there.ok("images")


def test_whoever_is_killed_whenever_one_machine_is_left(two: Two) -> None:
    source = random.Random(SEED)
    print(f"NAGAYA_MIGRATION_SEED={SEED}")
    start(two.here, "sh", "-c", LOAD)
    sides = [two.here, two.there]
    for _ in range(KILLS):
        here, there = sides
        receiver = two.listen("--keep", to=there)
        sender = here.popen("migrate", "send", "m", "--to", two.to, "--max-downtime", "2000")
        victim = source.choice(("send", "receive", "target", "target's VMM"))
        time.sleep(source.uniform(0.1, 3.0))
        kill(victim, sender, receiver, there)
        try:
            sender.communicate(timeout=120)
        finally:
            receiver.kill()
            receiver.communicate()
        settle(two, here, there)
        found = [[one["state"] for one in side.machines()] for side in (here, there)]
        assert sorted(map(len, found)) == [0, 1], (victim, found)
        owner = here if found[0] else there
        if (found[0] or found[1]) != ["running"]:  # killed behind the last step: it is there, and can be started
            assert owner is there and victim.startswith("target"), (victim, found)
            owner.ok("start", "m", timeout_s=180)
            shell(owner, "rm -f /w/f?")  # a power cut's: they were not synced
        assert "bad" not in shell(owner, CHECK)
        sides = [owner, there if owner is here else here]


def kill(victim: str, sender: subprocess.Popen[bytes], receiver: subprocess.Popen[bytes], there: Cli) -> None:
    process = {"send": sender, "receive": receiver}.get(victim)
    if process is not None:
        process.kill()
        return
    found = [pid for pid in supervisors(there.root) if pid != receiver.pid]
    if victim == "target's VMM":
        found = below(found)
    for pid in found[:1]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def settle(two: Two, here: Cli, there: Cli) -> None:
    """As a user would: where the source does not know, ask the target."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        states = [[one["state"] for one in side.machines()] for side in (here, there)]
        if "starting" not in states[1] and sum(map(len, states)) == 1:
            return
        if states[0] and Path(here.json("inspect", "m")[0]["directory"], "leaving.json").exists():
            receiver = two.listen("--keep", to=there)
            here("migrate", "resolve", "m", "--to", two.to)
            receiver.terminate()
            receiver.communicate()
        time.sleep(0.3)


FAST = (
    "head -c 8m /dev/urandom > /dev/shm/kept; md5sum /dev/shm/kept > /dev/shm/sum; "
    "while :; do for i in $(seq 16); do cat /bin/busybox > /dev/shm/x$i; done; echo > /dev/shm/n; done"
)
SLOW_STREAM_BYTES_PER_S = 12 << 20


def send_slowly(two: Two, *flags: str, type_: str = "kvm") -> Ran:
    """A machine that writes faster than that stream is."""
    start(two.here, "sh", "-c", FAST, type_=type_)
    wait_for(lambda: two.here("exec", "m", "ls", "/dev/shm/n").code == 0, 120)
    receiver = two.listen()
    relay = f"exec:{sys.executable} {RELAY} {two.socket} --rate {SLOW_STREAM_BYTES_PER_S}"
    ran = two.here("migrate", "send", "--json", *flags, "m", "--to", relay, timeout_s=180)
    assert finish(receiver)[0] == ran.code
    return ran


def goes_on(side: Cli) -> bool:
    """It writes, and what it had written before is what it was."""
    shell(side, "rm /dev/shm/n")
    wait_for(lambda: side("exec", "m", "ls", "/dev/shm/n").code == 0, 60)
    return side("exec", "m", "sh", "-c", "md5sum -s -c /dev/shm/sum").code == 0


@pytest.mark.parametrize("type_", ["kvm", "emulated"])
def test_one_that_writes_faster_than_the_stream_says_so_and_stays(two: Two, type_: str) -> None:
    need(type_)
    ran = send_slowly(two, type_=type_)
    assert ran.code == 1 and "--max-downtime" in ran.err, ran
    assert ("does not converge" if type_ == "kvm" else "in the time that it may stand") in ran.err
    assert ("--post-copy" in ran.err) == (type_ == "kvm")
    assert two.states("m") == ["running", ""]
    assert os.listdir(f"{two.there.root}/machines") == os.listdir(f"{two.there.root}/names") == []
    assert supervisors(two.there.root) == []
    assert goes_on(two.here)


def test_with_post_copy_it_runs_there_before_its_memory_is_there(two: Two) -> None:
    ran = send_slowly(two, "--post-copy")
    assert ran.code == 0, ran
    moved = json.loads(ran.out.splitlines()[-1])
    assert moved["post_copy"] and moved["downtime_ms"] > 0, moved
    assert set(moved["downtime_steps_ms"]) == {"pause", "state", "rest", "adopt"}
    print(f"stood for {moved['downtime_ms']} ms, {moved['rounds']} rounds, {moved['total_s']:.1f} s in all")
    assert two.states("m") == ["", "running"]
    assert goes_on(two.there)


def break_at_commit(two: Two, order: str) -> str:
    """Where to send a machine, so that the stream breaks at the last step: before it, or "p" behind it."""
    return f"exec:{sys.executable} {RELAY} {two.socket} --at out:COMMIT --order {order}"


def test_a_stream_that_breaks_at_the_last_step_is_asked_about(two: Two) -> None:
    start(two.here, "sleep", "600")
    receiver = two.listen("--keep")

    def send(order: str) -> Ran:
        command = break_at_commit(two, order)
        return two.here("migrate", "send", "m", "--to", command, "--max-downtime", "30000", timeout_s=120)

    try:
        lost = send("b")  # it was never heard: the target says so, and the machine goes on here
        assert lost.code == 1, lost
        assert two.states("m") == ["running", ""]
        assert shell(two.here, "echo here") == "here\n"
        unheard = send("p")  # it was heard, and that was not: the target says so, and the machine is gone from here
        assert unheard.code == 0, unheard
        assert two.states("m") == ["", "running"]
        assert shell(two.there, "echo there") == "there\n"
    finally:
        receiver.terminate()
        receiver.communicate()


def test_who_cannot_ask_says_where_it_is(two: Two) -> None:
    start(two.here, "sleep", "600")
    receiver = two.listen()  # takes one machine, and ends
    command = break_at_commit(two, "b")
    doubt = two.here("migrate", "send", "m", "--to", command, "--max-downtime", "30000", timeout_s=120)
    finish(receiver)
    assert doubt.code == 1 and "nagaya migrate resolve" in doubt.err, doubt
    assert two.states("m") == ["paused", ""]
    assert two.here("unpause", "m").code == 1
    assert two.here("migrate", "resolve", "m").code == 2
    assert two.here("migrate", "resolve", "m", "--to", "unix:/nowhere/s").code == 1
    for pid in supervisors(two.here.root):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: two.states("m") == ["exited", ""])
    refused = two.here("start", "m")
    assert refused.code == 1 and "handed over" in refused.err
    assert two.here.ok("migrate", "resolve", "m", "--here") == "m: stays here\n"
    assert two.here("migrate", "resolve", "m", "--there").code == 1
    two.here.ok("start", "m", timeout_s=180)
    assert shell(two.here, "echo here") == "here\n"


def test_an_emulated_machine_moves_with_its_address_its_disk_and_its_programs(two: Two) -> None:
    need("emulated")
    id_ = start(two.here, "sh", "-c", LOAD, flags=("--network", "house", "--hostname", "wanderer"), type_="emulated")
    before = two.here.json("inspect", "m")[0]
    wait_for(lambda: two.here("exec", "m", "ls", "/w/f1").code == 0, 120)
    refused = two.here("migrate", "send", "--post-copy", "m", "--to", two.to)
    assert refused.code == 1 and "--post-copy" in refused.err
    count = 0
    for source, target in ((two.here, two.there), (two.there, two.here)):
        receiver = two.listen(to=target)
        sent = source("migrate", "send", "--json", "--max-downtime", "30000", "m", "--to", two.to, timeout_s=180)
        assert sent.code == 0, sent
        moved = json.loads(sent.out.splitlines()[-1])
        assert moved["machine_id"] == id_ and set(moved["downtime_steps_ms"]) == EMULATED_STEPS
        assert finish(receiver)[0] == 0
        assert source.machines() == []
        now = shell(target, CHECK)
        assert "bad" not in now and int(now.split()[-1]) > count
        count = int(now.split()[-1])
        wait_for(lambda target=target, count=count: int(shell(target, "cat /dev/shm/n")) > count, 60)  # type: ignore[misc]
        after = target.json("inspect", "m")[0]
        assert (after["id"], after["name"], after["state"]["origin"]) == (id_, "m", "migrated")
        assert [(link["address"], link["mac"]) for link in after["links"]] == [
            (link["address"], link["mac"]) for link in before["links"]
        ]
        pinged = target("exec", "m", "ping", "-c", "3", "-W", "5", after["links"][0]["gateway"], timeout_s=60)
        assert pinged.code == 0, pinged
        assert abs(int(shell(target, "date +%s")) - time.time()) < 60
    # It can be saved, and stopped, as before.
    two.here.ok("snapshot", "create", "m", timeout_s=120)
    two.here.ok("snapshot", "rm", "--all", "m")
    two.here.ok("stop", "-t", "0", "m", timeout_s=120)
    assert shell_after_restart(two.here) == "0\n"
