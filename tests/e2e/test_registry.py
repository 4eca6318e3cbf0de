"""Against Debian's docker-registry on loopback, with skopeo and podman as the neighbours who read and write as well."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require_program
from tests.e2e.command import Cli

CONFIG = """version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {data}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a registry of this module's own."""
    require_program("docker-registry")
    directory = tmp_path_factory.mktemp("registry")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (directory / "config.yml").write_text(CONFIG.format(data=directory / "data", port=port))
    with open(directory / "log", "wb") as log:
        server = subprocess.Popen(
            ["docker-registry", "serve", str(directory / "config.yml")], stdout=log, stderr=log, cwd=directory
        )
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, (directory / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


def _digest(cli: Cli, name: str) -> str:
    digest: str = cli.json("inspect", "--type", "image", name)[0]["Digest"]
    return digest


def _output(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, (argv, done.stderr)
    return done.stdout


def test_push_and_pull_back(cli: Cli, empty_cli: Cli, registry: str) -> None:
    name = f"{registry}/ours/box:1"
    cli.ok("push", "--insecure", "busybox", name)
    cli.ok("push", "--insecure", "busybox", name)  # all there already
    pulled = empty_cli.ok("pull", "-q", "--insecure", name).strip()
    assert pulled == cli.json("inspect", "busybox")[0]["Id"]
    assert _digest(empty_cli, name) == _digest(cli, "busybox")
    assert empty_cli("run", "--rm", "--network", "none", name, "echo", "hi") == (0, "hi\n", "")
    by_digest = f"{registry}/ours/box@{_digest(cli, 'busybox')}"
    assert empty_cli.ok("pull", "-q", "--insecure", by_digest).strip() == pulled
    assert empty_cli("run", "--rm", "--insecure", "--pull", "always", "--network", "none", name, "true").code == 0


def test_a_tagged_image_is_pushed_where_its_name_says(cli: Cli, registry: str) -> None:
    name = f"{registry}/named:2"
    cli.ok("tag", "busybox", name)
    cli.ok("push", "--insecure", name)
    cli.ok("rmi", name)
    assert json.loads(_output("curl", "-s", f"http://{registry}/v2/named/tags/list"))["tags"] == ["2"]


def test_skopeo_and_we_read_each_other(cli: Cli, empty_cli: Cli, registry: str, tmp_path: Path) -> None:
    require_program("skopeo")
    ours, theirs = f"{registry}/for/skopeo:1", f"{registry}/from/skopeo:1"
    cli.ok("push", "--insecure", "busybox", ours)
    seen = json.loads(_output("skopeo", "inspect", "--tls-verify=false", f"docker://{ours}"))
    assert seen["Digest"] == _digest(cli, "busybox")
    assert seen["Name"] == f"{registry}/for/skopeo"
    _output("skopeo", "copy", "--tls-verify=false", f"docker://{ours}", f"oci:{tmp_path}/layout:x")
    assert empty_cli.ok("pull", "-q", f"oci:{tmp_path}/layout:x").strip() == cli.json("inspect", "busybox")[0]["Id"]
    # In Docker's own manifest format, too.
    for format_, tag in (("oci", "1"), ("v2s2", "2")):
        target = f"{registry}/from/skopeo:{tag}"
        flags = ["--dest-tls-verify=false", "--format", format_]
        _output("skopeo", "copy", *flags, f"oci:{tmp_path}/layout:x", f"docker://{target}")
        empty_cli.ok("pull", "-q", "--insecure", target)
        told = json.loads(_output("skopeo", "inspect", "--tls-verify=false", f"docker://{target}"))["Digest"]
        assert _digest(empty_cli, target) == told
        assert empty_cli("run", "--rm", "--network", "none", target, "echo", format_).out == f"{format_}\n"
    assert theirs


def test_podman_pulls_what_we_push(cli: Cli, empty_cli: Cli, registry: str) -> None:
    require_program("podman")
    tmp_path = Path(
        tempfile.mkdtemp(prefix="nagaya-podman-", dir="/tmp")
    )  # podman's run directory must have a short path
    name = f"{registry}/for/podman:1"
    cli.ok("push", "--insecure", "busybox", name)
    podman = ("podman", "--root", str(tmp_path / "root"), "--runroot", str(tmp_path / "run"), "--storage-driver", "vfs")
    try:
        _output(*podman, "pull", "-q", "--tls-verify=false", name)
        (image,) = json.loads(_output(*podman, "inspect", "--type", "image", name))
        assert image["Digest"] == _digest(cli, "busybox")
        assert f"sha256:{image['Id']}" == cli.json("inspect", "busybox")[0]["Id"]
        # …and we what podman pushes.
        _output(*podman, "push", "-q", "--tls-verify=false", name, f"{registry}/from/podman:1")
        empty_cli.ok("pull", "-q", "--insecure", f"{registry}/from/podman:1")
        assert empty_cli("run", "--rm", "--network", "none", f"{registry}/from/podman:1", "true").code == 0
    finally:
        subprocess.run([*podman, "rmi", "-a", "-f"], capture_output=True, check=False)
        subprocess.run(["umount", str(tmp_path / "root" / "vfs")], capture_output=True, check=False)
        subprocess.run(["umount", str(tmp_path / "root")], capture_output=True, check=False)
        subprocess.run(["rm", "-rf", str(tmp_path)], check=False)


def test_what_is_not_there(empty_cli: Cli, registry: str) -> None:
    for name in (f"{registry}/no/such:1", f"{registry}/ours/box:nope"):
        refused = empty_cli("pull", "--insecure", name)
        assert refused.code == 1
        assert [line for line in refused.err.splitlines() if line.startswith("nagaya: ")], refused
        assert "Traceback" not in refused.err
    plain = empty_cli("pull", f"{registry}/ours/box:1")
    assert plain.code == 1
    assert "--insecure" in plain.err
    assert empty_cli.json("images", "--json") == []
    assert not [name for name in os.listdir(f"{empty_cli.root}/images") if "tmp" in name and os.listdir(f"{empty_cli.root}/images/{name}")]  # fmt: skip
