"""The crash matrix: SIGKILL for the command, the supervisor or the machine's init, at any moment of any command.

Each round starts a command on a machine, kills one of the three after a random delay (or as soon as it exists), and
then looks: `ps` says what is true, `rm -f` of everything works, and nothing is left. The seed is printed;
NAGAYA_CRASH_SEED and NAGAYA_CRASH_ROUNDS repeat a run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from typing import Any

import pytest

from tests.e2e import leftovers
from tests.e2e.command import Cli
from tests.e2e.processes import parents, supervisors

ROUNDS = int(os.environ.get("NAGAYA_CRASH_ROUNDS", "200"))
BUDGET_S = 170.0
VERBS = ("run", "run --rm", "run -d", "start", "stop", "rm -f", "restart")
VICTIMS = ("command", "supervisor", "init")
PHASES = {"created", "starting", "running", "paused", "restarting", "exited"}


def _victims(kind: str, command: subprocess.Popen[bytes], root: str) -> list[int]:
    if kind == "command":
        return [command.pid]
    found = supervisors(root)
    if kind == "supervisor":
        return found
    return [pid for pid, parent in parents().items() if parent in found]


def _argv(verb: str) -> list[str]:
    """A command line on the machine "m"; what it runs ends by itself only when it is `run`."""
    if verb.startswith("run"):
        program = ["sleep", "600"] if verb == "run -d" else ["sh", "-c", "echo x; sleep 0.01; exit 3"]
        return [*verb.split(), "--network", "none", "--name", "m", "busybox", *program]
    return [*verb.split(), *(("-t", "0") if verb in ("stop", "restart") else ()), "m"]


def _prepare(cli: Cli, verb: str) -> None:
    if verb == "start":
        cli.ok("create", "--network", "none", "--name", "m", "busybox", "sleep", "600")
    elif verb in ("stop", "rm -f", "restart"):
        cli.ok("run", "-d", "--network", "none", "--name", "m", "busybox", "sleep", "600")


def _strike(cli: Cli, verb: str, victim: str, delay_s: float) -> int:
    """Run the command and kill; how many processes were hit."""
    command = cli.popen(*_argv(verb), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    hit = 0
    try:
        time.sleep(delay_s)
        deadline = time.monotonic() + 0.1
        while not hit and time.monotonic() < deadline:
            for pid in _victims(victim, command, cli.root):
                try:
                    os.kill(pid, signal.SIGKILL)
                    hit += 1
                except ProcessLookupError:
                    continue
            if command.poll() is not None:
                break
        command.wait(20)  # with its partner dead, a command must not hang
    except subprocess.TimeoutExpired:
        command.kill()
        command.wait()
        raise AssertionError(f"'{verb}' hung after its {victim} was killed") from None
    return hit


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _check_truth(cli: Cli, verb: str) -> None:
    """What `ps` shows is so: whoever runs has a process and answers, whoever has ended has none."""
    deadline = time.monotonic() + 3
    while True:
        ran = cli("ps", "-a", "--json")
        assert (ran.code, ran.err) == (0, ""), ran
        rows: list[dict[str, Any]] = json.loads(ran.out)
        # A supervisor whose init has just been killed has yet to wake up and write that down.
        stale = [row for row in rows if row["state"] == "running" and not _is_running(row["pid"])]
        if not stale or time.monotonic() > deadline:
            break
    assert stale == []
    assert len(rows) <= 1, rows
    for row in rows:
        assert row["state"] in PHASES, row
        if row["state"] == "running":
            answer = cli("exec", row["id"], "true")
            # Unless the machine has ended since: its program is short.
            assert answer.code == 0 or cli.machines() == [] or cli.machines()[0]["state"] == "exited", (row, answer)
        elif row["state"] in ("created", "exited"):
            assert row["pid"] == 0, row
            assert not _supervisors_soon_gone(cli.root), row
            again = cli("start", row["id"])  # whatever happened, it can be used again
            gone = verb == "run --rm" and cli.machines() == []  # its end was being written down as we looked
            assert again.code == 0 or gone, (row, again)


def _supervisors_soon_gone(root: str) -> list[int]:
    deadline = time.monotonic() + 3
    while (left := supervisors(root)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def _check_clean(cli: Cli, before: leftovers.Footprint, scratch: str) -> None:
    ids = cli.ok("ps", "-aq", "--no-trunc").split()
    if ids:
        # One that was created with --rm may end, and be gone, between the two commands.
        ran = cli("rm", "-f", "-v", *ids)
        assert ran.code == 0 or "there is no machine" in ran.err or "has been removed" in ran.err, ran
    assert cli.machines() == []
    left = leftovers.find_new(before, scratch)
    for directory in ("machines", "names", "run", "volumes"):
        if os.path.isdir(f"{cli.root}/{directory}"):
            left += [f"{directory}/{name}" for name in os.listdir(f"{cli.root}/{directory}")]
    assert left == []


@pytest.mark.timeout(240)
def test_crash_matrix(own_cli: Cli) -> None:
    seed = int(os.environ.get("NAGAYA_CRASH_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"crash matrix: NAGAYA_CRASH_SEED={seed} NAGAYA_CRASH_ROUNDS={ROUNDS}")
    noise = random.Random(seed)
    scratch = os.path.dirname(own_cli.root)
    own_cli.ok("ps", "-a")
    before = leftovers.take_footprint(scratch)
    hits = dict.fromkeys(VICTIMS, 0)
    began = time.monotonic()
    rounds = 0
    for number in range(ROUNDS):
        verb, victim, delay_s = noise.choice(VERBS), noise.choice(VICTIMS), noise.uniform(0, 0.06)
        _prepare(own_cli, verb)
        try:
            hits[victim] += bool(_strike(own_cli, verb, victim, delay_s))
            _check_truth(own_cli, verb)
            _check_clean(own_cli, before, scratch)
        except AssertionError as error:
            error.add_note(f"seed {seed}, round {number}: {verb}, {victim} killed after {delay_s * 1000:.1f} ms")
            raise
        rounds += 1
        if time.monotonic() - began > BUDGET_S:
            break
    print(f"{rounds} rounds in {time.monotonic() - began:.0f} s, killed: {hits}")
    assert rounds >= min(ROUNDS, 40), "this host is too slow for the matrix to say anything"
    assert rounds < 40 or all(count >= rounds // 20 for count in hits.values()), hits
