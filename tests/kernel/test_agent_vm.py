"""The agent as the first program of a virtual machine: what it makes of two disks, and how it ends the machine."""

from __future__ import annotations

import io
import shutil
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nagaya.protocol import agent as protocol
from nagaya.protocol.agent import MAX_WARNINGS, Exited, OutOfMemory, SetUp, SetupFailed
from nagaya.protocol.frame import encode
from nagaya.protocol.setup import GuestMount, GuestNetwork, GuestSetup, setup_payload
from nagaya.storage.disks import LEAST_BYTES, create_data_disk, grow_data_disk
from tests.conftest import require_program
from tests.kernel.agent_machine import build_agent
from tests.kernel.conftest import MKFS
from tests.kernel.test_virtiofsd import find_daemon
from tests.kernel.virtual_machine import BOOT_S, MAC, Disks, VirtualMachine

BUSYBOX = "/bin/busybox"
DUMPE2FS = "/usr/sbin/dumpe2fs"
NETWORK = (
    "-netdev",
    "socket,id=net,udp=127.0.0.1:9,localaddr=127.0.0.1:0",
    "-device",
    f"virtio-net-device,netdev=net,mac={MAC}",
)
SETUP = GuestSetup(
    hostname="lodger",
    time_ns=1_900_000_000 * 10**9,
    entropy=b"\x5a" * 64,
    files=(("/etc/hosts", b"127.0.0.1\tlocalhost\n"), ("/etc/resolv.conf", b"nameserver 192.0.2.1\n")),
    mounts=(
        GuestMount("tmpfs", "", "/scratch", options=("nosuid", "nodev", "noexec"), size_bytes=1 << 20, mode=0o700),
        GuestMount("tmpfs", "", "/by-link/below"),
    ),
    networks=(GuestNetwork(MAC, "192.0.2.7", 24, "192.0.2.1", 1400, "eth0", "fd00:7::7", 64, "fd00:7::1"),),
    sysctls=(("net.ipv4.ip_forward", "1"), ("net.ipv4.conf.eth0.forwarding", "0")),
    power_off="reboot",
    devices=(("/dev/net/tun", "/dev/net/tun"),),
    pids=40,
)


@pytest.fixture(scope="module")
def agent() -> str:
    require_program("qemu-system-x86_64")
    return build_agent()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of busybox, with a link in the place of a file and of a directory that will be mounted over."""
    require_program("mkfs.erofs")
    require_program("busybox")
    tree = tmp_path_factory.mktemp("image") / "tree"
    for name in ("bin", "etc", "var/lib/links", "locked"):
        (tree / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, tree / "bin")
    for name in subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split():
        if name != "busybox":
            (tree / "bin" / name).symlink_to("busybox")
    (tree / "etc/resolv.conf").symlink_to("../run/resolv.conf")  # what it leads to is missing
    (tree / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nguest:x:1000:1000::/var:/bin/sh\n")
    (tree / "etc/motd").write_text("from the image\n")
    (tree / "by-link").symlink_to("/var/lib/links")
    (tree / "to-proc").symlink_to("/proc")
    (tree / "locked").chmod(0o700)
    tree.chmod(0o751)
    made = tree.parent / "root.erofs"
    subprocess.run(["mkfs.erofs", str(made), str(tree)], check=True, capture_output=True)
    return made


def make_data(path: Path) -> Path:
    if not Path(MKFS).exists():
        pytest.skip("needs mkfs.ext4")
    with path.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run([MKFS, "-q", "-E", "lazy_itable_init=1,nodiscard", str(path)], check=True)
    return path


@pytest.fixture(scope="module")
def machine(
    vmlinux: str, agent: str, image: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VirtualMachine]:
    """One with everything that SETUP can say, but for read-only."""
    place = tmp_path_factory.mktemp("machine")
    disks = Disks(image, make_data(place / "data.img"))
    with VirtualMachine(vmlinux, agent, disks, place, arguments=NETWORK) as machine:
        assert machine.set_up(SETUP) == SetUp(())
        yield machine


def sh(machine: VirtualMachine, command: str, **options: object) -> str:
    """What a shell command wrote. It must succeed."""
    result = machine.run("/bin/sh", "-c", command, **options)  # type: ignore[arg-type]
    assert result.status == 0, result
    return result.out.decode()


def mount_options(machine: VirtualMachine, place: str) -> tuple[str, set[str]]:
    """The type and the options of what is mounted at `place`."""
    found = [line.split() for line in sh(machine, "cat /proc/mounts").splitlines() if line.split()[1] == place]
    _, _, kind, options, *_ = found[-1]
    return kind, set(options.split(","))


# -- what the machine looks like from within


def test_the_root_is_an_overlay_as_the_image_has_it(machine: VirtualMachine) -> None:
    assert mount_options(machine, "/")[0] == "overlay"
    assert sh(machine, "cat /etc/motd; stat -c %a / /locked") == "from the image\n751\n700\n"


def test_nothing_of_ours_can_be_seen(machine: VirtualMachine) -> None:
    places = {line.split()[1] for line in sh(machine, "cat /proc/mounts").splitlines()}
    assert not places & {"/lower", "/data", "/root", "/files", "/shares"}
    names = set(sh(machine, "ls /").split()) - {"tmp"}  # of another test's
    assert names == {"bin", "by-link", "dev", "etc", "locked", "proc", "run", "scratch", "sys", "to-proc", "var"}
    # The classic way out of a chroot leads to the same root.
    assert (
        sh(machine, "mkdir -p /tmp/x && chroot /tmp/x /bin/true 2>/dev/null; cd /../../.. && cat /etc/motd")
        == "from the image\n"
    )


def test_devices_are_a_containers(machine: VirtualMachine) -> None:
    names = set(sh(machine, "ls /dev").split())
    assert names - {"core"} == {
        "fd", "full", "mqueue", "net", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty",
        "urandom", "zero",
    }  # fmt: skip
    assert sh(machine, "readlink /dev/ptmx; readlink /dev/fd; stat -c %t:%T /dev/null /dev/net/tun").split() == [
        "pts/ptmx", "/proc/self/fd", "1:3", "a:c8",
    ]  # fmt: skip
    assert sh(machine, "echo x > /dev/null; head -c 4 /dev/zero | od -An -tx1").split() == ["00"] * 4
    assert mount_options(machine, "/dev/shm")[0] == "tmpfs"


def test_kernel_paths_are_masked_and_protected(machine: VirtualMachine) -> None:
    for place in ("/proc/sys", "/proc/bus", "/sys", "/sys/fs/cgroup"):
        assert "ro" in mount_options(machine, place)[1], place
    assert sh(machine, "cat /proc/timer_list /proc/keys; ls /sys/firmware") == ""
    assert machine.run("/bin/sh", "-c", "echo 1 > /proc/sys/kernel/panic").status != 0


def test_name_clock_and_sysctls(machine: VirtualMachine) -> None:
    assert sh(machine, "hostname") == "lodger\n"
    assert 0 <= int(sh(machine, "date +%s")) - 1_900_000_000 < 600
    assert sh(machine, "cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/conf/eth0/forwarding") == "1\n0\n"


def test_files_lie_over_the_images_own(machine: VirtualMachine) -> None:
    assert sh(machine, "cat /etc/hosts /etc/resolv.conf") == "127.0.0.1\tlocalhost\nnameserver 192.0.2.1\n"
    assert sh(machine, "readlink /etc/resolv.conf") == "../run/resolv.conf\n"
    assert sh(machine, "echo '# mine' >> /etc/hosts; tail -n1 /etc/hosts") == "# mine\n"


def test_a_tmpfs_has_its_size_mode_and_options(machine: VirtualMachine) -> None:
    kind, options = mount_options(machine, "/scratch")
    assert kind == "tmpfs" and {"size=1024k", "mode=700", "nosuid", "nodev", "noexec"} <= options
    assert mount_options(machine, "/var/lib/links/below")[0] == "tmpfs"  # the link in the way is followed


def test_the_link_is_configured(machine: VirtualMachine) -> None:
    link = sh(machine, "ip addr show eth0; ip route")
    for part in (",UP,", "mtu 1400", MAC, "inet 192.0.2.7/24 brd 192.0.2.255"):
        assert part in link
    assert "default via 192.0.2.1 dev eth0" in link and "192.0.2.0/24 dev eth0" in link
    assert "inet 127.0.0.1/8" in sh(machine, "ip addr show lo")


# -- programs, as behind every other wall


def test_output_input_status_and_signals(machine: VirtualMachine) -> None:
    result = machine.run("/bin/sh", "-c", "cat; echo bad >&2; exit 7", stdin=b"fed\n")
    assert (result.status, result.out, result.err) == (7, b"fed\n", b"bad\n")
    assert machine.run("/nowhere").status == 127
    channel = machine.spawn("/bin/sleep", "100")
    machine.started(channel)
    machine.link.signal(channel, 15)
    assert machine.finish(channel).status == 143


def test_a_terminal(machine: VirtualMachine) -> None:
    channel = machine.spawn(
        "/bin/sh", "-c", "stty size; tty; read line; echo got $line", tty=True, stdin=True, rows=33, columns=77
    )
    machine.wait_output(channel, b"/dev/pts/0")
    machine.link.send_stdin(channel, b"typed\n")
    assert machine.finish(channel).status == 0
    text = machine.output(channel)
    assert b"33 77" in text and b"got typed" in text


def test_much_data_both_ways(machine: VirtualMachine) -> None:
    data = bytes(range(256)) * 8192
    result = machine.run("/bin/cat", stdin=data, timeout_s=60)
    assert result.status == 0 and result.out == data


def test_users_and_limits(machine: VirtualMachine) -> None:
    assert sh(machine, "id -u; echo $HOME; ulimit -n; ulimit -Hn", user="guest") == "1000\n/var\n1024\n1048576\n"


def test_the_number_of_processes_is_limited(machine: VirtualMachine) -> None:
    result = machine.run("/bin/sh", "-c", "for i in $(seq 60); do sleep 100 & done; wait", timeout_s=60)
    assert b"can't fork" in result.err
    assert machine.run("/bin/sh", "-c", "kill -9 -1", user="guest").status in (0, 1, 137)
    machine.run("killall", "-9", "sleep")
    assert sh(machine, "cat /proc/self/cgroup") == "0::/machine\n"


def test_applets(machine: VirtualMachine) -> None:
    listed = machine.run("ps", applet=True).out.decode()
    assert '"pid":1,' in listed and "kthreadd" not in listed
    packed = machine.run("tar-out", "/etc/motd", applet=True)
    with tarfile.open(fileobj=io.BytesIO(packed.out)) as archive:
        member = archive.extractfile("motd")
        assert member is not None and member.read() == b"from the image\n"


def test_the_clock_is_put_right(machine: VirtualMachine) -> None:
    machine.link.set_clock(2_000_000_000 * 10**9)
    assert 0 <= int(sh(machine, "date +%s")) - 2_000_000_000 < 60


def test_the_data_disk_shows_what_overlay_wrote(machine: VirtualMachine) -> None:
    sh(machine, "rm /etc/motd; mkdir -p /var/lib/new; echo new > /var/lib/new/file; sync")
    packed = machine.run("tar-out", "/upper/.", applet=True, data_disk=True)
    assert packed.status == 0, packed
    with tarfile.open(fileobj=io.BytesIO(packed.out)) as archive:
        whiteout = archive.getmember("./etc/motd")
        assert whiteout.ischr() and (whiteout.devmajor, whiteout.devminor) == (0, 0)
        member = archive.extractfile("./var/lib/new/file")
        assert member is not None and member.read() == b"new\n"


# -- over several boots


def is_clean(data: Path) -> bool:
    """Whether the file system needs no replay of its journal."""
    text = subprocess.run([DUMPE2FS, "-h", str(data)], capture_output=True, text=True, check=True).stdout
    return "needs_recovery" not in text


def test_what_was_written_survives_every_kind_of_end(vmlinux: str, agent: str, image: Path, tmp_path: Path) -> None:
    disks = Disks(image, make_data(tmp_path / "data.img"))
    assert disks.data is not None
    plain = GuestSetup("m", power_off="reboot")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("brought"), io.BytesIO())
        gone = tarfile.TarInfo("etc/motd")
        gone.type = tarfile.CHRTYPE
        archive.addfile(gone)
    with VirtualMachine(vmlinux, agent, Disks(None, disks.data), tmp_path) as machine:
        assert machine.set_up(plain._replace(data_only=True)) == SetUp(())
        result = machine.run("tar-in", "/upper", stdin=packed.getvalue(), applet=True, data_disk=True)
        assert result.status == 0, result
        machine.shut_down()
    with VirtualMachine(vmlinux, agent, disks, tmp_path) as machine:
        assert machine.set_up(plain) == SetUp(())
        assert sh(machine, "ls /brought; ls /etc") == "/brought\npasswd\nresolv.conf\n"
        # Not synced by anybody, and still being written when the machine is asked to end.
        sh(machine, "echo first > /first; (while :; do echo on >> /going-on; done) & usleep 100000")
        machine.shut_down()
    assert is_clean(disks.data)
    with VirtualMachine(vmlinux, agent, disks, tmp_path) as machine:
        assert machine.set_up(plain) == SetUp(())
        assert sh(machine, "cat /first; head -n1 /going-on; echo second > /second") == "first\non\n"
    assert is_clean(disks.data)  # the host's stream ended, and the machine with it
    with VirtualMachine(vmlinux, agent, disks, tmp_path) as machine:
        setup = plain._replace(read_only=True, mounts=(GuestMount("tmpfs", "", "/made/for/it"),))
        assert machine.set_up(setup) == SetUp(())
        assert sh(machine, "cat /second; echo x > /made/for/it/x; echo x > /dev/shm/x") == "second\n"
        refused = machine.run("/bin/sh", "-c", "echo x > /x")
        assert refused.status != 0 and b"Read-only file system" in refused.err
        machine.shut_down()


def test_a_larger_disk_is_taken_at_the_next_start(vmlinux: str, agent: str, image: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.img"
    create_data_disk(str(data), LEAST_BYTES)
    disks, plain = Disks(image, data), GuestSetup("m", power_off="reboot")
    sizes = []
    for size in (LEAST_BYTES, 20 << 30, 20 << 30):
        grow_data_disk(str(data), size)
        with VirtualMachine(vmlinux, agent, disks, tmp_path) as machine:
            assert machine.set_up(plain) == SetUp(())
            sizes.append(1024 * int(sh(machine, "df -k / | tail -n 1 | awk '{print $2}'")))
            assert sh(machine, "echo here >> /kept; cat /kept") == "here\n" * len(sizes)
            machine.shut_down()
        subprocess.run(["/usr/sbin/e2fsck", "-fn", str(data)], check=True, capture_output=True)
    assert sizes[0] < LEAST_BYTES and sizes[1] == sizes[2] > 0.95 * (20 << 30)
    assert data.stat().st_blocks * 512 < 64 << 20


def test_synced_data_survives_the_end_of_the_vmm(vmlinux: str, agent: str, image: Path, tmp_path: Path) -> None:
    """As a power failure: writing and syncing goes on until QEMU is killed; all that was said to be synced is there."""
    data = tmp_path / "data.img"
    create_data_disk(str(data), LEAST_BYTES)
    disks, plain = Disks(image, data), GuestSetup("m", power_off="reboot")
    synced = -1
    for boot in range(3):
        machine = VirtualMachine(vmlinux, agent, disks, tmp_path)
        assert machine.set_up(plain) == SetUp(())
        last = int(sh(machine, "ls /work | sort -n | tail -n 1") if boot else "-1")
        assert last >= synced
        for number in range(synced + 1) if boot else ():
            assert sh(machine, f"cat /work/{number}") == f"content of {number}\n"
        script = (
            f"mkdir -p /work; i={last + 1}; while :; do echo content of $i > /work/$i; rm -f /old; ln /work/$i /old; sync;"
            " echo $i; i=$((i+1)); done"
        )
        channel = machine.spawn("/bin/sh", "-c", script)
        machine.wait_output(channel, b"%d\n" % (last + 8))
        machine.cut()
        machine.close()
        synced = int(machine.output(channel).split(b"\n")[-2])
        assert synced >= last + 8
    assert not is_clean(data)  # the journal had something to replay each time


def test_want_of_memory_is_told(vmlinux: str, agent: str, image: Path, tmp_path: Path) -> None:
    disks = Disks(image, make_data(tmp_path / "data.img"))
    with VirtualMachine(vmlinux, agent, disks, tmp_path) as machine:
        assert machine.set_up(GuestSetup("m", power_off="reboot")) == SetUp(())
        assert machine.run("/bin/false").status == 1
        assert OutOfMemory() not in machine.events
        result = machine.run("/bin/tail", "/dev/zero", timeout_s=60)
        assert result.status == 137
        assert [type(event) for event in machine.events[-2:]] == [OutOfMemory, Exited]
        assert sh(machine, "echo on") == "on\n"  # the agent itself is spared
        machine.shut_down()


def test_the_main_program_may_be_the_first_process(vmlinux: str, agent: str, image: Path, tmp_path: Path) -> None:
    disks = Disks(image, make_data(tmp_path / "data.img"))
    setup = GuestSetup("m", own_pids=True, pids=50, power_off="reboot", mounts=(GuestMount("tmpfs", "", "/by-link/t"),))
    with VirtualMachine(vmlinux, agent, disks, tmp_path) as machine:
        assert machine.set_up(setup) == SetUp(())
        main = machine.spawn("/bin/sh", "-c", "echo I am $$; cat", main=True, stdin=True)
        machine.wait_output(main, b"I am 1\n")
        machine.link.send_stdin(main, b"heard\n")
        machine.wait_output(main, b"heard\n")
        assert (
            sh(machine, "cat /proc/1/comm; ls -d /proc/[0-9]* | wc -l; cat /proc/1/cgroup") == "cat\n4\n0::/machine\n"
        )
        assert b'"pid":1,"ppid":0,"uid":0,"user":"root"' in machine.run("ps", applet=True).out
        assert [line.split()[1] for line in sh(machine, "cat /proc/mounts").splitlines()].count("/proc") == 1
        other = machine.spawn("/bin/sleep", "100")
        machine.started(other)
        machine.link.close_stdin(main)
        assert machine.finish(main).status == 0
        assert machine.finish(other).status == 137  # the kernel ends all others with it
        machine.shut_down()


@pytest.mark.parametrize(
    "frame",
    [
        encode(protocol.CLOCK, 0, bytes(8)),
        encode(protocol.SETUP, 0, b"\1\0\0\0\xff\0\0\0"),
        encode(protocol.SETUP, 0, setup_payload(GuestSetup("m", data_only=True, power_off="reboot"))) * 2,
    ],
    ids=["not-set-up", "malformed", "twice"],
)
def test_a_violation_ends_the_machine(vmlinux: str, agent: str, tmp_path: Path, frame: bytes) -> None:
    with VirtualMachine(vmlinux, agent, Disks(None, make_data(tmp_path / "data.img")), tmp_path) as machine:
        machine.send_raw(frame)
        assert machine.ended(BOOT_S)


@pytest.mark.parametrize(
    ("setup", "text"),
    [
        (GuestSetup("m"), "the machine has no disk with the serial number 'data'"),
        (GuestSetup("m", sysctls=(("kernel.nothing", "1"),)), "cannot set sysctl kernel.nothing=1: No such file or directory"),
        (GuestSetup("m", mounts=(GuestMount("tmpfs", "", "/to-proc/sys"),)),
         "nothing can be mounted at '/to-proc/sys', which leads to the machine's own /proc/sys: Operation not permitted"),
        (GuestSetup("m", networks=(GuestNetwork(MAC, "192.0.2.7", 24, "", 0),)), f"the machine has no network link with the address {MAC}: No such device"),
        (GuestSetup("m", mounts=(GuestMount("virtiofs", "share", "/mnt"),)), "cannot mount the host's share 'share' for /mnt: Invalid argument"),
    ],
    ids=["no-disk", "sysctl", "proc", "link", "share"],
)  # fmt: skip
def test_a_setup_that_fails_says_why(
    vmlinux: str, agent: str, image: Path, tmp_path: Path, setup: GuestSetup, text: str
) -> None:
    data = None if "serial" in text else make_data(tmp_path / "data.img")
    with VirtualMachine(vmlinux, agent, Disks(image, data), tmp_path) as machine:
        answer = machine.set_up(setup._replace(power_off="reboot"))
        assert isinstance(answer, SetupFailed)
        assert answer.text.startswith(text)
        machine.spawn("/bin/true")  # sent by a host that has not heard yet
        assert machine.quiet(0.2)
        machine.shut_down()


def test_modules_are_loaded_in_their_order(vmlinux: str, agent: str, image: Path, tmp_path: Path) -> None:
    disks = Disks(image, make_data(tmp_path / "data.img"))
    modules = (("z.ko", b"no module"), ("a.ko", b"none either"))  # and this kernel takes none at all
    with VirtualMachine(vmlinux, agent, disks, tmp_path, modules=modules) as machine:
        answer = machine.set_up(GuestSetup("m", power_off="reboot"))
        assert answer == SetUp(
            tuple(
                f"cannot load the kernel module {name}: Function not implemented" for name in ("000-z.ko", "001-a.ko")
            )
        )
        machine.shut_down()


def test_no_more_warnings_than_the_host_takes(vmlinux: str, agent: str, image: Path, tmp_path: Path) -> None:
    disks = Disks(image, make_data(tmp_path / "data.img"))
    with VirtualMachine(vmlinux, agent, disks, tmp_path, modules=(("a", b"no module"),) * 70) as machine:
        answer = machine.set_up(GuestSetup("m", power_off="reboot"))
        assert isinstance(answer, SetUp)
        assert len(answer.warnings) == MAX_WARNINGS
        machine.shut_down()


def test_directories_and_files_of_the_host(vmlinux: str, agent: str, image: Path, tmp_path: Path) -> None:
    daemon = find_daemon()
    shared = tmp_path / "shared"
    (shared / "directory").mkdir(parents=True)
    (shared / "directory/file").write_text("of the host\n")
    (shared / "directory").chmod(0o777)
    (shared / "single").write_text("one file\n")
    mounts = (
        GuestMount("virtiofs", "share", "/mnt/all", read_only=True),
        GuestMount("virtiofs", "share/directory", "/mnt/part", options=("noexec",)),
        GuestMount("virtiofs", "share/single", "/etc/single"),
    )
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.listen(1)
    with (tmp_path / "log").open("wb") as log:
        options = ["-o", f"source={shared}", "-o", "sandbox=chroot", "-f"]
        serving = subprocess.Popen(
            [daemon, f"--fd={listener.fileno()}", *options], pass_fds=[listener.fileno()], stderr=log
        )
    listener.close()
    arguments = (
        "-object", "memory-backend-memfd,id=memory,size=256M,share=on", "-machine", "memory-backend=memory",
        "-chardev", f"socket,id=share,path={tmp_path}/socket", "-device", "vhost-user-fs-device,chardev=share,tag=share",
    )  # fmt: skip
    disks = Disks(image, make_data(tmp_path / "data.img"))
    try:
        with VirtualMachine(vmlinux, agent, disks, tmp_path, arguments=arguments) as machine:
            assert machine.set_up(GuestSetup("m", mounts=mounts, power_off="reboot")) == SetUp(())
            assert sh(machine, "cat /mnt/all/single /mnt/part/file /etc/single") == "one file\nof the host\none file\n"
            assert "ro" in mount_options(machine, "/mnt/all")[1] and "noexec" in mount_options(machine, "/mnt/part")[1]
            assert machine.run("/bin/sh", "-c", "echo x > /mnt/all/directory/x").status != 0
            sh(machine, "echo back > /mnt/part/answer; echo more >> /etc/single")
            machine.shut_down()
        assert (shared / "directory/answer").read_text() == "back\n"
        assert (shared / "single").read_text() == "one file\nmore\n"
        serving.wait(5)
    finally:
        serving.kill()
        serving.wait()
