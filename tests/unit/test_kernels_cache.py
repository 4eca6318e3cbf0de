"""The kernels in the cache, and what `nagaya kernel` makes of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nagaya.cli import main
from nagaya.errors import NotFound, UsageError
from nagaya.kernels import cache, sources
from nagaya.kernels.cache import Record
from nagaya.storage import records
from nagaya.storage.lock import FileLock

ONE, TWO, OTHER = "1" * 16, "12" * 8, "f" * 16


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "nagaya" / "kernels"


def put(place: Path, name: str, *, built_ns: int, architecture: str = "", content: bytes = b"\x7fELF") -> str:
    (place / name).mkdir(parents=True)
    (place / name / "vmlinux").write_bytes(content)
    record = Record(
        "6.1.1-nagaya", architecture or os.uname().machine, "shipped", "/l.tar.xz", "gcc 12", built_ns, 1.5, 9, 4, "ab"
    )
    records.store(str(place / name / "kernel.json"), record)
    return str(place / name / "vmlinux")


def test_nothing_built_yet() -> None:
    assert cache.list_kernels() == []
    assert cache.find_kernel() is None
    with pytest.raises(NotFound, match="no guest kernel has been built") as caught:
        cache.get_kernel()
    assert "nagaya kernel build" in caught.value.hint


def test_the_newest_that_fits_this_host(place: Path) -> None:
    put(place, ONE, built_ns=5)
    path = put(place, TWO, built_ns=7)
    put(place, OTHER, built_ns=9, architecture="sparc")
    assert [kernel.id for kernel in cache.list_kernels()] == [OTHER, TWO, ONE]
    found = cache.find_kernel()
    assert found is not None and (found.id, found.path) == (TWO, path)
    assert cache.get_kernel() == found


def test_by_the_beginning_of_the_id(place: Path) -> None:
    put(place, ONE, built_ns=5)
    put(place, TWO, built_ns=7)
    assert cache.get_kernel("12").id == TWO
    with pytest.raises(UsageError, match="begins the ids of 2 kernels"):
        cache.get_kernel("1")
    with pytest.raises(NotFound, match="there is no guest kernel 'e'"):
        cache.get_kernel("e")


@pytest.mark.parametrize("damage", ["truncate", "record", "no-vmlinux", "no-record", "name"])
def test_what_is_damaged_does_not_count(place: Path, damage: str) -> None:
    path = Path(put(place, ONE, built_ns=5))
    if damage == "truncate":
        path.write_bytes(b"")
    elif damage == "record":
        (path.parent / "kernel.json").write_text("[[[")
    elif damage == "no-vmlinux":
        path.unlink()
    elif damage == "no-record":
        (path.parent / "kernel.json").unlink()
    else:
        path.parent.rename(place / "1234")
    assert cache.list_kernels() == []
    assert cache.find_kernel() is None


def test_removal(place: Path) -> None:
    put(place, ONE, built_ns=5)
    kernel = cache.get_kernel()
    cache.remove_kernel(kernel)
    assert os.listdir(place) == []
    cache.remove_kernel(kernel)  # somebody else was quicker


def test_what_builds_leave_goes_unless_one_goes_on(place: Path) -> None:
    cache.remove_build()  # nothing was ever built
    (place / "build" / "linux").mkdir(parents=True)
    with FileLock(str(place / "lock")):
        cache.remove_build()
        assert (place / "build").exists()
    cache.remove_build()
    assert os.listdir(place) == ["lock"]


# -- the command


def test_ls_path_and_rm(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(place, ONE, built_ns=5)
    path = put(place, TWO, built_ns=7)
    assert main(["kernel", "ls"]) == 0
    heading, first, _ = capsys.readouterr().out.splitlines()
    assert heading.split() == ["KERNEL", "ID", "VERSION", "CONFIG", "CREATED", "SIZE"]
    assert first.startswith(TWO) and "6.1.1-nagaya" in first
    assert main(["kernel", "ls", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [kernel["id"] for kernel in shown] == [TWO, ONE]
    assert shown[0]["path"] == path and shown[0]["size_bytes"] == 4
    assert main(["kernel", "ls", "--format", "{{.ID}} {{.Path}}"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{TWO} {path}"
    assert main(["kernel", "path"]) == 0
    assert capsys.readouterr().out == path + "\n"
    assert main(["kernel", "rm", "11", "nothing"]) == 1
    out = capsys.readouterr()
    assert out.out == ONE + "\n" and "there is no guest kernel 'nothing'" in out.err
    assert main(["kernel", "rm", "--all"]) == 0
    assert main(["kernel", "ls", "-q"]) == 0
    assert capsys.readouterr().out == TWO + "\n"


def test_completion_knows_kernels(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(place, ONE, built_ns=5)
    assert main(["__complete", "--", "kernel", "rm", ""]) == 0
    assert capsys.readouterr().out == ONE + "\n"
    assert main(["__complete", "--", "kernel", "b"]) == 0
    assert capsys.readouterr().out == "build\n"


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["rm"], 2, "name kernels to remove, or give --all"),
        (["rm", "--all", "1"], 2, "name kernels to remove, or give --all"),
        (["path", "1"], 1, "there is no guest kernel '1'"),
        (["path"], 1, "nagaya kernel build"),
        (["build", "--jobs", "0"], 2, "'0' is no number of jobs"),
        (["build", "--jobs", "two"], 2, "'two' is no number of jobs"),
        (["build", "--jobs", "9" * 5000], 2, "is no number of jobs"),
        (["build", "--config", "/does/not/exist"], 1, "cannot read the kernel configuration"),
        (["build", "--source", "/does/not/exist"], 1, "cannot read the kernel's source"),
    ],
)
def test_misuse_is_one_sentence(words: list[str], status: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernel", *words]) == status
    assert text in capsys.readouterr().err


# -- where a source comes from


def test_the_tested_version_is_taken_else_the_newest(tmp_path: Path) -> None:
    for version in ("5.10", "6.12", "6.9"):
        (tmp_path / f"linux-source-{version}.tar.xz").touch()
    (tmp_path / "linux-source-7.tar.xz").touch()
    assert sources.find_archive(str(tmp_path)) == f"{tmp_path}/linux-source-6.12.tar.xz"
    (tmp_path / "linux-source-6.1.tar.xz").touch()
    assert sources.find_archive(str(tmp_path)) == f"{tmp_path}/linux-source-6.1.tar.xz"


def test_no_source_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no source of Linux") as caught:
        sources.find_archive(str(tmp_path))
    assert "apt-get install linux-source" in caught.value.hint


def test_all_that_is_missing_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nagaya.errors import Unsupported

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unsupported) as caught:
        sources.require_tools()
    assert caught.value.hint == "as root: apt-get install bc binutils bison flex gcc make patch tar xz-utils"
