"""Machines that install their system at the first start: with what looks like an installer from outside, and with Debian's."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nagaya import Host, Machine
from nagaya.errors import Conflict, IntegrityError, NagayaError, NotFound, Unsupported, UsageError
from nagaya.manager.hardware import DriveOptions, InstallOptions, SeedOptions
from nagaya.storage.disk_images.installer import INITRAMFS
from tests import own_network
from tests.conftest import require_program
from tests.e2e.command import Cli
from tests.kernel.conftest import QUIET
from tests.kernel.debian_mirror import DIRECTORY, Mirror

SOURCE = os.path.join(os.path.dirname(__file__), "fake_installer.S")
WITHIN_S = 60.0
INSTALLED, ASKS, SILENT = range(3)
NEW = (DriveOptions(size_bytes=1 << 20),)


def make_installer(place: Path, said: int, *, restarts: bool = True) -> str:
    """A netboot directory."""
    for program in ("as", "ld", "ssh-keygen"):
        require_program(program)
    place.mkdir(exist_ok=True)
    words = ["--defsym", f"SAID={said}", "--defsym", f"RESTART={int(restarts)}"]
    subprocess.run(["as", "--32", *words, SOURCE, "-o", place / "object"], check=True)
    link = ["ld", "-m", "elf_i386", "-Ttext", "0", "--oformat", "binary", "-o", place / "linux", place / "object"]
    subprocess.run(link, check=True)
    (place / "initrd.gz").write_bytes(b"odd")
    return str(place)


@pytest.fixture
def install(make: Callable[..., Machine], tmp_path: Path) -> Callable[..., Machine]:
    def create(said: int, *, restarts: bool = True, **changes: object) -> Machine:
        source = make_installer(tmp_path / "installer", said, restarts=restarts)
        return make(drives=NEW, install=InstallOptions(source, b"d-i mirror/x string y\n"), **changes)

    return create


def said(machine: Machine) -> str:
    return b"".join(line.data for line in machine.logs()).decode()


def wait_for(condition: Callable[[], bool], machine: Machine) -> None:
    deadline_s = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline_s, (machine.state, said(machine))
        time.sleep(0.02)


def command_of(machine: Machine) -> str:
    try:
        return Path(f"/proc/{machine.state.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def test_it_installs_and_boots(host: Host, install: Callable[..., Machine], boot_disk: Path) -> None:
    """Its disk has a system from the beginning here: what counts is that it is not booted before the installer was."""
    machine = install(INSTALLED)
    disk = f"{machine.directory}/disk0.qcow2"
    subprocess.run(["qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", boot_disk, disk], check=True)
    with pytest.raises(Conflict, match="not installed yet"):
        machine.snapshots.create("early")
    machine.start()
    wait_for(lambda: "READY" in said(machine), machine)
    assert said(machine).index("the system is installed") < said(machine).index("READY")
    assert (machine.state.phase, machine.state.installing, machine.state.restarts) == ("running", False, 0)
    assert "-kernel" not in command_of(machine)
    assert not os.path.exists(f"{machine.directory}/install")
    machine.stop()
    machine.start()
    wait_for(lambda: said(machine).count("READY") == 2, machine)
    assert said(machine).count("the system is installed") == 1
    machine.kill()
    machine.snapshots.create("later")


def test_how_it_is_started(install: Callable[..., Machine]) -> None:
    machine = install(SILENT, restarts=False)
    machine.start()
    command = command_of(machine)
    assert (
        "-no-reboot" in command and " --- console=ttyS0,115200 " in command and "auto=true priority=critical" in command
    )
    assert machine.state.installing and any("being installed" in line for line in machine.state.warnings)
    with pytest.raises(Conflict, match="not installed yet"):
        machine.snapshots.create("early")
    began = time.monotonic()
    machine.stop()  # it has no power button
    assert time.monotonic() - began < 10
    assert machine.state.exit_code == 137 and os.path.isdir(f"{machine.directory}/install")


def test_an_end_before_its_end(install: Callable[..., Machine]) -> None:
    """It restarts without having said that it is done; its policy does not make it try for ever."""
    from nagaya.model.spec import Restart

    machine = install(SILENT, common=QUIET._replace(restart=Restart("always")))
    for _ in range(2):  # the second start begins anew
        machine.start()
        assert machine.wait() == 1
        assert "did not finish" in machine.state.error and machine.state.installing
        assert machine.state.restarts == 0 and machine.state.phase == "exited"


def test_a_question(install: Callable[..., Machine]) -> None:
    machine = install(ASKS, restarts=False)
    machine.start()
    assert machine.wait() == 125
    assert "asks what it has no answer to: The mirror does not answer. Try again?" in machine.state.error


@pytest.mark.parametrize("whom", ["qemu", "supervisor"])
def test_killed_in_the_middle(install: Callable[..., Machine], whom: str) -> None:
    machine = install(SILENT, restarts=False)
    machine.start()
    pid = machine.state.pid
    parent = int(re.search(r"^PPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)[1])  # type: ignore[index]
    os.kill(pid if whom == "qemu" else parent, signal.SIGKILL)
    wait_for(lambda: machine.state.phase == "exited" and not os.path.exists(f"/proc/{pid}"), machine)
    assert machine.state.installing and os.path.isdir(f"{machine.directory}/install")
    assert ("installs anew" in machine.state.error) == (whom == "supervisor")
    machine.start()
    assert machine.state.installing and "-kernel" in command_of(machine)
    machine.kill()


def test_a_disc(make: Callable[..., Machine], tmp_path: Path) -> None:
    """It is in a drive until the system is there, and not needed any more then."""
    for program in ("genisoimage", "bsdtar"):
        require_program(program)
    tree = tmp_path / "tree"
    tree.mkdir()
    for name, kind in (("install.amd", INSTALLED), ("doc", SILENT)):
        made = Path(make_installer(tree / name, kind))
        (made / "linux").rename(made / "vmlinuz")
    disc = tmp_path / "disc.iso"
    subprocess.run(["genisoimage", "-quiet", "-R", "-o", disc, tree], check=True)
    machine = make(drives=NEW, install=InstallOptions(str(disc)))
    assert [drive.cdrom for drive in machine.spec.hardware.drives] == [False]  # type: ignore[union-attr]
    machine.start()
    wait_for(lambda: not machine.state.installing, machine)
    machine.kill()
    disc.unlink()
    machine.start()
    machine.kill()


@pytest.mark.parametrize(
    ("changes", "problem", "words"),
    [
        ({"install": InstallOptions("/nowhere.iso")}, NotFound, "no installer"),
        ({"install": InstallOptions("/etc")}, NotFound, "linux is missing"),
        ({"install": InstallOptions("debian:potato")}, UsageError, "no Debian 'potato'"),
        ({"install": InstallOptions("debian:sid")}, Unsupported, "in no package"),
        ({"drives": (DriveOptions(cdrom=True),)}, UsageError, "needs a new disk"),
        ({"firmware": "direct", "type": "kvm"}, NagayaError, "KVM|VMM"),
        ({"firmware": "uefi", "secure_boot": True}, Unsupported, "secure boot"),
        ({"seed": SeedOptions(user="me")}, UsageError, "no cloud-init"),
        ({"seed": SeedOptions(ssh_keys=("nonsense",))}, UsageError, "no public key"),
        ({"install": InstallOptions("X", b"a\0b")}, UsageError, "no text"),
        ({"install": InstallOptions("X", b"#" * (1 << 20) + b"#")}, UsageError, "more than 1 MiB"),
    ],
)
def test_what_is_refused(
    host: Host, make: Callable[..., Machine], tmp_path: Path, changes: dict, problem: type, words: str
) -> None:
    source = make_installer(tmp_path / "installer", INSTALLED)
    options: dict = {"drives": NEW, "install": InstallOptions(source), **changes}
    with pytest.raises(problem, match=words):
        make(**options)
    left = os.listdir(host.paths.machines) if os.path.isdir(host.paths.machines) else []
    assert left == []


@pytest.mark.parametrize(
    ("content", "problem", "words"),
    [
        ({}, NotFound, "no Debian installer"),
        ({"install.amd/vmlinuz": b"MZ"}, NotFound, "no Debian installer"),  # without its initramfs
        ({"install.386/vmlinuz": b"MZ", "install.386/initrd.gz": b"x"}, Unsupported, "another CPU"),
        (None, IntegrityError, "cannot be read"),
    ],
)
def test_discs_without_an_installer(
    make: Callable[..., Machine], tmp_path: Path, content: dict[str, bytes] | None, problem: type, words: str
) -> None:
    for program in ("genisoimage", "bsdtar"):
        require_program(program)
    disc, tree = tmp_path / "disc.iso", tmp_path / "tree"
    tree.mkdir()
    if content is None:
        disc.write_bytes(os.urandom(1 << 20))
    else:
        for name, data in {"readme": b"-", **content}.items():
            (tree / name).parent.mkdir(exist_ok=True)
            (tree / name).write_bytes(data)
        subprocess.run(["genisoimage", "-quiet", "-R", "-o", disc, tree], check=True)
    with pytest.raises(problem, match=words):
        make(drives=NEW, install=InstallOptions(str(disc)))


def test_the_command(empty_cli: Cli, tmp_path: Path) -> None:
    cli, source = empty_cli, make_installer(tmp_path / "installer", SILENT, restarts=False)
    made = cli("machine", "create", "new", "--disk", "1g", "--install", source, "--type", "emulated")
    assert made.code == 0, made
    started = cli("start", "new")
    assert started.code == 0 and "nagaya logs -f new" in started.err
    assert "(Installing)" in cli.ok("ps", "--format", "{{.Status}}")
    cli.ok("rm", "-f", "new")
    for words, status in (
        (("--preseed", "/etc/hostname"), 2),
        (("--install", source, "--preseed", "/nowhere"), 2),
        (("--install", source, "--cloud-init"), 2),
        (("--install", "/nowhere"), 1),
    ):
        done = cli("machine", "create", "x", "--disk", "1g", *words)
        assert done.code == status and "Traceback" not in done.err, done
    assert cli.machines() == []


@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("firmware", ["bios", "uefi"])
def test_debians_own_installer(empty_cli: Cli, tmp_path: Path, firmware: str) -> None:
    """From the host's package sources to a login by ssh; at the end it is a machine as any other."""
    if not os.environ.get("NAGAYA_INSTALL") or os.environ.get(own_network.CHOICE) != "host":
        pytest.skip(
            f"takes an hour where it is emulated, and this host's network: NAGAYA_INSTALL=1 {own_network.CHOICE}=host"
        )
    for program in ("bsdtar", "ssh", "apt-get"):
        require_program(program)
    cli, mirror = empty_cli, Mirror("trixie", "amd64", tmp_path)
    with mirror.serve() as port:
        own = tmp_path / "own.cfg"
        own.write_text(
            f"d-i mirror/http/hostname string 10.0.2.2:{port}\nd-i mirror/http/directory string {DIRECTORY}\n"
            "d-i debian-installer/allow_unauthenticated boolean true\n"
        )
        words = ("--disk", "8g", "--cpus", "2", "--install", "debian:trixie", "--preseed", str(own))
        made = cli("machine", "create", "deb", "--firmware", firmware, *words, timeout_s=600)
        assert made.code == 0, made
        mirror.prepare(f"{cli.root}/machines/{made.out.strip()}/install/{INITRAMFS}")
        cli.ok("start", "deb")
        said = cli(
            "ssh", "--wait", "12000", "deb", "hostname; findmnt -no FSTYPE /; cat /etc/debian_version; ls /sys/firmware",
            timeout_s=13000,
        )  # fmt: skip
        log = cli.ok("logs", "deb")[-3000:]
        assert said.code == 0 and said.out.startswith("deb\next4\n13."), (said, log, mirror.missing)
        assert ("efi" in said.out.split()) == (firmware == "uefi")
        assert "(Installing)" not in cli.ok("ps", "--format", "{{.Status}}")
        cli.ok("stop", "deb", timeout_s=120)
        cli.ok("snapshot", "create", "deb", "fresh", timeout_s=120)
        cli.ok("start", "deb")
        assert cli("ssh", "--wait", "1200", "deb", "true", timeout_s=1300).code == 0
        cli.ok("stop", "deb", timeout_s=120)
        cli.ok("rm", "deb")
