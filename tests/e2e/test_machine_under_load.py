"""A machine at work (files with their sums, a network stream, timers), snapshotted, restored and forked again and again.

Nothing is lost, no clock is wrong, no timer stands still, nothing random comes twice, and the network of each is its own.

NAGAYA_SNAPSHOTS says how many times (2; 100 took 23 minutes of a host of 2 cores with a load of 10); the test tells what it saw. What a program keeps
in its own memory, a random generator's state above all, is in each copy of it what it was: docs/using-snapshots.md.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from tests.conftest import remove_all
from tests.e2e.command import Cli
from tests.e2e.kvm_place import await_builds, make_place, pack_program
from tests.e2e.test_lifecycle import wait_for

ROUNDS = int(os.environ.get("NAGAYA_SNAPSHOTS", "2"))
BUILD_S, PATIENCE_S = 600.0, 120.0
PORT, BLOCK_BYTES, AHEAD = 4000, 4096, 8
BROKEN_AFTER_S = 3.0
CLOCK_S = 2.0
LATE_S = 5.0
"""At most, on a host that others use too: a timer that waits for the next interrupt of another kind waits for ever, or for seconds."""
TIMERS = ("sleep", "timerfd", "poll", "condition")
LOOK = (
    "busybox cat /sys/class/net/eth0/address /etc/hostname; busybox ip -o -4 addr show eth0 | busybox awk '{print $4}'"
)
_HEAD = struct.Struct("<QQ")

pytestmark = pytest.mark.timeout(BUILD_S + PATIENCE_S * (2 + ROUNDS))


def sum_of(data: bytes) -> int:
    """As load.c: FNV-1a of 64 bits."""
    found = 0xCBF29CE484222325
    for byte in data:
        found = (found ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return found


BLOCKS = [(data, sum_of(data)) for data in (os.urandom(BLOCK_BYTES) for _ in range(64))]


class Stream:
    """Blocks to a machine, again and again, each of which it has to answer; a thread of its own."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._over = False
        self.answered = self.broken = 0
        self.wrong: list[str] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over:
            try:
                with socket.create_connection((self._address, PORT), BROKEN_AFTER_S) as connection:
                    self._talk(connection)
            except OSError:
                self.broken += 1
                time.sleep(0.05)

    def _talk(self, connection: socket.socket) -> None:
        connection.settimeout(BROKEN_AFTER_S)
        sent = heard = 0
        with connection.makefile("rb") as answers:
            while not self._over or heard < sent:
                while not self._over and sent - heard < AHEAD:
                    data, sum_ = BLOCKS[sent % len(BLOCKS)]
                    connection.sendall(_HEAD.pack(sent, sum_) + data)
                    sent += 1
                told = answers.read(_HEAD.size)
                if len(told) < _HEAD.size:
                    raise ConnectionResetError
                if _HEAD.unpack(told) != (heard, BLOCKS[heard % len(BLOCKS)][1]):
                    self.wrong.append(f"block {heard}: {told.hex()}")
                heard += 1
                self.answered += 1
                time.sleep(0.01)

    def goes_on(self) -> None:
        at = self.answered
        wait_for(lambda: self.answered > at + 2 * AHEAD, PATIENCE_S)

    def end(self) -> None:
        self._over = True
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive() and not self.wrong, self.wrong


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory, busybox_root: str) -> Iterator[Cli]:
    """A store with an image of busybox and the load."""
    place = make_place(tmp_path_factory, "load")
    pack_program(place, "load.c", "load", "-lpthread")
    made = Cli(
        str(place / "store"),
        env={"XDG_CACHE_HOME": str(place / "cache"), "NAGAYA_TEMPLATES": "1", "NAGAYA_TYPE": "kvm"},
    )
    made.ok("import", str(place / "tree.tar"), "load:1")
    made.ok("template", "build", "-q", "load:1", timeout_s=BUILD_S)
    yield made
    remove_all(made)
    made("prune", "-f")
    await_builds(made, BUILD_S)


class Seen:
    """What a machine says of itself at one moment."""

    def __init__(self, cli: Cli, name: str) -> None:
        self.asked_s = time.time()
        told = cli.ok("exec", name, "/bin/load", "look", timeout_s=PATIENCE_S)
        self.answered_s = time.time()
        self.words = dict(line.split(" ", 1) for line in told.splitlines())
        self.monotonic_s = int(self.words["monotonic_ns"]) / 1e9
        self.newest = int(self.words["newest"])
        self.late_s = {kind: int(self.words[f"{kind}_late_ns"]) / 1e9 for kind in TIMERS}
        assert int(self.words["wrong"]) == 0, self.words
        assert int(self.words["bad_files"]) == 0, self.words
        real_s = int(self.words["real_ns"]) / 1e9
        assert self.asked_s - CLOCK_S <= real_s <= self.answered_s + CLOCK_S, (real_s - self.asked_s, self.words)

    def random(self) -> list[str]:
        return [self.words[name] for name in ("random", "urandom", "uuid")]


def address_of(cli: Cli, name: str) -> str:
    address: str = cli.json("inspect", name)[0]["state"]["address"]
    return address.partition("/")[0]


def identity_of(cli: Cli, name: str) -> tuple[str, ...]:
    told = cli.ok("exec", name, "/bin/sh", "-c", LOOK, timeout_s=PATIENCE_S)
    return tuple(told.split())


def lines_late_s(cli: Cli, name: str, since_s: float) -> list[float]:
    """By how much each line came later into the log than it was written, by the machine's own clock, of those since then."""
    found = []
    for line in cli.ok("logs", "--timestamps", name).splitlines():
        stamp, _, text = line.partition(" ")
        came_s = datetime.datetime.fromisoformat(stamp).timestamp()
        if came_s > since_s:
            found.append(came_s - int(text.split()[2]) / 1e9)
    return found


@pytest.mark.parametrize("cpus", [1, 2])
def test_nothing_is_lost(cli: Cli, cpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = (ROUNDS + 2 - cpus) // 2 if ROUNDS > 1 else ROUNDS
    began_s = time.time()
    random: list[str] = []
    late_s: dict[str, float] = dict.fromkeys(TIMERS, 0.0)
    paused_ms, stood_ms = [], []

    def look(name: str) -> Seen:
        seen = Seen(cli, name)
        random.extend(seen.random())
        for kind in TIMERS:
            late_s[kind] = max(late_s[kind], seen.late_s[kind])
            assert seen.late_s[kind] < LATE_S, (name, kind, seen.late_s)
        return seen

    cli.ok("run", "-d", "--name", "m", "--cpus", str(cpus), "load:1", "/bin/load", "run", timeout_s=PATIENCE_S)
    stream = Stream(address_of(cli, "m"))
    try:
        stream.goes_on()
        me = identity_of(cli, "m")
        for number in range(rounds):
            before = look("m")
            broken = stream.broken
            made = json.loads(
                cli.ok("snapshot", "create", "--json", "--keep", "3", "m", f"s{number}", timeout_s=PATIENCE_S)
            )
            saved_s = time.time()
            paused_ms.append(made["paused_ms"])
            stood_ms.append(made["programs_stood_ms"])
            stream.goes_on()
            assert stream.broken == broken, "a snapshot broke a connection"
            between = look("m")
            restoring_s = time.time()
            cli.ok("snapshot", "restore", "m", f"s{number}", timeout_s=PATIENCE_S)
            stream.goes_on()
            after = look("m")
            assert before.newest <= after.newest
            # What ran between the snapshot and the restore was not: its clock is what it was then, and went on.
            ran_s = (saved_s - before.asked_s) + (after.answered_s - restoring_s)
            assert 0 < after.monotonic_s - before.monotonic_s <= ran_s + 0.1, (number, ran_s)
            assert between.monotonic_s > before.monotonic_s
            assert identity_of(cli, "m") == me
            (fork,) = cli.ok("fork", "m", timeout_s=PATIENCE_S).split()
            other = Stream(address_of(cli, fork))
            try:
                other.goes_on()
                stream.goes_on()
                forked = look(fork)
                assert after.newest <= forked.newest and after.monotonic_s < forked.monotonic_s
                theirs = identity_of(cli, fork)
                assert len(theirs) == 3 and not set(theirs) & set(me), (theirs, me)
            finally:
                other.end()
                cli.ok("rm", "-f", fork, timeout_s=PATIENCE_S)
        assert len(set(random)) == len(random) == 12 * rounds
        lines = lines_late_s(cli, "m", began_s)
    finally:
        with contextlib.suppress(AssertionError):
            cli.ok("rm", "-f", "m", timeout_s=PATIENCE_S)
        stream.end()
    with capsys.disabled():
        print(
            f"\n{rounds} snapshots, restores and forks with {cpus} CPUs in {time.time() - began_s:.0f} s: "
            f"{stream.answered} blocks answered, {stream.broken} broken connections, {len(random)} random numbers;\n"
            f"timers late at most { ({kind: round(late, 3) for kind, late in late_s.items()}) } s; "
            f"lines late at most {sorted(round(late, 3) for late in lines)[-5:]} s of {len(lines)};\n"
            f"CPUs stood {sorted(paused_ms)[len(paused_ms) // 2]} ms, at most {max(paused_ms)}; "
            f"programs {sorted(stood_ms)[len(stood_ms) // 2]} ms, at most {max(stood_ms)}"
        )
