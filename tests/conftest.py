"""What all suites share: `--require`, a store with the busybox image, the installed command, the check for leftovers."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests import own_network
from tests.e2e import leftovers
from tests.e2e.command import PROGRAM, Cli

os.environ["NAGAYA_TYPE"] = "container"  # where a test names no type: what it is by default depends on the host
os.environ.setdefault("NAGAYA_TEMPLATES", "0")  # a build in the background would outlive the test that began it

WATCHED = ("tests/e2e/", "tests/kernel/", "tests/conformance/")


# -- --require


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        default="",
        metavar="NAMES",
        help="facilities that must be there, by comma, or 'all': a test skipped because it 'needs NAME' fails",
    )


def _missing(config: pytest.Config, longrepr: object) -> str:
    """Why a skip is a failure under --require, or ""."""
    required = config.getoption("--require").split(",")
    reason = str(longrepr[2] if isinstance(longrepr, tuple) else longrepr).removeprefix("Skipped: ")
    if not reason.startswith("needs "):
        return ""
    named = any(name and name in reason for name in required)
    return f"--require: {reason}" if named or "all" in required else ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: Any = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        missing = _missing(item.config, report.longrepr)
        if missing:
            report.outcome, report.longrepr = "failed", missing
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report: Any = yield
    if report.skipped:
        missing = _missing(collector.config, report.longrepr)
        if missing:
            report.outcome, report.longrepr = "failed", missing
    return report


# -- the network


def pytest_configure(config: pytest.Config) -> None:
    """See tests/own_network.py. Here, for pytest has one thread by now, and has started nothing."""
    own_network.enter()


# -- leftovers


@pytest.fixture(scope="session", autouse=True)
def _mark() -> Iterator[None]:
    """Every process that this session starts, and every process that those start, carries the mark."""
    os.environ[leftovers.MARK] = secrets.token_hex(8)
    # A shell without job control starts what it sends to the background with Ctrl-C ignored, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    del os.environ[leftovers.MARK]


@pytest.fixture(scope="module", autouse=True)
def no_leftovers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, _mark: None
) -> Iterator[None]:
    """A module that leaves anything of a machine on this host fails, and says what."""
    module = os.path.relpath(str(request.path), str(request.config.rootpath))
    if not module.startswith(WATCHED):
        yield
        return
    scratch = str(tmp_path_factory.getbasetemp())
    before = leftovers.take_footprint(scratch)
    yield
    left = leftovers.find_new(before, scratch)
    assert not left, f"{module} left behind:\n" + "\n".join(left)


# -- stores


@pytest.fixture(scope="session")
def busybox_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The root of a store that has the busybox image, made on this host; shared by all tests of a session."""
    require_root()
    require_program("busybox")
    if not os.access(PROGRAM, os.X_OK):
        pytest.skip(f"needs nagaya installed beside the interpreter ({PROGRAM}): make .cache/venv")
    root = str(tmp_path_factory.mktemp("shared") / "store")
    ran = Cli(root)("pull", "busybox")
    assert ran.code == 0, ran
    return root


@pytest.fixture
def cli(busybox_root: str) -> Iterator[Cli]:
    """The command on the shared store. Machines and volumes that a test makes are removed after it."""
    made = Cli(busybox_root)
    yield made
    remove_all(made)


@pytest.fixture
def nagaya_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The root of a store of this test's own, with nothing in it."""
    return str(tmp_path_factory.mktemp("own") / "store")


@pytest.fixture
def own_cli(busybox_root: str, nagaya_root: str) -> Iterator[Cli]:
    """The command on a store of this test's own, with the busybox image."""
    os.mkdir(nagaya_root)
    subprocess.run(["cp", "-a", f"{busybox_root}/images", nagaya_root], check=True)  # shutil cannot copy whiteouts
    made = Cli(nagaya_root)
    yield made
    remove_all(made)


@pytest.fixture
def empty_cli(nagaya_root: str) -> Iterator[Cli]:
    """The command on a store of this test's own, with nothing in it."""
    require_root()
    made = Cli(nagaya_root)
    yield made
    remove_all(made)


@pytest.fixture
def network_namespace() -> Iterator[tuple[str, ...]]:
    """A network namespace with an outside world (198.51.100.2), as words to put before a command.

    Not `ip netns exec`: that mounts a new /sys, and the control groups below it are gone.
    """
    require_root()
    for program in ("ip", "nft", "nsenter"):
        require_program(program)
    inside, outside = (f"nagayatest-{side}-{os.getpid()}" for side in ("in", "out"))
    try:
        for words in (
            f"netns add {inside}",
            f"netns add {outside}",
            f"-n {inside} link set lo up",
            f"-n {inside} link add inner type veth peer name outer netns {outside}",
            f"-n {inside} address add 198.51.100.1/24 dev inner",
            f"-n {outside} address add 198.51.100.2/24 dev outer",
            f"-n {inside} link set inner up",
            f"-n {outside} link set outer up",
            f"-n {inside} route add default via 198.51.100.2",
        ):
            subprocess.run(["ip", *words.split()], check=True)
        yield ("nsenter", f"--net=/run/netns/{inside}")
    finally:
        for name in (inside, outside):
            subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)


def remove_all(cli: Cli) -> None:
    """Take every machine and every volume of a store away; a test's own failure is not hidden by what it left."""
    if cli.machine_ids():
        cli.ok("ps", "-a")  # mends what was cut off
        left = [machine["id"] for machine in cli.machines()]
        if left:
            cli.ok("rm", "-f", "-v", *left)
    if os.path.isdir(f"{cli.root}/volumes"):
        names = cli.ok("volume", "ls", "-q").split()
        if names:
            cli.ok("volume", "rm", *names)


def require_root() -> None:
    if os.geteuid():
        pytest.skip("needs root")


def require_program(name: str) -> None:
    if shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
        pytest.skip(f"needs {name}")
