"""Whole machines by the library and the command: a system of 512 bytes on QEMU, from its first word to its last."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nagaya import Host, Machine
from nagaya.errors import Conflict, IntegrityError, NotFound, Unsupported, UsageError
from nagaya.manager.attachment import Attachment
from nagaya.manager.hardware import DriveOptions, SeedOptions
from nagaya.model.spec import Restart
from tests import own_network
from tests.conformance.types import group_of
from tests.conftest import require_program
from tests.e2e.command import Cli
from tests.kernel.conftest import QUIET

WITHIN_S = 60.0


def said(machine: Machine) -> str:
    return b"".join(line.data + (b"" if line.partial else b"\n") for line in machine.logs()).decode().replace("\r", "")


def wait_until(machine: Machine, text: str, times: int = 1, *, within_s: float = WITHIN_S) -> None:
    deadline_s = time.monotonic() + within_s
    while said(machine).count(text) < times:
        assert time.monotonic() < deadline_s, (text, said(machine), machine.state)
        time.sleep(0.02)


def talk(attachment: Attachment, text: str, until: str, *, within_s: float = WITHIN_S) -> str:
    """Type on the console, and read until it has answered."""
    import select

    attachment.send_stdin(text.encode())
    got, deadline_s = b"", time.monotonic() + within_s
    while until.encode() not in got:
        assert time.monotonic() < deadline_s, got
        attachment.flush()
        select.select([attachment], [], [], 1)
        for event in attachment.receive():
            got += getattr(event, "data", b"")
    return got.decode()


def qemu_of(machine: Machine) -> int:
    """The pid of its QEMU; only for tests, which own both."""
    return machine.state.pid or machine.inspect()["state"]["pid"]  # type: ignore[index]


def test_a_whole_life(make: Callable[..., Machine]) -> None:
    machine = make()
    assert machine.state.phase == "created"
    machine.start()
    wait_until(machine, "READY")
    assert machine.state.phase == "running"
    with machine.attach() as attachment:
        assert "hello" in talk(attachment, "hello", "hello")
        assert "absent" in talk(attachment, "r", "absent")
        assert "stored" in talk(attachment, "w", "stored")
    assert machine.stats().memory_bytes > 1 << 20
    machine.pause()
    assert machine.state.phase == "paused"
    before = machine.stats().cpu_ns
    time.sleep(0.3)
    assert machine.stats().cpu_ns - before < 100_000_000
    machine.unpause()
    machine.stop()
    assert (machine.state.phase, machine.state.exit_code, machine.state.error) == ("exited", 0, "")
    assert said(machine).endswith("BYE\n")
    machine.start()
    wait_until(machine, "READY", times=2)
    with machine.attach() as attachment:
        assert "found" in talk(attachment, "r", "found")  # its disk has kept it
        attachment.send_stdin(b"q")
        attachment.flush()
    assert machine.wait() == 0  # it has switched itself off


def test_what_is_typed_right_before_a_detach_arrives(make: Callable[..., Machine]) -> None:
    """The console is still printing when its reader goes: the supervisor finds it gone by a write."""
    machine = make()
    machine.start()
    wait_until(machine, "READY")
    for number in range(1, 21):
        with machine.attach() as attachment:
            talk(attachment, "r", "n")  # of "absent", then of "found": more of it follows
            attachment.send_stdin(b"w")
            attachment.flush()
        wait_until(machine, "stored", times=number)


def test_what_is_not_inside_cannot_be_asked(make: Callable[..., Machine], tmp_path: Path) -> None:
    machine = make()
    for attempt in (
        lambda: machine.diff(),
        lambda: machine.commit("x"),
        lambda: machine.copy_out("/etc", str(tmp_path)),
    ):
        with pytest.raises(Unsupported, match="whole machine"):
            attempt()
    machine.start()
    for attempt in (lambda: machine.run(["true"]), lambda: machine.top()):
        with pytest.raises(Unsupported, match="whole machine"):
            attempt()
    machine.kill()
    assert machine.state.exit_code == 137


def test_a_system_that_ignores_the_button_is_switched_off(make: Callable[..., Machine], tmp_path: Path) -> None:
    deaf = tmp_path / "deaf.raw"
    deaf.write_bytes(b"\xfa\xf4\xeb\xfc".ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 16))  # cli; 1: hlt; jmp 1b
    machine = make(drives=(DriveOptions(str(deaf)),))
    machine.start()
    began = time.monotonic()
    machine.stop(timeout_s=0.5)
    assert 0.4 < time.monotonic() - began < 20
    assert machine.state.exit_code == 137


@pytest.mark.parametrize("what", ["qemu", "supervisor", "host"])
def test_killed_and_back(host: Host, make: Callable[..., Machine], boot_disk: Path, what: str) -> None:
    """Of a host that restarts, the store is all that is left."""
    machine = make(drives=(DriveOptions(str(boot_disk), clone=True), DriveOptions(size_bytes=1 << 20)))
    made = machine.spec
    machine.start()
    wait_until(machine, "READY")
    with machine.attach() as attachment:
        talk(attachment, "w", "stored")
    pid = qemu_of(machine)
    parent = int(re.search(r"^PPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)[1])  # type: ignore[index]
    place = machine.runtime_dir
    os.kill(pid if what == "qemu" else parent, signal.SIGKILL)
    deadline_s = time.monotonic() + WITHIN_S
    while machine.state.phase == "running" or os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    if what == "host":
        shutil.rmtree(place, ignore_errors=True)
        machine = Host(root=host.paths.root).machines.get("m")
    assert machine.spec == made
    assert (machine.state.phase, machine.state.exit_code) == ("exited", 137)
    assert group_of(machine) is None
    machine.start()
    wait_until(machine, "READY", times=2)
    with machine.attach() as attachment:
        talk(attachment, "r", "found")
    machine.stop()
    for drive in made.hardware.drives:  # type: ignore[union-attr]
        assert host.disks.check(f"{machine.directory}/{drive.path}").clean


def test_it_comes_back_by_its_policy(make: Callable[..., Machine]) -> None:
    machine = make(common=QUIET._replace(restart=Restart("always")))
    machine.start()
    wait_until(machine, "READY")
    os.kill(qemu_of(machine), signal.SIGKILL)
    wait_until(machine, "READY", times=2)
    assert machine.state.restarts == 1
    machine.stop()
    assert machine.state.phase == "exited"


def test_its_disk_is_in_use(host: Host, make: Callable[..., Machine], boot_disk: Path) -> None:
    host.disks.convert(str(boot_disk), "shared")
    first, second = (make(name, drives=(DriveOptions("shared"),)) for name in ("one", "two"))
    first.start()
    wait_until(first, "READY")
    for attempt in (
        second.start,
        lambda: host.disks.resize("shared", "+", 1 << 20),
        lambda: host.disks.clone("shared", "copy", linked=True),
        lambda: host.disks.check("shared"),
    ):
        with pytest.raises(Conflict, match="in use"):
            attempt()
    assert second.state.phase == "exited"
    qemu_img = subprocess.run(["qemu-img", "check", host.disks.locate("shared")], capture_output=True, text=True)
    assert "lock" in qemu_img.stderr  # QEMU's own
    first.kill()
    assert host.disks.check("shared").clean
    second.start()
    second.kill()
    with pytest.raises(Conflict, match="belongs to a machine"):
        host.disks.remove("shared", in_use=host.machines.disk_paths())


def test_nobody_writes_what_others_stand_on(host: Host, make: Callable[..., Machine], boot_disk: Path) -> None:
    host.disks.convert(str(boot_disk), "base")
    writer = make("writer", drives=(DriveOptions("base"),))
    host.disks.clone("base", "above", linked=True)
    with pytest.raises(Conflict, match="stands on it"):
        writer.start()
    reader = make("reader", drives=(DriveOptions("above"),))
    reader.start()
    wait_until(reader, "READY")
    reader.kill()


def test_a_disk_that_became_evil(host: Host, make: Callable[..., Machine], boot_disk: Path, tmp_path: Path) -> None:
    """A guest that took its QEMU over can write its image's header: the next start looks at it anew."""
    host.disks.convert(str(boot_disk), "victim")
    machine = make(drives=(DriveOptions("victim"),))
    path = host.disks.locate("victim")
    secret = tmp_path / "secret.raw"
    secret.write_bytes(bytes(1 << 20))
    subprocess.run(["qemu-img", "rebase", "-u", "-b", secret, "-F", "raw", path], check=True)
    with pytest.raises(IntegrityError, match="outside its own directory"):
        machine.start()


@pytest.mark.parametrize("format", ["raw", "vmdk", "vdi", "vhd", "vhdx"])
def test_every_format_boots(host: Host, make: Callable[..., Machine], boot_disk: Path, format: str) -> None:
    host.disks.convert(str(boot_disk), "disk", to=format)
    machine = make(drives=(DriveOptions("disk"),))
    machine.start()
    wait_until(machine, "READY")
    with machine.attach() as attachment:
        talk(attachment, "w", "stored")
    machine.stop()
    machine.start()
    with machine.attach() as attachment:
        talk(attachment, "r", "found")
    machine.kill()


def test_hardware_for_old_systems(make: Callable[..., Machine]) -> None:
    machine = make(compat=True, common=QUIET._replace(network="user"))
    machine.start()
    wait_until(machine, "READY")
    machine.stop()
    assert machine.state.exit_code == 0


def test_an_ide_disk_is_written(make: Callable[..., Machine], boot_disk: Path) -> None:
    with pytest.raises(Unsupported, match="IDE"):
        make(compat=True, drives=(DriveOptions(str(boot_disk), read_only=True),))


def test_screen_and_keys(make: Callable[..., Machine]) -> None:
    machine = make()
    with pytest.raises(Conflict):
        machine.front.take_picture()
    machine.start()
    wait_until(machine, "READY")
    before = machine.front.take_picture(format="ppm")
    assert before.startswith(b"P6\n720 400\n255\n") and len(before) == 15 + 720 * 400 * 3
    assert machine.front.take_picture().startswith(b"\x89PNG\r\n")
    machine.front.press_keys(("a", "f1"), text="b!")
    wait_until(machine, "KKKKK")  # the exclamation mark is two keys
    assert machine.front.take_picture(format="ppm") != before
    for keys, text in ((("nosuchkey",), ""), (("a--b",), ""), ((), "é")):
        with pytest.raises(UsageError):
            machine.front.press_keys(keys, text=text)
    assert not [name for name in os.listdir(machine.runtime_dir) if name.startswith("screen-")]
    for _ in range(3):  # a viewer that goes leaves room for the next one
        with socket.socket(socket.AF_UNIX) as viewer:
            viewer.settimeout(WITHIN_S)
            viewer.connect(machine.front.find_screen())
            assert viewer.recv(12) == b"RFB 003.008\n"
            viewer.sendall(b"RFB 003.008\n")
            assert viewer.recv(2) == b"\x01\x01"  # one way to show who one is: none
    machine.kill()


def test_discs_come_and_go(make: Callable[..., Machine], boot_disk: Path, tmp_path: Path) -> None:
    discs = [tmp_path / f"{number}.iso" for number in range(2)]
    for number, disc in enumerate(discs):
        disc.write_bytes(bytes([number]) * 65536)
    drives = (DriveOptions(str(boot_disk), clone=True), DriveOptions(cdrom=True))
    machine = make(drives=drives)
    machine.front.change_disc(str(discs[0]))  # it is off
    machine.start()
    wait_until(machine, "READY")

    def open_files() -> set[str]:
        place = f"/proc/{qemu_of(machine)}/fd"
        return {os.path.realpath(f"{place}/{fd}") for fd in os.listdir(place)}

    assert str(discs[0]) in open_files()
    machine.front.change_disc(str(discs[1]))
    assert str(discs[1]) in open_files()
    for wrong, problem in ((str(tmp_path / "none.iso"), NotFound), (str(tmp_path), UsageError)):
        with pytest.raises(problem):
            machine.front.change_disc(wrong)
    with pytest.raises(NotFound):
        machine.front.change_disc("", drive=1)
    machine.front.change_disc("")
    machine.front.change_disc("")  # nothing is in it
    machine.front.change_disc(str(discs[0]))
    assert [drive.path for drive in machine.spec.hardware.drives][1] == str(discs[0])  # type: ignore[union-attr]
    machine.stop()
    machine.start()
    assert str(discs[0]) in open_files()
    machine.kill()


def test_what_cloud_init_is_told(make: Callable[..., Machine], tmp_path: Path) -> None:
    for program in ("genisoimage", "ssh-keygen", "isoinfo"):
        require_program(program)
    seed = SeedOptions(user_data=b"#cloud-config\npackages: [x]\n", ssh_keys=("ssh-ed25519 AAAA me",))
    machine = make(seed=seed, common=QUIET._replace(network="user", hostname="inner"))
    machine.start()
    wait_until(machine, "READY")
    iso = f"{machine.directory}/seed.iso"

    def read(name: str) -> str:
        return subprocess.run(["isoinfo", "-J", "-i", iso, "-x", f"/{name}"], capture_output=True, text=True).stdout

    assert Path(iso).read_bytes()[0x8028:].startswith(b"CIDATA ")
    meta = json.loads(read("meta-data"))
    assert (meta["instance-id"], meta["local-hostname"]) == (machine.id, "inner")
    assert [key.split()[0] for key in meta["public-keys"]] == ["ssh-ed25519", "ssh-ed25519"]
    assert read("user-data") == "#cloud-config\npackages: [x]\n"
    assert json.loads(read("network-config"))["config"][0]["subnets"] == [{"type": "dhcp4"}]
    login = machine.front.find_login()
    assert (login.user, login.host) == ("debian", "127.0.0.1") and login.port > 1023
    socket.create_connection((login.host, login.port), timeout=10).close()  # QEMU listens
    assert os.stat(login.key).st_mode & 0o777 == 0o600
    machine.stop()
    plain = make("plain")
    with pytest.raises(Unsupported, match="cloud-init"):
        plain.front.find_login()
    with pytest.raises(UsageError, match="public key"):
        make("wrong", seed=SeedOptions(ssh_keys=("BEGIN OPENSSH PRIVATE KEY",)))


def test_a_tree_of_snapshots(make: Callable[..., Machine]) -> None:
    """Of a stopped machine and of a running one, five deep, and back again; each time its disk says what it had."""
    machine = make()
    disk = f"{machine.directory}/disk0.qcow2"

    def write(number: int) -> None:
        command = f"write -P {number} 512k 64k"
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, disk], check=True, capture_output=True)

    def content() -> int:
        shown = subprocess.run(["qemu-io", "-f", "qcow2", "-c", "read -v 512k 1", disk], capture_output=True, text=True)
        return int(shown.stdout.split()[1], 16)

    for number in range(1, 6):
        write(number)
        taken = machine.snapshots.create(f"s{number}").snapshot
        assert taken.parent == (machine.snapshots.get(f"s{number - 1}").id if number > 1 else "")
    for number in (2, 5, 1):
        machine.snapshots.restore(f"s{number}")
        assert content() == number
    write(9)
    branch = machine.snapshots.create("branch").snapshot
    assert branch.parent == machine.snapshots.get("s1").id
    left = {f"s{number}": number for number in range(1, 6)} | {"branch": 9}
    for name in ("s3", "s1"):  # from the middle, and from below: what stands on it stays
        machine.snapshots.remove(name)
        del left[name]
        for other, number in left.items():
            machine.snapshots.restore(other)
            assert content() == number
            assert subprocess.run(["qemu-img", "check", "-q", disk]).returncode == 0
    assert machine.snapshots.get("s4").parent == machine.snapshots.get("s2").id
    assert machine.snapshots.get("s2").parent == machine.snapshots.get("branch").parent == ""

    machine.start()
    wait_until(machine, "READY")
    with machine.attach() as attachment:
        talk(attachment, "w", "stored")
    taken = machine.snapshots.create("running", memory=False).snapshot
    assert (machine.state.phase, taken.memory) == ("running", False)
    assert machine.snapshots.create("whole", description="with what is in its memory").snapshot.memory
    assert machine.state.phase == "running"
    machine.snapshots.restore("s5")
    wait_until(machine, "READY", times=2)  # it ran, and so it runs again
    with machine.attach() as attachment:
        talk(attachment, "r", "absent")
    machine.snapshots.restore("running")
    wait_until(machine, "READY", times=3)
    with machine.attach() as attachment:
        talk(attachment, "r", "found")
    machine.kill()
    machine.snapshots.restore("whole")  # it goes on where it was: it does not greet again
    with machine.attach() as attachment:
        talk(attachment, "r", "found")
        assert "zzz" in talk(attachment, "zzz", "zzz")
    assert said(machine).count("READY") == 3
    machine.stop()
    assert machine.state.exit_code == 0
    assert subprocess.run(["qemu-img", "check", "-q", disk]).returncode == 0


def test_memory_goes_with_all_disks(host: Host, make: Callable[..., Machine], boot_disk: Path) -> None:
    host.disks.convert(str(boot_disk), "elsewhere")
    machine = make(drives=(DriveOptions("elsewhere"), DriveOptions(size_bytes=1 << 20)))
    machine.start()
    wait_until(machine, "READY")
    with pytest.raises(Unsupported, match="not its own"):
        machine.snapshots.create("no", memory=True)
    taken = machine.snapshots.create("disks")
    assert not taken.snapshot.memory and any("elsewhere" in line for line in taken.warnings)
    machine.kill()


def _skip_unless_built() -> None:
    """What is built from packages needs more time than a suite has, and the network that the suite is kept away from."""
    if not os.environ.get("NAGAYA_BUILD_MACHINES") or os.environ.get(own_network.CHOICE) != "host":
        pytest.skip(f"takes 10 minutes and this host's network: NAGAYA_BUILD_MACHINES=1 {own_network.CHOICE}=host")


@pytest.mark.timeout(3000)
def test_a_debian_of_our_own(empty_cli: Cli) -> None:
    """Built from the host's package sources, booted by BIOS and by UEFI to a login by ssh."""
    _skip_unless_built()
    cli = empty_cli
    ran = cli("machine", "build", "debian", "made", timeout_s=1800)
    assert ran.code == 0, ran
    for firmware in ("bios", "uefi"):
        name = f"deb-{firmware}"
        made = cli("machine", "create", name, "--disk", "made,clone", "--cloud-init", "--firmware", firmware)
        assert made.code == 0, made
        cli.ok("start", name)
        said = cli("ssh", "--wait", "900", name, "hostname; findmnt -no FSTYPE /; ls /sys/firmware", timeout_s=1000)
        assert said.code == 0 and said.out.startswith(f"{name}\next4\n"), said
        assert ("efi" in said.out.split()) == (firmware == "uefi")
        checked = cli(
            "ssh", name,
            "cloud-init status --wait; cloud-init schema --system; grep -ci 'invalid cloud-config' /var/log/cloud-init.log",
            timeout_s=600,
        )  # fmt: skip
        assert "Valid cloud-config: system userdata" in checked.out and checked.out.split()[-1] == "0", checked
        cli.ok("stop", name, timeout_s=120)
        cli.ok("rm", name)


@pytest.mark.timeout(7200)
def test_a_debian_for_another_cpu(empty_cli: Cli) -> None:
    """Its packages' programs run in an emulator while it is built; then it boots by UEFI to a login by ssh."""
    _skip_unless_built()
    for program in ("qemu-system-aarch64", "qemu-aarch64-static"):
        require_program(program)
    cli = empty_cli
    ran = cli("machine", "build", "debian", "made", "--arch", "arm64", timeout_s=5400)
    assert ran.code == 0, ran
    cli.ok("machine", "create", "arm", "--arch", "arm64", "--disk", "made,clone", "--cloud-init")
    cli.ok("start", "arm")
    said = cli("ssh", "--wait", "1500", "arm", "hostname; uname -m; findmnt -no FSTYPE /", timeout_s=1600)
    assert said.code == 0 and said.out == "arm\naarch64\next4\n", said
    cli.ok("stop", "arm", timeout_s=120)
    cli.ok("rm", "arm")


def test_qemu_has_nothing_of_the_host(make: Callable[..., Machine]) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    machine = make()
    machine.start()
    status = Path(f"/proc/{qemu_of(machine)}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split()[0] not in ("0", "65534") and fields["Groups"].strip() == ""
    assert int(fields["CapEff"], 16) == 0 and fields["NoNewPrivs"] == "1" and fields["Seccomp"] == "2"
    links = Path(f"/proc/{qemu_of(machine)}/net/dev").read_text()
    assert "eth0" not in links and "lo:" in links
    machine.kill()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"drives": ()}, UsageError),
        ({"drives": (DriveOptions("none"),)}, NotFound),
        ({"drives": (DriveOptions("/etc"),)}, UsageError),
        ({"firmware": "coreboot"}, UsageError),
        ({"architecture": "vax"}, UsageError),
        ({"type": "container"}, UsageError),
        ({"boot": "floppy"}, UsageError),
        ({"common": QUIET._replace(network="host")}, Unsupported),
        ({"drives": tuple(DriveOptions(size_bytes=1 << 20) for _ in range(17))}, UsageError),
    ],
)
def test_what_cannot_be_made(host: Host, make: Callable[..., Machine], changes: dict, problem: type) -> None:
    with pytest.raises(problem):
        make(**changes)
    machines = Path(host.paths.machines)
    assert not machines.exists() or list(machines.iterdir()) == []


def test_the_command(empty_cli: Cli, boot_disk: Path, tmp_path: Path) -> None:
    cli = empty_cli
    made = cli(
        "machine",
        "create",
        "pc",
        "--disk",
        f"{boot_disk},clone",
        "--disk",
        "1g",
        "--network",
        "none",
        "--type",
        "emulated",
    )
    assert made.code == 0, made
    cli.ok("start", "pc")
    deadline_s = time.monotonic() + WITHIN_S
    while "READY" not in cli.ok("logs", "pc"):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert cli.ok("ps", "--format", "{{.Names}} {{.Type}} {{.State}}") == "pc emulated running\n"
    assert '"firmware": "bios"' in cli.ok("inspect", "pc")
    refused = cli("exec", "pc", "true")
    assert refused.code == 125 and "whole machine" in refused.err
    cli.ok("restart", "pc")
    cli.ok("stop", "pc")
    cli.ok("rm", "pc")
    for words, status in (
        (("x", "--disk", "20q"), 1),
        (("x", "--disk", "20g,ro"), 2),
        (("x", "--disk", f"{boot_disk},colour=red"), 2),
        (("x", "--firmware", "bios"), 2),
        (("../x", "--disk", "1g"), 2),
    ):
        done = cli("machine", "create", *words)
        assert done.code == status and "Traceback" not in done.err, done
    assert cli.machines() == []
