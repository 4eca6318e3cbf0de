"""The emulated engine with the real QEMU: what a machine gets, what QEMU may not, and what is left after every end."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socketserver
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from nagaya.engines.cgroups.group import find_cgroup
from nagaya.engines.qemu import engine as engine_module
from nagaya.engines.qemu.boards import BOARDS, X86_64, Board
from nagaya.engines.vm import parts
from nagaya.engines.vm.agent import agent_path
from nagaya.engines.vm.bounds import group_name
from nagaya.errors import Conflict, LaunchError, Unsupported, UsageError
from nagaya.kernel import namespaces
from nagaya.kernels import cache
from nagaya.model.spec import Limits, Mount, Security
from nagaya.net.plan import LinkPlan, NetworkPlan
from nagaya.protocol.qmp import QmpError
from nagaya.storage.plan import DiskPlan, MountPlan
from tests.conftest import require_program, require_root
from tests.kernel.agent_machine import Lost, build_agent
from tests.kernel.container_machine import make_layer
from tests.kernel.emulated_machine import EmulatedMachine, bridge, make_spec
from tests.kernel.forked import in_child
from tests.kernel.test_agent_vm import make_data
from tests.kernel.test_virtiofsd import find_daemon

NOBODY = 65534
PROBE = Path(__file__).with_name("foreign_probe.c")


@pytest.fixture(scope="module", autouse=True)
def _parts(vmlinux: str) -> Iterator[None]:
    require_root()
    require_program("qemu-system-x86_64")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NAGAYA_AGENT", build_agent())
        yield


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    require_program("mkfs.erofs")
    require_program("busybox")
    place = tmp_path_factory.mktemp("image")
    tree = make_layer(str(place / "tree"))
    for name in ("date", "ping", "wget", "sync", "wc", "md5sum", "cut", "df", "seq"):
        os.symlink("busybox", f"{tree}/bin/{name}")
    subprocess.run(["mkfs.erofs", str(place / "root.erofs"), tree], check=True, capture_output=True)
    return str(place / "root.erofs")


@pytest.fixture
def disks(image: str, tmp_path: Path) -> DiskPlan:
    return DiskPlan(image, str(make_data(tmp_path / "data.img")))


@pytest.fixture(scope="module")
def machine(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedMachine]:
    """One for all that changes nothing in it."""
    place = tmp_path_factory.mktemp("machine")
    disks = DiskPlan(image, str(make_data(place / "data.img")))
    spec = make_spec(limits=Limits(memory_bytes=192 << 20, cpus_milli=1500))
    with EmulatedMachine(disks, place, spec) as made:
        yield made


# -- what a machine gets


def test_cpus_memory_and_name(machine: EmulatedMachine) -> None:
    assert machine.sh("hostname").strip() == "lodger"
    assert machine.sh("busybox nproc").strip() == "2"
    total_kib = int(machine.sh("busybox grep MemTotal /proc/meminfo").split()[1])
    assert 150 << 10 < total_kib <= 192 << 10


def test_the_clock_is_the_hosts(machine: EmulatedMachine) -> None:
    assert abs(int(machine.sh("date +%s")) - time.time()) < 3


def test_exit_statuses_and_output_arrive_whole(machine: EmulatedMachine) -> None:
    result = machine.run("/bin/sh", "-c", "seq 1 100000; echo end >&2; exit 7")
    assert result.status == 7 and result.err == b"end\n"
    assert result.out == b"".join(b"%d\n" % number for number in range(1, 100001))


def test_half_a_megabyte_in_and_out(machine: EmulatedMachine) -> None:
    data = os.urandom(1 << 19)
    assert machine.run("cat", stdin=data).out == data


def test_a_kernel_and_arguments_of_the_users(disks: DiskPlan, tmp_path: Path, vmlinux: str) -> None:
    own = tmp_path / "vmlinuz"
    shutil.copyfile(vmlinux, own)
    own.chmod(0o600)  # as distributions keep theirs: QEMU runs as somebody who may not read it
    with EmulatedMachine(disks, tmp_path, make_spec(kernel=str(own), append="lodger.word=1 loglevel=3")) as machine:
        words = machine.sh("cat /proc/cmdline").split()
    # QEMU itself adds the places of devices behind them.
    assert [word for word in words if not word.startswith("virtio_mmio.")][-2:] == ["lodger.word=1", "loglevel=3"]


# -- what QEMU has


def test_qemu_is_nobody_and_can_become_nobody_else(machine: EmulatedMachine) -> None:
    own = str(parts.user_id(machine.spec.id))
    assert machine.status("Uid") == [own] * 4 and machine.status("Gid") == [own] * 4
    assert machine.status("Groups") == []
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(machine.status(name)[0], 16) == 0
    assert machine.status("NoNewPrivs") == ["1"] and machine.status("Seccomp") == ["2"]
    for kind in ("net", "ipc"):
        assert os.readlink(f"/proc/{machine.booted.pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")


def test_qemu_has_no_descriptor_but_its_own(machine: EmulatedMachine) -> None:
    found = [os.readlink(f"/proc/{machine.booted.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{machine.booted.pid}/fd")]
    files = {path for path in found if path.startswith("/")}
    kernel = cache.get_kernel().path
    root, data = (path for path in files if path.endswith((".erofs", ".img")))
    assert files == {"/dev/null", kernel, "/memfd:initramfs (deleted)", root, data}
    sockets = {path for path in found if path.startswith("socket:")}
    assert len(sockets) == 4  # monitor, console, agent, and where whoever moves it listens for a monitor of its own


def test_the_image_is_never_written(machine: EmulatedMachine) -> None:
    process = Path(f"/proc/{machine.booted.pid}")
    images = [entry.name for entry in (process / "fd").iterdir() if os.readlink(entry).endswith(".erofs")]
    assert images
    for fd in images:
        flags = int((process / "fdinfo" / fd).read_text().split()[3], 8)
        assert flags & os.O_ACCMODE == os.O_RDONLY


# -- while it runs


def test_pause_stops_it_and_resume_goes_on(machine: EmulatedMachine) -> None:
    channel = machine.spawn("/bin/sh", "-c", "while :; do echo tick; sleep 0.05; done")
    machine.wait_output(channel, b"tick\ntick\n")
    machine.engine.pause()
    try:
        machine.quiet(0.3)  # what was under way
        before = machine.engine.stats().cpu_ns
        assert machine.quiet(0.5)
        assert machine.engine.stats().cpu_ns - before < 200_000_000
    finally:
        machine.engine.resume()
    machine.link.set_clock(time.time_ns())
    seen = len(machine.output(channel))
    machine.wait_for(lambda event: len(machine.output(channel)) > seen + 20)
    assert abs(int(machine.sh("date +%s")) - time.time()) < 3
    machine.link.signal(channel, signal.SIGKILL)
    assert machine.finish(channel).status == 128 + signal.SIGKILL


def test_stats_count(machine: EmulatedMachine) -> None:
    before = machine.engine.stats()
    machine.sh("dd if=/dev/urandom of=/root/data bs=1M count=4 2>/dev/null; sync; rm /root/data")
    after = machine.engine.stats()
    assert after.block_write_bytes - before.block_write_bytes >= 4 << 20
    assert after.cpu_ns > before.cpu_ns
    assert after.memory_limit_bytes == 192 << 20
    assert 16 << 20 < after.memory_bytes < 600 << 20
    assert after.net_rx_bytes == after.net_tx_bytes == -1


def test_a_refused_command_says_what_was_asked(machine: EmulatedMachine) -> None:
    monitor = machine.engine._qemu.monitor
    assert monitor is not None
    with pytest.raises(QmpError, match="refused") as caught:
        monitor.command("device_del", id="nothing")
    assert "device_del" in caught.value.sent and "nothing" in caught.value.received
    assert monitor.command("query-status")["status"] == "running"


# -- ends


def test_what_was_synced_survives_a_kill(disks: DiskPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_DISK_FREE_WITHIN_S", 0.1)
    spec = make_spec()
    with EmulatedMachine(disks, tmp_path, spec) as first:
        first.sh("echo kept > /root/note && sync")
        with pytest.raises(Conflict, match="in use"):
            parts.open_data(disks)
        first.engine.kill()
        assert first.ended()
        assert first.engine.explain_end(os.waitid(os.P_PIDFD, first.booted.pidfd, os.WEXITED | os.WNOWAIT)) is None
    with EmulatedMachine(disks, tmp_path, make_spec()) as second:
        assert second.sh("cat /root/note") == "kept\n"


def test_the_end_of_the_agents_stream_ends_the_machine(disks: DiskPlan, tmp_path: Path) -> None:
    with EmulatedMachine(disks, tmp_path, make_spec()) as machine:
        machine.hang_up()
        assert machine.ended()


def test_a_panic_ends_it_and_is_in_the_console(disks: DiskPlan, tmp_path: Path) -> None:
    spec = make_spec(security=Security(unmask=True))
    with EmulatedMachine(disks, tmp_path, spec) as machine:
        machine.spawn("/bin/sh", "-c", "echo c > /proc/sysrq-trigger")
        with pytest.raises(Lost):
            while True:
                machine.step()
        assert machine.ended()
        assert "Kernel panic - not syncing: sysrq triggered crash" in machine.console()
        problem = machine.engine.explain_end(None)
        assert isinstance(problem, LaunchError)
        assert problem.message == "the machine's kernel gave up: sysrq triggered crash"
        assert "Kernel panic" in problem.log_tail


def test_a_qemu_that_breaks_says_how(disks: DiskPlan, tmp_path: Path) -> None:
    with EmulatedMachine(disks, tmp_path, make_spec()) as machine:
        signal.pidfd_send_signal(machine.booted.pidfd, signal.SIGSYS)  # as a call that its sandbox forbids
        assert machine.ended()
        problem = machine.engine.explain_end(os.waitid(os.P_PIDFD, machine.booted.pidfd, os.WEXITED | os.WNOWAIT))
        assert isinstance(problem, LaunchError)
        assert problem.message.startswith(f"QEMU was killed by signal {signal.SIGSYS.value}")


def test_a_console_flood_is_bounded(disks: DiskPlan, tmp_path: Path) -> None:
    with EmulatedMachine(disks, tmp_path, make_spec(security=Security(cap_add=("ALL",)))) as machine:
        machine.sh("mknod /root/hvc0 c 229 0 && dd if=/dev/zero of=/root/hvc0 bs=64k count=32 2>/dev/null")
        for _ in range(8):
            machine.engine.listen()
        assert machine.sh("echo alive") == "alive\n"
    assert sum(file.stat().st_size for file in machine.runtime.glob("console.log*")) <= 2 * (256 << 10) + 65536


def test_qemu_that_does_not_start_tells_why(disks: DiskPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "find_board", lambda platform: X86_64._replace(cpu="no-such-cpu"))
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(LaunchError, match="no-such-cpu") as caught:
        EmulatedMachine(disks, tmp_path, make_spec())
    assert caught.value.status == 1 and "no-such-cpu" in caught.value.log_tail
    assert set(os.listdir("/proc/self/fd")) == before


def _boot_and_be_killed(disks: DiskPlan, place: Path, shared: Path) -> list[int]:
    """In a child: a supervisor that is killed; the pids of those who must not outlive it."""
    read, write = os.pipe()
    spec = make_spec()
    supervisor = os.fork()
    if supervisor == 0:
        mounts = (MountPlan("bind", str(shared), "/mnt", False, "rprivate", 0, 0, ()),)
        machine = EmulatedMachine(disks, place, spec, mounts=mounts)
        pids = [machine.booted.pid, *machine.engine._qemu.helpers]
        os.write(write, " ".join(map(str, pids)).encode())
        signal.pause()
    try:
        pids = [int(pid) for pid in os.read(read, 100).split()]
        pidfds = [os.pidfd_open(pid) for pid in pids]
    finally:
        os.kill(supervisor, signal.SIGKILL)
        os.waitpid(supervisor, 0)
    for fd in pidfds:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(5000)
        os.close(fd)
    runtime_dir = str(place / f"run-{spec.id}")
    assert os.geteuid() or find_cgroup(group_name(spec.id, runtime_dir)) is not None
    engine_module.EmulatedEngine().reclaim(spec.id, runtime_dir)
    assert find_cgroup(group_name(spec.id, runtime_dir)) is None
    return pids


def test_nothing_outlives_a_killed_supervisor(disks: DiskPlan, tmp_path: Path) -> None:
    find_daemon()
    shared = tmp_path / "shared"
    shared.mkdir()
    assert len(in_child(partial(_boot_and_be_killed, disks, tmp_path, shared))) == 2
    os.close(parts.open_data(disks))  # and the disk is free


# -- networks


def _bridged(disks: DiskPlan, place: Path) -> dict[str, object]:
    namespaces.unshare(namespaces.CLONE_NEWNET)
    link = LinkPlan(
        bridge="br0", host_link="ngy-test", address="10.87.0.2", prefix=16, gateway="10.87.0.1", mac="02:00:00:00:00:07",
        mtu=1400, address6="fd00:87::2", prefix6=64, gateway6="fd00:87::1",
    )  # fmt: skip
    plan = NetworkPlan("links", (link,))
    with bridge("br0", "10.87.0.1/16"):
        subprocess.run(["ip", "address", "add", "fd00:87::1/64", "dev", "br0", "nodad"], check=True)
        with EmulatedMachine(disks, place, make_spec(network="bridge"), network=plan) as machine:
            link = subprocess.run(["ip", "-br", "link", "show", "ngy-test"], capture_output=True, text=True, check=True)
            pinged = machine.run("ping", "-c", "1", "10.87.0.1").status
            mtu = machine.sh("cat /sys/class/net/eth0/mtu")
            routes = [line.split("dev")[0].split() for line in machine.sh("ip -6 route").splitlines()]
            pinged6 = machine.run("ping", "-6", "-c", "1", "fd00:87::1").status
            own_network = os.readlink(f"/proc/{machine.booted.pid}/ns/net") != os.readlink("/proc/self/ns/net")
        gone = subprocess.run(["ip", "link", "show", "ngy-test"], capture_output=True, check=False).returncode != 0
    routed = ["fd00:87::/64"] in routes and ["default", "via", "fd00:87::1"] in routes
    return {
        "link": "UP" in link.stdout,
        "ping": pinged,
        "ping6": (pinged6, routed),
        "mtu": mtu.strip(),
        "own": own_network,
        "gone": gone,
    }


def test_a_bridge_by_a_tap_device(disks: DiskPlan, tmp_path: Path) -> None:
    require_program("ip")
    assert in_child(partial(_bridged, disks, tmp_path)) == {
        "link": True,
        "ping": 0,
        "ping6": (0, True),
        "mtu": "1400",
        "own": True,
        "gone": True,
    }


class _Greeter(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.recv(4096)
        self.request.sendall(b"HTTP/1.0 200 OK\r\n\r\nhello from the host\n")


def _user_network(disks: DiskPlan, place: Path, cache_home: Path) -> dict[str, object]:
    """As a plain user, who has no bridge, on a host without passt (tests/e2e/test_published_ports.py has it)."""
    engine_module.find_passt = lambda: ""
    os.environ["XDG_CACHE_HOME"] = str(cache_home)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    link = LinkPlan("user", address="10.0.2.15", prefix=24, gateway="10.0.2.2", mac="02:00:00:00:00:07")
    plan = NetworkPlan("links", (link,))
    with socketserver.TCPServer(("127.0.0.1", 0), _Greeter) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with EmulatedMachine(disks, place, make_spec(network="bridge"), network=plan) as machine:
            heard = machine.run("wget", "-q", "-O", "-", f"http://10.0.2.2:{server.server_address[1]}/").out
            uid = machine.status("Uid")[0]
        server.shutdown()
    return {"heard": heard, "uid": uid}


def test_a_plain_user_with_a_user_mode_network(disks: DiskPlan, tmp_path: Path, vmlinux: str) -> None:
    kernels = tmp_path / "cache" / "nagaya" / "kernels"
    shutil.copytree(os.path.dirname(vmlinux), kernels / os.path.basename(os.path.dirname(vmlinux)))
    subprocess.run(["chmod", "-R", "a+rX", str(tmp_path / "cache")], check=True)
    for path in (tmp_path, Path(disks.data)):
        os.chown(path, NOBODY, NOBODY)
    above = tmp_path.parent
    modes = [(above, above.stat().st_mode), (above.parent, above.parent.stat().st_mode)]
    for parent in (Path(disks.image).parent, above, above.parent):
        parent.chmod(0o755)
    try:
        found = in_child(partial(_user_network, disks, tmp_path, tmp_path / "cache"))
    finally:
        for parent, mode in modes:
            parent.chmod(mode & 0o7777)
    assert found == {"heard": b"hello from the host\n", "uid": str(NOBODY)}


# -- volumes


def test_directories_and_files_of_the_host(disks: DiskPlan, tmp_path: Path) -> None:
    find_daemon()
    shared, note = tmp_path / "shared", tmp_path / "note"
    shared.mkdir()
    (shared / "below").mkdir()
    (shared / "seed").write_text("seed\n")
    note.write_text("a file\n")
    mounts = (
        MountPlan("bind", str(shared), "/mnt", False, "rprivate", 0, 0, ()),
        MountPlan("bind", str(shared / "below"), "/kept", True, "rprivate", 0, 0, ()),
        MountPlan("bind", str(note), "/etc/note", True, "rprivate", 0, 0, ()),
        MountPlan("tmpfs", "", "/fast", False, "", 1 << 20, 0o700, ()),
    )
    with EmulatedMachine(disks, tmp_path, make_spec(), mounts=mounts) as machine:
        assert machine.sh("cat /mnt/seed /etc/note") == "seed\na file\n"
        machine.sh("echo new > /mnt/new && dd if=/dev/urandom of=/mnt/large bs=1M count=8 2>/dev/null")
        digest = machine.sh("md5sum /mnt/large").split()[0]
        for target in ("/kept/no", "/etc/note"):
            assert machine.run("/bin/sh", "-c", f"echo x > {target}").status != 0
        (shared / "late").write_text("from the host\n")
        assert machine.sh("cat /mnt/late") == "from the host\n"
        helpers = list(machine.engine._qemu.helpers)
        assert helpers
    assert (shared / "new").read_text() == "new\n"
    assert (
        subprocess.run(["md5sum", str(shared / "large")], capture_output=True, text=True, check=True).stdout.split()[0]
        == digest
    )
    assert note.read_text() == "a file\n" and list((shared / "below").iterdir()) == []
    assert not any(os.path.exists(f"/proc/{pid}") for pid in helpers)


# -- other CPUs


@pytest.mark.parametrize("board", [board for board in BOARDS if board is not X86_64], ids=lambda board: board.platform)
def test_a_machine_with_another_cpu(board: Board, tmp_path: Path) -> None:
    compiler = f"{board.architecture}-linux-gnu-gcc"
    require_program("mkfs.erofs")
    for program in (board.program, compiler):  # not for everybody: five minutes of compiling for each CPU
        if shutil.which(program) is None:
            pytest.skip(f"optional: {program}")
    if cache.find_kernel(board.architecture) is None:
        pytest.skip(
            f"optional: a guest kernel for {board.architecture}: nagaya kernel build --arch {board.architecture}"
        )
    if not os.path.exists(agent_path(board.architecture)):
        pytest.skip(f"optional: the agent for {board.architecture}: make agent-{board.architecture}")
    tree = tmp_path / "tree"
    tree.mkdir(mode=0o755)
    subprocess.run([compiler, "-O2", "-static", "-o", str(tree / "probe"), str(PROBE)], check=True)
    subprocess.run(["mkfs.erofs", str(tmp_path / "root.erofs"), str(tree)], check=True, capture_output=True)
    disks = DiskPlan(str(tmp_path / "root.erofs"), str(make_data(tmp_path / "data.img")))
    spec = make_spec(platform=board.platform, limits=Limits(cpus_milli=2000))
    with EmulatedMachine(disks, tmp_path, spec) as machine:
        data = os.urandom(100_000)
        result = machine.run("/probe", "7", stdin=data)
        assert result.status == 7
        assert result.out == f"{board.architecture} 2\n".encode() + data


# -- what cannot be had


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"network": "host"}, Unsupported, "network of its own"),
        ({"userns": "auto"}, Unsupported, "user namespaces"),
        ({"security": Security(seccomp="/profile.json")}, Unsupported, "seccomp"),
        ({"limits": Limits(memory_bytes=32 << 20)}, UsageError, "64 MiB"),
        ({"limits": Limits(cpus_milli=65_000)}, UsageError, "64 CPUs"),
        ({"platform": "linux/s390x"}, Unsupported, "s390x"),
        ({"security": Security(cap_add=("NONSENSE",))}, UsageError, "NONSENSE"),
        ({"mounts": (Mount("bind", "/", "/proc/x"),)}, UsageError, "/proc"),
    ],
)
def test_what_no_emulated_machine_can_be(options: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        engine_module.EmulatedEngine().check(make_spec(**options))


def test_what_a_plain_user_does_without_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(limits=Limits(cpus_milli=1500, cpuset_cpus="0"))
    engine = engine_module.EmulatedEngine()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert engine.check(spec) == []
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    warnings = engine.check(spec)
    assert len(warnings) == 2 and "gives it 2" in warnings[0]


def test_a_host_without_a_kernel_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(Unsupported, match="kernel") as caught:
        engine_module.EmulatedEngine().check_host()
    assert "nagaya kernel build" in caught.value.hint
