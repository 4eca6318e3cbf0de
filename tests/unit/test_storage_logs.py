"""The machine's log: CRI lines, rotation, reading across rotations, damage."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nagaya.model.spec import LogLimits
from nagaya.storage.logs import LogReader, LogWriter, parse_line, parse_time


def _text(lines: list[object]) -> bytes:
    return b"".join(line.data + (b"" if line.partial else b"\n") for line in lines)  # type: ignore[attr-defined]


def test_lines_parts_and_streams(tmp_path: Path) -> None:
    writer = LogWriter(str(tmp_path), LogLimits())
    writer.write(1, b"one\ntwo")
    writer.write(2, b"err\n")
    writer.write(1, b" three\n\n")
    writer.close()
    lines = list(LogReader(str(tmp_path), 3).read())
    assert [(line.stream, line.data, line.partial) for line in lines] == [
        ("stdout", b"one", False),
        ("stdout", b"two", True),
        ("stderr", b"err", False),
        ("stdout", b" three", False),
        ("stdout", b"", False),
    ]
    assert all(a.time_ns <= b.time_ns for a, b in itertools.pairwise(lines))


@given(st.lists(st.binary(max_size=40), max_size=30))
def test_bytes_come_back_as_they_were(tmp_path_factory: object, chunks: list[bytes]) -> None:
    directory = str(tmp_path_factory.mktemp("log"))  # type: ignore[attr-defined]
    writer = LogWriter(directory, LogLimits())
    for chunk in chunks:
        writer.write(1, chunk)
    writer.close()
    assert _text(list(LogReader(directory, 3).read())) == b"".join(chunks)


def test_a_rotation_while_the_reader_looks_for_the_next_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LogWriter(str(tmp_path), LogLimits(max_bytes=1000, files=4))
    reader = LogReader(str(tmp_path), 4)
    line = b"x" * 600

    def write(name: bytes) -> None:
        writer.write(1, name + line + b"\n")

    write(b"1")
    seen = list(reader.read())
    for name in (b"2", b"3"):  # the first of them ends the file, and the other begins the next
        write(name)
    real = os.open

    def rotate_first(*arguments: object) -> int:
        monkeypatch.undo()
        for name in (b"4", b"5"):
            write(name)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", rotate_first)
    seen += list(reader.read())
    writer.close()
    reader.close()
    assert [read.data[:1] for read in seen] == [b"1", b"2", b"3", b"4", b"5"]


def test_rotation_keeps_the_newest_and_the_reader_follows(tmp_path: Path) -> None:
    writer = LogWriter(str(tmp_path), LogLimits(max_bytes=2000, files=3))
    reader = LogReader(str(tmp_path), 3)
    seen = []
    for number in range(300):
        writer.write(1, b"line %d\n" % number)
        if number % 7 == 0:
            seen += [line.data for line in reader.read()]
    seen += [line.data for line in reader.read()]
    writer.close()
    assert seen == [b"line %d" % number for number in range(300)]
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1", "log.2"]
    assert all(os.path.getsize(tmp_path / name) < 2200 for name in os.listdir(tmp_path))
    late = [line.data for line in LogReader(str(tmp_path), 3).read()]
    assert late == seen[-len(late) :] and len(late) > 40


def test_a_reader_in_the_midst_of_a_rotation(tmp_path: Path) -> None:
    writer, reader = LogWriter(str(tmp_path), LogLimits()), LogReader(str(tmp_path), 3)
    writer.write(1, b"one\n")
    assert _text(list(reader.read())) == b"one\n"
    (tmp_path / "log").rename(tmp_path / "log.1")  # and the new one is not there yet
    assert list(reader.read()) == []
    writer.close()
    (tmp_path / "log").touch()
    writer = LogWriter(str(tmp_path), LogLimits())
    writer.write(1, b"two\n")
    writer.close()
    assert _text(list(reader.read())) == b"two\n"
    reader.close()


def test_one_file_only(tmp_path: Path) -> None:
    writer = LogWriter(str(tmp_path), LogLimits(max_bytes=1024, files=1))
    for _ in range(100):
        writer.write(1, b"x" * 50 + b"\n")
    writer.close()
    assert os.listdir(tmp_path) == ["log"]


def test_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    writer = LogWriter(str(tmp_path), LogLimits())
    writer.write(1, b"good\n")
    writer.close()
    with open(tmp_path / "log", "ab") as file:
        file.write(
            b"garbage\n2026-99-99T00:00:00.000000000Z stdout F x\n2026-11-23T10:00:00.000000000Z stdout Q x\ncut"
        )
    assert [line.data for line in LogReader(str(tmp_path), 3).read()] == [b"good"]


def test_a_full_disk_loses_log_and_says_so() -> None:
    writer = LogWriter.__new__(LogWriter)
    writer._path, writer._limits, writer._size = "/nowhere/log", LogLimits(), 0
    writer._second, writer._stamp, writer.lost = -1, "", ""
    writer._fd = os.open("/dev/full", os.O_WRONLY)
    writer.write(1, b"x\n")
    assert writer.lost == "No space left on device"
    writer.close()


def test_times() -> None:
    assert parse_time(b"1970-01-01T00:00:01.000000002Z") == 1_000_000_002
    assert parse_time(b"1970-01-01T00:00:01Z") == -1
    assert parse_line(b"1970-01-01T00:00:00.000000000Z stderr P a b") is not None


def test_a_rotation_that_fails_goes_on_in_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its descriptor stays ours: a closed number would soon be another file's, and the log would be written there."""
    writer = LogWriter(str(tmp_path), LogLimits(max_bytes=1024, files=3))

    def refuse() -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "_open", refuse)
    for number in range(100):
        writer.write(1, b"line %d\n" % number)
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    writer.write(1, b"last\n")
    assert os.fstat(other).st_size == 0
    os.close(other)
    assert writer.lost == "No space left on device"
    monkeypatch.undo()
    writer.write(1, b"again\n")
    writer.close()
    assert (tmp_path / "log").exists()
