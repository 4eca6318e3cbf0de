"""Ways out of a container, each tried by root inside of it: all must fail. docs/isolation.md explains them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nagaya.engines.container.engine import agent_path
from nagaya.model.spec import Security
from nagaya.storage.plan import MountPlan
from tests.kernel import container_machine as machine
from tests.kernel.container_machine import Container

HERE = Path(__file__).parent
NAMES = re.findall(r'\{"([a-z0-9-]+)", try_', (HERE / "escape.c").read_text())
# What opens when no filter stands in the way, and why that is no way out.
HARMLESS_UNFILTERED = {
    "clone-user", "unshare-user", "clone3-user",  # capabilities over nothing but itself
    "userfaultfd", "io-uring", "keyctl", "add-key", "vsock", "perf", "syslog",  # kernel surface, not a way
    "mount-32-bit",  # asks only whether the filter sees it
}  # fmt: skip


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> str:
    machine.require_facilities()
    compiler = shutil.which("musl-gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    made = machine.make_layer(str(tmp_path_factory.mktemp("escape") / "layer"))
    headers = (
        ["-idirafter", "/usr/include", "-idirafter", "/usr/include/x86_64-linux-gnu"] if "musl" in compiler else []
    )
    command = [compiler, "-static", "-O1", *headers, "-o", f"{made}/bin/escape", str(HERE / "escape.c")]
    built = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert built.returncode == 0, built.stderr
    return made


@pytest.fixture(scope="module", params=["plain", "userns", "init=false", "may gain privileges"])
def container(
    request: pytest.FixtureRequest, layer: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Container]:
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "userns": {"userns": "auto"},
        "init=false": {"init": False},
        "may gain privileges": {"security": Security(no_new_privileges=False)},
    }
    directory = str(tmp_path_factory.mktemp("machine"))
    with machine.boot(
        machine.make_request(machine.make_spec(**variants[request.param]), directory, (layer,))
    ) as booted:
        if request.param == "init=false":
            booted.wait_started(booted.start("sleep", "1000", main=True))
        yield booted


# With --init=false PID 1 is the user's own program, of the same user: what reaches it reaches nothing more.
OWN_PROGRAM = {
    "ptrace-init", "read-init", "init-root", "init-program-read", "init-descriptors", "init-memory-write",
    "oom-adjust-init", "init-program",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_way_out(container: Container, name: str) -> None:
    if name in OWN_PROGRAM and not container.request.spec.init:
        pytest.skip("PID 1 is the user's own program here")
    ended = container.run("escape", name)
    assert ended.status == 1, f"{name}: {ended}"
    assert "OUT" not in ended.stdout


def test_the_list_is_complete(layer: str) -> None:
    listed = subprocess.run(
        [f"{layer}/bin/escape"], capture_output=True, text=True, check=True, timeout=10
    ).stdout.split()
    assert listed == NAMES and len(NAMES) > 50
    documented = (HERE.parent.parent / "docs/isolation.md").read_text()
    assert [name for name in NAMES if f"`{name}`" not in documented] == []


def test_the_attempts_can_succeed(layer: str, tmp_path: Path) -> None:
    """A test that cannot fail proves nothing: with the walls taken down, many of the same attempts get out."""
    security = Security(cap_add=("ALL",), seccomp="unconfined", unmask=True)
    request = machine.make_request(machine.make_spec(security=security), str(tmp_path / "machine"), (layer,))
    with machine.boot(request) as container:
        for name in ("mount", "unshare-mount", "fsopen", "hostname", "ptrace-init", "pidfd-getfd", "syslog", "clock"):
            assert container.run("escape", name).stdout == "OUT\n", name


def test_capabilities_alone_hold_without_a_filter(layer: str, tmp_path: Path) -> None:
    """Two walls, not one: without the filter, the missing capabilities and the read-only mounts still refuse."""
    spec = machine.make_spec(security=Security(seccomp="unconfined"))
    with machine.boot(machine.make_request(spec, str(tmp_path / "machine"), (layer,))) as container:
        for name in NAMES:
            if name not in HARMLESS_UNFILTERED:
                ended = container.run("escape", name)
                assert ended.status == 1, f"{name}: {ended}"


def test_the_agents_program_on_the_host_is_out_of_reach(layer: str, tmp_path: Path) -> None:
    """CVE-2019-5736: with every capability, /proc/1/exe is a file of the machine's own, and not the host's program."""
    security = Security(cap_add=("ALL",), seccomp="unconfined")
    request = machine.make_request(machine.make_spec(security=security), str(tmp_path / "machine"), (layer,))
    before = Path(agent_path()).read_bytes()
    with machine.boot(request) as container:
        assert container.shell("echo overwritten > /proc/1/exe").status != 0
        assert "/dev/.nagaya-agent (deleted)" in container.run("ls", "-l", "/proc/1/exe").stdout
    assert Path(agent_path()).read_bytes() == before


def test_a_link_in_the_image_leads_no_mount_to_the_host(layer: str, tmp_path: Path) -> None:
    """The attack of CVE-2019-14271, CVE-2021-30465 and their kin: a mount target that is a link out of the root."""
    (tmp_path / "top").mkdir()
    (tmp_path / "victim").mkdir()
    (tmp_path / "top/data").symlink_to("../../../../../../../.." + str(tmp_path / "victim"))
    spec = machine.make_spec()
    mounts = (MountPlan("tmpfs", "", "/data/deep", False, "rprivate", 0, 0o777, ()),)
    request = machine.make_request(spec, str(tmp_path / "machine"), (str(tmp_path / "top"), layer), mounts=mounts)
    with machine.boot(request) as container:
        assert container.shell("echo x > /data/deep/file && cat /data/deep/file").stdout == "x\n"
    assert os.listdir(tmp_path / "victim") == []
