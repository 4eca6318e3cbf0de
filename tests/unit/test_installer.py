"""Installers of systems: the answers that they get, where they come from, and what is understood of what they say."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path
from struct import pack

import pytest

from nagaya.errors import IntegrityError, NotFound, Unsupported, UsageError
from nagaya.images.sources.apt_sources import AptSource
from nagaya.manager.hardware import InstallOptions
from nagaya.manager.installing import Installer, find_mirror, find_proxy, plan_answers
from nagaya.model.spec import Drive, Hardware, Install, MachineSpec, Process
from nagaya.storage.disk_images import installer
from nagaya.storage.disk_images.installer import InstallerFiles
from nagaya.storage.disk_images.installer_source import check_kernel, take_from_directory
from nagaya.storage.disk_images.preseed import Answers, Mirror, make_preseed, split_mirror
from nagaya.supervisor.installing import question
from tests.conftest import require_program


def answers(preseed: bytes) -> dict[str, str]:
    """As debconf-set-selections(1) reads them: owner, question, type, value; the last one wins."""
    found = {}
    for line in preseed.decode().splitlines():
        words = line.split(maxsplit=3)
        if words and not line.startswith("#"):
            found[words[1]] = words[3] if len(words) > 3 else ""
    return found


def test_answers() -> None:
    mirror = Mirror("http://one.example/debian/", "bookworm", "http://two.example:81/s/security", "http://proxy:3128")
    got = answers(make_preseed(Answers("web", "/dev/vda", mirror)))
    assert (got["netcfg/hostname"], got["partman-auto/disk"]) == ("web", "/dev/vda")
    assert (got["mirror/protocol"], got["mirror/http/hostname"], got["mirror/http/directory"]) == (
        "http", "one.example", "/debian",
    )  # fmt: skip
    assert (got["mirror/suite"], got["mirror/http/proxy"]) == ("bookworm", "http://proxy:3128")
    assert (got["apt-setup/security_host"], got["apt-setup/security_path"]) == ("two.example:81", "/s/security")
    assert got["apt-setup/services-select"] == "security, updates"
    assert "openssh-server" in got["pkgsel/include"] and got["passwd/root-password-crypted"] == "*"


def test_answers_without_a_mirror() -> None:
    got = answers(make_preseed(Answers("web", "/dev/sda", None)))
    assert got["apt-setup/use_mirror"] == "false" and not any(key.startswith("mirror/") for key in got)
    https = answers(make_preseed(Answers("web", "/dev/sda", Mirror("https://one.example/debian"))))
    assert https["mirror/https/hostname"] == "one.example" and https["apt-setup/services-select"] == "updates"


def test_the_users_answers_win() -> None:
    files = InstallerFiles("linux", "initrd.gz", "disc.iso")
    own = b"d-i time/zone string Europe/Berlin\nd-i mirror/http/hostname string mine.example\n"
    made = plan_answers(InstallOptions("x", own), Installer(files), hostname="a_b.example", compat=True)
    got = answers(made)
    assert (got["time/zone"], got["mirror/http/hostname"]) == ("Europe/Berlin", "mine.example")
    assert (got["netcfg/get_hostname"], got["partman-auto/disk"]) == ("a-b", "/dev/sda")


def test_an_installer_without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nagaya.manager.installing.find_debian_sources", list)
    for disc, preseed, refused in (
        ("", b"", True), ("/x.iso", b"", False), ("", b"d-i mirror/http/hostname string h\n", False),
    ):  # fmt: skip
        options, found = InstallOptions("x", preseed), Installer(InstallerFiles("linux", "initrd.gz", disc))
        if refused:
            with pytest.raises(UsageError, match="no Debian sources"):
                plan_answers(options, found, hostname="x", compat=False)
        else:
            assert b"use_mirror boolean false" in plan_answers(options, found, hostname="x", compat=False)


def test_where_packages_come_from() -> None:
    sources = [
        AptSource("cdrom:[Debian]", ("bookworm",), ("main",)),
        AptSource("http://user:secret@three.example/debian", ("bookworm",), ("main",)),
        AptSource("http://one.example/debian", ("bookworm", "bookworm-updates"), ("main",)),
        AptSource("http://two.example/debian-security", ("bookworm-security",), ("main",)),
    ]
    found = find_mirror(sources, "trixie")
    assert found is not None
    assert found[:3] == ("http://one.example/debian", "trixie", "http://two.example/debian-security")
    assert find_mirror(sources[:2], "") is None
    lines = ['Acquire::http::Proxy "http://p:1";', 'Acquire::https::Proxy "DIRECT";']
    assert (find_proxy(lines, "http"), find_proxy(lines, "https"), find_proxy([], "http")) == ("http://p:1", "", "")
    for wrong in ("ftp://one.example/debian", "http://a:b@one.example/", "file:/srv", "http:///debian"):
        with pytest.raises(UsageError, match="over HTTP"):
            split_mirror(wrong)


def kernel(machine: int) -> bytes:
    return b"MZ".ljust(0x3C, b"\0") + pack("<I", 0x80) + bytes(0x40) + b"PE\0\0" + pack("<H", machine) + bytes(64)


def test_whose_kernel_it_is(tmp_path: Path) -> None:
    path = tmp_path / "linux"
    for machine, architecture in ((0x8664, "x86_64"), (0xAA64, "aarch64"), (0x5064, "riscv64")):
        path.write_bytes(kernel(machine))
        check_kernel(str(path), architecture=architecture)
        with pytest.raises(NotFound, match=r"initrd.gz is missing"):
            take_from_directory(str(tmp_path), architecture=architecture)
    with pytest.raises(Unsupported, match="for riscv64, and the machine's CPU is x86_64"):
        check_kernel(str(path), architecture="x86_64")
    path.write_bytes(kernel(0x014C))
    with pytest.raises(Unsupported, match="another CPU"):
        check_kernel(str(path), architecture="x86_64")
    for wrong in (b"", b"MZ", b"MZ".ljust(0x3C, b"\0") + b"\xff\xff\xff\xff", b"MZ".ljust(64, b"\0"), b"\x7fELF" * 99):
        path.write_bytes(wrong)
        with pytest.raises(IntegrityError, match="no kernel"):
            check_kernel(str(path), architecture="x86_64")


def spec(disc: str = "", platform: str = "linux/amd64") -> MachineSpec:
    drive = Drive("disk0.qcow2", "qcow2", own=True)
    return MachineSpec(
        "0" * 32, "m", "emulated", "", "", platform, Process(("bios",)), "m", 0,
        hardware=Hardware(drives=(drive,), install=Install("x", disc)),
    )  # fmt: skip


def test_what_a_machine_gets(tmp_path: Path) -> None:
    """Its initramfs is the installer's with another archive behind it, as the kernel unpacks them."""
    require_program("bsdtar")
    source, directory = tmp_path / "source", tmp_path / "machine"
    source.mkdir()
    directory.mkdir()
    (source / "linux").write_bytes(kernel(0x8664))
    (source / "initrd.gz").write_bytes(b"\x1f\x8bodd")
    files = take_from_directory(str(source), architecture="x86_64")
    assert installer.find_in(str(directory), spec()) is None
    installer.put_into(str(directory), files, b"d-i a/b string c\n", ("ssh-ed25519 AAAA one", "ssh-rsa BBBB two"))
    plan = installer.find_in(str(directory), spec())
    assert plan is not None and Path(plan.kernel).read_bytes() == kernel(0x8664)
    assert plan.command_line.split(" --- ")[1] == "console=ttyS0,115200"
    assert stat.S_IMODE(os.stat(plan.initramfs).st_mode) == 0o644  # QEMU's user is another one
    whole = Path(plan.initramfs).read_bytes()
    assert whole[:8] == b"\x1f\x8bodd\0\0\0" and whole[8:14] == b"070701"
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(["bsdtar", "-xf", "-", "-C", out], input=whole[8:], check=True)
    assert (out / "preseed.cfg").read_bytes() == b"d-i a/b string c\n"
    assert (out / "authorized_keys").read_text() == "ssh-ed25519 AAAA one\nssh-rsa BBBB two\n"
    steps = out / "usr/lib/finish-install.d"
    assert sorted(os.listdir(steps)) == ["90nagaya", "96nagaya"]
    assert all(os.access(steps / name, os.X_OK) for name in os.listdir(steps))
    assert installer.MARK.decode() in (steps / "96nagaya").read_text()
    Path(plan.kernel).unlink()
    with pytest.raises(IntegrityError, match="missing"):
        installer.find_in(str(directory), spec())
    installer.settle(str(directory))
    assert not installer.is_installing(str(directory)) and os.listdir(directory) == []


def test_a_disc_is_there_meanwhile() -> None:
    with_disc = installer.with_disc(spec("/srv/disc.iso")).hardware
    assert with_disc is not None and [drive.path for drive in with_disc.drives] == ["disk0.qcow2", "/srv/disc.iso"]
    assert with_disc.drives[1].cdrom and with_disc.drives[1].read_only
    assert installer.with_disc(spec()) == spec()


def test_what_an_installer_asks() -> None:
    said = (
        b"Loading additional components  ... 5%\n\nDownload installer components\n-----------------------------\n\n"
        b"The installer failed to download a file.\nTry again?\n  1: Retry [*],  2: Cancel,\n"
        b"Prompt: '?' for help, default=1> "
    )
    assert question(said) == "The installer failed to download a file. Try again? 1: Retry [*], 2: Cancel,"
    assert question(b"A note\n[Press enter to continue]") == "A note [Press enter to continue]"
    assert len(question(b"x" * 4000 + b"Prompt: > ")) == 301
    assert question(b"\x1b[31mred\xff\nPrompt: > ").isprintable()
