"""Building a kernel: what is asked of a source, what is kept, and that nothing half-built ever counts."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nagaya.errors import HostError, LaunchError, UsageError
from nagaya.kernels import build, cache
from nagaya.kernels.build import Request, build_kernel
from nagaya.storage.lock import is_held
from tests.unit.linux_double import Told, write_linux

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, and a host that has every program."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("nagaya.kernels.sources.require_tools", lambda architecture: None)
    monkeypatch.setattr(build, "NEEDED_BYTES", 1)
    monkeypatch.setattr(build, "NEEDED_BYTES_WHOLE", 1)
    monkeypatch.delenv("NAGAYA_TEST_COMPILER", raising=False)
    return tmp_path / "cache" / "nagaya" / "kernels"


@pytest.fixture
def linux(tmp_path: Path) -> str:
    return write_linux(tmp_path / "linux.tar")


def test_from_archive_to_cache(place: Path, linux: str) -> None:
    told = Told()
    built = build_kernel(Request(jobs=3, source=linux), told)
    assert built.path == str(place / built.id / "vmlinux")
    assert Path(built.path).read_bytes()[:4] == b"\x7fELF"
    assert (built.record.version, built.record.fragment, built.record.steps) == ("6.1.999-double", "shipped", 2)
    assert built.record.size_bytes == os.stat(built.path).st_size
    assert "CONFIG_VIRTIO_MMIO=y\n" in (place / built.id / "config").read_text()
    assert told.steps == [
        f"unpacking {linux}",
        "leaving out the kernel in user mode: it was not written for this Linux",
        "configuring",
        "compiling with 3 jobs",
    ]
    assert [(done, what) for done, _, what in told.counts] == [(1, "init/main.o"), (2, "vmlinux")]
    assert sorted(os.listdir(place)) == sorted([built.id, "lock"])
    assert not is_held(str(place / "lock"))
    assert cache.find_kernel() == built


def test_the_same_again_is_not_built_again(linux: str) -> None:
    first, told = build_kernel(Request(source=linux), Told()), Told()
    assert build_kernel(Request(source=linux), told) == first
    assert told.steps == [f"kernel {first.id} is here already"]


def test_force_replaces_it(place: Path, linux: str) -> None:
    first = build_kernel(Request(source=linux), Told())
    again = build_kernel(Request(source=linux, force=True), Told())
    assert again.id == first.id and again.record.built_ns > first.record.built_ns
    assert again.record.digest == first.record.digest
    assert sorted(os.listdir(place)) == sorted([first.id, "lock"])


def test_source_fragment_and_compiler_make_the_name(
    tmp_path: Path, linux: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fragment = tmp_path / "my.config"
    fragment.write_text("CONFIG_DRM=y  # pictures\n")
    plain = build_kernel(Request(source=linux), Told())
    mine = build_kernel(Request(source=linux, fragment=str(fragment)), Told())
    assert mine.record.fragment == str(fragment)
    assert "CONFIG_DRM=y\n" in (Path(mine.path).parent / "config").read_text()
    fragment.write_text("# another reason is no other kernel\nCONFIG_DRM=y  # films\n")
    assert build_kernel(Request(source=linux, fragment=str(fragment)), Told()) == mine
    other = write_linux(tmp_path / "other.tar", extra="one byte more")
    changed = build_kernel(Request(source=other), Told())
    monkeypatch.setattr("nagaya.kernels.sources.compiler_version", lambda architecture: "gcc 99")
    newer = build_kernel(Request(source=linux), Told())
    assert len({plain.id, mine.id, changed.id, newer.id}) == 4
    assert {kernel.id for kernel in cache.list_kernels()} == {plain.id, mine.id, changed.id, newer.id}


def test_what_guests_never_use_is_unpacked_only_for_a_fragment(place: Path, tmp_path: Path, linux: str) -> None:
    card, menu = place / "build/linux/drivers/gpu/card.c", place / "build/linux/drivers/gpu/Kconfig"
    build_kernel(Request(source=linux, keep=True), Told())
    assert not card.exists() and menu.exists()
    (tmp_path / "f").write_text("CONFIG_DRM=y\n")
    build_kernel(Request(source=linux, keep=True, fragment=str(tmp_path / "f")), Told())
    assert card.exists()


def test_a_line_that_does_not_survive_is_named(place: Path, tmp_path: Path, linux: str) -> None:
    (tmp_path / "f").write_text("CONFIG_GONE=y\n")
    with pytest.raises(UsageError, match="CONFIG_GONE is n instead of y"):
        build_kernel(Request(source=linux, fragment=str(tmp_path / "f")), Told())
    assert os.listdir(place) == ["lock"]


def test_an_archive_of_something_else(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a source of Linux"):
        build_kernel(Request(source=write_linux(tmp_path / "x.tar", kbuild=False)), Told())
    (tmp_path / "noise").write_bytes(b"noise" * 1000)
    with pytest.raises(LaunchError, match="tar failed with status") as caught:
        build_kernel(Request(source=str(tmp_path / "noise")), Told())
    assert "tar" in caught.value.log_tail
    with pytest.raises(UsageError, match="is a directory"):
        build_kernel(Request(source=str(tmp_path)), Told())
    with pytest.raises(HostError, match="cannot read the kernel's source"):
        build_kernel(Request(source=str(tmp_path / "missing")), Told())
    assert cache.list_kernels() == []


def test_a_compiler_that_fails_has_the_last_word(place: Path, linux: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAGAYA_TEST_COMPILER", "echo main.c:1: error: no; exit 7")
    with pytest.raises(LaunchError, match="make vmlinux failed with status 2") as caught:
        build_kernel(Request(source=linux), Told())
    assert "main.c:1: error: no" in caught.value.log_tail
    log = caught.value.hint.removeprefix("the whole log is ")
    assert "a warning" in Path(log).read_text()
    assert cache.find_kernel() is None
    monkeypatch.setenv("NAGAYA_TEST_COMPILER", "true")
    build_kernel(Request(source=linux), Told())
    assert not os.path.exists(log)


def test_the_callers_environment_changes_nothing(linux: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = build_kernel(Request(source=linux), Told())
    for name, value in {
        "ARCH": "arm",
        "MAKEFLAGS": "-n",
        "KCONFIG_ALLCONFIG": "/x",
        "LC_ALL": "de_DE",
        "O": "/x",
    }.items():
        monkeypatch.setenv(name, value)
    assert build_kernel(Request(source=linux, force=True), Told()).record.digest == plain.record.digest


def test_a_full_disk_is_noticed_before_the_work(place: Path, linux: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "NEEDED_BYTES", 1 << 60)
    with pytest.raises(HostError, match="MiB are free") as caught:
        build_kernel(Request(source=linux), Told())
    assert "XDG_CACHE_HOME" in caught.value.hint
    assert os.listdir(place) == ["lock"]


# -- interruptions: in processes of their own

_BUILD = """\
import sys
from nagaya.kernels import build, sources
from tests.unit.linux_double import Told
sources.require_tools = lambda architecture: None
build.NEEDED_BYTES = 1
try:
    print(build.build_kernel(build.Request(source=sys.argv[1]), Told()).id)
except KeyboardInterrupt:
    print("interrupted")
"""


def start_build(linux: str, compiler: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _BUILD, linux],
        env={**os.environ, "NAGAYA_TEST_COMPILER": compiler},
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path) -> str:
    end_s = time.monotonic() + 20
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < end_s, f"{path} never came"
        time.sleep(0.01)
    return path.read_text().strip()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_gone(pid: int) -> None:
    end_s = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < end_s, f"{pid} goes on"
        time.sleep(0.01)


def test_ctrl_c_ends_the_compilers_and_leaves_nothing(place: Path, tmp_path: Path, linux: str) -> None:
    running = start_build(linux, f"echo $$ > {tmp_path}/pid; exec sleep 60")
    compiler = int(wait_for(tmp_path / "pid"))
    running.send_signal(signal.SIGINT)
    assert running.communicate(timeout=20)[0] == "interrupted\n"
    wait_until_gone(compiler)
    assert os.listdir(place) == ["lock"]


def test_kill_9_leaves_no_half_kernel_and_no_compiler(place: Path, tmp_path: Path, linux: str) -> None:
    running = start_build(linux, f"echo $$ > {tmp_path}/pid; exec sleep 60")
    compiler = int(wait_for(tmp_path / "pid"))
    running.kill()
    running.communicate()
    wait_until_gone(compiler)  # make was told by the kernel that we are gone, and told its compilers
    assert cache.find_kernel() is None
    built = build_kernel(Request(source=linux), Told())
    assert sorted(os.listdir(place)) == sorted([built.id, "lock"])


def test_a_build_waits_for_the_orphans_of_a_killed_one(place: Path, tmp_path: Path, linux: str) -> None:
    """A compiler that will not be stopped still writes into the tree: it has the lock as well."""
    running = start_build(linux, f"trap '' TERM; echo $$ > {tmp_path}/pid; sleep 0.6; sleep 0")
    compiler = int(wait_for(tmp_path / "pid"))
    running.kill()
    running.communicate()
    if is_running(compiler):
        assert is_held(str(place / "lock"))
    build_kernel(Request(source=linux), Told())
    assert not is_running(compiler)


def test_two_builds_at_once_make_one_kernel(place: Path, tmp_path: Path, linux: str) -> None:
    first = start_build(linux, f"echo $$ > {tmp_path}/pid; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done")
    wait_for(tmp_path / "pid")
    second = start_build(linux, "exit 1")  # it compiles nothing, or it would fail
    time.sleep(0.2)
    assert second.poll() is None
    (tmp_path / "go").touch()
    names = [running.communicate(timeout=20)[0] for running in (first, second)]
    assert names[0] == names[1] != ""
    assert [kernel.id for kernel in cache.list_kernels()] == [names[0].strip()]


def test_what_was_cut_off_is_swept(place: Path, linux: str) -> None:
    (place / "0123456789abcdef").mkdir(parents=True)
    (place / "0123456789abcdef" / "vmlinux").write_bytes(b"half")
    (place / "fedcba9876543210.gone-1").mkdir()
    (place / "build" / "linux").mkdir(parents=True)
    built = build_kernel(Request(source=linux), Told())
    assert sorted(os.listdir(place)) == sorted([built.id, "lock"])
