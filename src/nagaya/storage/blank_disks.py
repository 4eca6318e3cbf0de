"""Empty disks to copy: mke2fs makes one of each size once, and each new machine's disk is a copy of it.

mke2fs syncs what it writes, which takes 10 to 100 ms where anybody else writes to that file system; a copy takes 0.5 ms. Nothing is
lost by not syncing it: the first that a guest's kernel does with its journal is to have its disk flushed, all of it.
"""

from __future__ import annotations

import os

from nagaya.storage.disks import copy_data_disk, describe_format, format_data_disk, reserve_data_disk
from nagaya.storage.paths import make_directory

MOST = 16  # sizes, of less than 1 MiB each up to 100 GiB
_HASH_SEED = (1024 + 0xEC, 16)  # of directories, in ext4's superblock: offset, bytes. A UUID is part of group checksums


def fill_blank(fd: int, directory: str) -> None:
    """Make an empty file system on what was reserved as `fd`, of that in `directory` ("" = anew, with a UUID of its own).

    Raises `Unsupported` without mke2fs, `HostError`, `LaunchError`.
    """
    size_bytes = os.fstat(fd).st_size
    if not directory:
        format_data_disk(fd)
        return
    import hashlib  # lazy: 3 ms, and who begins from a template does without

    name = hashlib.sha256(describe_format(size_bytes).encode()).hexdigest()[:16]
    path = f"{directory}/{size_bytes}-{name}"
    try:
        try:
            copy_data_disk(path, fd)
        except FileNotFoundError:
            _make(path, size_bytes)
            copy_data_disk(path, fd)
        offset, count = _HASH_SEED
        os.pwrite(fd, os.urandom(count), offset)
    except OSError:  # a full disk, a store that is only to be read, another maker: it can still be made where it is
        format_data_disk(fd)


def _make(path: str, size_bytes: int) -> None:
    directory = os.path.dirname(path)
    make_directory(directory)
    for name in sorted(os.listdir(directory), key=lambda name: os.stat(f"{directory}/{name}").st_atime_ns)[: 1 - MOST]:
        os.unlink(f"{directory}/{name}")  # one that is just made by another is made again
    temporary = f"{directory}/{os.urandom(8).hex()}.tmp"
    reserve_data_disk(temporary, size_bytes)
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CLOEXEC)
        try:
            format_data_disk(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
