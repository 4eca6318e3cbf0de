"""Where a virtual machine's agent mounts: places that an image's links lead to, and paths that are long, deep or missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nagaya.engines.container.userns import open_userns
from nagaya.errors import HostError
from nagaya.protocol.agent import SetUp, SetupFailed
from nagaya.protocol.setup import GuestMount, GuestSetup, setup_payload
from tests.conftest import require_program
from tests.kernel.vm_agent import VmMachine, build_vm_agent


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> str:
    require_program("busybox")
    return build_vm_agent(tmp_path_factory.mktemp("agent"))


@pytest.fixture(scope="module")
def userns(agent: str) -> Iterator[int]:
    try:
        fd, _ = open_userns(f"{os.getpid():08x}")
    except HostError as error:
        pytest.skip(f"needs user namespaces: {error.message}")
    yield fd
    os.close(fd)


@pytest.fixture
def machine(agent: str, userns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VmMachine]:
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0")
    log = tmp_path / "log"
    log.touch()
    with VmMachine(agent, userns, str(log)) as machine:
        yield machine
    assert log.read_text() == ""


def set_up(machine: VmMachine, setup: GuestSetup) -> SetUp | SetupFailed:
    machine.link.setup(setup_payload(setup))
    event = machine.wait_for(lambda event: isinstance(event, SetUp | SetupFailed))
    assert isinstance(event, SetUp | SetupFailed)
    return event


def at(*targets: str) -> GuestSetup:
    return GuestSetup("m", mounts=tuple(GuestMount("tmpfs", "", target) for target in targets), power_off="reboot")


def places(machine: VmMachine) -> set[str]:
    """Where the user's file systems are."""
    lines = machine.run("/bin/cat", "/proc/mounts").out.decode().splitlines()
    return {line.split()[1] for line in lines if line.startswith("tmpfs") and ",mode=" not in line}


@pytest.mark.parametrize(
    ("target", "place"),
    [
        ("/new", "/new"),
        ("/new//a/./b/../c/", "/new/a/c"),
        ("/a", "/b/b"),  # a link to what is missing
        ("/a/further/in", "/b/b/further/in"),  # and one on the way
        ("/etc/resolv.conf/x", "/run/resolv.conf/x"),  # relative to where the link is
        ("/var/run/lock", "/run/lock"),
        ("/up/there", "/there"),  # ".." does not lead out of the root
        ("/long/end", "/n" * 1900 + "/end"),
        ("/" + "d/" * 2046 + "e", "/" + "d/" * 2046 + "e"),  # as deep as a path can be
    ],
)
def test_missing_places_are_made(machine: VmMachine, target: str, place: str) -> None:
    assert set_up(machine, at(target)) == SetUp(())
    assert place in places(machine)


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("/loop/x", "Too many levels of symbolic links"),
        ("/many", "Too many levels of symbolic links"),  # each round leads to one more
        ("/bin/sh/x", "Not a directory"),
        ("/" + "d/" * 2049, "File name too long"),
        ("/long/" + "d/" * 300, "File name too long"),  # only once the link is followed
        ("/" + "y" * 256, "File name too long"),
    ],
)
def test_impossible_places_are_refused(machine: VmMachine, target: str, why: str) -> None:
    answer = set_up(machine, at(target))
    assert isinstance(answer, SetupFailed)
    assert answer.text.endswith(f": {why}")
    assert answer.text.startswith("cannot mount /")
