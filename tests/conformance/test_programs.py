"""What a program in a machine gets, and what its caller gets of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from nagaya import ExecOptions, Machine
from nagaya.errors import ExecError, LaunchError
from nagaya.manager.attachment import Attachment, Exited, Output
from tests.conformance.types import PATIENCE_S

Run = Callable[..., tuple[int, bytes, bytes]]
Start = Callable[..., Machine]


@pytest.mark.parametrize("status", [0, 1, 42, 125, 127, 255])
def test_exit_status(run: Run, status: int) -> None:
    assert run("sh", "-c", f"exit {status}") == (status, b"", b"")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_death_by_signal(run: Run, number: int) -> None:
    assert run("sh", "-c", f"kill -{int(number)} $$")[0] == 128 + number


@pytest.mark.parametrize(
    ("argv", "status", "text"),
    [
        (("nosuch",), 127, "not found"),
        (("/bin/nosuch",), 127, "No such file"),
        (("badinterp",), 127, "interpreter"),
        (("/bin/noexec",), 126, "denied"),
        (("noshebang",), 126, "format"),
        (("/tmp",), 126, "directory"),
    ],
)
@pytest.mark.parametrize("init", [True, False])
def test_what_cannot_be_executed(create: Start, argv: tuple[str, ...], status: int, text: str, init: bool) -> None:
    machine = create(*argv, init=init)
    with pytest.raises(ExecError, match=text) as caught:
        machine.start()
    assert caught.value.status == status
    assert machine.state.phase == "exited"
    assert machine.state.exit_code == status


def test_streams_are_kept_apart(run: Run) -> None:
    assert run("sh", "-c", "echo out; echo err >&2") == (0, b"out\n", b"err\n")


def test_input_reaches_the_program_and_ends(run: Run) -> None:
    data = os.urandom(3 << 20)
    assert run("cat", input_=data) == (0, data, b"")


def test_output_is_whole_when_the_program_ends_at_once(run: Run) -> None:
    status, out, _ = run("sh", "-c", "dd if=/dev/zero bs=1024 count=60 2>/dev/null")
    assert (status, len(out)) == (0, 60 << 10)


def test_environment_directory_and_names(run: Run) -> None:
    status, out, _ = run(
        "sh", "-c", "pwd; hostname; echo $A:$HOME:$PATH", env=("A=b c",), workdir="/new/place", hostname="inn"
    )
    assert status == 0
    assert out.decode().split("\n")[:3] == [
        "/new/place",
        "inn",
        "b c:/root:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ]


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", "uid=0(root) gid=0(root)"),
        ("ann", "uid=1000(ann) gid=1000(ann) groups=50(staff),1000(ann)"),
        ("1000", "uid=1000(ann) gid=1000(ann) groups=50(staff),1000(ann)"),
        ("ann:staff", "uid=1000(ann) gid=50(staff)"),
        ("4711", "uid=4711 gid=0(root)"),
        ("4711:4712", "uid=4711 gid=4712"),
    ],
)
def test_user(run: Run, user: str, expected: str) -> None:
    status, out, _ = run("sh", "-c", "id; echo $HOME", user=user)
    assert status == 0
    assert out.decode().startswith(expected)
    assert ("/home/ann" in out.decode()) == (user.startswith("ann") or user == "1000")


@pytest.mark.parametrize("user", ["nobody-here", "ann:nogroup-here"])
def test_unknown_user(create: Start, user: str) -> None:
    with pytest.raises(LaunchError, match="there is no"):
        create("true", user=user).start()


def _read_until(attachment: Attachment, wanted: bytes, timeout_s: float = PATIENCE_S) -> bytes:
    got = b""
    deadline = time.monotonic() + timeout_s
    while wanted not in got:
        assert time.monotonic() < deadline, got
        assert attachment._wait(1.0) or True
        for event in attachment.receive():
            assert isinstance(event, Output), (event, got)
            got += event.data
    return got


def test_terminal_size_interrupt_and_resize(create: Start) -> None:
    machine = create("sh", tty=True, stdin=True)
    attachment = machine.start(attach=True, rows=31, columns=99)
    assert attachment is not None
    with attachment:
        attachment.send_stdin(b"stty size; tty\n")
        assert b"/dev/pts/" in _read_until(attachment, b"31 99") or b"/dev/pts/" in _read_until(
            attachment, b"/dev/pts/"
        )
        attachment.resize(50, 120)
        attachment.send_stdin(b"stty size\n")
        _read_until(attachment, b"50 120")
        attachment.send_stdin(b"sh -c 'echo be''gun; exec sleep 100'; echo status $?\n")
        _read_until(attachment, b"begun")
        attachment.send_stdin(b"\x03")
        attachment.send_stdin(b"echo after; exit 9\n")
        _read_until(attachment, b"after")
        events: list[object] = []
        while not events or not isinstance(events[-1], Exited):
            attachment._wait(5)
            events += attachment.receive()
        assert events[-1] == Exited(9, "")


def test_a_slow_reader_slows_the_program_and_loses_nothing(create: Start) -> None:
    machine = create("sh", "-c", "seq 1 400000; echo done > /tmp/done; sleep 60")
    attachment = machine.start(attach=True)
    assert attachment is not None
    with attachment:
        time.sleep(0.5)
        assert machine.run(["test", "-e", "/tmp/done"]).exit_code == 1
        got = _read_until(attachment, b"400000\n")
    assert got == b"".join(b"%d\n" % number for number in range(1, 400001))


def test_exec_runs_beside_the_main_program(start: Start) -> None:
    machine = start("sleep", "600", env=("A=1",), workdir="/tmp")
    assert machine.run(["sh", "-c", "cat; echo $A; pwd; exit 3"], stdin=b"in\n") == (3, b"in\n1\n/tmp\n", b"")
    assert machine.run(["sh", "-c", "id -u; echo $B"], user="ann", env=("B=2",)).stdout == b"1000\n2\n"
    for argv, status in ((["nosuch"], 127), (["/bin/noexec"], 126)):
        with pytest.raises(ExecError) as caught:
            machine.run(argv)
        assert caught.value.status == status
    assert machine.exec(ExecOptions(("touch", "/tmp/detached")), detach=True) is None
    while machine.run(["test", "-e", "/tmp/detached"]).exit_code:
        time.sleep(0.01)


def test_many_programs_at_once(start: Start) -> None:
    machine = start("sleep", "600")
    attachments = [
        machine.exec(ExecOptions(("sh", "-c", f"read x; echo {n}$x; exit {n}"), stdin=True)) for n in range(40)
    ]
    for number, attachment in enumerate(attachments):
        assert attachment is not None
        with attachment:
            assert attachment.communicate(b"z\n", timeout_s=PATIENCE_S) == (number, b"%dz\n" % number, b"")


def test_orphans_are_reaped_and_do_not_hold_a_program_up(start: Start) -> None:
    machine = start("sleep", "600")
    began = time.monotonic()
    result = machine.run(["sh", "-c", "(sleep 300; echo late) & echo now"], timeout_s=PATIENCE_S)
    assert (result.exit_code, result.stdout) == (0, b"now\n")
    assert time.monotonic() - began < 10
    for _ in range(20):
        machine.run(["sh", "-c", "true & sleep 0.01"])
    assert not [row for row in machine.top() if "Z" in row.command]
    assert len(machine.top()) < 8


def test_top_sees_the_programs(start: Start) -> None:
    machine = start("sleep", "4321", user="ann")
    (row,) = [row for row in machine.top() if row.command == "sleep 4321"]
    assert row.user == "ann"


@pytest.mark.parametrize("init", [True, False])
def test_init_is_ours_or_the_program(run: Run, init: bool) -> None:
    status, out, _ = run("sh", "-c", "echo $$; exit 5", init=init)
    assert status == 5
    assert (out == b"1\n") == (not init)


def test_without_our_init_everything_else_still_works(start: Start) -> None:
    machine = start("sh", "-c", "trap 'exit 6' TERM; while true; do sleep 0.05; done", init=False)
    assert machine.run(["sh", "-c", "echo hi; ps | grep -c sh"]).stdout.startswith(b"hi\n")
    machine.stop()
    assert machine.state.exit_code == 6
