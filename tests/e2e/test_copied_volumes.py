"""Volumes of virtual machines where virtiofsd is missing: copied in at each start, and said so."""

from __future__ import annotations

import glob
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nagaya.engines.vm.shares import find_program
from nagaya.kernels.cache import cache_directory
from tests.conformance.types import find_obstacle
from tests.conftest import require_program, require_root
from tests.e2e.command import Cli

# In a mount namespace of its own: a program that cannot be executed is none.
HIDE = "for f in /usr/lib/qemu/virtiofsd /usr/libexec/virtiofsd /usr/bin/virtiofsd; do [ -e $f ] && mount --bind /dev/null $f; done; "
PREFIX = ("unshare", "-m", "sh", "-c", HIDE + 'exec "$@"', "sh")
NOBODY = 65534
RUN = ("run", "--rm", "--type", "emulated", "--network", "none")
WARNING = "brought up to date at each start, and what the machine writes there stays in it: virtiofsd"


@pytest.fixture
def cli(cli: Cli) -> Iterator[Cli]:
    require_root()
    require_program("qemu-system-x86_64")
    obstacle = find_obstacle("emulated")
    if obstacle:
        pytest.skip(f"needs emulated machines: {obstacle}")
    yield Cli(cli.root, prefix=PREFIX)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    place = tmp_path / "source"
    (place / "below").mkdir(parents=True)
    (place / "note").write_text("a note\n")
    (place / "note").chmod(0o640)
    os.chown(place / "note", 7, 8)
    (place / "below" / "random").write_bytes(os.urandom(3 << 20))
    (place / "link").symlink_to("note")
    os.mkfifo(place / "fifo")
    return place


def test_a_directory_comes_whole_and_nothing_goes_back(cli: Cli, source: Path) -> None:
    digest = subprocess.run(
        ["sha256sum", str(source / "below/random")], capture_output=True, check=True, text=True
    ).stdout.split()[0]
    script = "stat -c '%a %u %g' /made/for/it/note; readlink /made/for/it/link; sha256sum </made/for/it/below/random; ls -l /made/for/it/fifo | cut -c1; echo x >/made/for/it/new; ls /made/for/it"
    ran = cli(*RUN, "-v", f"{source}:/made/for/it", "busybox", "sh", "-c", script, timeout_s=120)
    assert ran.code == 0, ran
    assert f"/made/for/it is a copy, {WARNING}" in ran.err
    assert f"copying {source} to /made/for/it: 3.16MB" in ran.err  # 3 MiB and the archive's own
    lines = ran.out.split("\n")
    assert lines[:2] == ["640 7 8", "note"]
    assert lines[2].split()[0] == digest
    assert lines[3:9] == ["p", "below", "fifo", "link", "new", "note"]
    assert not (source / "new").exists()


def test_what_is_read_only_is_that_inside(cli: Cli, source: Path) -> None:
    script = "cat /there/note /etc/the-note; touch /there/x; echo x >>/etc/the-note; grep -c -e ' /there [^ ]* ro' -e ' /etc/the-note [^ ]* ro' /proc/mounts; true"
    binds = ("-v", f"{source}:/there:ro", "-v", f"{source}/note:/etc/the-note:ro")
    ran = cli(*RUN, *binds, "busybox", "sh", "-c", script, timeout_s=120)
    assert ran.out == "a note\na note\n2\n", ran
    assert ran.err.count("Read-only file system") == 2


def test_each_start_copies_again(cli: Cli, source: Path) -> None:
    name = "copied"
    cli.ok("create", "--name", name, "--type", "emulated", "--network", "none", "-v", f"{source}:/there", "busybox",
           "sh", "-c", "cat /there/note; echo mine >>/there/mine; grep -c mine /there/mine")  # fmt: skip
    assert cli.ok("start", "-a", name, timeout_s=120) == "a note\n1\n"
    (source / "note").write_text("another\n")
    assert cli.ok("start", "-a", name, timeout_s=120) == "another\n2\n"
    cli.ok("rm", name)


def test_what_does_not_fit_is_one_sentence(cli: Cli, source: Path) -> None:
    (source / "large").write_bytes(os.urandom(1 << 20) * 80)
    ran = cli(*RUN, "--storage", "64m", "-v", f"{source}:/there", "busybox", "true", timeout_s=120)
    assert ran.code == 125
    assert f"cannot copy {source} to /there in the machine: " in ran.err and "No space left" in ran.err
    assert "--storage" in ran.err and "Traceback" not in ran.err


def test_what_goes_away_meanwhile_is_left_out_with_a_warning(cli: Cli, source: Path) -> None:
    (source / "a-large-one").write_bytes(os.urandom(1 << 20) * 60)
    (source / "zuletzt").write_text("soon gone\n")
    starting = cli.popen(
        *RUN, "-v", f"{source}:/there", "busybox", "ls", "/there", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not is_open(source / "a-large-one") and time.monotonic() < deadline:
        time.sleep(0.01)
    (source / "zuletzt").unlink()
    out, said = starting.communicate(timeout=120)
    assert starting.returncode == 0, said
    assert out.split() == [b"a-large-one", b"below", b"fifo", b"link", b"note"]
    text = f"the copy of {source} at /there is not whole: 1 file went away while it was made (zuletzt)"
    assert text in said.decode()


def is_open(path: Path) -> bool:
    """Whether a process reads the file."""
    for fd in glob.iglob("/proc/[0-9]*/fd/*"):
        try:
            if os.readlink(fd) == str(path):
                return True
        except OSError:
            continue
    return False


@pytest.mark.parametrize("type_", ["emulated", "kvm"])
@pytest.mark.timeout(300)
def test_a_plain_user_gets_a_copy(tmp_path: Path, source: Path, type_: str) -> None:
    """He cannot run virtiofsd; he may use /dev/kvm here."""
    require_root()
    if obstacle := find_obstacle(type_):
        pytest.skip(f"needs {type_}: {obstacle}")
    home = Path(tempfile.mkdtemp(prefix="nagaya-plain-"))  # he may enter: pytest's own directories are root's
    shutil.copytree(cache_directory(), home / "cache/nagaya/kernels")
    shutil.copytree(source, home / "source", symlinks=True, ignore=shutil.ignore_patterns("fifo"))
    for path in (home, *home.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    (home / "source/note").chmod(0o640)
    device = f"mknod -m 666 {home}/kvm c 10 232 && mount --bind {home}/kvm /dev/kvm && "
    ids = f'exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups env HOME={home} XDG_CACHE_HOME={home}/cache "$@"'
    prefix = ("unshare", "-m", "sh", "-c", (device if type_ == "kvm" else "") + ids, "sh")
    plain = Cli(str(home / "store"), prefix=prefix)
    try:
        argv = ("run", "--rm", "--type", type_, "--network", "none", "-v", f"{home}/source:/there", "busybox")
        ran = plain(*argv, "sh", "-c", "cat /there/note; stat -c '%a %u' /there/note; id -u", timeout_s=280)
        assert ran.code == 0, ran
        assert ran.out == f"a note\n640 {NOBODY}\n0\n"
        assert "only root can share directories" in ran.err
    finally:
        shutil.rmtree(home)


@pytest.mark.timeout(300)
def test_on_kvm_too(cli: Cli, source: Path) -> None:
    if obstacle := find_obstacle("kvm"):
        pytest.skip(f"needs kvm: {obstacle}")
    argv = ("run", "--rm", "--type", "kvm", "--network", "none", "-v", f"{source}:/there:ro", "busybox")
    ran = cli(*argv, "sh", "-c", "cat /there/note; touch /there/x; ls /there", timeout_s=280)
    assert ran.out == "a note\nbelow\nfifo\nlink\nnote\n", ran
    assert f"/there is a copy, {WARNING}" in ran.err and "Read-only file system" in ran.err


def daemons() -> set[int]:
    """Processes that are a virtiofsd."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if file.read().partition(b"\0")[0] == os.fsencode(find_program()):
                    found.add(int(pid))
        except OSError:
            continue
    return found


def test_a_daemon_that_ends_during_the_start_ends_the_start(cli: Cli, source: Path) -> None:
    shared = Cli(cli.root)  # without the hiding: virtiofsd shares it
    if not find_program():
        pytest.skip("needs virtiofsd")
    before, began = daemons(), time.monotonic()
    starting = shared.popen(*RUN, "-v", f"{source}:/there", "busybox", "true", stderr=subprocess.PIPE)
    assert starting.stderr is not None
    while not (found := daemons() - before) and time.monotonic() < began + 10:
        time.sleep(0.01)
    time.sleep(0.3)  # QEMU has met it by then, and the guest boots
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    said = starting.stderr.read().decode()
    assert starting.wait(30) == 125, said
    assert "a helper process of the machine ended" in said or "QEMU did not start the machine" in said
    assert time.monotonic() - began < 20


def test_a_read_only_machine_has_no_place_for_it(cli: Cli, source: Path) -> None:
    ran = cli(*RUN, "--read-only", "-v", f"{source}:/there", "busybox", "true")
    assert ran.code == 125
    assert "a read-only machine has no place for a copy" in ran.err


def test_a_kill_in_the_midst_leaves_a_machine_that_starts(cli: Cli, source: Path) -> None:
    (source / "large").write_bytes(os.urandom(1 << 20) * 100)
    name = "cut-off"
    cli.ok("create", "--name", name, "--type", "emulated", "--network", "none", "-v", f"{source}:/there", "busybox",
           "sh", "-c", "cat /there/note")  # fmt: skip
    starting = cli.popen("start", "-a", name)
    time.sleep(1.2)  # it boots, or copies
    starting.send_signal(signal.SIGKILL)
    starting.wait()
    cli.ok("kill", name) if "running" in cli.ok("ps", "-a", "--format", "{{.Status}}").lower() else None
    cli("stop", "-t", "0", name, timeout_s=60)
    assert cli.ok("start", "-a", name, timeout_s=120) == "a note\n"
    cli.ok("rm", "-f", name)
