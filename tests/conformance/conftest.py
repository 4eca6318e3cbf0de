"""One suite for every engine: each type must pass the same cases (`types.py` says which run)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nagaya import CreateOptions, Host, Machine
from nagaya.errors import NagayaError
from nagaya.manager.attachment import Attachment
from tests.conformance.table import Table
from tests.conformance.types import HERE, PATIENCE_S, TYPES, Reports, describe_run, find_obstacle, mark

REPORTS = Reports()
TABLE = Table()
RECORD = os.environ.get("NAGAYA_CONFORMANCE_RECORD", "")
BUSYBOX = "/bin/busybox"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark([item for item in items if str(item.path).startswith(HERE)])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcome = REPORTS.take(report)
    if outcome is None:
        return
    TABLE.add(outcome)
    if RECORD:
        with open(RECORD, "a") as file:
            file.write(json.dumps(outcome._replace(**describe_run())._asdict()) + "\n")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not TABLE.types():
        return
    terminalreporter.section("conformance of the types")
    for line in TABLE.totals() + TABLE.failures():
        terminalreporter.line(line)


@pytest.fixture(scope="session")
def busybox_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system: Debian's static busybox, two users, nothing else."""
    if not os.path.exists(BUSYBOX):
        pytest.skip("needs busybox-static")
    tree = tmp_path_factory.mktemp("busybox")
    for name in ("bin", "etc", "tmp", "root", "home/ann", "data"):
        (tree / name).mkdir(parents=True)
    shutil.copy2(BUSYBOX, tree / "bin" / "busybox")
    for applet in ("sh", "cat", "echo", "sleep", "true", "false", "ls", "id", "kill", "env", "pwd", "stty", "ps", "dd",
                   "hostname", "touch", "rm", "mkdir", "ln", "wc", "head", "seq", "test", "stat", "md5sum", "tty", "nohup",
                   "chown", "chmod", "mount", "umount", "mknod", "ip", "grep", "cut", "tr", "readlink", "date", "yes", "tail"):  # fmt: skip
        os.link(tree / "bin" / "busybox", tree / "bin" / applet)
    (tree / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n")
    (tree / "etc" / "group").write_text("root:x:0:\nann:x:1000:\nstaff:x:50:ann\n")
    (tree / "data" / "seed").write_text("from the image\n")
    (tree / "bin" / "noexec").write_text("#!/bin/sh\n")
    (tree / "bin" / "noshebang").write_text("echo hi\n")
    (tree / "bin" / "badinterp").write_text("#!/no/such/interpreter\n")
    for name in ("noshebang", "badinterp"):
        (tree / "bin" / name).chmod(0o755)
    os.chown(tree / "home" / "ann", 1000, 1000)
    (tree / "tmp").chmod(0o1777)
    tree.chmod(0o755)  # the machine's "/", which its users must be able to enter
    return tree


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, busybox_tree: Path) -> Iterator[Host]:
    """A store of its own with one image, "box"."""
    if os.geteuid():
        pytest.skip("needs root")
    made = Host(root=str(tmp_path_factory.mktemp("store")))
    made.images.import_rootfs(str(busybox_tree), "box", changes=("CMD sh", "VOLUME /data"))
    yield made
    for machine in made.machines.list():
        machine.remove(force=True, volumes=True)
    assert os.listdir(made.paths.machines) == []
    assert not os.path.exists(made.paths.run) or os.listdir(made.paths.run) == []


Start = Callable[..., Machine]


@pytest.fixture(params=TYPES)
def create(request: pytest.FixtureRequest, host: Host) -> Iterator[Start]:
    """Make a machine of the engine under test; all are removed afterwards."""
    obstacle = find_obstacle(request.param)
    if obstacle:
        pytest.skip(f"needs {request.param}: {obstacle}")
    made: list[Machine] = []

    def make(*argv: str, **options: object) -> Machine:
        options.setdefault("network", "none")
        wanted = CreateOptions("box", command=argv, type=request.param, **options)  # type: ignore[arg-type]
        machine = host.machines.create(wanted)
        made.append(machine)
        return machine

    yield make
    for machine in made:
        try:
            machine.remove(force=True, volumes=True)
        except NagayaError:
            continue  # the test removed it


@pytest.fixture
def start(create: Start) -> Start:
    """Make and start one."""

    def begin(*argv: str, **options: object) -> Machine:
        machine = create(*argv, **options)
        machine.start()
        return machine

    return begin


@pytest.fixture
def run(create: Start) -> Callable[..., tuple[int, bytes, bytes]]:
    """Run one to its end: (status, stdout, stderr)."""

    def begin(*argv: str, input_: bytes = b"", **options: object) -> tuple[int, bytes, bytes]:
        machine = create(*argv, stdin=bool(input_), **options)
        attachment = machine.start(attach=True)
        assert isinstance(attachment, Attachment)
        with attachment:
            return attachment.communicate(input_, timeout_s=PATIENCE_S)

    return begin
