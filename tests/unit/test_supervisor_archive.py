"""The archive of a volume that is copied: whole when it is left alone, and what others take away meanwhile left out."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from nagaya.engines.base import Copy
from nagaya.supervisor.archive import write_archive


class Watched(io.BytesIO):
    """Calls `then` once, when the first file is well under way."""

    def __init__(self, then: Callable[[], None]) -> None:
        super().__init__()
        self._then = then

    def write(self, data: object) -> int:
        done = super().write(data)  # type: ignore[arg-type]
        if self.tell() > 30_000:
            then, self._then = self._then, lambda: None
            then()
        return done


@pytest.fixture
def source(tmp_path: Path) -> Path:
    place = tmp_path / "source"
    (place / "below/deep").mkdir(parents=True)
    (place / "a").write_bytes(b"a" * 100_000)  # the first in its order
    (place / "b").write_bytes(b"b" * 5000)
    os.link(place / "b", place / "c")
    (place / "below/deep/x").write_text("x")
    (place / "link").symlink_to("nowhere")
    os.mkfifo(place / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place / "socket"))
    return place


def write(source: Path, then: Callable[[], None]) -> tuple[str, dict[str, tarfile.TarInfo], tarfile.TarFile]:
    stream = Watched(then)
    said = write_archive(Copy(str(source), "/there", is_directory=source.is_dir(), read_only=False), stream)
    stream.seek(0)
    tar = tarfile.open(fileobj=stream)
    return said, {member.name: member for member in tar}, tar


def test_all_of_it(source: Path) -> None:
    said, members, tar = write(source, lambda: None)
    assert said == ""
    assert sorted(members) == [
        ".",
        "./a",
        "./b",
        "./below",
        "./below/deep",
        "./below/deep/x",
        "./c",
        "./link",
        "./pipe",
    ]
    assert members["./c"].islnk() and members["./c"].linkname == "./b"
    assert members["./link"].linkname == "nowhere" and members["./pipe"].isfifo()
    content = tar.extractfile("./a")
    assert content is not None and content.read() == b"a" * 100_000


def test_a_single_file(source: Path) -> None:
    said, members, _ = write(source / "b", lambda: None)
    assert (said, list(members)) == ("", ["there"])


def test_what_goes_away_is_left_out_and_told(source: Path) -> None:
    def lose() -> None:
        os.unlink(source / "b")
        os.unlink(source / "below/deep/x")
        os.rmdir(source / "below/deep")

    said, members, tar = write(source, lose)
    assert said == "1 file went away while it was made (b)"
    assert "./b" not in members and "./below" in members
    assert members["./c"].isreg()  # no link to what is not there
    content = tar.extractfile("./c")
    assert content is not None and content.read() == b"b" * 5000


def test_what_becomes_another_kind_is_no_file_any_more(source: Path) -> None:
    def change() -> None:
        os.unlink(source / "b")
        os.mkfifo(source / "b")  # it would block whoever opens it to read

    said, members, _ = write(source, change)
    assert said == "" and members["./b"].isfifo()


def test_what_shrinks_is_filled_up(source: Path) -> None:
    said, _, tar = write(source, lambda: os.truncate(source / "a", 50_000))
    assert said == "1 file became shorter while it was made (a)"
    content = tar.extractfile("./a")
    assert content is not None
    data = content.read()
    assert len(data) == 100_000 and data[:50_000] == b"a" * 50_000 and data.endswith(bytes(100))


def test_a_deep_tree_is_no_recursion(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, names = str(source / "deeper"), 1500
    os.mkdir(place)
    monkeypatch.chdir(place)
    for _ in range(names):
        os.mkdir("d")
        os.chdir("d")
    os.chdir("/")
    said, members, _ = write(source, lambda: None)
    subprocess.run(["rm", "-r", place], check=True)  # which shutil.rmtree cannot
    assert said == "" and "./deeper" + "/d" * names in members


def test_what_cannot_be_read_is_an_error(source: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        write_archive(Copy(str(source / "gone"), "/there", is_directory=False, read_only=False), io.BytesIO())
