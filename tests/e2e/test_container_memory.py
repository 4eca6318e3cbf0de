"""Containers saved with their programs by CRIU, and gone back to. Skipped where CRIU does not work on this kernel."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from nagaya.engines.container.criu import find_criu
from tests.e2e.command import Cli
from tests.e2e.processes import supervisors
from tests.e2e.test_lifecycle import state_of, wait_for
from tests.e2e.test_machine_under_load import Stream, address_of
from tests.e2e.test_snapshots import machine_dir, numbers, shell, snapshots_of

COUNT = "i=0; trap 'exit 7' TERM; while :; do i=$((i+1)); echo $i; echo $i > /n; sleep 0.1; done"
ROUNDS = int(os.environ.get("NAGAYA_SNAPSHOT_ROUNDS", "6"))

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module", autouse=True)
def criu() -> None:
    """Not a "needs": Debian 12's package does not work on Linux 6.18, say, and CI cannot have another."""
    path = find_criu()
    if not path:
        pytest.skip("CRIU is not installed")
    checked = subprocess.run([path, "check"], capture_output=True, text=True, check=False)
    if checked.returncode:
        pytest.skip(f"CRIU does not work on this kernel: {checked.stderr.strip()}")


@pytest.fixture
def counting(cli: Cli) -> Cli:
    cli.start("sh", "-c", COUNT, flags=("--name", "m"))
    wait_for(lambda: len(numbers(cli, "m")) > 3)
    return cli


def goes_on_from(cli: Cli, name: str, at: int) -> None:
    """It has gone back to about `at`, and counts."""
    wait_for(lambda: numbers(cli, name)[-1] < numbers(cli, name)[-2] or max(numbers(cli, name)[-3:]) <= at + 3)
    before = numbers(cli, name)[-1]
    assert before <= at + 20
    wait_for(lambda: numbers(cli, name)[-1] > before)


def test_a_program_goes_on_where_it_was(counting: Cli) -> None:
    cli = counting
    made = cli.json("snapshot", "create", "--json", "m", "a")
    assert made["memory"] and 0 < made["paused_ms"] <= made["programs_stood_ms"] + 1
    at = numbers(cli, "m")[-1]
    wait_for(lambda: numbers(cli, "m")[-1] > at + 30)
    cli.ok("snapshot", "restore", "m", "a")
    goes_on_from(cli, "m", at)
    assert state_of(cli, "m")["origin"] == "saved"
    assert int(shell(cli, "m", "cat /n")) <= numbers(cli, "m")[-1]  # its disk went back with it
    cli.ok("snapshot", "create", "--memory", "m", "again")  # one that has gone back can be saved, too
    cli.ok("snapshot", "restore", "m", "again")
    cli.ok("snapshot", "restore", "--no-memory", "m", "a")  # anew, from its disk
    wait_for(lambda: 1 in numbers(cli, "m")[-20:])
    cli.ok("snapshot", "restore", "m", "a")
    cli.ok("stop", "m")
    assert state_of(cli, "m")["exit_code"] == 7
    cli.ok("snapshot", "restore", "m", "a")  # it had ended
    assert state_of(cli, "m")["phase"] == "running"


def test_what_is_mounted_and_what_is_running_beside(own_cli: Cli, tmp_path: Path) -> None:
    cli = own_cli
    (tmp_path / "file").write_text("mine\n")
    flags = (
        "--name",
        "m",
        "-v",
        f"{tmp_path}:/v",
        "-v",
        f"{tmp_path}:/ro:ro",
        "--tmpfs",
        "/t",
        "-v",
        "kept:/vol",
        "-m",
        "64m",
        "-t",
    )
    cli.start(
        "sh",
        "-c",
        "echo 5 > /t/f; exec 3>/deleted; rm /deleted; trap 'exit 3' TERM; while :; do sleep 0.1; date >&3; done",
        flags=flags,
    )
    wait_for(lambda: cli("exec", "m", "cat", "/t/f").out == "5\n")
    beside = cli.popen("exec", "m", "sh", "-c", "echo $$ > /t/pid; sleep 1000")
    wait_for(lambda: cli("exec", "m", "cat", "/t/pid").code == 0)
    cli.ok("snapshot", "create", "--memory", "m", "a")
    shell(cli, "m", "echo 6 > /t/f; echo new > /v/new; echo v > /vol/f")
    cli.ok("snapshot", "restore", "m", "a")
    beside.wait(20)
    assert (
        shell(
            cli,
            "m",
            "cat /t/f /v/new /ro/file /vol/f; tty < /dev/console 2>/dev/null; kill -0 $(cat /t/pid) && echo there",
        )
        == "5\nnew\nmine\nv\nthere\n"
    )
    assert cli("exec", "m", "touch", "/ro/no").code == 1
    assert cli("exec", "m", "touch", "/v/yes").code == 0
    assert cli.json("inspect", "m")[0]["limits"]["memory_bytes"] == 64 << 20
    assert "hidden" not in shell(cli, "m", "cat /proc/kcore 2>&1; ls /proc/acpi /sys/firmware")
    cli.ok("stop", "m")
    assert state_of(cli, "m")["exit_code"] == 3


def test_the_network_and_threads(own_cli: Cli, tmp_path: Path) -> None:
    """Server, timers of all kinds and files of load.c, over a bridge."""
    cli = own_cli
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    source = str(Path(__file__).parent / "load.c")
    subprocess.run(["gcc", "-O2", "-static-pie", "-o", str(tree / "bin" / "load"), source, "-lpthread"], check=True)
    shutil.copy2("/bin/busybox", tree / "bin" / "busybox")
    subprocess.run(["tar", "-C", str(tree), "-cf", str(tmp_path / "tree.tar"), "bin"], check=True)
    cli.ok("import", str(tmp_path / "tree.tar"), "load:1")
    cli.ok("run", "-d", "--name", "m", "load:1", "/bin/load", "run")
    stream = Stream(address_of(cli, "m"))
    try:
        stream.goes_on()
        link = cli.ok("exec", "m", "/bin/busybox", "ip", "addr")
        for number in range(3):
            broken = stream.broken
            cli.ok("snapshot", "create", "--memory", "m", f"s{number}")
            stream.goes_on()
            assert stream.broken == broken, "a snapshot broke a connection"
            cli.ok("snapshot", "restore", "m", f"s{number}")
            stream.goes_on()
            told = dict(line.split(" ", 1) for line in cli.ok("exec", "m", "/bin/load", "look").splitlines())
            assert (told["wrong"], told["bad_files"]) == ("0", "0"), told
            assert [
                line for line in cli.ok("exec", "m", "/bin/busybox", "ip", "addr").splitlines() if "inet " in line
            ] == [line for line in link.splitlines() if "inet " in line]
    finally:
        cli.ok("rm", "-f", "m")
        stream.end()
        cli("prune", "-f")


def test_what_cannot_be_saved_says_so(own_cli: Cli, tmp_path: Path) -> None:
    cli = own_cli
    cases = {"--userns=auto": "user namespace", "--init=false": "its own init"}
    for number, (flag, reason) in enumerate(cases.items()):
        cli.start("sleep", "600", flags=("--name", f"n{number}", flag))
        refused = cli("snapshot", "create", "--memory", f"n{number}", "a")
        assert refused.code == 1 and reason in refused.err, refused
        assert state_of(cli, f"n{number}")["phase"] == "running"
        told = cli("snapshot", "create", f"n{number}", "b")
        assert told.code == 0 and "disks alone" in told.err and reason in told.err
    cli.start("sleep", "600", flags=("--name", "m"))
    cli.ok("pause", "m")
    refused = cli("snapshot", "create", "--memory", "m", "a")
    assert refused.code == 1 and "paused" in refused.err
    assert "disks alone" in cli("snapshot", "create", "m", "b").err and state_of(cli, "m")["phase"] == "paused"
    cli.ok("unpause", "m")
    refused = cli("fork", "m")
    assert refused.code == 1 and "cannot be there twice" in refused.err
    cli.ok("snapshot", "create", "--memory", "m", "c")
    file = tmp_path / "file"
    cli.ok("snapshot", "save", "-q", "m", "c", str(file))
    refused = cli("snapshot", "restore", "-q", "--from", str(file), "other")
    assert refused.code == 1 and "in no other" in refused.err, refused
    assert len(cli.machines()) == 3


def test_one_that_crius_images_are_damaged_of_is_left_alone(counting: Cli) -> None:
    cli = counting
    cli.ok("snapshot", "create", "--memory", "m", "a")
    pid = state_of(cli, "m")["pid"]
    place = Path(cli.json("snapshot", "inspect", "m", "a")[0]["directory"]) / "memory"
    kept = (place / "pstree.img").read_bytes()
    (place / "pstree.img").write_bytes(kept[:-1])
    refused = cli("snapshot", "restore", "m", "a")
    assert refused.code == 1 and "damaged" in refused.err and state_of(cli, "m")["pid"] == pid
    (place / "pstree.img").write_bytes(kept)
    cli.ok("snapshot", "restore", "m", "a")


def test_kills_leave_nothing_half_made(counting: Cli) -> None:
    """Of the command, at any moment; then of the supervisor."""
    cli = counting
    for number in range(ROUNDS):
        command = cli.popen(
            "snapshot", "create", "--memory", "m", f"k{number}", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(0.05 + 0.08 * number)
        command.send_signal(signal.SIGKILL)
        command.wait(20)
        before = numbers(cli, "m")[-1]
        wait_for(lambda before=before: numbers(cli, "m")[-1] > before)  # type: ignore[misc]
        assert cli.machines()[0]["state"] == "running"
        assert not list(machine_dir(cli, "m").glob("snapshots/.*"))
    cli.ok("snapshot", "create", "--memory", "m", "whole")
    for name in snapshots_of(cli, "m"):
        cli.ok("snapshot", "restore", "m", name)
    for delay_s in (0.05, 0.15, 0.25):
        command = cli.popen("snapshot", "restore", "m", "whole", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay_s)
        command.kill()
        command.wait(20)
        wait_for(lambda: cli.machines()[0]["state"] in ("running", "exited"))  # and not just starting
        cli.ok("snapshot", "restore", "m", "whole")
        before = numbers(cli, "m")[-1]
        wait_for(lambda before=before: numbers(cli, "m")[-1] != before)  # type: ignore[misc]
    for delay_s in (0.05, 0.12, 0.2, 0.3):
        command = cli.popen("snapshot", "create", "--memory", "m", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay_s)
        for pid in supervisors(cli.root):
            os.kill(pid, signal.SIGKILL)
        command.wait(20)
        wait_for(lambda: cli.machines()[0]["state"] == "exited")
        assert not list(machine_dir(cli, "m").glob("snapshots/.*"))
        cli.ok("start", "m")
