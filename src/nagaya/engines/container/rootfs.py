"""The root file system: an overlay of the image's layers, or a plain copy of them where overlay cannot be mounted."""

from __future__ import annotations

import errno
import os
import stat

from nagaya.kernel import mount as kernel
from nagaya.storage.merge import merge_layers
from nagaya.storage.plan import RootfsPlan
from nagaya.storage.tree import remove_tree

OPTIONS_MAX = 4000  # mount(2) takes one page of options


def prepare(plan: RootfsPlan) -> None:
    """Make the writable directories. `upper` is the machine's / itself: it begins as the image's topmost one is."""
    for path in (plan.upper, plan.work):
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            continue
        image = os.stat(plan.lower[0])
        os.chown(path, image.st_uid, image.st_gid)
        os.chmod(path, stat.S_IMODE(image.st_mode))  # and not what the umask leaves of it


def options(lower: tuple[str, ...], upper: str, work: str) -> str:
    """Overlay's mount options. Colons part the layers, so that one in a path needs a backslash."""
    parts = [part.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,") for part in lower]
    return f"lowerdir={':'.join(parts)},upperdir={_escape(upper)},workdir={_escape(work)}"


def _escape(path: str) -> str:
    return path.replace("\\", "\\\\").replace(",", "\\,")


def mount_overlay(plan: RootfsPlan, target: str) -> int:
    """Mount the overlay at `target`, in a mount namespace of our own; a directory descriptor of it.

    Always writable: mount targets may have to be made first. A read-only root becomes one when they are there.

    Many layers do not fit mount(2)'s one page of options: relative to their common directory about 60 do, named by
    descriptors about 200. Beyond that it takes fsconfig's `lowerdir+` (Linux 6.5).
    """
    common = os.path.commonpath([os.path.dirname(layer) for layer in plan.lower])
    short = tuple(os.path.relpath(layer, common) for layer in plan.lower)
    if _fits(options(short, plan.upper, plan.work)):
        before = os.open(".", os.O_PATH | os.O_CLOEXEC)
        try:
            os.chdir(common)
            kernel.mount("overlay", target, "overlay", 0, options(short, plan.upper, plan.work))
        finally:
            os.fchdir(before)
            os.close(before)
    else:
        _mount_many(plan, target)
    return os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _fits(text: str) -> bool:
    return len(os.fsencode(text)) < OPTIONS_MAX


def _mount_many(plan: RootfsPlan, target: str) -> None:
    layers = [os.open(layer, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for layer in plan.lower]
    try:
        text = options(tuple(f"/proc/self/fd/{fd}" for fd in layers), plan.upper, plan.work)
        if _fits(text):
            kernel.mount("overlay", target, "overlay", 0, text)
            return
    finally:
        for fd in layers:
            os.close(fd)
    tree = build_overlay(plan.lower, plan.upper, plan.work)
    there = os.open(target, os.O_PATH | os.O_CLOEXEC)
    kernel.move_mount(tree, there)
    os.close(there)
    os.close(tree)


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


def has_copy(plan: RootfsPlan) -> bool:
    """Whether the machine began with a copy. It stays with it: its changes are in there."""
    return os.path.exists(f"{os.path.dirname(plan.upper)}/copy.done")


def mount_copy(plan: RootfsPlan, target: str, *, shift: int = 0) -> int:
    """Copy the layers into the machine's own directory (once) and bind that at `target`.

    `shift` is added to every owner, for a user namespace without idmapped mounts.
    """
    directory = f"{os.path.dirname(plan.upper)}/copy"
    done = f"{directory}.done"
    if not os.path.exists(done):
        remove_tree(directory)
        os.mkdir(directory, 0o755)
        merge_layers(plan.lower, directory, shift=shift)
        os.close(os.open(done, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    tree = kernel.open_tree(directory, kernel.OPEN_TREE_CLONE | kernel.OPEN_TREE_CLOEXEC)
    there = os.open(target, os.O_PATH | os.O_CLOEXEC)
    kernel.move_mount(tree, there)
    os.close(there)
    os.close(tree)
    return os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
