"""Removing a directory tree. `shutil.rmtree` does the same, but importing it costs 5 ms (it pulls in bz2 and lzma)."""

from __future__ import annotations

import errno
import os
import stat

DEEP = 100  # levels that a removal walks before it brings up what is below


def remove_tree(path: str) -> None:
    """Delete `path` and all below it without following a link; a path that is not there is fine.

    Descriptors, not paths, lead down: a tree that somebody changes meanwhile cannot make us leave it. A machine (or a
    hostile layer) can nest directories deeper than we have descriptors or frames: those are moved up to `path`'s top.
    """
    parent, name = os.path.split(path)
    try:
        fd = os.open(parent or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        _remove_top(fd, name)
    except FileNotFoundError:
        return  # another remover was quicker
    finally:
        os.close(fd)


def _remove_top(parent: int, name: str) -> None:
    if _unlink(parent, name):
        return
    top = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        waiting = os.listdir(top)
        while waiting:
            _remove(top, waiting.pop(), top, waiting, 1)
    finally:
        os.close(top)
    _rmdir(parent, name)


def _remove(parent: int, name: str, top: int, waiting: list[str], depth: int) -> None:
    if _unlink(parent, name):
        return
    if depth > DEEP:
        moved = f".deep-{os.urandom(8).hex()}"
        os.rename(name, moved, src_dir_fd=parent, dst_dir_fd=top)
        waiting.append(moved)
        return
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        for entry in os.listdir(fd):
            _remove(fd, entry, top, waiting, depth + 1)
    finally:
        os.close(fd)
    _rmdir(parent, name)


def _unlink(parent: int, name: str) -> bool:
    """Remove what is no directory; False for one."""
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EPERM):
            raise
        if not stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
            raise PermissionError(errno.EPERM, "unlink", name) from None
        return False
    return True


def _rmdir(parent: int, name: str) -> None:
    try:
        os.rmdir(name, dir_fd=parent)
    except FileNotFoundError:
        pass
