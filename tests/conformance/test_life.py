"""The life cycle: phases, stop and kill, restart policies, pause, rename, update, logs, files, repair."""

from __future__ import annotations

import io
import os
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nagaya import Host, Limits, Machine, Mount, Restart, UpdateOptions
from nagaya.errors import Conflict, NotFound, Unsupported, UsageError
from nagaya.model.spec import LogLimits
from nagaya.storage import machines as records
from tests.conformance.types import PATIENCE_S

Start = Callable[..., Machine]
Run = Callable[..., tuple[int, bytes, bytes]]


def _wait_for(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_phases(create: Start) -> None:
    machine = create("sh", "-c", "trap 'exit 4' TERM; echo ready; while true; do sleep 0.05; done")
    assert machine.state.phase == "created"
    for refused in (machine.pause, machine.attach, machine.top, machine.stats, machine.kill):
        with pytest.raises(Conflict):
            refused()
    machine.start()
    assert machine.state.phase == "running"
    with pytest.raises(Conflict):
        machine.start()
    with pytest.raises(Conflict, match="cannot remove"):
        machine.remove()
    _wait_for(lambda: bool(list(machine.logs())))  # by now it listens: it had only begun to run
    machine.stop()
    assert (machine.state.phase, machine.state.exit_code) == ("exited", 4)
    machine.stop()
    machine.start()
    assert machine.state.phase == "running"
    machine.kill()
    assert machine.state.exit_code == 137
    machine.remove()
    with pytest.raises(NotFound):
        machine.start()
    with pytest.raises(NotFound):
        _ = machine.state


def test_stop_kills_what_does_not_listen(start: Start) -> None:
    machine = start("sh", "-c", "trap '' TERM; echo ready; while true; do sleep 0.05; done")
    _wait_for(lambda: bool(list(machine.logs())))
    began = time.monotonic()
    machine.stop(timeout_s=0.3)
    assert 0.25 < time.monotonic() - began < 5
    assert machine.state.exit_code == 137


def test_its_own_stop_signal(start: Start) -> None:
    machine = start("sh", "-c", "trap 'exit 8' USR1; echo ready; while true; do sleep 0.05; done", stop_signal=10)
    _wait_for(lambda: bool(list(machine.logs())))
    machine.stop()
    assert machine.state.exit_code == 8


def test_wait_sees_the_end(start: Start) -> None:
    machine = start("sh", "-c", "sleep 0.3; exit 12")
    assert machine.wait() == 12
    assert machine.wait() == 12


def test_pause_freezes_and_kill_reaches_the_frozen(start: Start) -> None:
    machine = start("sh", "-c", "i=0; while true; do i=$((i+1)); echo $i; sleep 0.02; done")
    _wait_for(lambda: len(list(machine.logs())) > 3)
    machine.pause()
    assert machine.state.phase == "paused"
    time.sleep(0.1)
    before = len(list(machine.logs()))
    time.sleep(0.2)
    assert len(list(machine.logs())) == before
    with pytest.raises(Conflict, match="paused"):
        machine.run(["true"])
    machine.unpause()
    _wait_for(lambda: len(list(machine.logs())) > before)
    machine.pause()
    machine.kill()
    assert machine.state.phase == "exited"


def test_stop_wakes_the_paused(start: Start) -> None:
    machine = start("sh", "-c", "trap 'exit 4' TERM; echo ready; while true; do sleep 0.05; done")
    _wait_for(lambda: bool(list(machine.logs())))
    machine.pause()
    machine.stop()
    assert machine.state.exit_code == 4


def test_restart_on_failure_gives_up_in_the_end(start: Start) -> None:
    machine = start("sh", "-c", "echo run; exit 3", restart=Restart("on-failure", 2))
    _wait_for(lambda: machine.state.phase == "exited")
    assert machine.state.restarts == 2
    assert [line.data for line in machine.logs()] == [b"run"] * 3


def test_restart_always_until_stopped(start: Start) -> None:
    machine = start("sh", "-c", "sleep 0.05", restart=Restart("always"))
    _wait_for(lambda: machine.state.restarts >= 2)
    machine.stop()
    assert machine.state.phase == "exited"
    restarts = machine.state.restarts
    time.sleep(0.5)
    assert machine.state.restarts == restarts


def test_auto_remove(host: Host, create: Start) -> None:
    machine = create("sh", "-c", "touch /data/x", auto_remove=True)
    (volume,) = [mount.source for mount in machine.spec.mounts if mount.anonymous]
    assert os.listdir(host.volumes.get(volume).path) == ["seed"]
    attachment = machine.start(attach=True)
    assert attachment is not None
    with attachment:
        assert attachment.communicate(timeout_s=PATIENCE_S)[0] == 0
    with pytest.raises(NotFound):
        host.machines.get(machine.name)
    with pytest.raises(NotFound):
        host.volumes.get(volume)


def test_names(host: Host, create: Start) -> None:
    first = create("true", name="first")
    with pytest.raises(Conflict, match="in use"):
        create("true", name="first")
    first.rename("second")
    assert host.machines.get("second").id == first.id
    assert host.machines.get(first.id[:12]).id == first.id
    create("true", name="first")
    with pytest.raises(Conflict):
        first.rename("first")
    with pytest.raises(UsageError):
        first.rename("no/good")
    with pytest.raises(NotFound):
        host.machines.get("third")


def test_data_outlives_a_restart_and_diff_names_it(start: Start) -> None:
    machine = start("sleep", "600")
    machine.run(["sh", "-c", "echo kept > /root/file; rm /etc/group; echo x >> /etc/passwd"])
    machine.restart(timeout_s=0)
    assert machine.run(["cat", "/root/file"]).stdout == b"kept\n"
    changes = {(change.kind, change.path) for change in machine.diff()}
    assert {("A", "/root/file"), ("D", "/etc/group"), ("C", "/etc/passwd"), ("C", "/root")} <= changes


def test_logs(start: Start) -> None:
    machine = start("sh", "-c", "echo one; echo two >&2; sleep 0.3; echo three; exec sleep 600")
    followed: list[bytes] = []
    thread = threading.Thread(target=lambda: followed.extend(line.data for line in machine.logs(follow=True)))
    thread.start()
    _wait_for(lambda: len(followed) == 3)
    assert [(line.stream, line.data) for line in machine.logs()] == [
        ("stdout", b"one"),
        ("stderr", b"two"),
        ("stdout", b"three"),
    ]
    assert [line.data for line in machine.logs(tail=1)] == [b"three"]
    middle = list(machine.logs())[1].time_ns
    assert [line.data for line in machine.logs(since_ns=middle)] == [b"two", b"three"]
    assert [line.data for line in machine.logs(until_ns=middle)] == [b"one", b"two"]
    machine.kill()
    thread.join(10)
    assert not thread.is_alive()
    assert followed == [b"one", b"two", b"three"]


def test_logs_rotate(start: Start) -> None:
    machine = start("sh", "-c", "seq 1 20000; sleep 600", log=LogLimits(max_bytes=100_000, files=2))
    _wait_for(lambda: b"20000" in [line.data for line in machine.logs()])
    assert sorted(name for name in os.listdir(machine.directory) if name.startswith("log")) == ["log", "log.1"]
    text = b"".join(line.data + (b"" if line.partial else b"\n") for line in machine.logs())
    # The oldest file may begin in the middle of a line, whose first part was rotated away.
    lines = [int(word) for word in text.split()][1:]
    assert lines == list(range(lines[0], 20001))
    assert lines[0] > 2


def test_limits_hold_and_change_live(start: Start) -> None:
    limits = Limits(memory_bytes=64 << 20, pids=20, cpus_milli=500)
    machine = start("sleep", "600", limits=limits)
    assert machine.stats().memory_limit_bytes in (-1, 64 << 20)
    result = machine.run(["sh", "-c", "for i in $(seq 1 60); do sleep 2 & done; wait"], timeout_s=PATIENCE_S)
    assert b"fork" in result.stderr
    fixed = "limits" in machine.inspect()["missing"]  # type: ignore[operator]
    if fixed:
        with pytest.raises(Unsupported, match="while it runs"):
            machine.update(UpdateOptions(memory_bytes=96 << 20))
        assert machine.spec.limits == limits
        machine.stop(timeout_s=0)
        machine.update(UpdateOptions(memory_bytes=96 << 20))
        machine.start()
    else:
        machine.update(UpdateOptions(memory_bytes=96 << 20))
    assert machine.stats().memory_limit_bytes in (-1, 96 << 20)
    assert machine.spec.limits.memory_bytes == 96 << 20
    before_ns, began = machine.stats().cpu_ns, time.monotonic()
    machine.run(["sh", "-c", "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done"], timeout_s=PATIENCE_S)
    used = (machine.stats().cpu_ns - before_ns) / 1e9
    assert used < 0.75 * (time.monotonic() - began) + 0.2


def test_too_much_memory_is_an_end_that_says_why(start: Start) -> None:
    machine = start("sh", "-c", "tail /dev/zero", limits=Limits(memory_bytes=64 << 20))  # a VM has its kernel in that
    _wait_for(lambda: machine.state.phase == "exited")
    assert machine.state.exit_code == 137
    assert machine.state.oom_killed


def test_mounts_volumes_and_read_only(host: Host, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("host\n")
    mounts = (
        Mount("bind", str(tmp_path), "/mnt/ro", read_only=True),
        Mount("bind", str(tmp_path), "/mnt/rw"),
        Mount("bind", str(tmp_path / "file"), "/etc/one-file"),
        Mount("tmpfs", "", "/scratch", size_bytes=1 << 20),
        Mount("volume", "store", "/data"),
    )
    script = (
        "cat /etc/one-file /data/seed; touch /mnt/ro/x; touch /mnt/rw/made /data/made; touch /rootfile; "
        "dd if=/dev/zero of=/scratch/big bs=1k count=2000 2>&1 | grep -o 'No space'; mount | grep -c ' /scratch '"
    )
    _, out, err = run("sh", "-c", script, mounts=mounts, read_only=True)
    assert out == b"host\nfrom the image\nNo space\n1\n"
    assert err.count(b"Read-only file system") == 2
    assert sorted(os.listdir(tmp_path)) == ["file", "made"]
    assert sorted(os.listdir(host.volumes.get("store").path)) == ["made", "seed"]
    assert run("ls", "/data", mounts=(Mount("volume", "store", "/data"),))[1] == b"made\nseed\n"
    host.volumes.remove("store")


@pytest.mark.parametrize("running", [True, False])
def test_copying_both_ways(create: Start, tmp_path: Path, running: bool) -> None:
    machine = create("sleep", "600")
    if running:
        machine.start()
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "big").write_bytes(os.urandom(2 << 20))
    (tree / "link").symlink_to("sub/big")
    machine.copy_in(str(tree), "/root/")
    machine.copy_in(f"{tree}/.", "/home")
    machine.copy_in(str(tree / "sub" / "big"), "/root/renamed")
    out = tmp_path / "out"
    machine.copy_out("/root/tree", str(out))
    assert (out / "sub" / "big").read_bytes() == (tree / "sub" / "big").read_bytes()
    assert os.readlink(out / "link") == "sub/big"
    machine.copy_out("/root/renamed", str(tmp_path / "file"))
    assert (tmp_path / "file").stat().st_size == 2 << 20
    machine.copy_out("/home/sub/.", str(tmp_path / "contents"))
    assert os.listdir(tmp_path / "contents") == ["big"]
    for source, target in (("/no/such", str(tmp_path / "x")), ("/root/tree", str(tmp_path / "file"))):
        with pytest.raises((NotFound, UsageError)):
            machine.copy_out(source, target)
    with pytest.raises(NotFound):
        machine.copy_in("/no/such/on/host", "/root")
    with pytest.raises(NotFound):
        machine.copy_in(str(tree), "/no/such/place")


def test_tar_streams(start: Start, tmp_path: Path) -> None:
    machine = start("sleep", "600")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("dir/file")
        member.size, member.uid = 3, 1000
        tar.addfile(member, io.BytesIO(b"abc"))
    (tmp_path / "in.tar").write_bytes(buffer.getvalue())
    with open(tmp_path / "in.tar", "rb") as file:
        machine.tar_in("/tmp", file.fileno())
    assert machine.run(["stat", "-c", "%u %s", "/tmp/dir/file"]).stdout == b"1000 3\n"
    with open(tmp_path / "out.tar", "wb") as file:
        machine.tar_out("/tmp/dir", file.fileno())
    with tarfile.open(tmp_path / "out.tar") as tar:
        assert sorted(member.name for member in tar) == ["dir", "dir/file"]


def test_a_machine_cannot_write_outside_by_cp(start: Start, tmp_path: Path) -> None:
    """A link inside that points out leads nowhere on the host."""
    machine = start("sleep", "600")
    machine.run(["sh", "-c", "mkdir /root/d; ln -s /etc /root/d/evil; echo x > /root/file"])
    out = tmp_path / "out"
    machine.copy_out("/root/d", str(out))
    assert os.readlink(out / "evil") == "/etc"
    machine.run(["sh", "-c", "mkdir /tmp/inside; ln -s /../../../../tmp/inside /root/out"])
    machine.copy_in(__file__, "/root/out/")
    assert machine.run(["ls", "/tmp/inside"]).stdout.decode().split() == [os.path.basename(__file__)]
    assert not os.path.exists("/tmp/inside")


def test_commit_makes_an_image(host: Host, start: Start) -> None:
    machine = start("sleep", "600")
    machine.run(["sh", "-c", "echo new > /root/new; rm -r /home/ann"])
    machine.commit("committed", message="m", changes=("CMD cat /root/new",))
    from nagaya import CreateOptions

    child = host.machines.create(CreateOptions("committed", network="none"))
    attachment = child.start(attach=True)
    assert attachment is not None
    with attachment:
        assert attachment.communicate(timeout_s=PATIENCE_S) == (0, b"new\n", b"")
    child.remove()
    host.images.remove("committed")


def _supervisor_of(machine: Machine) -> int:
    """The process that holds the machine's liveness lock, by /proc/locks."""
    inode = os.stat(f"{machine.directory}/lock").st_ino
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                if os.stat(f"/proc/{pid}/fd/{fd}").st_ino == inode and int(pid) != os.getpid():
                    return int(pid)
        except OSError:
            continue
    raise AssertionError("nobody holds the lock")


def test_a_killed_supervisor_takes_the_machine_along_and_the_next_look_mends(host: Host, start: Start) -> None:
    machine = start("sleep", "98765", network="none", restart=Restart("always"))
    init = machine.state.pid
    os.kill(_supervisor_of(machine), 9)
    _wait_for(lambda: not os.path.exists(f"/proc/{init}") or _is_zombie(init))
    state = host.machines.get(machine.name).state
    assert (state.phase, state.exit_code) == ("exited", 137)
    assert "supervisor was killed" in state.error
    assert not os.path.exists(host.paths.runtime(machine.id))
    machine.start()
    assert machine.run(["true"]).exit_code == 0


def test_a_killed_supervisor_of_a_paused_machine_leaves_nothing_frozen(start: Start) -> None:
    machine = start("sleep", "98766")
    init = machine.state.pid
    machine.pause()
    os.kill(_supervisor_of(machine), 9)
    _wait_for(lambda: not records.is_alive(machine.paths, machine.id))
    assert machine.state.phase == "exited"
    _wait_for(lambda: not os.path.exists(f"/proc/{init}") or _is_zombie(init))


def test_a_killed_init_is_told(start: Start) -> None:
    machine = start("sleep", "600")
    os.kill(machine.state.pid, 9)
    _wait_for(lambda: machine.state.phase == "exited")
    assert machine.state.exit_code == 137
    assert "killed from outside" in machine.state.error


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_commands_on_one_machine_take_turns(create: Start) -> None:
    machine = create("sleep", "600")
    refused: list[str] = []

    def work(number: int) -> None:
        for _ in range(4):
            try:
                if number % 2:
                    machine.start()
                else:
                    machine.stop(timeout_s=0)
            except Conflict as error:
                refused.append(error.message)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert machine.state.phase in ("running", "exited")
    assert all("is running: cannot start it" in message for message in refused)
    machine.stop(timeout_s=0)
    assert machine.state.phase == "exited"
