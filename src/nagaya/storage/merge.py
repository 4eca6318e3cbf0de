"""Image layers copied into one plain directory: what an overlay would show, for where none can be mounted."""

from __future__ import annotations

import errno
import os
import stat

from nagaya.storage.tree import remove_tree


def merge_layers(lower: tuple[str, ...], target: str, *, shift: int = 0) -> None:
    """Copy layers, topmost first as an overlay takes them, into the directory `target`.

    Owners (plus `shift`), modes, times, hard links, devices and extended attributes are kept.
    """
    for layer in reversed(lower):
        copy_layer(layer, target, shift=shift)


def copy_layer(layer: str, target: str, *, shift: int = 0) -> None:
    """Put one layer (in overlayfs's form: 0/0 devices and opaque directories) on top of what `target` has."""
    links: dict[tuple[int, int], str] = {}
    _copy_directory(layer, target, links, shift)


def _copy_directory(source: str, target: str, links: dict[tuple[int, int], str], shift: int) -> None:
    for entry in os.scandir(source):
        found = entry.stat(follow_symlinks=False)
        there = f"{target}/{entry.name}"
        if stat.S_ISCHR(found.st_mode) and found.st_rdev == 0:
            remove_tree(there)
            continue
        if stat.S_ISDIR(found.st_mode):
            if _is_opaque(entry.path) or (os.path.lexists(there) and not _is_plain_directory(there)):
                remove_tree(there)
            if not os.path.lexists(there):
                os.mkdir(there, 0o700)
            _copy_directory(entry.path, there, links, shift)
        else:
            remove_tree(there)
            earlier = links.get((found.st_dev, found.st_ino))
            if earlier is not None:
                os.link(earlier, there, follow_symlinks=False)
                continue
            _copy_file(entry.path, there, found)
            if found.st_nlink > 1:
                links[(found.st_dev, found.st_ino)] = there
        _copy_metadata(entry.path, there, found, shift)
    _copy_metadata(source, target, os.lstat(source), shift)


def _is_plain_directory(path: str) -> bool:
    return stat.S_ISDIR(os.lstat(path).st_mode)


def _is_opaque(path: str) -> bool:
    try:
        return os.getxattr(path, "trusted.overlay.opaque", follow_symlinks=False) == b"y"
    except OSError:
        return False


def _copy_file(source: str, target: str, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        os.symlink(os.readlink(source), target)
    elif stat.S_ISREG(found.st_mode):
        reading = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _copy_bytes(reading, writing, found.st_size)
        finally:
            os.close(reading)
            os.close(writing)
    else:
        os.mknod(target, stat.S_IFMT(found.st_mode) | 0o600, found.st_rdev)


def _copy_bytes(reading: int, writing: int, left: int) -> None:
    try:
        while left and (count := os.copy_file_range(reading, writing, left)):
            left -= count
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        while left and (count := os.sendfile(writing, reading, None, left)):  # between file systems that cannot
            left -= count


def _copy_metadata(source: str, target: str, found: os.stat_result, shift: int) -> None:
    os.lchown(target, found.st_uid + shift, found.st_gid + shift)
    if not stat.S_ISLNK(found.st_mode):
        os.chmod(target, stat.S_IMODE(found.st_mode))
    for name in os.listxattr(source, follow_symlinks=False):
        if not name.startswith("trusted.overlay."):
            os.setxattr(target, name, os.getxattr(source, name, follow_symlinks=False), follow_symlinks=False)
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns), follow_symlinks=False)
