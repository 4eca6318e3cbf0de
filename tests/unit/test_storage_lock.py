"""File locks: liveness can be asked for without disturbing anyone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nagaya.storage.lock import FileLock, is_held


def test_held_is_seen_and_not_disturbed(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    assert not is_held(path)
    with FileLock(path):
        assert is_held(path)
        assert not FileLock(path).acquire(wait=False)
        assert is_held(path)
    assert not is_held(path)


def test_the_holder_s_death_frees_it(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        FileLock(path).acquire()
        os.write(write, b"1")
        os.read(0, 1)
        os.kill(os.getpid(), 9)
    os.read(read, 1)
    assert is_held(path)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert not is_held(path)
    os.close(read)
    os.close(write)


def test_a_forked_copy_keeps_it_held_until_it_closes(tmp_path: Path) -> None:
    """Why a forked supervisor closes every descriptor of its launcher first."""
    path = str(tmp_path / "lock")
    lock = FileLock(path)
    lock.acquire()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    lock.release()
    assert is_held(path)
    os.close(write)
    os.waitpid(pid, 0)
    os.close(read)
    assert not is_held(path)


def test_a_lock_whose_file_is_removed_meanwhile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = FileLock(str(path))
    holder.acquire()
    waiter = os.fork()
    if waiter == 0:
        os.close(holder.fd)  # or we would hold it ourselves
        try:
            FileLock(str(path)).acquire()
        except FileNotFoundError:
            os._exit(7)
        os._exit(0)
    while not _waits(waiter):
        assert os.waitpid(waiter, os.WNOHANG) == (0, 0)
    path.unlink()
    holder.release()
    assert os.waitstatus_to_exitcode(os.waitpid(waiter, 0)[1]) == 7


def _waits(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        FileLock(str(tmp_path / "link")).acquire()
    assert not (tmp_path / "elsewhere").exists()
