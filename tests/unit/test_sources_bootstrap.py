"""Images made here: which suite a name means, which archives are Debian's, and an mmdebstrap that can be told to fail.

The real mmdebstrap takes half a minute and a network: tests/e2e runs it.
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nagaya.errors import LaunchError, NagayaError, Unsupported
from nagaya.images.content import Blobs
from nagaya.images.manifest import host_platform, parse_config, parse_manifest
from nagaya.images.progress import Silent
from nagaya.images.references import parse_reference
from nagaya.images.sources import apt_sources, bootstrap
from nagaya.images.sources.bootstrap import BusyboxSource, DebianSource, find_bootstrap, is_static
from tests.unit.sources_material import Heard, layer_tar, partial_files, stored_digests

KEY = "/usr/share/keyrings/debian-archive-keyring.gpg"
DEB822 = f"""
# a comment
Types: deb deb-src
URIs: http://mirror.example/debian https://other.example/debian/
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: {KEY}

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Enabled: yes
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBF

Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main
Enabled: no

Types: deb-src
URIs: http://source.example/debian
Suites: bookworm
Components: main
"""
ONE_LINE = """
deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.example/debian bookworm main # why
deb-src http://mirror.example/debian bookworm main
# deb http://off.example/debian bookworm main
deb [ trusted=yes ] http://mirror.example/debian bookworm-backports main
deb http://broken.example
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


# -- names


@pytest.mark.parametrize(
    ("name", "suite"),
    [
        ("debian:bookworm", "bookworm"),
        ("debian:12", "bookworm"),
        ("debian:12-slim", "bookworm"),
        ("debian:trixie-slim", "trixie"),
        ("debian:13", "trixie"),
        ("debian:sid", "sid"),
        ("debian:stable", "stable"),
        ("debian:99", ""),
        ("debian:bookworm-20240101", ""),
        ("debian:nonsense", ""),
        ("ubuntu:latest", ""),
        ("busybox:1.36", ""),
    ],
)
def test_which_suite_a_name_means(name: str, suite: str) -> None:
    found = find_bootstrap(parse_reference(name))
    assert (f"bootstrap debian {suite} (mmdebstrap)" if suite else None) == (found.label if found else None)


def test_latest_is_this_hosts_own_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "host_suite", lambda: "trixie")
    found = find_bootstrap(parse_reference("debian"))
    assert found is not None
    assert "trixie" in found.label
    found = find_bootstrap(parse_reference("busybox"))
    assert found is not None
    assert "busybox-static" in found.label


# -- apt's sources


def test_stanzas_are_read() -> None:
    first, second, third = apt_sources.parse_deb822(DEB822)
    suites = ("bookworm", "bookworm-updates")
    assert first == apt_sources.AptSource(
        "http://mirror.example/debian", suites, ("main", "contrib"), (f"signed-by={KEY}",)
    )
    assert second.uri == "https://other.example/debian/"
    assert third == apt_sources.AptSource("http://mirror.example/debian-security", ("bookworm-security",), ("main",))


def test_lines_are_read() -> None:
    first, second = apt_sources.parse_one_line(ONE_LINE)
    assert first == apt_sources.AptSource(
        "http://mirror.example/debian", ("bookworm",), ("main",), ("arch=amd64", f"signed-by={KEY}")
    )
    assert second.suites == ("bookworm-backports",)


def test_both_formats_are_found_and_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt_sources, "LISTS", str(tmp_path / "lists"))
    parts = tmp_path / "apt" / "sources.list.d"
    parts.mkdir(parents=True)
    (tmp_path / "apt" / "sources.list").write_text("deb http://a.example/debian sid main\n")
    (parts / "b.sources").write_text(DEB822)
    (parts / "c.list.disabled").write_text("deb http://c.example/debian sid main\n")
    (parts / "d.list").write_text("deb [signed-by=/usr/share/keyrings/vendor.gpg] http://d.example/apt stable main\n")
    (parts / "e.list").write_text("deb http://e.example/node nodistro main\ndeb http://e.example/x bookworm stable\n")
    found = {source.uri for source in apt_sources.find_debian_sources(str(tmp_path / "apt"))}
    assert found == {
        "http://a.example/debian",
        "http://mirror.example/debian",
        "https://other.example/debian/",
        "http://mirror.example/debian-security",
    }
    assert apt_sources.find_debian_sources(str(tmp_path / "missing")) == []


def release(directory: Path, name: str, origin: str, date: str = "Sat, 07 Jun 2025 09:45:00 UTC") -> None:
    directory.mkdir(exist_ok=True)
    text = f"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\nOrigin: {origin}\nSuite: x\nDate: {date}\nMD5Sum:\n abc 1 f\n"
    (directory / f"{name}_InRelease").write_text(text)


def test_an_archive_is_whose_it_says_it_is(tmp_path: Path) -> None:
    """A third party's "stable main", and a company's mirror of Debian under a key of its own."""
    release(tmp_path, "vendor.example_apt_dists_stable", "Vendor, Inc.")
    release(tmp_path, "mirror.example:8080_de%5fbian_dists_bookworm", "Debian")
    origins = apt_sources.find_origins(str(tmp_path))
    vendor = apt_sources.AptSource("https://vendor.example/apt", ("stable",), ("main",))
    mirror = apt_sources.AptSource(
        "http://me:pw@mirror.example:8080/de_bian/", ("bookworm",), ("main",), ("signed-by=/etc/apt/keyrings/own.gpg",)
    )
    assert not apt_sources.is_debian(vendor, origins)
    assert apt_sources.is_debian(mirror, origins)
    assert not apt_sources.is_debian(mirror)  # nothing known yet: the key decides


def test_the_date_of_a_suite_is_its_youngest_release(tmp_path: Path) -> None:
    release(tmp_path, "m_debian_dists_bookworm", "Debian", "Sat, 07 Jun 2025 09:45:00 UTC")
    release(tmp_path, "m_debian_dists_bookworm-updates", "Debian", "Sun, 08 Jun 2025 09:45:00 UTC")
    release(tmp_path, "m_debian_dists_trixie", "Debian", "Mon, 09 Jun 2025 09:45:00 UTC")
    release(tmp_path, "v_dists_bookworm", "Vendor", "Tue, 10 Jun 2025 09:45:00 UTC")
    release(tmp_path, "w_dists_bookworm", "Debian", "no date")
    assert apt_sources.find_release_date("bookworm", str(tmp_path)) == 1749375900
    assert apt_sources.find_release_date("sid", str(tmp_path)) == 0
    assert apt_sources.find_release_date("sid", str(tmp_path / "missing")) == 0


def test_another_suite_is_put_in_the_place_of_the_hosts() -> None:
    sources = apt_sources.parse_deb822(DEB822)
    assert apt_sources.rewrite_suite(sources, "trixie") == [
        f"deb [signed-by={KEY}] http://mirror.example/debian trixie main contrib",
        f"deb [signed-by={KEY}] http://mirror.example/debian trixie-updates main contrib",
        f"deb [signed-by={KEY}] https://other.example/debian/ trixie main contrib",
        f"deb [signed-by={KEY}] https://other.example/debian/ trixie-updates main contrib",
        "deb http://mirror.example/debian-security trixie-security main",
    ]
    assert all(" sid " in line for line in apt_sources.rewrite_suite(sources, "sid"))
    assert len(apt_sources.rewrite_suite(sources, "sid")) == 2
    assert apt_sources.rewrite_suite(apt_sources.parse_one_line(ONE_LINE)[1:], "trixie") == []  # backports alone


# -- debian, by a mmdebstrap of our own


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of programs before the real ones, and an apt that is ours."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    sources = [apt_sources.AptSource("http://mirror.example/debian", ("bookworm",), ("main",))]
    monkeypatch.setattr(bootstrap, "find_debian_sources", lambda: sources)
    monkeypatch.setattr(bootstrap, "find_release_date", lambda suite: 1749375900)
    return directory


def program(directory: Path, name: str, script: str) -> None:
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


def test_what_mmdebstrap_makes_becomes_an_image(programs: Path, root: Path, tmp_path: Path) -> None:
    plain = layer_tar({"etc/os-release": b"ID=debian\n"})
    (tmp_path / "rootfs.tar").write_bytes(plain)
    program(
        programs,
        "apt-config",
        "printf '%s\\n' 'Acquire::http::Proxy \"http://proxy.example:3128\";' 'APT::Other \"1\";'",
    )
    program(
        programs,
        "mmdebstrap",
        f'printf "%s\\n" "$@" "EPOCH $SOURCE_DATE_EPOCH" > {tmp_path}/asked\n'
        f'echo "I: running apt-get update..." >&2\ncat {tmp_path}/rootfs.tar',
    )
    heard = Heard()
    blobs = Blobs(str(root))
    got = DebianSource("bookworm", slim=True).fetch(blobs, platform="", progress=heard)
    config = parse_config(blobs.read(parse_manifest(blobs.read(got.digest)).config.digest))
    assert config.config.command == ("bash",)
    assert config.config.env[0].startswith("PATH=")
    assert config.platform == host_platform()
    assert config.created_ns == 1749375900 * 10**9
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[:2] == ["--variant=minbase", "--format=tar"]
    assert asked[-4:] == ["bookworm", "-", "deb http://mirror.example/debian bookworm main", "EPOCH 1749375900"]
    assert '--aptopt=Acquire::http::Proxy "http://proxy.example:3128";' in asked
    assert "--dpkgopt=path-exclude=/usr/share/doc/*" in asked
    assert heard.steps == ["mmdebstrap: running apt-get update..."]
    again = DebianSource("bookworm", slim=True).fetch(Blobs(f"{root}2"), platform="", progress=Silent())
    assert again.digest == got.digest, "the same packages make the same image"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "echo 'E: Unable to locate package x' >&2; echo 'I: removing tempdir' >&2; exit 25",
            "Unable to locate package x",
        ),
        ("cat TAR; echo 'E: it broke at the end' >&2; exit 1", "it broke at the end"),
        ("exit 3", "status 3"),
        ("exit 0", "status 0"),
        ("kill -9 $$", "status -9"),
    ],
)
def test_a_failing_mmdebstrap_is_told_and_leaves_nothing(
    programs: Path, root: Path, tmp_path: Path, script: str, said: str
) -> None:
    (tmp_path / "rootfs.tar").write_bytes(layer_tar({"x": b"1"}))
    program(programs, "mmdebstrap", script.replace("TAR", f"{tmp_path}/rootfs.tar"))
    with pytest.raises(LaunchError, match="mmdebstrap failed") as caught:
        DebianSource("bookworm").fetch(Blobs(str(root)), platform="", progress=Silent())
    assert said in caught.value.message
    assert stored_digests(root) == set()
    assert partial_files(root) == []


def test_a_cut_off_tar_does_not_become_an_image(programs: Path, root: Path) -> None:
    """Status 0 with half a tar is for the unpacker to find; without a status it is not even a blob."""
    program(programs, "mmdebstrap", "head -c 100000 /dev/zero; kill -9 $$")
    with pytest.raises(LaunchError):
        DebianSource("bookworm").fetch(Blobs(str(root)), platform="", progress=Silent())
    assert stored_digests(root) == set()


def test_without_mmdebstrap_it_says_what_to_install(
    programs: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(Unsupported) as caught:
        DebianSource("bookworm").fetch(Blobs(str(root)), platform="", progress=Silent())
    assert caught.value.hint == "apt install mmdebstrap"


def test_without_debians_archives_it_says_so(programs: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "find_debian_sources", list)
    with pytest.raises(Unsupported, match="no Debian sources"):
        DebianSource("bookworm").fetch(Blobs(str(root)), platform="", progress=Silent())


def test_another_platforms_debian(programs: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = apt_sources.AptSource("http://mirror.example/debian", ("bookworm",), ("main",), ("arch=amd64", "trusted=yes"))
    monkeypatch.setattr(bootstrap, "find_debian_sources", lambda: [own])
    (tmp_path / "rootfs.tar").write_bytes(layer_tar({"x": b"1"}))
    program(programs, "mmdebstrap", f'printf "%s\\n" "$@" > {tmp_path}/asked\ncat {tmp_path}/rootfs.tar')
    blobs = Blobs(str(root))
    got = DebianSource("bookworm").fetch(blobs, platform="linux/s390x", progress=Silent())
    config = parse_config(blobs.read(parse_manifest(blobs.read(got.digest)).config.digest))
    assert config.platform == "linux/s390x"
    asked = (tmp_path / "asked").read_text().splitlines()
    assert "--architectures=s390x" in asked
    assert asked[-1] == "deb [trusted=yes] http://mirror.example/debian bookworm main"
    program(programs, "mmdebstrap", "echo 'E: install arch-test for foreign architecture support' >&2; exit 1")
    with pytest.raises(LaunchError, match="arch-test") as caught:
        DebianSource("bookworm").fetch(blobs, platform="linux/s390x", progress=Silent())
    assert "qemu-user-static" in caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a plain user's mmdebstrap enters a namespace of its own")
def test_another_platforms_programs_run_in_an_emulator(
    programs: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the host is told nothing of: mmdebstrap runs where it is known, and does not look for it elsewhere."""
    entered = tmp_path / "entered"

    @contextmanager
    def double(architecture: str) -> Iterator[Callable[[], None]]:
        assert architecture == "riscv64"
        yield lambda: entered.touch()

    own = apt_sources.AptSource("http://mirror.example/debian", ("trixie",), ("main",), ())
    monkeypatch.setattr(bootstrap, "find_debian_sources", lambda: [own])
    monkeypatch.setattr(bootstrap, "find_emulator", lambda architecture: "/usr/bin/qemu")
    monkeypatch.setattr(bootstrap, "foreign_programs", double)
    (tmp_path / "rootfs.tar").write_bytes(layer_tar({"x": b"1"}))
    program(programs, "mmdebstrap", f'printf "%s\\n" "$@" > {tmp_path}/asked\ncat {tmp_path}/rootfs.tar')
    DebianSource("trixie").fetch(Blobs(str(root)), platform="linux/riscv64", progress=Silent())
    asked = (tmp_path / "asked").read_text().splitlines()
    assert {"--skip=check/qemu", "--architectures=riscv64"} <= set(asked) and entered.exists()
    entered.unlink()
    DebianSource("trixie").fetch(Blobs(str(root)), platform="", progress=Silent())
    assert "--skip=check/qemu" not in (tmp_path / "asked").read_text() and not entered.exists()


def test_releases_before_a_cpu_was_there(root: Path) -> None:
    with pytest.raises(Unsupported, match="bookworm was not made for riscv64") as caught:
        DebianSource("bookworm").fetch(Blobs(str(root)), platform="linux/riscv64", progress=Silent())
    assert "debian:trixie" in caught.value.hint


def test_platforms_that_there_are_none_for(root: Path) -> None:
    with pytest.raises(Unsupported, match="no Debian for linux/mips"):
        DebianSource("bookworm").fetch(Blobs(str(root)), platform="linux/mips", progress=Silent())
    with pytest.raises(Unsupported, match="for this host only"):
        BusyboxSource().fetch(Blobs(str(root)), platform="linux/s390x", progress=Silent())


HANG = "trap 'rm {place}/work; exit 1' TERM\ntouch {place}/work\necho $$ > {place}/pid\nwhile :; do sleep 0.05; done"


def await_file(path: Path) -> None:
    deadline = time.monotonic() + 10
    while not path.exists() or not path.read_text().strip():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.01)


def await_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while _runs(pid):
        assert time.monotonic() < deadline, f"{pid} is still there"
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    """A zombie does not: it is an orphan, and not every container has a PID 1 that reaps."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


PULL = """
from nagaya.images.content import Blobs
from nagaya.images.progress import Silent
from nagaya.images.sources import apt_sources, bootstrap
bootstrap.find_debian_sources = lambda: [apt_sources.AptSource("http://x", ("bookworm",), ("main",))]
bootstrap.DebianSource("bookworm").fetch(Blobs({root!r}), platform="", progress=Silent())
"""


@pytest.mark.timeout(40)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_pull_that_ends_takes_mmdebstrap_with_it(
    programs: Path, root: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """By Ctrl-C, or killed: either way mmdebstrap is asked to end, so that it can remove its directory."""
    program(programs, "mmdebstrap", HANG.format(place=tmp_path))
    puller = subprocess.Popen([sys.executable, "-c", PULL.format(root=str(root))], stderr=subprocess.DEVNULL)
    try:
        await_file(tmp_path / "pid")
        puller.send_signal(number)
        assert puller.wait(20) == -number
    finally:
        puller.kill()
        puller.wait()
    await_gone(int((tmp_path / "pid").read_text()))
    assert not (tmp_path / "work").exists()
    assert stored_digests(root) == set()
    if number == signal.SIGINT:
        assert partial_files(root) == []


# -- busybox


def test_busybox_is_an_image_of_its_programs(root: Path, tmp_path: Path) -> None:
    if not is_static("/bin/busybox"):
        pytest.skip("busybox-static is not installed")
    blobs = Blobs(str(root))
    got = BusyboxSource().fetch(blobs, platform="", progress=Silent())
    manifest = parse_manifest(blobs.read(got.digest))
    config = parse_config(blobs.read(manifest.config.digest))
    assert config.config.command == ("sh",)
    with tarfile.open(blobs.path(manifest.layers[0].digest)) as tar:
        members = {member.name.strip("./"): member for member in tar}
    files = [member for name, member in members.items() if name.startswith("bin/") and member.isreg()]
    assert len(files) == 1, "one file, the others are hard links to it"
    assert {"bin/sh", "bin/ls", "usr/bin/env", "etc/passwd", "dev", "proc", "sys"} <= members.keys()
    assert members["tmp"].mode & 0o7777 == 0o1777
    assert members["etc/shadow"].mode & 0o7777 == 0o600
    assert {(member.uid, member.gid) for member in members.values()} == {(0, 0)}
    time.sleep(1.1)
    again = BusyboxSource().fetch(Blobs(str(tmp_path / "b")), platform="", progress=Silent())
    assert again.digest == got.digest, "the same program makes the same image"


def elf(*segments: int) -> bytes:
    """A 64-bit ELF header with program headers of these types (elf(5))."""
    head = (
        b"\x7fELF\x02\x01\x01"
        + bytes(9)
        + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
    )
    return head + b"".join(struct.pack("<I", kind) + bytes(52) for kind in segments)


@pytest.mark.parametrize(
    ("data", "static"),
    [
        (elf(1, 1, 6), True),
        (elf(6, 3, 1), False),
        (b"#!/bin/sh\n" * 20, False),
        (b"", False),
        (elf(1, 1, 3)[:150], False),
        (elf(1)[:64], False),
        (elf()[:64], False),
    ],
)
def test_which_programs_are_static(tmp_path: Path, data: bytes, static: bool) -> None:
    (tmp_path / "program").write_bytes(data)
    assert is_static(str(tmp_path / "program")) is static
    assert not is_static(str(tmp_path / "missing"))


def test_busybox_is_fetched_where_it_is_not_installed(
    programs: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = "/bin/busybox"
    if not is_static(real):
        pytest.skip("busybox-static is not installed")
    monkeypatch.setattr(bootstrap, "INSTALLED", str(tmp_path / "none"))
    program(programs, "apt-get", "touch busybox-static_1_amd64.deb")
    program(programs, "dpkg-deb", f"mkdir -p package/usr/bin && cp {real} package/usr/bin/busybox")
    BusyboxSource().fetch(Blobs(str(root)), platform="", progress=Silent())
    program(programs, "apt-get", "echo 'E: Unable to locate package' >&2; exit 100")
    with pytest.raises(LaunchError, match="Unable to locate package"):
        BusyboxSource().fetch(Blobs(str(root)), platform="", progress=Silent())
    program(programs, "dpkg-deb", "mkdir -p package/bin && cp /bin/sh package/bin/busybox")
    program(programs, "apt-get", "touch busybox-static_1_amd64.deb")
    with pytest.raises(NagayaError, match="no static busybox"):
        BusyboxSource().fetch(Blobs(str(root)), platform="", progress=Silent())
