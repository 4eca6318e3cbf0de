"""A machine under load that moves back and forth between two stores, many times in a row: nothing of it is lost.

witness.c is the load: files with sums, a stream to a host beside both stores, timers, random numbers. `NAGAYA_MIGRATIONS=100`
moves it that often (some 3 minutes of type kvm on a host with 2 cores); 4 by default. NAGAYA_MIGRATIONS_TYPES=kvm,emulated
says which types, NAGAYA_MIGRATIONS_POST_COPY=1 allows one of type kvm to run before its memory is there, and
NAGAYA_MIGRATIONS_RECORD=FILE keeps what each move has told.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import Cli
from tests.e2e.test_lifecycle import wait_for
from tests.e2e.test_migration import need
from tests.e2e.two_stores import NETWORK, SUBNET, Two, open_two

TYPES = os.environ.get("NAGAYA_MIGRATIONS_TYPES", "kvm,emulated").split(",")
MOVES = int(os.environ.get("NAGAYA_MIGRATIONS", "4"))
POST_COPY = os.environ.get("NAGAYA_MIGRATIONS_POST_COPY") == "1"
RECORD = os.environ.get("NAGAYA_MIGRATIONS_RECORD", "")
MAX_DOWNTIME_MS = 5000
CLOCK_S = 1.0
"""How far the machine's clock may be off, beside what asking it takes."""
ECHO = f"{SUBNET}.250", 7007
PARTS = ("files", "stream", "ticks", "random")

pytestmark = pytest.mark.timeout(300 + 60 * MOVES)

SERVER = """
import socket
with socket.create_server(("", %d)) as listener:
    print("ready", flush=True)
    stream, _ = listener.accept()
    while data := stream.recv(1 << 16):
        stream.sendall(data)
"""


@pytest.fixture
def two(tmp_path_factory: pytest.TempPathFactory, busybox_root: str) -> Iterator[Two]:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    place = tmp_path_factory.mktemp("row")
    tree = place / "tree" / "bin"
    tree.mkdir(parents=True)
    source = str(Path(__file__).parent / "witness.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-static", "-o", str(tree / "witness"), source], check=True)
    shutil.copy2("/bin/busybox", tree / "busybox")
    (tree / "sh").symlink_to("busybox")
    with open_two(place, f"{busybox_root}/images") as made, beside(made):
        for side in (made.here, made.there):
            side.ok("import", str(place / "tree"), "witness")
        yield made


@contextmanager
def beside(two: Two) -> Iterator[None]:
    """A third network namespace, on the link of both stores' networks: its address is on the same network as the machine's."""
    space = f"ngymig{os.getpid()}c"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    ip("netns", "add", space)
    try:
        ip("-n", space, "link", "add", "both", "type", "bridge")
        ip("-n", space, "addr", "add", f"{ECHO[0]}/24", "dev", "both")
        for number, side in enumerate((two.here, two.there)):
            # The network's bridge is there while a machine is in it.
            side.ok("run", "-d", "--name", "keep", "--network", NETWORK, "busybox", "sleep", "1000000")
            bridge = side.json("network", "inspect", NETWORK)[0]["bridge"]
            inside = two.spaces[number]
            ip("-n", space, "link", "add", f"to{number}", "type", "veth", "peer", "name", "beside", "netns", inside)
            ip("-n", space, "link", "set", f"to{number}", "master", "both", "up")
            ip("-n", inside, "link", "set", "beside", "master", bridge, "up")
        ip("-n", space, "link", "set", "both", "up")
        command = ["ip", "netns", "exec", space, sys.executable, "-c", SERVER % ECHO[1]]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            try:
                yield
            finally:
                server.kill()
    finally:
        ip("netns", "del", space)


def read_accounts(side: Cli) -> dict[str, int]:
    """How far each part is, and `longest_ms` between two ticks. Fails when one of them has seen anything wrong."""
    busybox = "/bin/busybox"
    bad = side.ok("exec", "m", "sh", "-c", f"{busybox} cat /dev/shm/bad 2> /dev/null; :", timeout_s=120)
    assert not bad, bad
    found = {}
    for part in PARTS:
        count, problems, more = side.ok("exec", "m", busybox, "cat", f"/dev/shm/{part}", timeout_s=120).split()
        assert problems == "0", (part, problems)
        found[part] = int(count)
        if part == "ticks":
            found["longest_ms"] = int(more)
    return found


def read_clock_error(side: Cli) -> float:
    """How many seconds the machine's clock is off, beyond what asking it took."""
    before = time.time()
    told = float(side.ok("exec", "m", "/bin/witness", "clock", timeout_s=120))
    return max(0.0, before - told, told - time.time())


def move(two: Two, source: Cli, target: Cli) -> dict[str, Any]:
    receiver = two.listen(to=target)
    flags = ["--post-copy"] if POST_COPY else []
    sent = source(
        "migrate", "send", "--json", "--max-downtime", str(MAX_DOWNTIME_MS), *flags, "m", "--to", two.to, timeout_s=300
    )
    out, err = receiver.communicate(timeout=60)
    assert sent.code == 0 and receiver.returncode == 0, (sent, out, err)
    told: dict[str, Any] = json.loads(sent.out.splitlines()[-1])
    return told


@pytest.mark.parametrize("type_", TYPES)
def test_nothing_of_it_is_lost(two: Two, type_: str) -> None:
    need(type_)
    two.here.ok(
        "run", "-d", "--type", type_, "-m", "128m", "--storage", "256m", "--name", "m", "--network", NETWORK, "witness",
        "/bin/sh", "-c", f"/bin/busybox mkdir /w; exec /bin/witness /w /dev/shm {ECHO[0]} {ECHO[1]}", timeout_s=180,
    )  # fmt: skip
    everyone = "test -e /dev/shm/files -a -e /dev/shm/stream -a -e /dev/shm/ticks -a -e /dev/shm/random"
    wait_for(lambda: two.here("exec", "m", "/bin/busybox", "sh", "-c", everyone).code == 0, 60)
    before = read_accounts(two.here)
    sides = [two.here, two.there]
    stood, errors, told = [], [], []
    for number in range(MOVES):
        one = move(two, *sides)
        sides.reverse()
        owner = sides[0]
        assert [side["name"] for side in sides[1].machines()] == ["keep"]
        errors.append(read_clock_error(owner))
        assert errors[-1] <= CLOCK_S, f"after move {number + 1} its clock is off by {errors[-1]:.2f} s"
        wait_for(lambda owner=owner, before=before: is_further(read_accounts(owner), before), 60)  # type: ignore[misc]
        before = read_accounts(owner)
        stood.append(float(one["downtime_ms"]))
        told.append({**one, "clock_error_s": errors[-1], "load": os.getloadavg()[0]})
        print(f"move {number + 1}: stood for {stood[-1]:.0f} ms {one['downtime_steps_ms']}; {before}", flush=True)
        if RECORD:
            Path(RECORD).write_text("\n".join(map(json.dumps, told)) + "\n")
    drawn = owner.ok("exec", "m", "/bin/busybox", "od", "-An", "-v", "-tx8", "/w/random", timeout_s=120).splitlines()
    whole = [line for line in drawn if len(line.split()) == 2]
    assert len(whole) >= before["random"] // 2 and len(set(whole)) == len(whole)
    print(
        f"{MOVES} moves: stood for {statistics.median(stood):.0f} ms in the middle and {max(stood):.0f} at most; clock off by"
        f" {max(errors) * 1e3:.0f} ms at most; {before}; {len(whole)} random numbers, all different"
    )


def is_further(now: dict[str, int], before: dict[str, int]) -> bool:
    return all(now[part] > before[part] for part in PARTS)
