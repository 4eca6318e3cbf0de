"""Each process of a migration killed, and its stream broken, at each step of it: one machine is left, and never two.

`NAGAYA_MIGRATION_PHASES=all` tries every victim at every step of both kinds (some 10 minutes); else each step has one victim.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.e2e.command import Cli
from tests.e2e.processes import below, supervisors
from tests.e2e.test_lifecycle import wait_for
from tests.e2e.test_migration import CHECK, LOAD, need, shell, start
from tests.e2e.two_stores import Two, open_two

ALL = os.environ.get("NAGAYA_MIGRATION_PHASES") == "all"
RELAY = str(Path(__file__).with_name("relay.py"))
VICTIMS = ("source", "source's VMM", "target", "target's VMM", "send", "receive", "stream")
STEPS = {
    "offer": "out:OFFER", "accepted": "back:ACCEPT", "pages": "out:PAGES", "blocks": "out:BLOCKS", "round": "out:ROUND",
    "round there": "back:ROUND", "state": "out:STATE", "ready": "back:READY", "commit": "out:COMMIT",
    "behind commit": "out:COMMIT", "running": "back:RUNNING",
}  # fmt: skip
EARLY_STEPS = {
    "strange": "out:STRANGE", "state": "out:STATE", "runs early": "back:RUNNING", "late pages": "out:STATE,out:PAGES",
    "ready": "back:READY", "commit": "out:COMMIT", "behind commit": "out:COMMIT", "running": "back:RUNNING,back:RUNNING",
}  # fmt: skip
EMULATED_STEPS = {
    "offer": "out:OFFER", "accepted": "back:ACCEPT", "blocks": "out:BLOCKS", "round": "out:ROUND", "memory": "out:ENGINE",
    "late memory": "out:ROUND,out:ENGINE,out:ENGINE", "state": "out:STATE", "ready": "back:READY", "commit": "out:COMMIT",
    "behind commit": "out:COMMIT", "running": "back:RUNNING",
}  # fmt: skip
EMULATED_VICTIMS = ("source's mover", "target's mover", *VICTIMS)
HANDED_OVER = ("commit", "behind commit", "running")
"""Steps that come when the source has written down that the machine may run there."""

pytestmark = pytest.mark.timeout(2400 if ALL else 900)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, busybox_root: str) -> Iterator[Two]:
    need("kvm")
    with open_two(tmp_path_factory.mktemp("two"), f"{busybox_root}/images") as made:
        yield made


class Held:
    """A migration whose stream stands at a step."""

    def __init__(self, two: Two, at: str, *flags: str, round_s: float, is_emulated: bool) -> None:
        self.two = two
        self.is_emulated = is_emulated
        self.place = f"{two.socket}.step"
        with listening(self.place) as listener:
            self.receiver = two.listen("--keep")
            relay = f"{sys.executable} {RELAY} {two.socket} --at {at} --tell {self.place} --round {round_s}"
            self.sender = two.here.popen("migrate", "send", *flags, "m", "--to", f"exec:{relay}")
            try:
                self.relay, _ = listener.accept()
            except TimeoutError:
                raise AssertionError(f"the step {at} does not come: {self._end_commands()}") from None

    def pid(self, victim: str) -> int:
        side = self.two.here if victim.startswith("source") else self.two.there
        commands = (self.sender.pid, self.receiver.pid)
        found = [pid for pid in supervisors(side.root) if pid not in commands]
        if victim.endswith(("VMM", "mover")):
            found = below(found)
            if self.is_emulated:  # whose mover is a process of its own
                found = [pid for pid in found if name_of(pid).startswith("qemu") == victim.endswith("VMM")]
                found = [pid for pid in found if not is_zombie(pid)]  # that of its arrival is reaped at its end
        return found[0] if found else 0

    def harm(self, victim: str, step: str) -> bool:
        """False when there is no such process at this step."""
        if victim == "stream":
            self.relay.send(b"p" if step.startswith("behind") else b"b")
        elif victim in ("send", "receive"):
            (self.sender if victim == "send" else self.receiver).kill()
        else:
            pid = self.pid(victim)
            if not pid:
                return False
            os.kill(pid, signal.SIGKILL)
        return True

    def close(self) -> None:
        """Whatever has come of it, the commands end."""
        self.relay.close()
        self._end_commands()

    def _end_commands(self) -> list[tuple[bytes, bytes]]:
        """What they had said, of those that nobody has listened to yet."""
        commands = [command for command in (self.sender, self.receiver) if command.returncode is None]
        for command in commands:
            command.kill()
        return [command.communicate() for command in commands]

    def finish(self) -> tuple[int, str]:
        """Let the stream go on, where it is whole; what `send` has said of it."""
        try:
            self.relay.send(b"g")
        except OSError:
            pass  # it has ended, as it was told to
        out, err = self.sender.communicate(timeout=120)
        return self.sender.returncode, (out + err).decode(errors="replace")


@contextmanager
def listening(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        listener.settimeout(90)
        try:
            yield listener
        finally:
            os.unlink(path)


def is_handed_over(side: Cli) -> bool:
    return any(
        Path(side.root, "machines", name, "leaving.json").exists() for name in os.listdir(f"{side.root}/machines")
    )


def check_one_runs(two: Two) -> None:
    """Not both, unless the one here stands: it is said to run until it is known to run there."""
    if two.states("m") == ["running", "running"]:
        assert is_handed_over(two.here) or two.states("m") != ["running", "running"]


def settle(two: Two) -> None:
    """As a user would: what does not settle by itself is asked about. Meanwhile the machine runs once at most."""

    def is_settled() -> bool:
        check_one_runs(two)
        states = two.states("m")
        if "starting" in states:
            return False
        if states[0] and is_handed_over(two.here):
            receiver = two.listen("--keep")
            two.here("migrate", "resolve", "m", "--to", two.to)
            receiver.terminate()
            receiver.communicate()
            return False
        return states.count("") == 1

    try:
        wait_for(is_settled, 90)
    except AssertionError:
        pytest.fail(f"this does not settle: {two.states('m')}, handed over: {is_handed_over(two.here)}")


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text()


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def check_nothing_is_left(side: Cli) -> None:
    assert side.machines() == []
    for place in ("machines", "names"):
        assert os.listdir(f"{side.root}/{place}") == [], place
    assert supervisors(side.root) == []


def bring_back(two: Two) -> None:
    """It runs at the source again."""
    if two.states("m")[0] == "":
        two.here, two.there = two.there, two.here
    if two.states("m")[0] != "running":
        two.here.ok("start", "m", timeout_s=180)


def cases(steps: dict[str, str], victims: tuple[str, ...]) -> list[tuple[str, str]]:
    if ALL:
        return [(step, victim) for step in steps for victim in victims]
    return [(step, victims[number % len(victims)]) for number, step in enumerate(steps)]


def try_all(two: Two, steps: dict[str, str], *flags: str, round_s: float = 0.0, type_: str = "kvm") -> None:
    # What a killed one had not synced is not worth anything.
    start(two.here, "sh", "-c", f"rm -f /w/f?; {LOAD}", type_=type_)
    try:
        shell(two.here, "echo kept > /kept; sync")
        for step, victim in cases(steps, EMULATED_VICTIMS if type_ == "emulated" else VICTIMS):
            what = f"{victim} at {step}"
            with closing(Held(two, steps[step], *flags, round_s=round_s, is_emulated=type_ == "emulated")) as held:
                check_one_runs(two)
                harmed = held.harm(victim, step)
                if not harmed:
                    is_early = step == "offer" or (victim == "source's mover" and step == "accepted")
                    has_ended = victim == "target's mover" and step == "running"
                    assert has_ended or (victim.startswith(("target", "source's mover")) and is_early), what
                code, said = held.finish()
            settle(two)
            states = two.states("m")
            print(
                f"{what}: send {code}, the machine is {states}: {said.strip().splitlines()[-1] if said.strip() else ''}"
            )
            is_source_killed = harmed and victim in ("source", "source's VMM")
            owner, other = (two.here, two.there) if states[0] else (two.there, two.here)
            unneeded = ["send", "receive"]
            if type_ == "emulated" and step in ("state", "ready"):  # all of it is on its way by then
                unneeded.append("source's VMM")
            if step not in HANDED_OVER and harmed and victim not in unneeded:
                assert owner is two.here, (what, states, said)
                assert states[0] == ("exited" if is_source_killed else "running"), (what, states, said)
                assert code == 1, what
            elif owner is two.here:
                assert states[0] == "running" or is_source_killed, (what, states, said)
            else:
                assert states[1] == "running" or victim.startswith("target"), (what, states, said)
            check_nothing_is_left(other)
            bring_back(two)
            assert shell(two.here, "cat /kept") == "kept\n", what
            wait_for(lambda: two.here("exec", "m", "ls", "/w/f1").code == 0, 120)
            assert "bad" not in shell(two.here, CHECK), what
    finally:
        for side in (two.here, two.there):
            side("rm", "-f", "m")


def test_whoever_ends_at_whichever_step_one_machine_is_left(two: Two) -> None:
    try_all(two, STEPS, "--max-downtime", "30000")


def test_the_same_of_one_that_runs_before_its_memory_is_there(two: Two) -> None:
    """So little time, and such long rounds, that nothing is ever little enough: it runs there early, after some rounds."""
    try_all(two, EARLY_STEPS, "--max-downtime", "1", "--post-copy", round_s=0.3)


def test_the_same_of_an_emulated_one(two: Two) -> None:
    need("emulated")
    try_all(two, EMULATED_STEPS, "--max-downtime", "30000", type_="emulated")
