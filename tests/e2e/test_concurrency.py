"""Many commands at once: they take turns on one machine, never corrupt it, and a name has one owner."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from tests.e2e.command import Cli, Ran

EXPECTED = (0, 1, 2, 125)


def check_sentence(ran: Ran) -> None:
    """Refused, perhaps; broken, never."""
    assert ran.code in EXPECTED, ran
    assert "internal error" not in ran.err, ran
    assert "Traceback" not in ran.err, ran
    if ran.code:
        assert ran.err.startswith("nagaya: "), ran


def test_twenty_runs_at_once(cli: Cli) -> None:
    with ThreadPoolExecutor(20) as pool:
        results = list(pool.map(lambda n: cli.run("sh", "-c", f"echo {n}; exit {n}"), range(20)))
    assert [(ran.code, ran.out, ran.err) for ran in results] == [(n, f"{n}\n", "") for n in range(20)]
    assert cli.machines() == []


def test_one_name_one_owner(cli: Cli) -> None:
    """Ten creates of one name: one wins, nine are told who has it."""
    with ThreadPoolExecutor(10) as pool:
        results = list(pool.map(lambda _: cli("create", "--network", "none", "--name", "it", "busybox"), range(10)))
    winners = [ran for ran in results if ran.code == 0]
    assert len(winners) == 1, results
    for ran in results:
        if ran.code:
            assert ran.code == 1
            assert "nagaya: the name 'it' is in use" in ran.err, ran
    assert [machine["id"] for machine in cli.machines()] == [winners[0].out.strip()]


def test_one_start_of_ten(cli: Cli) -> None:
    cli.ok("create", "--network", "none", "--name", "m", "busybox", "sleep", "600")
    with ThreadPoolExecutor(10) as pool:
        results = list(pool.map(lambda _: cli("start", "m"), range(10)))
    assert sorted(ran.code for ran in results) == [0] + [1] * 9, results
    assert cli("exec", "m", "true").code == 0


def test_execs_at_once(cli: Cli) -> None:
    cli.start(flags=("--name", "m"))
    with ThreadPoolExecutor(16) as pool:
        results = list(
            pool.map(lambda n: cli("exec", "-i", "m", "sh", "-c", f"cat; exit {n}", input=f"{n}"), range(32))
        )
    assert [(ran.code, ran.out) for ran in results] == [(n, f"{n}") for n in range(32)]


def test_everything_at_once_on_one_machine(cli: Cli) -> None:
    """Starts, stops, kills, restarts, execs, renames, updates and looks: refusals are sentences, the end is consistent."""
    cli.start(flags=("--name", "m"))
    (id_,) = (machine["id"] for machine in cli.machines())
    commands = [
        ("start", id_), ("stop", "-t", "0", id_), ("kill", id_), ("restart", "-t", "0", id_), ("exec", id_, "true"),
        ("pause", id_), ("unpause", id_), ("rename", id_, "other"), ("rename", id_, "m"), ("inspect", id_), ("ps", "-a"),
        ("update", "--pids-limit", "100", id_), ("update", "--pids-limit", "200", id_), ("stats", "--no-stream", id_),
        ("logs", id_), ("top", id_), ("diff", id_),
    ]  # fmt: skip
    with ThreadPoolExecutor(8) as pool:
        for ran in pool.map(lambda words: cli(*words), commands * 4):
            if ran.code == 137:  # an exec whose machine was killed
                continue
            check_sentence(ran)
    assert [machine["id"] for machine in cli.machines()] == [id_]
    cli("unpause", id_)
    cli.ok("stop", "-t", "0", id_)
    cli.ok("start", id_)
    assert cli("exec", id_, "true").code == 0


def test_removal_races(cli: Cli) -> None:
    """`rm -f` against everything: in the end it is gone, whoever was first."""
    for _ in range(4):
        id_ = cli.start()
        commands = [
            ("rm", "-f", id_),
            ("stop", "-t", "0", id_),
            ("exec", id_, "true"),
            ("rm", "-f", id_),
            ("start", id_),
        ]
        with ThreadPoolExecutor(len(commands)) as pool:
            for ran in pool.map(lambda words: cli(*words), commands):
                if ran.code != 137:
                    check_sentence(ran)
        assert cli("rm", "-f", id_).code in (0, 1)
        assert cli.machine_ids() == []


def test_pulls_at_once(empty_cli: Cli) -> None:
    """Five runs of an image that is not there: it is made, and all five run."""
    barrier = threading.Barrier(5)

    def begin(number: int) -> Ran:
        barrier.wait()
        return empty_cli.run("echo", str(number))

    with ThreadPoolExecutor(5) as pool:
        results = list(pool.map(begin, range(5)))
    assert [(ran.code, ran.out) for ran in results] == [(0, f"{n}\n") for n in range(5)], results
    assert len(empty_cli.json("images", "--json")) == 1


def test_removing_an_image_that_is_being_used(own_cli: Cli) -> None:
    """`rmi -f` and `prune -af` against `run`: each run works or is refused in a sentence; no machine has half an image."""
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(own_cli.run, "cat", "/etc/passwd") for _ in range(6)]
        removals = [pool.submit(own_cli, *words) for words in (("rmi", "-f", "busybox"), ("prune", "-af")) * 3]
        for job in runs:
            ran = job.result()
            assert (ran.code == 0 and ran.out.startswith("root:")) or ran.code == 125, ran
            assert "internal error" not in ran.err, ran
        for job in removals:
            check_sentence(job.result())
    assert own_cli.run("true").code == 0
