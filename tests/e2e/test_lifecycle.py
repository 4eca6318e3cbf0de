"""A machine from `create` to `rm`, by every verb that there is."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.command import Cli


def wait_for(condition: Callable[[], bool], timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state_of(cli: Cli, name: str) -> dict[str, object]:
    state: dict[str, object] = cli.json("inspect", name)[0]["state"]
    return state


def test_from_create_to_rm(cli: Cli) -> None:
    script = "trap 'exit 4' TERM; echo up; while true; do sleep 0.05; done"
    id_ = cli.ok("create", "--network", "none", "--name", "m", "busybox", "sh", "-c", script).strip()
    assert [machine["state"] for machine in cli.machines()] == ["created"]
    assert cli.ok("ps", "-q") == ""
    assert cli.ok("start", "m") == "m\n"
    assert cli.ok("ps", "-q", "--no-trunc").split() == [id_]
    refused = cli("start", "m")
    assert (refused.code, refused.err.count("\n")) == (1, 2)
    assert cli("rm", "m").code == 1
    wait_for(lambda: cli.ok("logs", "m") == "up\n")
    assert cli.ok("stop", "m") == "m\n"
    (machine,) = cli.machines()
    assert (machine["state"], machine["exit_code"]) == ("exited", 4)
    assert cli.ok("stop", "m") == "m\n"  # fine when it has ended
    cli.ok("restart", "-t", "0", "m")
    assert cli.machines()[0]["state"] == "running"
    assert cli.ok("kill", "m") == "m\n"
    assert cli.machines()[0]["exit_code"] == 137
    assert cli.ok("rm", id_[:12]) == f"{id_[:12]}\n"
    assert cli.machines() == []


def test_several_at_once_and_one_that_is_not_there(cli: Cli) -> None:
    for name in ("a", "b"):
        cli.start(flags=("--name", name))
    ran = cli("stop", "-t", "0", "a", "none-such", "b")
    assert ran.code == 1
    assert ran.out.split() == ["a", "b"]
    assert ran.err.startswith("nagaya: ")
    assert "none-such" in ran.err
    assert {machine["state"] for machine in cli.machines()} == {"exited"}
    assert cli.ok("rm", "a", "b").split() == ["a", "b"]


def test_ps_filters_and_formats(cli: Cli) -> None:
    cli.start(flags=("--name", "web", "-l", "tier=front", "-l", "shop"))
    cli.start(flags=("--name", "db", "-l", "tier=back"))
    cli.start("sh", "-c", "exit 3", flags=("--name", "done"))
    cli.ok("wait", "done")

    def names(*filters: str) -> list[str]:
        flags = [word for text in filters for word in ("-f", text)]
        return sorted(cli.ok("ps", "-a", *flags, "--format", "{{.Names}}").split())

    assert names() == ["db", "done", "web"]
    assert names("label=tier") == ["db", "web"]
    assert names("label=tier=front") == names("label=shop") == names("name=we") == ["web"]
    assert names("status=exited") == names("exited=3") == ["done"]
    assert names("ancestor=busybox", "status=running") == ["db", "web"]
    assert names("before=db") == ["web"]
    assert names("since=db") == ["done"]
    assert cli("ps", "-f", "nonsense=1").code == 2
    table = cli.ok("ps", "--format", 'table {{.Names}}\t{{.Label "tier"}}').splitlines()
    assert table[0].split() == ["NAMES", "tier"]
    assert sorted(line.split() for line in table[1:]) == [["db", "back"], ["web", "front"]]
    assert cli.ok("ps").splitlines()[0].split()[:2] == ["MACHINE", "ID"]
    lines = cli.ok("ps", "-a", "--format", "json").splitlines()
    assert sorted(json.loads(line)["Names"] for line in lines) == ["db", "done", "web"]
    (last,) = cli.json("ps", "-l", "--json")
    assert (last["name"], last["exit_code"], last["command"]) == ("done", 3, ["sh", "-c", "exit 3"])


def test_exec(cli: Cli) -> None:
    cli.start(flags=("--name", "m", "-e", "A=1", "-w", "/tmp"))
    assert cli("exec", "-i", "m", "sh", "-c", "cat; echo $A; pwd; exit 5", input="in\n") == (5, "in\n1\n/tmp\n", "")
    ran = cli("exec", "-u", "1000:1000", "-w", "/", "-e", "B=2", "m", "sh", "-c", "id -u; pwd; echo $A$B")
    assert ran.out.split() == ["1000", "/", "12"]
    assert cli("exec", "m", "nothing-of-the-kind").code == 127
    assert cli("exec", "m", "/etc/passwd").code == 126
    assert cli("exec", "-d", "m", "touch", "/tmp/detached") == (0, "", "")
    wait_for(lambda: cli("exec", "m", "test", "-e", "/tmp/detached").code == 0)
    cli.ok("stop", "-t", "0", "m")
    refused = cli("exec", "m", "true")
    assert refused.code == 125
    assert "  hint: " in refused.err


def test_logs(cli: Cli) -> None:
    cli.start("sh", "-c", "echo one; echo two >&2; sleep 0.7; echo three", flags=("--name", "m"))
    process = cli.popen("logs", "-f", "m")
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, b"one\nthree\n", b"two\n")
    assert cli("logs", "m") == (0, "one\nthree\n", "two\n")
    assert cli.ok("logs", "-n", "1", "m") == "three\n"
    stamp = cli.ok("logs", "-t", "--tail", "1", "m").split()[0]
    assert cli.ok("logs", "--since", stamp, "m") == "three\n"
    assert cli.ok("logs", "--until", "10m", "m") == ""
    first = cli.ok("logs", "-t", "m").split()[0]
    assert cli.ok("logs", "--until", first, "m") == "one\n"
    assert first < stamp
    assert cli.ok("logs", "--since", "10m", "m") == "one\nthree\n"


def test_attach_to_a_running_one(cli: Cli) -> None:
    cli.ok("run", "-d", "-i", "--network", "none", "--name", "m", "busybox", "sh", "-c", "read x; echo got $x; exit 6")
    ran = cli("attach", "m", input="this\n")
    assert (ran.code, ran.out) == (6, "got this\n")


@pytest.mark.parametrize("running", [True, False])
def test_cp(cli: Cli, tmp_path: Path, running: bool) -> None:
    cli.ok("create", "--network", "none", "--name", "m", "busybox", "sleep", "600")
    if running:
        cli.ok("start", "m")
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "big").write_bytes(os.urandom(3 << 20))
    (tree / "link").symlink_to("sub/big")
    cli.ok("cp", str(tree), "m:/root/")
    cli.ok("cp", "m:/root/tree", str(tmp_path / "back"))
    assert (tmp_path / "back" / "sub" / "big").read_bytes() == (tree / "sub" / "big").read_bytes()
    assert os.readlink(tmp_path / "back" / "link") == "sub/big"
    stream = cli.bytes("cp", "m:/root/tree/sub", "-")[1]
    with tarfile.open(fileobj=io.BytesIO(stream)) as tar:
        assert sorted(tar.getnames()) == ["sub", "sub/big"]
    assert cli.bytes("cp", "-", "m:/tmp", input=stream)[0] == 0
    cli.ok("cp", "m:/tmp/sub/big", str(tmp_path / "one"))
    assert (tmp_path / "one").stat().st_size == 3 << 20
    for words in (("m:/no/such", str(tmp_path)), (str(tmp_path / "none"), "m:/"), (str(tree), "m:/no/such/place")):
        refused = cli("cp", *words)
        assert refused.code == 1, words
        assert refused.err.startswith("nagaya: ")


def test_stats_and_top(cli: Cli) -> None:
    cli.start("sh", "-c", "sleep 600 & sleep 601", flags=("--name", "m", "-m", "64m"))
    (row,) = cli.json("stats", "--no-stream", "--json")
    assert row["name"] == "m"
    assert 0 < int(row["memory_bytes"]) < 64 << 20
    header, line = cli.ok("stats", "--no-stream", "m").splitlines()
    assert "CPU" in header
    assert " m " in f" {line} "
    rows = cli.json("top", "m", "--json")
    assert {"sleep 600", "sleep 601"} <= {row["command"] for row in rows}
    assert "sleep 600" in cli.ok("top", "m")


def test_pause(cli: Cli) -> None:
    cli.start("sh", "-c", "while true; do echo x; sleep 0.02; done", flags=("--name", "m"))
    wait_for(lambda: len(cli.ok("logs", "m")) > 4)
    cli.ok("pause", "m")
    assert cli.machines()[0]["state"] == "paused"
    before = cli.ok("logs", "m")
    time.sleep(0.3)
    assert cli.ok("logs", "m") == before
    assert cli("exec", "m", "true").code == 125
    assert cli("pause", "m").code == 1
    cli.ok("unpause", "m")
    wait_for(lambda: len(cli.ok("logs", "m")) > len(before))
    cli.ok("pause", "m")
    cli.ok("rm", "-f", "m")


def test_rename_and_update(cli: Cli) -> None:
    cli.start(flags=("--name", "old"))
    cli.ok("rename", "old", "new")
    assert cli("exec", "old", "true").code == 125
    assert cli("exec", "new", "true").code == 0
    said = cli.ok("update", "--memory", "64m", "--restart", "on-failure:2", "--pids-limit", "33", "new")
    assert said
    data = cli.json("inspect", "new")[0]
    assert (data["limits"]["memory_bytes"], data["limits"]["pids"]) == (64 << 20, 33)
    assert (data["restart"]["policy"], data["restart"]["max_retries"]) == ("on-failure", 2)
    assert cli("update", "new").code == 2


def test_restart_policies(cli: Cli) -> None:
    count = "echo run >> /count; exit 3"
    cli.start("sh", "-c", count, flags=("--name", "three", "--restart", "on-failure:2"))
    assert cli.ok("wait", "three") == "3\n"
    assert state_of(cli, "three")["restarts"] == 2
    cli.ok("cp", "three:/count", "/dev/shm/nagaya-count")
    try:
        assert Path("/dev/shm/nagaya-count").read_text() == "run\n" * 3
    finally:
        os.unlink("/dev/shm/nagaya-count")
    cli.start("sleep", "0.05", flags=("--name", "always", "--restart", "always"))
    wait_for(lambda: int(str(state_of(cli, "always")["restarts"])) >= 2)
    cli.ok("stop", "always")
    assert state_of(cli, "always")["phase"] == "exited"
    cli.start("true", flags=("--name", "once", "--restart", "on-failure"))
    assert cli.ok("wait", "once") == "0\n"
    assert state_of(cli, "once")["restarts"] == 0


def test_wait_for_several(cli: Cli) -> None:
    cli.start("sh", "-c", "sleep 0.4; exit 12", flags=("--name", "slow"))
    cli.start("sh", "-c", "exit 3", flags=("--name", "quick"))
    assert cli.ok("wait", "slow", "quick").split() == ["12", "3"]


def test_events(own_cli: Cli) -> None:
    follower = own_cli.popen("events", "--since", "1", "--json", "-f", "type=machine")
    assert follower.stdout is not None
    own_cli.run("sh", "-c", "exit 4", flags=("--name", "m"))
    seen = []
    while not seen or seen[-1]["action"] != "destroy":
        seen.append(json.loads(follower.stdout.readline()))
    follower.terminate()
    follower.communicate()
    assert [event["action"] for event in seen] == ["create", "start", "die", "destroy"]
    assert seen[2]["attributes"]["exit_code"] == "4"
    assert own_cli.ok("events", "--since", "1", "--follow=false", "-f", "action=die").count("\n") == 1


def test_diff_commit_export(cli: Cli, tmp_path: Path) -> None:
    cli.start("sh", "-c", "echo new > /root/new; rm /etc/group; echo x >> /etc/passwd", flags=("--name", "m"))
    cli.ok("wait", "m")
    changes = cli.ok("diff", "m").splitlines()
    assert {"A /root/new", "D /etc/group", "C /etc/passwd"} <= set(changes)
    made = cli.ok("commit", "-m", "why", "-a", "who", "-c", "CMD cat /root/new", "m", "made:1").strip()
    assert cli("run", "--rm", "--network", "none", "made:1") == (0, "new\n", "")
    assert cli("run", "--rm", "--network", "none", "made:1", "test", "-e", "/etc/group").code == 1
    assert cli.json("inspect", "--type", "image", "made:1")[0]["Id"] == made
    cli.ok("export", "-o", str(tmp_path / "tree.tar"), "m")
    names = _names(tmp_path / "tree.tar")
    assert {"root/new", "etc/passwd", "bin/busybox"} <= names
    assert "etc/group" not in names
    cli.ok("rm", "m")
    cli.ok("rmi", "made:1")


def test_a_machine_that_was_never_started_has_no_changes(cli: Cli) -> None:
    cli.ok("create", "--name", "fresh", "--network", "none", "busybox", "true")
    assert cli.ok("diff", "fresh") == ""
    cli.ok("commit", "-c", "CMD echo committed", "fresh", "fresh:1")
    assert cli("run", "--rm", "--network", "none", "fresh:1") == (0, "committed\n", "")
    cli.ok("rm", "fresh")
    cli.ok("rmi", "fresh:1")


def _names(archive: Path) -> set[str]:
    with tarfile.open(archive) as tar:
        return {name.removeprefix("./") for name in tar.getnames()}


@pytest.mark.parametrize("running", [True, False])
def test_export_leaves_out_what_is_mounted(cli: Cli, tmp_path: Path, running: bool) -> None:
    """Neither /proc and /dev nor volumes belong to the machine's files."""
    (tmp_path / "secret").write_text("of the host")
    flags = (
        "-v",
        f"{tmp_path}:/mnt/host",
        "-v",
        f"{tmp_path}/secret:/etc/secret",
        "--tmpfs",
        "/scratch",
        "--name",
        "m",
    )
    cli.start(flags=flags)
    cli.ok("exec", "m", "sh", "-c", "echo 1 > /scratch/x; echo 2 > /root/kept")
    if not running:
        cli.ok("stop", "-t", "0", "m")
    cli.ok("export", "-o", str(tmp_path / "tree.tar"), "m")
    names = _names(tmp_path / "tree.tar")
    assert {"root/kept", "proc", "sys", "dev", "scratch", "mnt/host", "etc/secret"} <= names
    assert not [name for name in names if name.startswith(("proc/", "sys/", "dev/", "scratch/", "mnt/host/"))]
    with tarfile.open(tmp_path / "tree.tar") as tar:
        members = {member.name.removeprefix("./"): member.size for member in tar}
    assert members["etc/secret"] == 0
    assert members["root/kept"] == 2


def test_prune(own_cli: Cli) -> None:
    own_cli.start("true", flags=("--name", "ended", "-v", "/anonymous"))
    own_cli.start(flags=("--name", "alive"))
    own_cli.ok("wait", "ended")
    own_cli.ok("commit", "ended", "orphan")
    own_cli.ok("tag", "busybox", "orphan")  # the commit has no name any more
    own_cli.ok("rm", "ended")
    own_cli.start(
        "true",
        flags=(
            "--name",
            "ended",
        ),
    )
    own_cli.ok("wait", "ended")
    own_cli.ok("prune", "-f", "--volumes")
    assert [machine["name"] for machine in own_cli.machines()] == ["alive"]
    assert own_cli.ok("volume", "ls", "-q") == ""
    assert len(own_cli.json("images", "--json")) == 1
    assert own_cli("exec", "alive", "true").code == 0


def test_prune_asks(cli: Cli) -> None:
    cli.start("true", flags=("--name", "ended"))
    cli.ok("wait", "ended")
    refused = cli("prune", input="n\n")
    assert refused.code == 2
    assert "-f" in refused.err
    assert len(cli.machines()) == 1


def test_inspect_formats(cli: Cli) -> None:
    id_ = cli.start(flags=("--name", "m", "-l", "a.b=c", "-e", "X=y", "-m", "32m"))
    text = "{{.Id}} {{.State.Status}} {{.State.Running}} {{.Name}} {{.Config.Hostname}} {{.HostConfig.Memory}}"
    assert cli.ok("inspect", "-f", text, "m").split() == [id_, "running", "true", "m", id_[:12], str(32 << 20)]
    assert cli.ok("inspect", "-f", '{{index .Config.Labels "a.b"}}{{range .Config.Env}}[{{.}}]{{end}}', "m").strip().startswith("c[")  # fmt: skip
    assert json.loads(cli.ok("inspect", "-f", "{{json .Config.Cmd}}", "m")) == ["sleep", "600"]
    assert int(cli.ok("inspect", "-f", "{{.State.Pid}}", "m")) > 1
    both = cli.json("inspect", "m", "busybox")
    assert len(both) == 2
    assert cli("inspect", "-f", "{{.No", "m").code != 0
