"""Sums of files and trees that say whether one is still what it was, whatever file system has held it since."""

from __future__ import annotations

import errno
import os
import stat

BLOCK = 64 << 10
_CHUNK = 1 << 20


def digest_file(path: str) -> tuple[str, int]:
    """("sha256:…", bytes that are not zeros, in blocks of 64 KiB) of a regular file.

    Blocks of zeros count as holes, which file systems and archives keep or do not. Raises `OSError`.
    """
    import hashlib  # lazy: 5 ms, and rare

    total = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        size = os.fstat(fd).st_size
        total.update(b"%d\n" % size)
        used = at = 0
        while at < size:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA) // BLOCK * BLOCK
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break
                raise
            data = os.pread(fd, _CHUNK, at)
            if not data:
                break
            for offset in range(0, len(data), BLOCK):
                block = data[offset : offset + BLOCK]
                if block.count(0) != len(block):
                    total.update(b"%d\n" % (at + offset))
                    total.update(block)
                    used += len(block)
            at += len(data)
    finally:
        os.close(fd)
    return f"sha256:{total.hexdigest()}", used


def digest_tree(path: str) -> tuple[str, int]:
    """The same of a directory with all that is below it: owners, modes, times, attributes, devices, which names are one file.

    Sockets do not count: one whose program has ended means nothing, and archives leave them out. Raises `OSError`, and
    `RecursionError` for a tree that is nested beyond reason.
    """
    import hashlib

    total = hashlib.sha256()
    links: dict[tuple[int, int], str] = {}
    used = 0

    def enter(full: str, name: str) -> None:
        nonlocal used
        found = os.lstat(full)
        if stat.S_ISSOCK(found.st_mode):
            return
        told: list[object] = [name, found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, found.st_rdev]
        told.append([(key, os.getxattr(full, key, follow_symlinks=False)) for key in _attributes(full)])
        if stat.S_ISLNK(found.st_mode):
            told.append(os.readlink(full))
        elif not stat.S_ISDIR(found.st_mode):
            first = links.setdefault((found.st_dev, found.st_ino), name)
            told.append(first)
            if stat.S_ISREG(found.st_mode) and first == name:
                digest, data_bytes = digest_file(full)
                told.append(digest)
                used += data_bytes
        total.update(repr(told).encode("utf-8", "surrogateescape") + b"\n")
        if stat.S_ISDIR(found.st_mode):
            for entry in sorted(os.listdir(full)):
                enter(f"{full}/{entry}", f"{name}/{entry}")

    enter(path, "")
    return f"sha256:{total.hexdigest()}", used


def _attributes(path: str) -> list[str]:
    try:
        return sorted(os.listxattr(path, follow_symlinks=False))
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return []
        raise
