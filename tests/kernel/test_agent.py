"""The real agent as PID 1 of a PID namespace: programs, terminals, flow control, policy, and the end of everything."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import select
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nagaya.errors import RemoteError
from nagaya.model.policy import ProcessPolicy
from nagaya.protocol import agent as protocol
from nagaya.protocol.agent import Exited, Output, SpawnFailed
from nagaya.protocol.frame import encode
from nagaya.protocol.setup import GuestSetup, setup_payload
from tests.kernel.agent_machine import LAX, PATH, TIMEOUT_S, Lost, Machine, build_agent

U32 = struct.Struct("<I")
PASSWD = """\
root:x:0:0:root:/root:/bin/sh
bob:x:1500:1600:Bob:/home/bob:/bin/sh
long:x:1501:1600:{}:/home/long:/bin/sh
broken line
bad:x:nan:1600::/:/bin/sh
last:x:1502:1602::/home/last:/bin/sh
"""
GROUP = "root:x:0:\nstaff:x:1600:\naudio:x:1700:alice,bob\nvideo:x:1701:bob\nown:x:1600:bob\nlast:x:1602:"


@pytest.fixture(scope="module")
def agent() -> str:
    return build_agent()


@pytest.fixture
def machine(agent: str) -> Iterator[Machine]:
    with Machine(agent) as made:
        yield made


@pytest.fixture
def peopled(agent: str, tmp_path: Path) -> Iterator[Machine]:
    """A machine with users of its own."""
    tmp_path.chmod(0o755)
    (tmp_path / "passwd").write_text(PASSWD.format("x" * 9000))
    (tmp_path / "group").write_text(GROUP)
    binds = ((str(tmp_path / "passwd"), "/etc/passwd"), (str(tmp_path / "group"), "/etc/group"))
    with Machine(agent, binds=binds) as made:
        yield made


def status_field(text: bytes, name: str) -> str:
    return next(line for line in text.decode().splitlines() if line.startswith(name + ":")).split("\t", 1)[1].strip()


def processes(machine: Machine) -> list[dict[str, object]]:
    result = machine.run("ps", applet=True)
    assert result.status == 0, result
    return [json.loads(line) for line in result.out.splitlines()]


# -- how programs end


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("exit 0", 0),
        ("exit 1", 1),
        ("exit 255", 255),
        ("kill -TERM $$", 143),
        ("kill -KILL $$", 137),
        ("kill -SEGV $$", 139),
    ],
)
def test_exit_status(machine: Machine, script: str, status: int) -> None:
    assert machine.run("sh", "-c", script).status == status


def test_signal_from_outside(machine: Machine) -> None:
    channel = machine.spawn("sh", "-c", "trap 'echo got; exit 7' USR1; echo ready; while :; do sleep 0.02; done")
    machine.wait_output(channel, b"ready")
    machine.link.signal(channel, 0)  # asks nothing
    machine.link.signal(channel, 4000)  # no such signal: ignored
    machine.link.signal(channel, 10)
    result = machine.finish(channel)
    assert (result.status, result.out) == (7, b"ready\ngot\n")


def test_started_tells_the_pid_inside(machine: Machine) -> None:
    channel = machine.spawn("sh", "-c", "echo $$")
    pid = machine.started(channel)
    assert machine.finish(channel).out == f"{pid}\n".encode()
    assert pid > 1


def test_orphans_are_reaped(machine: Machine) -> None:
    assert machine.run("sh", "-c", "for i in 1 2 3 4 5; do (sleep 0.02 &) ; done").status == 0
    deadline = time.monotonic() + 5
    while len(left := processes(machine)) > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [row["pid"] for row in left] == [1]


def test_descendants_do_not_hold_the_end_back(machine: Machine) -> None:
    began = time.monotonic()
    assert machine.run("sh", "-c", "sleep 30 & exit 3").status == 3
    assert machine.run("sh", "-c", "yes & yes >&2 & yes & exit 4", timeout_s=5).status == 4
    assert machine.run("true", timeout_s=5).status == 0, "the flood that goes on must not starve the next program"
    assert time.monotonic() - began < 10


def test_descendants_may_write_on_without_dying(machine: Machine, tmp_path: Path) -> None:
    done = tmp_path / "done"
    script = f"(sleep 0.1; head -c 1000000 /dev/zero && head -c 1000000 /dev/zero >&2 && echo $? > {done}) & exit 0"
    assert machine.run("sh", "-c", script).status == 0
    deadline = time.monotonic() + 5
    while not done.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert done.exists(), "SIGPIPE or a full pipe stopped it"
    assert not machine.output(1), "what came after EXITED was dropped"


# -- output


def test_streams_are_apart(machine: Machine) -> None:
    result = machine.run("sh", "-c", "echo out; echo err >&2")
    assert (result.out, result.err) == (b"out\n", b"err\n")


def test_a_slow_reader_slows_its_program_alone(machine: Machine, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 10
    (tmp_path / "data").write_bytes(data)
    machine.grants = False
    channel = machine.spawn("cat", str(tmp_path / "data"))
    machine.wait_for(lambda event: len(machine.output(channel)) == protocol.WINDOW)
    assert machine.quiet(0.1), "more than the window"
    assert machine.run("echo", "other").out == b"other\n"
    held = len(machine.output(channel))
    assert held == protocol.WINDOW
    machine.grants = True
    machine.link.grant(channel, held)
    result = machine.finish(channel)
    assert hashlib.sha256(result.out).digest() == hashlib.sha256(data).digest()
    assert result.status == 0


def test_exited_waits_for_output_that_waits_for_credit(machine: Machine) -> None:
    machine.grants = False
    size = protocol.WINDOW + 30000  # the rest fits into the pipe: the program ends at once
    channel = machine.spawn("sh", "-c", f"head -c {size} /dev/zero; exit 5")
    machine.wait_for(lambda event: len(machine.output(channel)) == protocol.WINDOW)
    assert machine.quiet(0.1)
    machine.link.grant(channel, protocol.WINDOW)
    result = machine.finish(channel)
    assert (result.status, len(result.out)) == (5, size)


def test_discarded_output(machine: Machine) -> None:
    result = machine.run("sh", "-c", "head -c 1000000 /dev/zero && exit 6", discard=True)
    assert (result.status, result.out) == (6, b"")
    result = machine.run("sh", "-c", "head -c 1000000 /dev/zero && exit 6", discard=True, tty=True)
    assert (result.status, result.out) == (6, b"")


# -- input


def test_input_and_its_end(machine: Machine) -> None:
    data = os.urandom(1 << 20) * 3
    assert machine.run("cat", stdin=data).out == data


def test_no_input_is_dev_null(machine: Machine) -> None:
    assert machine.run("sh", "-c", "readlink /proc/self/fd/0; cat").out == b"/dev/null\n"


def test_input_that_nobody_reads_is_swallowed(machine: Machine) -> None:
    assert machine.run("sh", "-c", "exec <&-; sleep 0.05; exit 4", stdin=bytes(2 << 20)).status == 4


def test_input_waits_for_a_program_that_reads_late(machine: Machine) -> None:
    channel = machine.spawn("sh", "-c", "read go; sleep 0.1; wc -c", stdin=True)
    result = machine.finish(channel, stdin=b"go\n" + bytes(1 << 20))
    assert int(result.out) == 1 << 20


# -- terminals


def test_terminal(machine: Machine) -> None:
    script = (
        "tty <&1; stty size; readlink /proc/self/fd/2; ps -o tpgid= -p $$ | tr -d ' ' | grep -qx $$ && echo foreground"
    )
    result = machine.run("sh", "-c", script, tty=True, rows=31, columns=97)
    lines = result.out.decode().split("\r\n")
    assert lines[0].startswith("/dev/pts/")
    assert lines[1:3] == ["31 97", lines[0]]
    assert result.err == b""


def test_terminal_is_the_controlling_one(machine: Machine) -> None:
    assert machine.run("sh", "-c", "echo yes > /dev/tty", tty=True).out == b"yes\r\n"
    assert machine.run("sh", "-c", "echo no 2>/dev/null > /dev/tty || echo none").out == b"none\n"


def test_resize_and_interrupt(machine: Machine) -> None:
    channel = machine.spawn(
        "sh",
        "-c",
        "trap 'stty size' WINCH; echo ready; while :; do sleep 0.02; done",
        tty=True,
        stdin=True,
        rows=24,
        columns=80,
    )
    machine.wait_output(channel, b"ready")
    machine.link.resize(channel, 40, 120)
    machine.wait_output(channel, b"40 120")
    machine.link.send_stdin(channel, b"\x03")
    assert machine.finish(channel).status == 130


def test_terminal_output_is_complete(machine: Machine) -> None:
    for _ in range(10):
        result = machine.run("seq", "1", "5000", tty=True)
        assert result.out.split() == [str(i).encode() for i in range(1, 5001)]


def test_terminal_belongs_to_the_user(peopled: Machine) -> None:
    assert peopled.run("sh", "-c", "stat -c %u $(tty)", tty=True, user="bob").out == b"1500\r\n"


def test_hung_up_terminal_with_input_and_no_credit_does_not_spin(machine: Machine) -> None:
    machine.grants = False
    channel = machine.spawn(
        "sh", "-c", "stty raw -echo; echo ready; sleep 0.3; head -c 400000 /dev/zero & wait", tty=True, stdin=True
    )
    machine.wait_output(channel, b"ready")
    machine.link.send_stdin(channel, bytes(100_000))
    machine.wait_for(lambda event: len(machine.output(channel)) == protocol.WINDOW)
    machine.link.signal(channel, 9)
    assert machine.quiet(0.2) or machine.quiet(0.2)
    before = cpu_ticks(machine.agent_pid)
    assert machine.quiet(0.5)
    assert cpu_ticks(machine.agent_pid) - before < 10, "the agent burns time on a terminal that nobody has open"
    machine.link.grant(channel, protocol.WINDOW)
    assert machine.finish(channel).status == 137


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


# -- what cannot be executed


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (("nosuch",), 127, "not found in the machine's PATH"),
        (("/nosuch",), 127, "No such file"),
        (("/etc/passwd/x",), 127, "Not a directory"),
        (("/tmp",), 126, "Is a directory"),
        (("/etc/passwd",), 126, "Permission denied"),
        (("",), 127, "not found"),
    ],
)
def test_exec_failures(machine: Machine, argv: tuple[str, ...], status: int, words: str) -> None:
    result = machine.run(*argv)
    assert result.failed is not None
    assert result.status == status
    assert words in result.failed.text
    assert machine.run("true").status == 0


def test_script_failures(machine: Machine, tmp_path: Path) -> None:
    for name, text in (("plain", "echo hi\n"), ("lost", "#!/no/such/interpreter\n"), ("empty", "")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "locked").write_text("#!/bin/sh\n")
    env = (f"PATH=/nosuch:{tmp_path}",)
    answers = {name: machine.run(name, env=env) for name in ("plain", "lost", "empty", "locked")}
    assert {name: answer.status for name, answer in answers.items()} == {
        "plain": 126,
        "lost": 127,
        "empty": 126,
        "locked": 126,
    }
    assert "interpreter" in (answers["lost"].failed or SpawnFailed(0, 0, 0, "")).text
    assert "Exec format error" in (answers["plain"].failed or SpawnFailed(0, 0, 0, "")).text


def test_default_path(machine: Machine) -> None:
    assert machine.run("true", env=()).status == 0


def test_no_more_than_256_programs(machine: Machine) -> None:
    channels = [machine.spawn("sleep", "60", discard=True) for _ in range(256)]
    for channel in channels:
        machine.started(channel)
    result = machine.run("true")
    assert result.failed is not None
    assert (result.status, result.failed.errno) == (125, 24)
    machine.link.signal(channels[3], 9)
    assert machine.finish(channels[3]).status == 137
    assert machine.run("true").status == 0


# -- who runs it, and with what


@pytest.mark.parametrize(
    ("user", "ids", "home"),
    [
        ("", "0 0 0", "/root"),
        ("root", "0 0 0", "/root"),
        ("bob", "1500 1600 1600 1700 1701", "/home/bob"),
        ("1500", "1500 1600 1600 1700 1701", "/home/bob"),
        ("bob:audio", "1500 1700 1700", "/home/bob"),
        ("bob:", "1500 1600 1600 1700 1701", "/home/bob"),
        ("last", "1502 1602 1602", "/home/last"),
        ("4321", "4321 0 0", "/"),
        ("4321:77", "4321 77 77", "/"),
    ],
)
def test_users(peopled: Machine, user: str, ids: str, home: str) -> None:
    result = peopled.run("sh", "-c", "echo $(id -u) $(id -g) $(id -G); echo $HOME", user=user)
    assert result.out.decode().splitlines() == [ids, home], result
    kernel = status_field(peopled.run("cat", "/proc/self/status", user=user).out, "Groups").split()
    assert sorted(kernel, key=int) == sorted(set(ids.split()[1:]), key=int), "the primary one is among them"


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ("alice", "no user 'alice'"), ("bad", "no user 'bad'"), ("bob:nosuch", "no group 'nosuch'"),
        ("4294967295", "no user"), ("-1", "no user"), ("b" * 300, "too long"),
    ],
)  # fmt: skip
def test_unknown_users(peopled: Machine, user: str, words: str) -> None:
    result = peopled.run("id", user=user)
    assert result.failed is not None
    assert result.status == 125
    assert words in result.failed.text


def test_a_fifo_for_passwd_blocks_nothing(agent: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "passwd")
    with Machine(agent, binds=((str(tmp_path / "passwd"), "/etc/passwd"),)) as machine:
        assert machine.run("echo", "hi", timeout_s=3).out == b"hi\n"
        assert machine.run("ps", applet=True, timeout_s=3).status == 0


def test_home_is_kept_when_given(peopled: Machine) -> None:
    assert peopled.run("env", env=("HOME=/else", "A=b=c", "EMPTY="), user="bob").out == b"HOME=/else\nA=b=c\nEMPTY=\n"


MASK = (1 << 0) | (1 << 5) | (1 << 7)  # CHOWN, KILL, SETUID


def test_capabilities(peopled: Machine) -> None:
    policy = ProcessPolicy(MASK, no_new_privileges=True)
    root = peopled.run("cat", "/proc/self/status", policy=policy).out
    bob = peopled.run("cat", "/proc/self/status", policy=policy, user="bob").out
    names = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    assert [int(status_field(root, n), 16) for n in names] == [0, MASK, MASK, MASK, 0]
    assert [int(status_field(bob, n), 16) for n in names] == [0, 0, 0, MASK, 0]
    assert status_field(root, "NoNewPrivs") == status_field(bob, "NoNewPrivs") == "1"
    assert status_field(peopled.run("cat", "/proc/self/status").out, "NoNewPrivs") == "0"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter names x86-64's system calls")
def test_seccomp(machine: Machine, tmp_path: Path) -> None:
    def insn(code: int, jt: int, jf: int, k: int) -> bytes:
        return struct.pack("<HBBI", code, jt, jf, k)

    # mkdir(2) is number 83: ENOANO (55); the rest is allowed
    filter_ = insn(0x20, 0, 0, 0) + insn(0x15, 0, 1, 83) + insn(0x06, 0, 0, 0x50000 | 55) + insn(0x06, 0, 0, 0x7FFF0000)
    policy = ProcessPolicy(MASK, no_new_privileges=True, seccomp=filter_)
    result = machine.run("sh", "-c", f"grep Seccomp: /proc/self/status; mkdir {tmp_path}/x", policy=policy)
    assert result.out == b"Seccomp:\t2\n"
    assert result.status == 1
    assert b"No anode" in result.err
    broken = machine.run("true", policy=policy._replace(seccomp=bytes(8)))
    assert broken.failed is not None
    assert broken.status == 125
    assert "system call filter" in broken.failed.text


def test_resource_limits(machine: Machine) -> None:
    policy = LAX._replace(rlimits=((7, 100, 200), (4, 0, 0)))
    assert machine.run("sh", "-c", "ulimit -Sn; ulimit -Hn; ulimit -c", policy=policy).out == b"100\n200\n0\n"


def test_a_limit_that_may_not_be_raised_goes_as_far_as_it_may(machine: Machine) -> None:
    ours = machine.run("sh", "-c", "ulimit -Hn").out
    beyond = LAX._replace(rlimits=((7, 1 << 40, 1 << 40),))  # more than fs.nr_open: EPERM for anyone
    assert machine.run("sh", "-c", "ulimit -Sn; ulimit -Hn", policy=beyond).out == ours * 2
    wrong = machine.run("true", policy=LAX._replace(rlimits=((99, 1, 1),)))
    assert wrong.failed is not None
    assert (wrong.status, wrong.failed.errno) == (125, 22)


def test_clean_surroundings(machine: Machine) -> None:
    result = machine.run(
        "sh",
        "-c",
        "umask; pwd; ls /proc/self/fd | tr '\\n' ' '; echo; cut -d' ' -f6 /proc/$$/stat; echo $$",
        env=(PATH,),
    )
    umask, directory, fds, session, pid = result.out.decode().splitlines()
    assert (umask, directory, fds) == ("0022", "/", "0 1 2 3 ")  # 3: ls has the directory open
    assert session == pid
    status = machine.run("cat", "/proc/self/status").out
    assert [int(status_field(status, name), 16) for name in ("SigBlk", "SigIgn", "SigCgt")] == [0, 0, 0]


def test_working_directory(peopled: Machine, tmp_path: Path) -> None:
    new = tmp_path / "made" / "here"
    assert peopled.run("pwd", workdir=str(new)).out == f"{new}\n".encode()
    assert (new.stat().st_mode & 0o7777, new.stat().st_uid) == (0o755, 0)
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    assert (
        peopled.run("sh", "-c", "readlink /proc/self/cwd", workdir=str(private), user="bob").out
        == f"{private}\n".encode()
    )
    (tmp_path / "file").touch()
    result = peopled.run("pwd", workdir=str(tmp_path / "file"))
    assert result.failed is not None
    assert "working directory" in result.failed.text


# -- the agent itself


def test_agent_is_out_of_reach_and_small(peopled: Machine) -> None:
    policy = ProcessPolicy(MASK, no_new_privileges=True)
    for user in ("", "bob"):
        assert peopled.run("readlink", "/proc/1/exe", policy=policy, user=user).status == 1
        assert peopled.run("readlink", "/proc/1/fd/3", policy=policy, user=user).status == 1
        assert peopled.run("head", "-c1", "/proc/1/mem", policy=policy, user=user).status == 1
    for _ in range(50):
        peopled.run("true")
    with open(f"/proc/{peopled.agent_pid}/status", "rb") as file:
        assert int(status_field(file.read(), "VmRSS").split()[0]) < 1024


def test_ps(peopled: Machine) -> None:
    channel = peopled.spawn("sleep", "60", user="bob")
    pid = peopled.started(channel)
    rows = {row["pid"]: row for row in processes(peopled)}
    assert set(rows) == {1, pid}, "the listing itself is not listed"
    row = rows[pid]
    assert (row["ppid"], row["uid"], row["user"], row["command"]) == (1, 1500, "bob", "sleep 60")
    assert row["state"] in ("S", "R", "D")
    assert isinstance(row["rss_bytes"], int)
    assert row["rss_bytes"] > 0
    assert rows[1]["uid"] == 0


def sleepers(agent_pid: int) -> list[int]:
    with open(f"/proc/{agent_pid}/task/{agent_pid}/children") as file:
        return [os.pidfd_open(int(pid)) for pid in file.read().split()]


def wait_all(pidfds: list[int]) -> None:
    for fd in pidfds:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(TIMEOUT_S * 1000), "a process outlived its machine"
        os.close(fd)


def start_sleepers(machine: Machine) -> list[int]:
    for _ in range(2):
        channel = machine.spawn("sh", "-c", "trap '' TERM HUP; (setsid sleep 60 &); echo up; sleep 60")
        machine.wait_output(channel, b"up")
    return sleepers(machine.agent_pid)


def test_end_of_stream_ends_everything(agent: str) -> None:
    with Machine(agent) as machine:
        pidfds = start_sleepers(machine)
        assert len(pidfds) >= 2
        machine.close()
        wait_all(pidfds)


def test_shutdown_ends_everything(agent: str) -> None:
    with Machine(agent) as machine:
        pidfds = start_sleepers(machine)
        machine.link.shutdown()
        with pytest.raises(Lost):
            machine.wait_for(lambda event: False)
        assert os.waitstatus_to_exitcode(machine.close()) == 0
        wait_all(pidfds)


def test_killed_agent_ends_everything(agent: str) -> None:
    with Machine(agent) as machine:
        pidfds = start_sleepers(machine)
        machine.kill_agent()
        with pytest.raises(Lost):
            machine.wait_for(lambda event: False)
        wait_all(pidfds)


def _spawn_frame(payload: bytes, channel: int = 9) -> bytes:
    return encode(protocol.SPAWN, channel, payload)


ARG = struct.pack("<HHI", 1, 0, 4) + b"true"
VIOLATIONS = {
    "unknown type": encode(77, 1),
    "agent's own type": encode(protocol.STDOUT, 1, b"x"),
    "flags": struct.pack("<IHHI", 0, protocol.SHUTDOWN, 1, 0),
    "payload too long": struct.pack("<IHHI", (64 << 10) + 1, protocol.STDIN, 0, 1),
    "spawn too long": struct.pack("<IHHI", (1 << 20) + 1, protocol.SPAWN, 0, 1),
    "channel 0": _spawn_frame(ARG, 0),
    "no argument": _spawn_frame(b""),
    "cut field": _spawn_frame(ARG[:-1]),
    "huge field": _spawn_frame(struct.pack("<HHI", 1, 0, 0xFFFFFFFF)),
    "unknown field": _spawn_frame(ARG + struct.pack("<HHI", 99, 0, 0)),
    "nul in argument": _spawn_frame(struct.pack("<HHI", 1, 0, 3) + b"a\0b"),
    "environment without =": _spawn_frame(ARG + struct.pack("<HHI", 2, 0, 1) + b"A"),
    "relative directory": _spawn_frame(ARG + struct.pack("<HHI", 3, 0, 1) + b"x"),
    "filter of odd size": _spawn_frame(ARG + struct.pack("<HHI", 8, 0, 7) + bytes(7)),
    "too many limits": _spawn_frame(ARG + (struct.pack("<HHI", 9, 0, 24) + bytes(24)) * 33),
    "channel in use": _spawn_frame(ARG, 1),
    "credit for nothing": encode(protocol.CREDIT, 1, U32.pack(1)),
    "malformed credit": encode(protocol.CREDIT, 1, b""),
    "malformed signal": encode(protocol.SIGNAL, 1, b"123"),
    "malformed resize": encode(protocol.RESIZE, 1, b""),
    "a virtual machine's set-up": encode(protocol.SETUP, 0, setup_payload(GuestSetup("m"))),
    "a virtual machine's clock": encode(protocol.CLOCK, 0, bytes(8)),
    "input beyond the window": encode(protocol.STDIN, 1, bytes(64 << 10)) * 7,
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_violations_end_the_machine(agent: str, name: str) -> None:
    with Machine(agent) as machine:
        machine.started(machine.spawn("sleep", "60", stdin=True))
        # The link has not sent that, and wonders about credit for it; a long one may meet a machine that is gone.
        with pytest.raises((Lost, RemoteError, BrokenPipeError)):
            machine.send_raw(VIOLATIONS[name])
            machine.wait_for(lambda event: False)
        assert os.waitstatus_to_exitcode(machine.close()) == 100


def test_frames_that_crossed_the_end_are_dropped(machine: Machine) -> None:
    channel = machine.spawn("true", stdin=True)
    assert machine.finish(channel).status == 0
    for type_, payload in (
        (protocol.STDIN, b"late"), (protocol.STDIN_CLOSE, b""), (protocol.SIGNAL, U32.pack(9)),
        (protocol.RESIZE, U32.pack(0)), (protocol.CREDIT, U32.pack(5)),
    ):  # fmt: skip
        machine.send_raw(encode(type_, channel, payload))
    assert machine.run("echo", "on").out == b"on\n"


# -- without an init of ours


def test_the_program_is_pid_1(agent: str) -> None:
    with Machine(agent, init=False) as machine:
        channel = machine.spawn("sh", "-c", "echo $$; cat; exit 9", main=True, stdin=True, user="0:0")
        machine.started(channel)
        other = machine.run("sh", "-c", "test -d /proc/1 && readlink /proc/1/exe; cat /proc/1/comm")
        assert other.out.splitlines()[-1] == b"sh", "another program sees the main one in the same namespace"
        result = machine.finish(channel, stdin=b"input")
        assert (result.status, result.out) == (9, b"1\ninput")


def test_the_program_is_pid_1_with_a_terminal(agent: str) -> None:
    with Machine(agent, init=False) as machine:
        result = machine.run("sh", "-c", "echo $$; stty size; exit 2", main=True, tty=True, rows=20, columns=70)
        assert (result.status, result.out) == (2, b"1\r\n20 70\r\n")


def test_pid_1_that_cannot_be_executed(agent: str) -> None:
    with Machine(agent, init=False) as machine:
        result = machine.run("nosuch", main=True)
        assert (result.status, result.failed is not None) == (127, True)


def test_end_of_stream_ends_a_machine_without_init(agent: str) -> None:
    with Machine(agent, init=False) as machine:
        channel = machine.spawn("sh", "-c", "trap '' TERM HUP INT; sleep 60 & echo up; wait", main=True)
        machine.wait_output(channel, b"up")
        main = os.pidfd_open(int(Path(f"/proc/{machine._outer}/task/{machine._outer}/children").read_text().split()[0]))
        machine.close()
        wait_all([main])


def test_a_killed_stub_ends_the_machine(agent: str) -> None:
    with Machine(agent, init=False) as machine:
        stub = int(Path(f"/proc/{machine._outer}/task/{machine._outer}/children").read_text().split()[0])
        os.kill(stub, 9)  # the agent, which we forked, has not been able to reap it before us: it is still that stub
        with pytest.raises(Lost):
            machine.wait_for(lambda event: False)


def test_exited_comes_once_and_last(machine: Machine) -> None:
    channel = machine.spawn("sh", "-c", "echo a; echo b >&2")
    machine.finish(channel)
    assert machine.quiet(0.05)
    mine = [e for e in machine.events if not isinstance(e, protocol.Hello) and e.channel == channel]
    assert [type(e) for e in mine].count(Exited) == 1
    assert isinstance(mine[-1], Exited)
    assert {e.stream for e in mine if isinstance(e, Output)} == {1, 2}
