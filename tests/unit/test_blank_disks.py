"""Empty disks that are copied: storage/blank_disks.py."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from nagaya.storage import blank_disks, disks

SIZE = 64 << 20
SEED = slice(1024 + 0xEC, 1024 + 0xEC + 16)

pytestmark = pytest.mark.skipif(
    shutil.which("mke2fs", path=f"{os.environ['PATH']}:/usr/sbin") is None, reason="needs mke2fs"
)


def made(path: Path, directory: str, size_bytes: int = SIZE) -> bytes:
    disks.reserve_data_disk(str(path), size_bytes)
    fd = os.open(path, os.O_RDWR)
    blank_disks.fill_blank(fd, directory)
    os.close(fd)
    return path.read_bytes()


def test_copies_differ_by_their_seed_alone(tmp_path: Path) -> None:
    blanks = str(tmp_path / "store" / "blanks")
    first, second = bytearray(made(tmp_path / "a", blanks)), bytearray(made(tmp_path / "b", blanks))
    assert len(os.listdir(blanks)) == 1
    assert first[SEED] != second[SEED] and any(first[SEED])
    first[SEED] = second[SEED]
    assert first == second
    program = shutil.which("e2fsck", path=f"{os.environ['PATH']}:/usr/sbin")
    assert program
    checked = subprocess.run([program, "-f", "-n", str(tmp_path / "a")], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_each_size_is_another_one_and_few_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blank_disks, "MOST", 3)
    blanks = tmp_path / "blanks"
    for number in range(5):
        made(tmp_path / f"{number}", str(blanks), SIZE + (number << 20))
    left = {int(name.partition("-")[0]) for name in os.listdir(blanks)}
    assert len(left) == 3 and SIZE + (4 << 20) in left


def test_without_a_place_for_it_the_disk_is_made_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for number, directory in enumerate(("", str(tmp_path / "file" / "below"))):
        assert made(tmp_path / f"{number}", directory)[1024 + 56 : 1024 + 58] == b"\x53\xef"


def test_what_a_killed_maker_left_is_in_nobody_s_way(tmp_path: Path) -> None:
    blanks = tmp_path / "blanks"
    blanks.mkdir()
    (blanks / "0011223344556677.tmp").write_bytes(b"half")
    assert made(tmp_path / "a", str(blanks))
    assert len([name for name in os.listdir(blanks) if not name.endswith(".tmp")]) == 1
