"""Machines that start and stop with the host, by the commands that its unit runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nagaya import Host, Machine
from nagaya.errors import NagayaError
from nagaya.manager import autostart
from nagaya.manager.hardware import DriveOptions
from nagaya.model.spec import Autostart
from tests.e2e.command import Cli
from tests.kernel.test_whole_machines import wait_until

pytestmark = pytest.mark.timeout(300)


def test_in_their_order_and_back(make: Callable[..., Machine], host: Host) -> None:
    later, first, by_hand, never = (make(name) for name in ("later", "first", "by-hand", "never"))
    autostart.settle(later, Autostart(order=5, delay_s=0.5))
    autostart.settle(first, Autostart())
    by_hand.start()
    broken: list[str] = []

    def failed(machine: Machine, problem: NagayaError) -> None:
        broken.append(f"{machine.name}: {problem.message}")

    started = autostart.start_all(host.machines.list(), failed)
    assert ([machine.name for machine in started], broken) == (["first", "later"], [])
    assert later.state.started_ns - first.state.started_ns >= 500_000_000
    assert never.state.phase == "created"
    assert autostart.start_all(host.machines.list(), failed) == []  # they run
    for machine in (later, first, by_hand):
        wait_until(machine, "READY")
    stopped = autostart.stop_all(host.machines.list(), 60, failed)
    assert ([machine.name for machine in stopped], broken) == (["by-hand", "later", "first"], [])
    assert by_hand.state.finished_ns <= later.state.finished_ns <= first.state.finished_ns
    assert [machine.state.exit_code for machine in stopped] == [0, 0, 0]  # in good order
    first.snapshots.create("before")
    autostart.settle(first, None)
    first.snapshots.restore("before")
    assert first.spec.autostart is None  # as it is by now
    assert [machine.name for machine in autostart.in_order(host.machines.list())] == ["later"]


def test_one_that_does_not_start_or_stop_keeps_nobody(make: Callable[..., Machine], host: Host, tmp_path: Path) -> None:
    gone = tmp_path / "gone.raw"
    gone.write_bytes(bytes(1 << 16))
    deaf = tmp_path / "deaf.raw"
    deaf.write_bytes(b"\xfa\xf4\xeb\xfc".ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 16))  # cli; 1: hlt; jmp 1b
    lost = make("lost", drives=(DriveOptions(str(gone)),))
    stubborn = make("stubborn", drives=(DriveOptions(str(deaf)),))
    gone.unlink()
    autostart.settle(lost, Autostart())
    autostart.settle(stubborn, Autostart(order=1))
    broken: list[str] = []
    started = autostart.start_all(host.machines.list(), lambda machine, problem: broken.append(machine.name))
    assert ([machine.name for machine in started], broken) == (["stubborn"], ["lost"])
    autostart.stop_all(host.machines.list(), 0.5, lambda machine, problem: broken.append(machine.name))
    assert (stubborn.state.phase, stubborn.state.exit_code, broken) == ("exited", 137, ["lost"])


def test_the_command(empty_cli: Cli, boot_disk: Path) -> None:
    cli = empty_cli
    for name in ("a", "b"):
        cli.ok("machine", "create", name, "--disk", f"{boot_disk},clone", "--network", "none", "--type", "emulated")
    assert cli.ok("autostart", "enable", "--order", "3", "--delay", "0.1", "a", "b") == "a\nb\n"
    cli.ok("autostart", "disable", "b")
    assert json.loads(cli.ok("autostart", "ls", "--json")) == [
        {"name": "a", "order": 3, "delay_s": 0.1, "state": "created"}
    ]
    assert cli.ok("autostart", "start") == "a\n"
    assert cli.ok("autostart", "ls", "--format", "{{.Name}} {{.State}}") == "a running\n"
    assert cli.ok("autostart", "stop", "--timeout", "60") == "a\n"
    assert "autostart stop --timeout 300" in cli.ok("generate", "systemd", "--all")
    for words in (
        ("generate", "systemd"),
        ("generate", "systemd", "--all", "a"),
        ("autostart", "enable", "--order", "x", "a"),
    ):
        done = cli(*words)
        assert done.code in (1, 2) and "Traceback" not in done.err, done
    cli.ok("rm", "a", "b")
