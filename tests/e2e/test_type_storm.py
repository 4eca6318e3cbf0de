"""Many machines of each type, killed at any moment: nothing stays behind, and nothing that a machine had synced is lost.

Every machine counts: it appends a number to a file of its own and to one in a volume, syncs, and prints the number. Some
process of it is killed while it is created, starts, runs, stops, gets another type or is removed. After that it must start
again, and have all that it printed. NAGAYA_STORM says how many machines of each type (4), NAGAYA_STORM_TYPES which, NAGAYA_STORM_SEED repeats a run's choices.
"""

from __future__ import annotations

import collections
import os
import random
import signal
import subprocess
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest

from nagaya.engines import TYPES
from tests.conformance.types import find_obstacle
from tests.conftest import remove_all
from tests.e2e.command import Cli
from tests.e2e.processes import below, supervisors

COUNT = int(os.environ.get("NAGAYA_STORM", "4"))
CHOSEN = tuple(filter(None, os.environ.get("NAGAYA_STORM_TYPES", "").split(",")))
SEED = int(os.environ.get("NAGAYA_STORM_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
AT_ONCE = {"container": 4, "emulated": 3, "kvm": 2}
BOOT_S = {"container": 0.1, "emulated": 1.5, "kvm": 25.0}  # about; a kill comes anywhere in it
PATIENCE_S = 240.0
RECORDS = "/root/records"
SCRIPT = f"""
n=$(tail -n 1 {RECORDS} 2>/dev/null); n=${{n:-0}}
while true; do
    n=$((n+1)); echo $n >>{RECORDS}; echo $n >>/volume/records; sync; echo $n; sleep 0.05
done
"""
PHASES = ("create", "start", "running", "stop", "update", "rm")
VICTIMS = ("command", "supervisor", "below")
OTHER = {"container": "emulated", "emulated": "container", "kvm": "emulated"}  # which `update --type` makes of it
UPDATE_S = {"container": 0.7, "emulated": 2.5, "kvm": 0.3}  # about: from a disk to directories takes a boot


class Storm:
    """The machines of one type. Each is one thread's; what they share is counted under a lock."""

    def __init__(self, cli: Cli, type_: str) -> None:
        self.cli, self.type = cli, type_
        self.counts: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def run(self, number: int) -> None:
        """One machine, from its creation to its removal."""
        dice = random.Random(f"{SEED} {self.type} {number}")
        name, phase = f"{self.type}-{number}", dice.choice(PHASES)
        victim = dice.choice(
            {"create": VICTIMS[:1], "update": ("command", "child"), "running": VICTIMS[1:]}.get(phase, VICTIMS)
        )
        create = ("create", "--name", name, "--type", self.type, "--network", "none", "--memory", "128m",
                  "-v", f"{name}:/volume", "busybox", "sh", "-c", SCRIPT)  # fmt: skip
        if phase == "create":
            self._strike(dice, create, victim, name, within_s=0.15)
        if phase != "create" or not self._is_there(name):  # else the name is free, and so is what belongs to it
            self.cli.ok(*create, timeout_s=PATIENCE_S)
        if phase == "create":
            self.cli.ok("start", name, timeout_s=PATIENCE_S)
            self._wait_for_records(name)
        elif phase == "start":
            self._strike(dice, ("start", name), victim, name, within_s=BOOT_S[self.type])
        else:
            self.cli.ok("start", name, timeout_s=PATIENCE_S)
            self._wait_for_records(name)
            time.sleep(dice.uniform(0, 1))
            if phase == "running":
                self._kill(dice, name, victim, None)
            elif phase == "update":
                self._change_type(dice, name, victim)
            else:
                argv = ("stop", "-t", "5", name) if phase == "stop" else ("rm", "-f", name)
                self._strike(dice, argv, victim, name, within_s=0.3)
        self.count(f"{phase}: {victim}")
        there = self._is_there(name)
        assert there or phase == "rm", f"{name} is gone"
        if there:
            self._check(dice, name)
            removed = self.cli("rm", "-f", name, timeout_s=PATIENCE_S)
            assert removed.code == 0, (phase, victim, removed)
        self.cli.ok("volume", "rm", name)

    def _change_type(self, dice: random.Random, name: str, victim: str) -> None:
        """Cut off, it has the old type or the new one, and the next change succeeds."""
        self.cli.ok("stop", "-t", "0", name, timeout_s=PATIENCE_S)
        change = ("update", "--type", OTHER[self.type], name)
        self._strike(dice, change, victim, name, within_s=UPDATE_S[self.type])
        type_ = self.cli.ok("inspect", "--format", "{{.Type}}", name).strip()
        assert type_ in (self.type, OTHER[self.type])
        self.count(f"then {type_}")
        if type_ == self.type:
            self.cli.ok(*change, timeout_s=PATIENCE_S)

    # -- killing

    def _strike(self, dice: random.Random, argv: tuple[str, ...], victim: str, name: str, *, within_s: float) -> None:
        command = self.cli.popen(*argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            time.sleep(dice.uniform(0, within_s))
            self._kill(dice, name, victim, command)
            command.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"'{' '.join(argv)}' hung after its {victim} was killed") from None
        finally:
            command.kill()
            command.wait()

    def _kill(self, dice: random.Random, name: str, victim: str, command: subprocess.Popen[bytes] | None) -> None:
        """SIGKILL for the command, the machine's supervisor, or one of the processes below that."""
        if victim == "command":
            assert command is not None
            pids = [command.pid] if command.poll() is None else []
        elif (
            victim == "child"
        ):  # the helper machine that reads a disk, or what makes one; the command where it has none
            assert command is not None
            pids = below([command.pid]) if command.poll() is None else []
        else:
            pids = self._supervisors(name)
            pids = pids if victim == "supervisor" else below(pids)
            dice.shuffle(pids)
        for pid in pids[-1:]:  # of those below any: a disk's process, virtiofsd, QEMU, the machine's VMM or its init
            try:
                os.kill(pid, signal.SIGKILL)
                self.count("killed")
            except ProcessLookupError:
                pass

    def _supervisors(self, name: str) -> list[int]:
        ran = self.cli("inspect", "--type", "machine", "--format", "{{.ID}}", name)
        if ran.code:
            return []
        return supervisors(self.cli.root, ran.out.strip())[:1]

    # -- what must be true after it

    def _wait_for_records(self, name: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not self.cli.ok("logs", name):
            assert time.monotonic() < deadline, f"{name} counts nothing"
            time.sleep(0.1)

    def _is_there(self, name: str) -> bool:
        ran = self.cli("inspect", "--type", "machine", name)
        assert ran.code == 0 or any(words in ran.err for words in ("there is no machine", "has been removed")), ran
        return ran.code == 0

    def _check(self, dice: random.Random, name: str) -> None:
        """It can be used again, and has everything that it printed."""
        stopped = self.cli("stop", "-t", "0", name, timeout_s=PATIENCE_S)
        assert stopped.code == 0, stopped
        printed = max((int(line) for line in self.cli.ok("logs", name).split() if line.isdigit()), default=0)
        self.count("checked")
        self.count("checked with records") if printed else None
        volume = self.cli.ok("volume", "inspect", "--format", "{{.path}}", name).strip()
        assert _last(_read(f"{volume}/records")) >= printed, "the volume lost what was synced"
        if dice.random() < 0.3 and printed:
            code, out, err = self.cli.bytes("cp", f"{name}:{RECORDS}", "-", timeout_s=PATIENCE_S)
            assert code == 0, err
            with tarfile.open(fileobj=BytesIO(out)) as archive:
                member = archive.extractfile("records")
                assert member is not None
                kept = member.read()
        else:
            self.cli.ok("start", name, timeout_s=PATIENCE_S)
            kept = self.cli.bytes("exec", name, "cat", RECORDS, timeout_s=PATIENCE_S)[1]
        assert _last(kept) >= printed, f"{name} lost what was synced: {_last(kept)} of {printed}"
        numbers = [int(line) for line in kept.split()]
        assert numbers == list(range(1, len(numbers) + 1)), "its file has holes"


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


def _last(records: bytes) -> int:
    return max((int(line) for line in records.split() if line.isdigit()), default=0)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("type_", CHOSEN or TYPES)
def test_a_storm(cli: Cli, type_: str) -> None:
    obstacle = find_obstacle(type_)
    if obstacle:
        pytest.skip(f"needs machines of type {type_}: {obstacle}")
    print(f"NAGAYA_STORM_SEED={SEED}")
    storm = Storm(cli, type_)
    began = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE[type_]) as pool:
        failures = [error for error in pool.map(lambda number: _try(storm, number), range(COUNT)) if error]
    print(f"{type_}: {COUNT} machines in {time.monotonic() - began:.0f} s, {dict(sorted(storm.counts.items()))}")
    remove_all(cli)
    assert not failures, "\n".join(failures)
    assert cli.machine_ids() == []
    if COUNT >= 8:  # of fewer, every kill may come too late
        assert storm.counts["killed"] > 0
        assert storm.counts["checked with records"] > 0, "nothing had been synced: nothing was shown"


def _try(storm: Storm, number: int) -> str:
    try:
        storm.run(number)
    except BaseException as error:
        return f"machine {number}: {type(error).__name__}: {error}"
    return ""
