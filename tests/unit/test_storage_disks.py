"""Data disks without mounting them: sizes, features, growing, and what is said when one cannot be made."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import struct
from pathlib import Path

import pytest

from nagaya.errors import Conflict, HostError, LaunchError, NotFound, Unsupported, UsageError
from nagaya.kernel.locks import pack_lock
from nagaya.storage import disks

MIB = 1 << 20
needs_mke2fs = pytest.mark.skipif(
    shutil.which("mke2fs", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None, reason="needs e2fsprogs"
)
METADATA_CSUM, GDT_CSUM, JOURNAL, EXTENTS, BITS_64 = 0x400, 0x10, 0x4, 0x40, 0x80


class Superblock:
    """Of ext4 (kernel: Documentation/filesystems/ext4/super.rst)."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            file.seek(1024)
            raw = file.read(1024)
        (self.blocks,) = struct.unpack_from("<I", raw, 4)
        (log_block,) = struct.unpack_from("<I", raw, 24)
        self.block_bytes = 1024 << log_block
        (self.magic,) = struct.unpack_from("<H", raw, 56)
        self.compatible, self.incompatible, self.read_only = struct.unpack_from("<III", raw, 92)
        self.uuid = raw[104:120]


@needs_mke2fs
@pytest.mark.parametrize("size", [disks.LEAST_BYTES, 300 * MIB + 5000, 10 << 30, 100 << 30])
def test_a_disk_has_its_size_and_takes_next_to_none(tmp_path: Path, size: int) -> None:
    path = tmp_path / "data.img"
    disks.create_data_disk(str(path), size)
    found = path.stat()
    assert found.st_size == size // 4096 * 4096 and found.st_blocks * 512 < 2 * MIB and found.st_mode & 0o777 == 0o600
    superblock = Superblock(path)
    assert superblock.magic == 0xEF53 and superblock.block_bytes == 4096
    assert superblock.blocks == size // 4096
    assert superblock.compatible & JOURNAL and superblock.incompatible & EXTENTS and superblock.incompatible & BITS_64
    assert not superblock.read_only & METADATA_CSUM and superblock.read_only & GDT_CSUM
    assert os.listdir(tmp_path) == ["data.img"]


@needs_mke2fs
def test_no_two_disks_have_one_uuid(tmp_path: Path) -> None:
    for name in ("a", "b"):
        disks.create_data_disk(str(tmp_path / name), disks.LEAST_BYTES)
    assert Superblock(tmp_path / "a").uuid != Superblock(tmp_path / "b").uuid


@needs_mke2fs
def test_the_host_s_configuration_has_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mke2fs.conf").write_text("[defaults]\nblocksize = 1024\nbase_features = metadata_csum\n")
    monkeypatch.setenv("MKE2FS_CONFIG", str(tmp_path / "mke2fs.conf"))
    disks.create_data_disk(str(tmp_path / "d"), 128 * MIB)
    superblock = Superblock(tmp_path / "d")
    assert superblock.block_bytes == 4096 and not superblock.read_only & METADATA_CSUM


@pytest.mark.parametrize("size", [-1, 0, 4096, disks.LEAST_BYTES - 1])
def test_a_size_that_is_none_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(UsageError, match="64 MiB"):
        disks.create_data_disk(str(tmp_path / "d"), size)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "d").write_text("data")
    with pytest.raises(HostError, match="cannot make the machine's disk"):
        disks.create_data_disk(str(tmp_path / "d"), disks.LEAST_BYTES)
    assert (tmp_path / "d").read_text() == "data"


def test_beyond_the_host_s_largest_file(tmp_path: Path) -> None:
    with pytest.raises(HostError) as refusal:
        disks.create_data_disk(str(tmp_path / "d"), 1 << 62)
    assert os.listdir(tmp_path) == [] and refusal.value.message


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo warning; echo 'mke2fs: No space left on device' >&2; exit 1", "No space left on device"),
        ("exit 3", "status 3"),
        ("kill -9 $$", "status -9"),
    ],
)
def test_what_the_program_says_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/mke2fs").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "bin/mke2fs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    with pytest.raises(LaunchError, match="could not make the machine's disk") as refusal:
        disks.create_data_disk(str(tmp_path / "d"), disks.LEAST_BYTES)
    assert said in refusal.value.message and "df -h" in refusal.value.hint and os.listdir(tmp_path) == ["bin"]


def test_without_the_program_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(Unsupported) as refusal:
        disks.create_data_disk(str(tmp_path / "d"), disks.LEAST_BYTES)
    assert refusal.value.hint == "apt install e2fsprogs" and os.listdir(tmp_path) == []


@needs_mke2fs
def test_it_does_not_matter_which_descriptors_are_free(tmp_path: Path) -> None:
    gc.collect()  # what other tests have left to it
    before = os.listdir("/proc/self/fd")
    for number, free in enumerate(((3,), (), (3, 4, 5))):
        held = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
        for fd in [fd for fd in held if fd in free]:
            os.close(fd)
            held.remove(fd)
        disks.create_data_disk(str(tmp_path / f"{number}"), disks.LEAST_BYTES)
        assert Superblock(tmp_path / f"{number}").magic == 0xEF53
        for fd in held:
            os.close(fd)
    assert os.listdir("/proc/self/fd") == before


def test_growing(tmp_path: Path) -> None:
    path = tmp_path / "d"
    path.write_bytes(bytes(8192))
    disks.grow_data_disk(str(path), 1 << 30)
    assert path.stat().st_size == 1 << 30 and path.stat().st_blocks * 512 <= 8192
    disks.grow_data_disk(str(path), 1 << 30)
    with pytest.raises(UsageError, match="smaller"):
        disks.grow_data_disk(str(path), 1 << 29)
    assert path.stat().st_size == 1 << 30
    with pytest.raises(NotFound):
        disks.grow_data_disk(str(tmp_path / "none"), 1 << 30)


@pytest.mark.parametrize("kind", [fcntl.F_RDLCK, fcntl.F_WRLCK])
def test_a_disk_in_use_does_not_grow(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "d"
    path.write_bytes(bytes(8192))
    with path.open("r+b") as user:
        fcntl.fcntl(user, fcntl.F_OFD_SETLK, pack_lock(kind))
        with pytest.raises(Conflict, match="in use"):
            disks.grow_data_disk(str(path), 1 << 30)
    assert path.stat().st_size == 8192
    disks.grow_data_disk(str(path), 1 << 30)
