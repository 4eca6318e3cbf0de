"""The cache of fetched installers: what is used again, what is not, and what kills leave. apt is a double here."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from struct import pack

import pytest

from nagaya.errors import LaunchError, NotFound, Unsupported, UsageError
from nagaya.images.progress import Silent
from nagaya.images.sources.apt_package import Candidate
from nagaya.images.sources.apt_sources import AptSource
from nagaya.manager import installing
from nagaya.storage.disk_images import installer_cache as cache

_KERNEL = b"MZ" + bytes(0x3A) + pack("<I", 0x40) + b"PE\0\0" + pack("<H", 0x8664) + bytes(100)
_A_DAY_NS = 25 * 3600 * 10**9


class Steps(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def step(self, text: str) -> None:
        self.told.append(text)


class Apt:
    """An archive with one package, that counts how often it is asked and fetched from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.content = b"one"
        self.asked = self.fetched = 0
        self.problem: Exception | None = None
        monkeypatch.setattr(installing, "Archive", self._open)
        monkeypatch.setattr(installing, "extract", self._extract)
        monkeypatch.setattr(
            installing, "find_debian_sources", lambda: [AptSource("http://one.example/debian", ("trixie",), ("main",))]
        )

    def _open(self, lines: list[str], place: str) -> Apt:
        self.asked += 1
        if self.problem is not None:
            raise self.problem
        assert lines == ["deb http://one.example/debian trixie main"], lines
        return self

    def find(self, package: str) -> Candidate:
        return Candidate(f"1+{self.content.decode()}", hashlib.sha256(self.content).hexdigest())

    def download(self, package: str) -> str:
        self.fetched += 1
        return package

    def _extract(self, package: str, files: dict[str, str]) -> None:
        for inside, target in files.items():
            Path(target).write_bytes(_KERNEL if inside.endswith("linux") else self.content)


@pytest.fixture
def apt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Apt:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Apt(monkeypatch)


def take(source: str = "debian:trixie", *, platform: str = "linux/amd64") -> tuple[bytes, list[str]]:
    """The initramfs, and what was told."""
    steps = Steps()
    with installing.open_installer(
        source, directory="/nowhere", architecture="x86_64", platform=platform, progress=steps
    ) as found:
        assert Path(found.files.kernel).read_bytes() == _KERNEL and found.suite == "trixie"
        return Path(found.files.initramfs).read_bytes(), steps.told


def age(by_ns: int = _A_DAY_NS) -> None:
    (kept,) = cache.list_kept()
    cache.records.store(f"{kept.path}/installer.json", kept.record._replace(asked_ns=kept.record.asked_ns - by_ns))


def test_the_second_time_asks_nobody(apt: Apt) -> None:
    assert take()[0] == b"one"
    apt.problem = AssertionError("asked again")
    for source in ("debian:trixie", "debian:13"):
        assert take(source) == (b"one", [])
    assert (apt.asked, apt.fetched) == (1, 1)
    (kept,) = cache.list_kept()
    assert (kept.record.version, kept.record.suite, kept.record.size_bytes) == ("1+one", "trixie", len(_KERNEL) + 3)
    assert kept.id == hashlib.sha256(b"one").hexdigest()[:16]
    assert sorted(os.listdir(cache.cache_directory())) == sorted([".build-lock", "lock", kept.id])


def test_after_a_day_it_is_asked_for_a_newer_one(apt: Apt) -> None:
    take()
    age()
    assert take()[0] == b"one" and (apt.asked, apt.fetched) == (2, 1)
    assert take()[0] == b"one" and apt.asked == 2  # it has just been told
    age()
    apt.content = b"two"
    assert take()[0] == b"two" and apt.fetched == 2
    assert [kept.record.version for kept in cache.list_kept()] == ["1+two"]


def test_without_an_answer_the_old_one_is_taken(apt: Apt) -> None:
    take()
    age()
    apt.problem = LaunchError("no network")
    content, told = take()
    assert content == b"one" and "cannot look for a newer one (no network)" in told[-1]
    apt.problem = NotFound("gone")
    assert take()[0] == b"one"
    cache.remove(cache.list_kept()[0].id)
    with pytest.raises(NotFound, match="gone"):
        take()


@pytest.mark.parametrize("part", ["linux", "initrd.gz", "installer.json"])
@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_a_damaged_one_is_fetched_anew(apt: Apt, part: str, how: str) -> None:
    take()
    path = Path(cache.list_kept()[0].path, part)
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if how == "cut" else b"X" + data[1:])
    assert take()[0] == b"one" and apt.fetched == 2
    assert [kept.record.version for kept in cache.list_kept()] == ["1+one"]


def test_of_another_cpu(apt: Apt) -> None:
    """What is kept is what the machine's CPU can run: a package with something else in it is not."""
    with (
        pytest.raises(Unsupported, match="is for x86_64"),
        installing.open_installer(
            "debian:trixie", directory="/nowhere", architecture="aarch64", platform="linux/arm64", progress=Steps()
        ),
    ):
        pass
    assert cache.list_kept() == []
    assert sorted(os.listdir(cache.cache_directory())) == [".build-lock", "lock"]


def test_what_kills_leave(apt: Apt) -> None:
    take()
    directory = Path(cache.cache_directory())
    for name in (".build-0123", ".build-gone-1-00ff9a603bb49384"):
        (directory / name / "apt").mkdir(parents=True)
    (directory / "0123456789abcdef").mkdir()  # no record
    (kept,) = cache.list_kept()
    with cache.open_cache():
        assert cache.prune() == ["0123456789abcdef"]
        assert sorted(os.listdir(directory)) == sorted([".build-lock", "lock", kept.id])
        long_ago = time.time() - cache.UNUSED_S - 60
        os.utime(kept.path, (long_ago, long_ago))
        assert cache.prune() == [kept.id]
    assert cache.list_kept() == []


def test_names(apt: Apt) -> None:
    with pytest.raises(NotFound, match="no installer"):
        cache.get("")
    take()
    assert cache.get(cache.list_kept()[0].id[:4]) == cache.list_kept()[0]
    with pytest.raises(NotFound):
        cache.get("zz")
    with pytest.raises(UsageError, match="no Debian 'potato'"):
        take("debian:potato")
    assert apt.asked == 1
