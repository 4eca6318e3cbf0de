"""Images: pulled, named, written to archives and read back, made of a tree, removed."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from tests.conftest import require_program
from tests.e2e.command import Cli


def test_pull_twice(own_cli: Cli) -> None:
    (before,) = own_cli.json("images", "--json")
    first = own_cli.ok("pull", "-q", "busybox").strip()
    second = own_cli.ok("pull", "-q", "busybox").strip()
    assert first == second == own_cli.ok("images", "-q", "--no-trunc").strip()
    assert first == before["id"]


def test_run_says_where_the_image_came_from(empty_cli: Cli) -> None:
    ran = empty_cli("run", "--rm", "--network", "none", "busybox", "echo", "hi")
    assert (ran.code, ran.out) == (0, "hi\n"), ran
    assert "busybox" in ran.err
    quiet = empty_cli("run", "--rm", "--network", "none", "busybox", "echo", "hi")
    assert quiet == (0, "hi\n", "")
    refused = empty_cli("run", "--rm", "--pull", "never", "--network", "none", "debian", "true")
    assert refused.code == 125
    assert refused.err.startswith("nagaya: ")


def test_tags_and_removal(own_cli: Cli) -> None:
    own_cli.ok("tag", "busybox", "example.org/team/box:v1")
    assert own_cli("run", "--rm", "--network", "none", "example.org/team/box:v1", "true").code == 0
    names = own_cli.ok("images", "--format", "{{.Repository}}:{{.Tag}}").split()
    assert sorted(names) == ["busybox:latest", "example.org/team/box:v1"]
    own_cli.start(flags=("--name", "user"))
    id_ = own_cli.ok("images", "-q", "busybox").strip()
    assert own_cli("rmi", id_).code == 1  # has two names
    own_cli.ok("rmi", "example.org/team/box:v1")
    refused = own_cli("rmi", "busybox")
    assert refused.code == 1
    assert "user" in refused.err or "machine" in refused.err
    assert "  hint: " in refused.err
    own_cli.ok("rm", "-f", "user")
    own_cli.ok("rmi", "busybox")
    assert own_cli.json("images", "--json") == []
    for directory in ("blobs/sha256", "layers"):
        found = f"{own_cli.root}/images/{directory}"
        assert not os.path.isdir(found) or [name for name in os.listdir(found) if not name.startswith(".")] == [], found


def test_history_and_inspect(cli: Cli) -> None:
    rows = cli.json("history", "busybox", "--json")
    assert rows
    (data,) = cli.json("inspect", "busybox")
    assert data["Id"].startswith("sha256:")
    assert data["Os"] == "linux"
    assert cli.ok("history", "--no-trunc", "busybox").count("\n") == len(rows) + 1


@pytest.mark.parametrize("format_", ["oci-archive", "docker-archive", "oci"])
def test_save_and_load(cli: Cli, empty_cli: Cli, tmp_path: Path, format_: str) -> None:
    path = str(tmp_path / "saved")
    cli.ok("save", "--format", format_, "-o", path, "busybox")
    empty_cli.ok("load", "-i", path)
    (ours,) = cli.json("images", "--json", "busybox")
    (theirs,) = empty_cli.json("images", "--json")
    assert theirs["id"] == ours["id"]
    assert empty_cli.run("echo", "loaded").out == "loaded\n"
    own = "docker-archive" if format_ == "docker-archive" else format_
    assert empty_cli.ok("pull", "-q", f"{own}:{path}").strip() == ours["id"]


def test_save_to_a_pipe_and_load_from_one(cli: Cli, empty_cli: Cli) -> None:
    cli.ok("tag", "busybox", "second:2")
    code, archive, err = cli.bytes("save", "-q", "busybox", "second:2")
    assert (code, err) == (0, b"")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert "index.json" in {name.removeprefix("./") for name in tar.getnames()}
    assert empty_cli.bytes("load", input=archive)[0] == 0
    assert empty_cli("run", "--rm", "--network", "none", "second:2", "true").code == 0
    cli.ok("rmi", "second:2")


def test_skopeo_reads_what_we_save(cli: Cli, tmp_path: Path) -> None:
    require_program("skopeo")
    import subprocess

    cli.ok("save", "--format", "oci", "-o", str(tmp_path / "layout"), "busybox")
    cli.ok("save", "--format", "docker-archive", "-o", str(tmp_path / "archive"), "busybox")
    config = cli.json("inspect", "busybox")[0]["Id"]
    for source in (f"oci:{tmp_path}/layout", f"docker-archive:{tmp_path}/archive"):
        done = subprocess.run(["skopeo", "inspect", "--raw", source], capture_output=True, check=True)
        assert json.loads(done.stdout)["config"]["digest"] == config


def test_import_a_tree_and_export_it(cli: Cli, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin" / "busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (tree / "bin" / "busybox").chmod(0o755)
    (tree / "bin" / "sh").symlink_to("busybox")
    (tree / "etc").mkdir()
    (tree / "etc" / "motto").write_text("made of a tree\n")
    with tarfile.open(tmp_path / "tree.tar.gz", "w:gz") as tar:
        tar.add(tree, ".")
    change = ("-c", "ENTRYPOINT [\"/bin/busybox\"]", "-c", "CMD [\"cat\", \"/etc/motto\"]")  # fmt: skip
    for source in (str(tree), str(tmp_path / "tree.tar.gz")):
        cli.ok("import", *change, source, "tree:1")
        assert cli("run", "--rm", "--network", "none", "tree:1") == (0, "made of a tree\n", "")
    archive = (tmp_path / "tree.tar.gz").read_bytes()
    assert cli.bytes("import", "-", "piped", input=archive)[0] == 0
    cli.ok("create", "--network", "none", "--name", "m", "piped", "/bin/sh")
    code, exported, _ = cli.bytes("export", "m")
    assert code == 0
    with tarfile.open(fileobj=io.BytesIO(exported)) as tar:
        assert {name.removeprefix("./").rstrip("/") for name in tar.getnames()} >= {
            "bin/busybox",
            "bin/sh",
            "etc/motto",
        }
    cli.ok("rm", "m")
    cli.ok("rmi", "tree:1", "piped")
