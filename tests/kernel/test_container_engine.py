"""The container engine on this kernel: a busybox machine, its agent, and what a program inside of it finds."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nagaya.engines.base import BootRequest
from nagaya.engines.container.engine import ContainerEngine
from nagaya.errors import HostError, IntegrityError, NagayaError, NotFound, UsageError
from nagaya.kernel import capabilities, process
from nagaya.model.spec import Device, Limits, Security, Ulimit
from nagaya.storage.plan import MountPlan
from tests.kernel import container_machine as machine
from tests.kernel.container_machine import Container, boot, make_request, make_spec
from tests.kernel.forked import in_child

Make = Callable[..., BootRequest]
NAMESPACES = ("mnt", "pid", "net", "ipc", "uts", "cgroup")
DEFAULT_CAPS = 0xA80425FB  # Docker's fourteen


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> str:
    machine.require_facilities()
    return machine.make_layer(str(tmp_path_factory.mktemp("image") / "layer"))


@pytest.fixture
def make(tmp_path: Path, layer: str) -> Make:
    """Make a request for a machine with changes to its spec."""

    def made(
        *, mounts: tuple[MountPlan, ...] = (), etc: tuple[tuple[str, str], ...] = (), **changes: Any
    ) -> BootRequest:
        return make_request(make_spec(**changes), str(tmp_path / "machine"), (layer,), mounts=mounts, etc=etc)

    return made


pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def plain(make: Make) -> Iterator[Container]:
    with boot(make()) as container:
        yield container


def status(container: Container, **options: Any) -> dict[str, str]:
    text = container.run("cat", "/proc/self/status", **options).stdout
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def bind(source: Path | str, target: str, **changes: Any) -> MountPlan:
    return MountPlan("bind", str(source), target, False, "rprivate", 0, 0, ())._replace(**changes)


# -- what a program finds


def test_a_program_runs_and_ends(plain: Container) -> None:
    assert plain.run("echo", "hello", main=True).stdout == "hello\n"
    assert plain.run("sh", "-c", "exit 7").status == 7
    assert plain.run("no-such-program").status == 127
    assert plain.booted.warnings == ()


def test_every_namespace_is_its_own(plain: Container) -> None:
    shown = plain.shell("cd /proc/self/ns; for n in *; do ls -l $n; done").stdout
    inside = {line.split(" -> ")[0].split()[-1]: line.split(" -> ")[1] for line in shown.splitlines()}
    for kind in NAMESPACES:
        assert inside[kind] != os.readlink(f"/proc/self/ns/{kind}"), kind
    assert inside["user"] == os.readlink("/proc/self/ns/user")


def test_the_agent_is_init_and_alone(plain: Container) -> None:
    listing = plain.run("ps", "-o", "pid,comm").stdout.split("\n")
    assert [line.split() for line in listing[1:3]] == [["1", "nagaya-agent"], [line_pid(listing[2]), "ps"]]
    assert plain.run("hostname").stdout == "test-machine\n"


def line_pid(line: str) -> str:
    return line.split()[0]


def test_privileges_of_root_and_of_a_user(plain: Container) -> None:
    root = status(plain)
    expected = DEFAULT_CAPS & capabilities.bounding_set()
    for name in ("CapPrm", "CapEff", "CapBnd"):
        assert int(root[name], 16) == expected
    for name in ("CapInh", "CapAmb"):
        assert int(root[name], 16) == 0
    assert root["Seccomp"] == "2" and root["NoNewPrivs"] == "1"
    user = status(plain, user="guest")
    assert user["Uid"].split() == ["1000"] * 4 and user["Gid"].split() == ["1000"] * 4
    assert int(user["CapEff"], 16) == int(user["CapPrm"], 16) == int(user["CapInh"], 16) == 0


def test_the_mount_table(plain: Container) -> None:
    table = {}
    for line in plain.run("cat", "/proc/self/mountinfo").stdout.splitlines():
        left, right = line.split(" - ")
        table[left.split()[4]] = (right.split()[0], left.split()[5].split(","), left.split()[6:])
    assert table["/"][0] == "overlay"
    for place, kind in (
        ("/proc", "proc"),
        ("/dev", "tmpfs"),
        ("/dev/pts", "devpts"),
        ("/dev/shm", "tmpfs"),
        ("/sys", "sysfs"),
    ):
        assert table[place][0] == kind and "nosuid" in table[place][1]
    assert "ro" in table["/sys"][1]
    for place in ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"):
        assert not os.path.exists(place) or "ro" in table[place][1], place
    for place, (_, options, _) in table.items():
        if place.startswith("/sys/fs/cgroup"):
            assert "ro" in options, place
    assert not any("shared" in field or "master" in field for _, _, tags in table.values() for field in tags)
    assert "/tmp/" not in " ".join(table), "a mount of the host's shows through"


def test_masked_paths_tell_nothing(plain: Container) -> None:
    script = (
        "for f in /proc/kcore /proc/keys /proc/timer_list /proc/interrupts /proc/latency_stats; do [ -e $f ] && cat $f; done;"
        "for d in /proc/acpi /proc/scsi /sys/firmware /sys/devices/virtual/powercap; do [ -e $d ] && ls $d; done; true"
    )
    ended = plain.shell(script)
    assert ended == machine.Ended(0, "", "")


def test_writes_to_the_kernel_are_refused(plain: Container) -> None:
    for path in (
        "/proc/sys/kernel/core_pattern",
        "/proc/sysrq-trigger",
        "/sys/kernel/uevent_helper",
        "/proc/irq/default_smp_affinity",
    ):
        ended = plain.shell(f"echo x > {path}")
        assert ended.status != 0, path


def test_devices(plain: Container) -> None:
    script = "cd /dev; for n in *; do echo $n $(stat -c '%F %t:%T %a' $n); done"
    found = dict(line.split(" ", 1) for line in plain.shell(script).stdout.splitlines())
    assert found["null"] == "character special file 1:3 666"
    assert {
        "null",
        "zero",
        "full",
        "random",
        "urandom",
        "tty",
        "ptmx",
        "pts",
        "shm",
        "fd",
        "stdin",
        "stdout",
        "stderr",
    } <= set(found)
    assert set(found) <= {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm", "fd", "stdin", "stdout", "stderr", "core", "mqueue"}  # fmt: skip
    assert (
        plain.shell(
            "echo x > /dev/null; dd if=/dev/zero of=/dev/shm/f bs=10 count=1; cat /dev/shm/f | wc -c || true"
        ).status
        == 0
    )
    assert plain.shell("echo x > /dev/full").status != 0
    assert int(plain.run("stat", "-f", "-c", "%b", "/dev/shm").stdout) * 4096 == 64 << 20


def test_only_loopback_without_a_network(plain: Container) -> None:
    assert plain.shell("cd /sys/class/net && echo *").stdout == "lo\n"
    assert plain.run("cat", "/sys/class/net/lo/operstate").stdout == "unknown\n"
    assert "127.0.0.1/8" in plain.run("ip", "address").stdout
    assert plain.run("ip", "link", "set", "lo", "down").status != 0  # no CAP_NET_ADMIN


# -- what a machine may ask for


def test_the_hosts_network(make: Make) -> None:
    with boot(make(network="host")) as container:
        shown = container.shell("ls -l /proc/self/ns/net").stdout
        assert os.readlink("/proc/self/ns/net") in shown
        assert os.readlink("/proc/self/ns/uts") not in container.shell("ls -l /proc/self/ns/uts").stdout


def test_a_read_only_root(make: Make, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    mounts = (
        bind(tmp_path / "data", "/made/on/the/way"),
        MountPlan("tmpfs", "", "/scratch", False, "", 1 << 20, 0o700, ()),
    )
    with boot(make(read_only=True, mounts=mounts)) as container:
        assert "Read-only" in container.shell("echo x > /file").stderr
        assert (
            container.shell("echo x > /made/on/the/way/file && echo y > /scratch/file && echo z > /dev/shm/f").status
            == 0
        )
        assert container.shell("stat -c %a /scratch").stdout == "700\n"
    assert (tmp_path / "data/file").read_text() == "x\n"


def test_changes_stay_in_the_upper_directory(make: Make, layer: str) -> None:
    request = make()
    with boot(request) as container:
        assert container.shell("echo kept > /file; chmod 700 /tmp").status == 0
    assert Path(request.rootfs.upper, "file").read_text() == "kept\n"
    assert not Path(layer, "file").exists()
    with boot(request) as container:  # and are there at the next start
        assert container.run("cat", "/file").stdout == "kept\n"


def test_binds_and_our_files_over_etc(make: Make, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/in").write_text("from the host\n")
    mounts = (bind(tmp_path / "data", "/data", read_only=True),)
    with boot(make(mounts=mounts, etc=(("/etc/hosts", str(tmp_path / "hosts")),))) as container:
        assert container.run("cat", "/etc/hosts", "/data/in").stdout == "127.0.0.1 localhost\nfrom the host\n"
        assert "Read-only" in container.run("touch", "/data/new").stderr


def test_a_volume_over_dev_hides_ours_and_gets_no_nodes(make: Make, tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    os.mknod(tmp_path / "dev/null", 0o20666, os.makedev(1, 3))
    with boot(make(mounts=(bind(tmp_path / "dev", "/dev"),))) as container:
        assert container.run("ls", "/dev").stdout == "null\n"
    assert os.listdir(tmp_path / "dev") == ["null"]


def test_a_device_is_made_with_its_rights_and_others_stay_closed(make: Make) -> None:
    with boot(
        make(devices=(Device("/dev/zero", "/dev/sub/zeros", "r"),), security=Security(cap_add=("MKNOD",)))
    ) as container:
        assert container.shell(
            "dd if=/dev/sub/zeros bs=4 count=1 | wc -c 2>/dev/null; stat -c %t:%T /dev/sub/zeros"
        ).stdout.endswith("1:5\n")
        assert container.shell("mknod /dev/kmsg2 c 1 11").status == 0  # making it is allowed, as with runc
        assert "not permitted" in container.run("cat", "/dev/kmsg2").stderr


@pytest.mark.parametrize("init", [True, False])
def test_capabilities_by_request(make: Make, init: bool) -> None:
    security = Security(cap_drop=("ALL",), cap_add=("CHOWN",))
    with boot(make(security=security, init=init)) as container:
        assert int(status(container)["CapPrm"], 16) == 1
        agent = Path(f"/proc/{container.booted.pid}/status").read_text()
        assert f"CapBnd:\t{DEFAULT_CAPS & capabilities.bounding_set():016x}" in agent


def test_programs_that_may_gain_privileges_are_filtered_all_the_same(make: Make) -> None:
    with boot(make(security=Security(no_new_privileges=False))) as container:
        assert container.booted.policy.seccomp == b""
        for user in ("", "guest"):
            shown = status(container, user=user)
            assert shown["NoNewPrivs"] == "0" and shown["Seccomp"] == "2"
        assert "permission denied" in container.run("mount", "-t", "tmpfs", "x", "/tmp").stderr


def test_unconfined(make: Make) -> None:
    with boot(make(security=Security(seccomp="unconfined", unmask=True))) as container:
        assert status(container)["Seccomp"] == "0"
        places = [line.split()[4] for line in container.run("cat", "/proc/self/mountinfo").stdout.splitlines()]
        assert [place for place in places if place.startswith("/proc")] == ["/proc"]


def test_sysctls(make: Make) -> None:
    sysctls = (("kernel.shmmni", "1234"), ("net.ipv4.ip_forward", "1"), ("net.ipv4.conf.lo.forwarding", "1"))
    before = Path("/proc/sys/kernel/shmmni").read_text()
    with boot(make(sysctls=sysctls)) as container:
        assert container.run("cat", "/proc/sys/kernel/shmmni", "/proc/sys/net/ipv4/ip_forward").stdout == "1234\n1\n"
    assert Path("/proc/sys/kernel/shmmni").read_text() == before


def test_ulimits(make: Make) -> None:
    with boot(make(ulimits=(Ulimit("nofile", 100, 200), Ulimit("core", 0, 0)))) as container:
        lines = {line[:16]: line.split()[3:5] for line in container.run("cat", "/proc/self/limits").stdout.splitlines()}
        assert lines["Max open files  "] == ["100", "200"]


def test_more_layers_than_mount_options_hold(make: Make, tmp_path: Path, layer: str) -> None:
    extra = []
    for number in range(150):
        (tmp_path / f"l{number}").mkdir()
        (tmp_path / f"l{number}/file-{number}").write_text("")
        extra.append(str(tmp_path / f"l{number}"))
    request = make()
    with boot(request._replace(rootfs=request.rootfs._replace(lower=(*extra, layer)))) as container:
        assert container.shell("ls / | grep -c file- || ls /file-* | cat | wc -l").status in (0, 1)
        assert container.run("ls", "/file-0", "/file-149").status == 0


# -- init=false


def test_the_program_itself_is_pid_1(make: Make) -> None:
    with boot(make(init=False)) as container:
        main = container.start("sh", "-c", "echo $$; cat /proc/1/comm; while true; do sleep 0.05; done", main=True)
        container.wait_started(main)
        other = container.run("ps", "-o", "pid,comm").stdout.splitlines()
        assert other[1].split() == ["1", "sh"]
        assert not any("nagaya-agent" in line for line in other)
        shown = status(container)
        assert shown["Seccomp"] == "2" and int(shown["CapEff"], 16) == DEFAULT_CAPS & capabilities.bounding_set()
        container.engine.kill()
        container.wait_for_end()


def test_the_end_of_pid_1_is_reported(make: Make) -> None:
    with boot(make(init=False)) as container:
        assert container.run("sh", "-c", "exit 9", main=True).status == 9


# -- user namespaces


def test_root_inside_is_nobody_on_the_host(make: Make, tmp_path: Path) -> None:
    volume, foreign = tmp_path / "volume", tmp_path / "foreign"
    for place in (volume, foreign):
        place.mkdir()
        (place / "file").write_text("secret\n")
        (place / "file").chmod(0o600)
    mounts = (bind(volume, "/volume", owned=True), bind(foreign, "/foreign"))
    request = make(userns="auto", mounts=mounts, etc=(("/etc/hosts", str(volume / "file")),))
    with boot(request) as container:
        if any("copy" in warning for warning in container.booted.warnings):
            pytest.skip("no idmapped mounts on this file system")
        inside = container.run("cat", "/proc/self/uid_map").stdout.split()
        assert inside[0] == "0" and int(inside[1]) >= 65536 and inside[2] == "65536"
        assert Path(f"/proc/{container.booted.pid}/uid_map").read_text().split() == inside
        uids = Path(f"/proc/{container.booted.pid}/status").read_text().split("Uid:\t")[1].split("\n")[0].split("\t")
        assert uids == [inside[1]] * 4
        assert (
            container.run("stat", "-c", "%u", "/bin/busybox", "/volume/file", "/foreign/file").stdout == "0\n0\n65534\n"
        )
        assert container.shell("cat /volume/file; echo more > /volume/new; echo mine > /mine").stdout == "secret\n"
        assert container.run("cat", "/foreign/file").status != 0
        assert container.shell("echo x > /dev/null; cat /dev/zero | dd bs=1 count=1 2>/dev/null").status == 0
        assert container.run("mknod", "/node", "c", "1", "3").status != 0
    assert os.stat(volume / "new").st_uid == 0  # stored with the machine's own ids
    assert os.stat(f"{request.rootfs.upper}/mine").st_uid == 0


def test_a_user_namespace_in_the_hosts_network(make: Make) -> None:
    """Where sysfs cannot be mounted anew: the host's is shown, read-only."""
    with boot(make(userns="auto", network="host")) as container:
        assert "Read-only" in container.run("mkdir", "/sys/fs/cgroup/x").stderr
        assert container.shell("echo x > /sys/kernel/uevent_helper").status != 0
        assert container.run("ls", "/sys/class/net").stdout.split() == sorted(os.listdir("/sys/class/net"))


def test_a_copy_with_shifted_owners_where_there_are_no_idmapped_mounts(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nagaya.kernel import mount as kernel

    plain = kernel.mount_setattr

    def without(fd: int, **changes: Any) -> None:
        if changes.get("set_", 0) & kernel.MOUNT_ATTR_IDMAP:
            raise OSError(errno.EINVAL, "mount_setattr: no idmapped mounts in this test")
        plain(fd, **changes)

    monkeypatch.setattr(kernel, "mount_setattr", without)  # which the forked child inherits
    request = make(userns="auto")
    for _ in range(2):
        with boot(request) as container:
            assert any("copy" in warning for warning in container.booted.warnings)
            assert container.run("stat", "-c", "%u", "/bin/busybox").stdout == "0\n"
            assert container.shell("echo x > /root/file").status == 0


# -- life and limits


def test_the_number_of_processes_is_limited(make: Make) -> None:
    with boot(make(limits=Limits(pids=8))) as container:
        assert "can't fork" in container.shell("for i in 1 2 3 4 5 6 7 8 9; do sleep 1000 & done").stderr
        assert 1 < container.engine.stats().pids <= 8


def test_memory_is_limited_and_the_limit_can_be_changed(make: Make) -> None:
    with boot(make(limits=Limits(memory_bytes=64 << 20, cpus_milli=500))) as container:
        reading = container.engine.stats()
        assert reading.memory_limit_bytes == 64 << 20 and reading.memory_bytes > 0 and reading.cpu_ns > 0
        assert not container.engine.oom_killed()
        greedy = ("dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1")
        assert container.run(*greedy).status == 128 + signal.SIGKILL
        assert container.engine.oom_killed()
        container.engine.set_limits(Limits(memory_bytes=256 << 20))
        assert container.engine.stats().memory_limit_bytes == 256 << 20
        assert container.run(*greedy).status == 0


def test_pausing_stops_time_for_programs(plain: Container) -> None:
    channel = plain.start("sh", "-c", "while true; do echo x >> /dev/shm/ticks; sleep 0.01; done")
    plain.wait_started(channel)
    ticks = Path(f"/proc/{plain.booted.pid}/root/dev/shm/ticks")
    deadline = time.monotonic() + 5
    while not ticks.exists() or ticks.stat().st_size < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    plain.engine.pause()
    frozen = ticks.stat().st_size
    time.sleep(0.1)
    assert ticks.stat().st_size == frozen
    plain.engine.resume()
    while ticks.stat().st_size == frozen:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_machine_takes_everything_along(plain: Container) -> None:
    plain.wait_started(plain.start("sleep", "1000"))
    plain.engine.kill()
    plain.wait_for_end()
    plain.engine.kill()  # and killing it again is no error


def test_the_machine_ends_when_its_supervisor_does(make: Make) -> None:
    """`kill -9` of the supervisor: the agent sees its stream end. What is left is one control group, for reclaim."""
    request = make()

    def supervise() -> None:
        with ExitStack() as stack:
            booted = ContainerEngine().boot(request, stack)
            container = Container(ContainerEngine(), booted, request)
            container.wait_started(container.start("sleep", "1000"))
            os.write(write, str(booted.pid).encode())
            os.kill(os.getpid(), signal.SIGKILL)

    read, write = os.pipe()
    process.prctl(process.PR_SET_CHILD_SUBREAPER, 1)  # the orphaned machine is then ours to wait for
    pid = os.fork()
    if pid == 0:
        try:
            supervise()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    init = int(os.read(read, 20))
    os.close(read)
    os.close(write)
    os.waitpid(init, 0)
    engine = ContainerEngine()
    assert machine.leftover_cgroups(request.spec.id)
    engine.reclaim(request.spec.id, request.runtime_dir)
    engine.reclaim(request.spec.id, request.runtime_dir)
    assert not machine.leftover_cgroups(request.spec.id)


@pytest.mark.parametrize("changes", [{}, {"userns": "auto"}, {"init": False}])
def test_a_supervisor_killed_at_any_moment_of_a_boot(make: Make, changes: dict[str, Any]) -> None:
    process.prctl(process.PR_SET_CHILD_SUBREAPER, 1)
    for round_ in range(15):
        request = make(**changes)
        before = machine.look()
        pid = os.fork()
        if pid == 0:
            try:
                with ExitStack() as stack:
                    ContainerEngine().boot(request, stack)
                    signal.pause()
            finally:
                os._exit(1)
        time.sleep(round_ * 0.0015)  # from before the fork to after the boot
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ContainerEngine().reclaim(request.spec.id, request.runtime_dir)
        while machine.look().children > before.children:  # orphans end by themselves, or this never does
            os.waitpid(-1, 0)
        machine.assert_nothing_left(request, before)


def test_one_engine_boots_again(make: Make) -> None:
    request, engine = make(), ContainerEngine()
    for _ in range(3):
        with ExitStack() as stack:
            booted = engine.boot(request, stack)
            container = Container(engine, booted, request)
            assert container.run("true", main=True).status == 0
            engine.kill()
            os.waitid(os.P_PIDFD, booted.pidfd, os.WEXITED)
            os.close(booted.pidfd)
            os.close(booted.agent)


# -- failures: one clear error, nothing left


def failing(request: BootRequest) -> NagayaError:
    before = machine.look()
    with pytest.raises(NagayaError) as caught, ExitStack() as stack:
        ContainerEngine().boot(request, stack)
    machine.assert_nothing_left(request, before)
    assert "Traceback" not in caught.value.message and "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize("userns", ["", "auto"])
@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"mounts": (bind("/nowhere", "/x"),)}, HostError, "cannot open a mount's source: open_tree: No such file"),
        ({"mounts": (bind("/usr", "/etc/passwd"),)}, HostError, "cannot mount: Not a directory (/etc/passwd)"),
        ({"hostname": "x" * 65}, HostError, "cannot set the host name: sethostname: Invalid argument"),
        ({"sysctls": (("net.ipv4.no_such_thing", "1"),)}, HostError, "cannot set sysctl net.ipv4.no_such_thing=1: No such file"),
        ({"mounts": (bind("/usr", "/x", options=("what",)),)}, UsageError, "unknown mount option 'what'"),
        ({"devices": (Device("/dev/nothing", "/dev/x"),)}, NotFound, "there is no device"),
        ({"limits": Limits(cpuset_cpus="4000")}, HostError, "cannot confine the machine to CPUs 4000"),
    ],
)  # fmt: skip
def test_a_boot_that_fails(make: Make, changes: dict[str, Any], kind: type, text: str, init: bool, userns: str) -> None:
    problem = failing(make(init=init, userns=userns, **changes))
    assert type(problem) is kind, problem
    assert text in problem.message


def test_an_agent_that_cannot_be_executed(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "agent").write_text("no program")
    monkeypatch.setenv("NAGAYA_AGENT", str(tmp_path / "agent"))
    problem = failing(make())
    assert isinstance(problem, HostError) and problem.message.startswith(
        "cannot start the agent: execveat: Exec format error"
    )
    monkeypatch.setenv("NAGAYA_AGENT", str(tmp_path / "none"))
    assert "No such file" in failing(make()).message


def test_an_image_with_a_linked_proc(make: Make, tmp_path: Path, layer: str) -> None:
    (tmp_path / "hostile").mkdir()
    (tmp_path / "hostile/proc").symlink_to("/etc")
    request = make()
    problem = failing(request._replace(rootfs=request.rootfs._replace(lower=(str(tmp_path / "hostile"), layer))))
    assert isinstance(problem, IntegrityError) and "/proc" in problem.message


def test_a_missing_layer(make: Make, tmp_path: Path) -> None:
    request = make()
    problem = failing(request._replace(rootfs=request.rootfs._replace(lower=(str(tmp_path / "gone"),))))
    assert "No such file" in problem.message and str(tmp_path / "gone") in problem.message


@pytest.mark.parametrize("changes", [{}, {"userns": "auto"}, {"init": False}])
def test_a_first_process_that_is_killed(make: Make, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    from nagaya.engines.container import boot as child_side

    def die(*arguments: object) -> None:
        os._exit(1)  # as good as a kill from outside: PID 1 ignores signals of its own namespace

    monkeypatch.setattr(child_side, "_furnish", die)
    problem = failing(make(**changes))
    assert "ended before its agent ran" in problem.message


def test_an_outer_process_killed_behind_its_fork_leaves_no_orphan(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from nagaya.engines.container import boot as child_side

    def die(handshake: int, **message: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(child_side, "tell", die)
    problem = failing(make(userns="auto"))
    assert "ended before its agent ran" in problem.message


# -- a machine that does not run


def test_an_applet_on_a_stopped_machine(make: Make, tmp_path: Path) -> None:
    request = make()
    read, write = os.pipe()
    pid = ContainerEngine().start_applet(request.rootfs, ("stat", "/etc/passwd"), 0, write, 2)
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    with os.fdopen(read) as pipe:
        assert '"size"' in pipe.read()


def test_the_host_is_left_alone_by_offline_work(make: Make, tmp_path: Path, layer: str) -> None:
    """An image whose /proc is a link gets no mount through it."""
    (tmp_path / "hostile").mkdir()
    (tmp_path / "hostile/proc").symlink_to("/etc")
    request = make()
    rootfs = request.rootfs._replace(lower=(str(tmp_path / "hostile"), layer))

    def run() -> int:
        pid = ContainerEngine().start_applet(rootfs, ("stat", "/etc/passwd"), 0, os.open("/dev/null", os.O_WRONLY), 2)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert in_child(run) == 0
