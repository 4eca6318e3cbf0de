"""The root file system: an overlay of the image's layers, or a plain copy of them where overlay cannot be mounted."""

from __future__ import annotations

import errno
import os
import stat

from nagaya.kernel import mount as kernel
from nagaya.storage.plan import RootfsPlan
from nagaya.storage.tree import remove_tree

OPTIONS_MAX = 4000  # mount(2) takes one page of options


def prepare(plan: RootfsPlan) -> None:
    """Make the writable directories."""
    for path in (plan.upper, plan.work):
        try:
            os.mkdir(path, 0o755)
        except FileExistsError:
            pass


def options(lower: tuple[str, ...], upper: str, work: str) -> str:
    """Overlay's mount options. Colons part the layers, so that one in a path needs a backslash."""
    parts = [part.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,") for part in lower]
    return f"lowerdir={':'.join(parts)},upperdir={_escape(upper)},workdir={_escape(work)}"


def _escape(path: str) -> str:
    return path.replace("\\", "\\\\").replace(",", "\\,")


def mount_overlay(plan: RootfsPlan, target: str) -> int:
    """Mount the overlay at `target`, in a mount namespace of our own; a directory descriptor of it.

    Always writable: mount targets may have to be made first. A read-only root becomes one when they are there.

    Many layers do not fit mount(2)'s one page: relative to their common directory they do up to about 100; beyond
    that, fsconfig's `lowerdir+` (Linux 6.5) takes them one by one.
    """
    common = os.path.commonpath([os.path.dirname(layer) for layer in plan.lower])
    short = tuple(os.path.relpath(layer, common) for layer in plan.lower)
    text = options(short, plan.upper, plan.work)
    if len(os.fsencode(text)) < OPTIONS_MAX:
        before = os.open(".", os.O_PATH | os.O_CLOEXEC)
        try:
            os.chdir(common)
            kernel.mount("overlay", target, "overlay", 0, text)
        finally:
            os.fchdir(before)
            os.close(before)
    else:
        tree = build_overlay(plan.lower, plan.upper, plan.work)
        there = os.open(target, os.O_PATH | os.O_CLOEXEC)
        kernel.move_mount(tree, there)
        os.close(there)
        os.close(tree)
    return os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def build_overlay(lower: tuple[str, ...], upper: str, work: str) -> int:
    """A detached overlay mount by the new mount API."""
    context = kernel.fsopen("overlay")
    try:
        kernel.fsconfig_string(context, "source", "overlay")
        for layer in lower:
            kernel.fsconfig_string(context, "lowerdir+", layer)
        kernel.fsconfig_string(context, "upperdir", upper)
        kernel.fsconfig_string(context, "workdir", work)
        kernel.fsconfig_create(context)
        return kernel.fsmount(context)
    finally:
        os.close(context)


def cannot_overlay(error: OSError) -> bool:
    """Whether this file system (or kernel) has no overlay, so that a copy is the way."""
    return error.errno in (errno.EINVAL, errno.ENODEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


def mount_copy(plan: RootfsPlan, target: str, *, shift: int = 0) -> int:
    """Copy the layers into the machine's own directory (once) and bind that at `target`.

    `shift` is added to every owner, for a user namespace without idmapped mounts.
    """
    directory = f"{os.path.dirname(plan.upper)}/copy"
    done = f"{directory}.done"
    if not os.path.exists(done):
        remove_tree(directory)
        os.mkdir(directory, 0o755)
        for layer in reversed(plan.lower):
            copy_layer(layer, directory, shift=shift)
        os.close(os.open(done, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    tree = kernel.open_tree(directory, kernel.OPEN_TREE_CLONE | kernel.OPEN_TREE_CLOEXEC)
    there = os.open(target, os.O_PATH | os.O_CLOEXEC)
    kernel.move_mount(tree, there)
    os.close(there)
    os.close(tree)
    return os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


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
            left = found.st_size
            while left and (count := os.copy_file_range(reading, writing, left)):
                left -= count
        finally:
            os.close(reading)
            os.close(writing)
    elif not stat.S_ISSOCK(found.st_mode):
        os.mknod(target, stat.S_IFMT(found.st_mode) | 0o600, found.st_rdev)


def _copy_metadata(source: str, target: str, found: os.stat_result, shift: int) -> None:
    os.lchown(target, found.st_uid + shift, found.st_gid + shift)
    if not stat.S_ISLNK(found.st_mode):
        os.chmod(target, stat.S_IMODE(found.st_mode))
    for name in os.listxattr(source, follow_symlinks=False):
        if not name.startswith("trusted.overlay."):
            os.setxattr(target, name, os.getxattr(source, name, follow_symlinks=False), follow_symlinks=False)
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns), follow_symlinks=False)


