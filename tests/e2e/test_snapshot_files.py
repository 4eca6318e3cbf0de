"""Snapshots as files: out of one store and into another, and those that are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.command import Cli
from tests.e2e.snapshot_files import damaged, rewrite
from tests.e2e.test_lifecycle import state_of, wait_for
from tests.e2e.test_snapshots import LOOK, TREE, machine_dir, need_emulated, numbers, run_counter, shell, snapshots_of

pytestmark = pytest.mark.timeout(300)


def test_a_container_comes_to_another_store(cli: Cli, empty_cli: Cli, tmp_path: Path) -> None:
    cli.start(flags=("--name", "m", "-e", "A=b"))
    shell(cli, "m", TREE)
    before = shell(cli, "m", LOOK)
    cli.ok("snapshot", "create", "-m", "as it was", "m", "clean")
    file = str(tmp_path / "clean.snapshot")
    cli.ok("snapshot", "save", "m", "clean", file)
    assert os.listdir(tmp_path) == ["clean.snapshot"]
    assert empty_cli.ok("snapshot", "restore", "-q", "--from", file) == "m\n"
    assert empty_cli.machines()[0]["state"] == "created"
    assert empty_cli.json("inspect", "m")[0]["id"] != cli.json("inspect", "m")[0]["id"]
    empty_cli.ok("start", "m")
    assert shell(empty_cli, "m", LOOK) == before
    assert shell(empty_cli, "m", "echo $A") == "b\n"
    assert snapshots_of(empty_cli, "m") == ["clean"]
    shell(empty_cli, "m", "rm -rf /d")
    empty_cli.ok("snapshot", "restore", "m", "clean")
    assert shell(empty_cli, "m", LOOK) == before
    refused = empty_cli("snapshot", "restore", "-q", "--from", file)
    assert refused.code == 1 and "'m' is in use" in refused.err
    assert empty_cli.ok("snapshot", "restore", "-q", "--from", file, "other") == "other\n"


def test_through_a_pipe_and_without_its_image(cli: Cli, empty_cli: Cli) -> None:
    cli.start(flags=("--name", "m"))
    shell(cli, "m", "echo mine > /f")
    cli.ok("snapshot", "create", "m", "s")
    code, data, _ = cli.bytes("snapshot", "save", "-q", "--no-image", "m", "s", "-")
    assert code == 0
    code, _, err = empty_cli.bytes("snapshot", "restore", "-q", "--from", "-", input=data)
    assert code == 1 and b"does not hold its image" in err and empty_cli.machines() == []
    code, out, err = cli.bytes("snapshot", "restore", "-q", "--from", "-", "other", input=data)
    assert (code, out) == (0, b"other\n"), err


def test_damaged_files_are_refused(cli: Cli, empty_cli: Cli, tmp_path: Path) -> None:
    cli.start(flags=("--name", "m"))
    shell(cli, "m", "echo mine > /f; head -c 300000 /dev/urandom > /g")
    cli.ok("snapshot", "create", "m", "s")
    file = tmp_path / "whole"
    cli.ok("snapshot", "save", "m", "s", str(file))
    pid = state_of(cli, "m")["pid"]
    for what, path in damaged(file, tmp_path).items():
        ran = cli("snapshot", "restore", "-q", "--from", str(path), "other")
        assert ran.code == 1 and "Traceback" not in ran.err and ran.err.count("\n") <= 2, (what, ran)
    assert [row["name"] for row in cli.machines()] == ["m"]
    assert not [name for name in os.listdir(machine_dir(cli, "m").parent) if name != machine_dir(cli, "m").name]
    assert state_of(cli, "m")["pid"] == pid and shell(cli, "m", "cat /f") == "mine\n"
    for path, words in ((str(tmp_path / "nosuch"), "there is no file"), (str(tmp_path), "directory")):
        ran = cli("snapshot", "restore", "-q", "--from", path, "other")
        assert ran.code == 1 and words in ran.err, ran
    assert cli("snapshot", "save", "m", "s", "/nosuch/file").code == 1
    assert cli("snapshot", "restore", "--from", str(file), "a", "b").code == 2
    assert cli("snapshot", "restore").code == 2


def test_a_file_names_nothing_outside_of_itself(cli: Cli, tmp_path: Path) -> None:
    cli.start(flags=("--name", "m"))
    cli.ok("snapshot", "create", "m", "s")
    cli.ok("snapshot", "save", "m", "s", str(tmp_path / "whole"))
    (tmp_path / "work").mkdir()
    rewrite(
        tmp_path / "whole", tmp_path / "evil", tmp_path / "work",
        record=lambda one: one._replace(parts=(one.parts[0]._replace(name="../../../evil"),)),
    )  # fmt: skip
    ran = cli("snapshot", "restore", "-q", "--from", str(tmp_path / "evil"), "other")
    assert ran.code == 1 and "part" in ran.err, ran


def test_an_emulated_machine_goes_on_in_another_store(cli: Cli, empty_cli: Cli, tmp_path: Path) -> None:
    need_emulated()
    run_counter(cli, "emulated", "--network", "none")
    cli.ok("snapshot", "create", "m", "s", timeout_s=120)
    at = numbers(cli, "m")[-1]
    file = str(tmp_path / "s")
    cli.ok("snapshot", "save", "m", "s", file)
    assert empty_cli.ok("snapshot", "restore", "-q", "--from", file, timeout_s=120) == "m\n"
    wait_for(lambda: len(numbers(empty_cli, "m")) > 2, 60)
    assert 0 < numbers(empty_cli, "m")[0] <= at + 1
    assert shell(cli, "m", "hostname") != shell(empty_cli, "m", "hostname")
    (name,) = empty_cli.ok("fork", "m", timeout_s=120).split()  # whose root came with the file
    empty_cli.ok("rm", "-f", "m")
    before = numbers(empty_cli, name)[-1]
    wait_for(lambda: numbers(empty_cli, name)[-1] > before, 60)
    shell(empty_cli, name, "ls -l /bin/busybox")
