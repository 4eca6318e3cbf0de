"""Removing a directory tree. `shutil.rmtree` does the same, but importing it costs 5 ms (it pulls in bz2 and lzma)."""

from __future__ import annotations

import errno
import os
import stat


def remove_tree(path: str) -> None:
    """Delete `path` and all below it without following a link; a path that is not there is fine.

    Descriptors, not paths, lead down: a tree that somebody changes meanwhile cannot make us leave it.
    """
    parent, name = os.path.split(path)
    try:
        fd = os.open(parent or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        _remove(fd, name)
    except FileNotFoundError:
        return  # another remover was quicker
    finally:
        os.close(fd)


def _remove(parent: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=parent)
        return
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EPERM):
            raise
    if not stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
        raise PermissionError(errno.EPERM, "unlink", name)
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        for entry in os.listdir(fd):
            _remove(fd, entry)
    finally:
        os.close(fd)
    try:
        os.rmdir(name, dir_fd=parent)
    except FileNotFoundError:
        pass
