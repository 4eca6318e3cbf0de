"""Directories of the host in a virtual machine: one virtiofsd for all mounts of a machine.

It sees nothing but them: in a mount namespace of its own they are bound to /0, /1, /2, ... of an empty file system, and
that is what it serves. A guest names them "TAG/0" and so on, and the machine needs one device, however many they are.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import ExitStack

from nagaya.engines.vm import child
from nagaya.kernel import mount as kernel
from nagaya.kernel import namespaces, unix
from nagaya.static import NamedTuple
from nagaya.storage.plan import MountPlan

TAG = "shares"
PROGRAMS = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")  # QEMU's own until 7.2; the one written in Rust
SOCKET = "shares.sock"
STAGE = "shares"


class Shares(NamedTuple):
    """A running virtiofsd. `socket` is connected to it and speaks vhost-user; it ends when that is closed."""

    socket: int
    pid: int
    tags: tuple[tuple[str, str], ...]  # (target, share), as `plan_setup` wants them


def find_program() -> str:
    """The path of virtiofsd, or ""."""
    for path in PROGRAMS:
        if os.access(path, os.X_OK):
            return path
    for directory in child.ENVIRONMENT["PATH"].split(":"):
        if os.access(f"{directory}/virtiofsd", os.X_OK):
            return f"{directory}/virtiofsd"
    return ""


def why_not() -> str:
    """Why this host, or this user, cannot share directories with a virtual machine; "" when it can."""
    if os.geteuid():
        return "only root can share directories, for virtiofsd gives files the owners that the guest says"
    if not find_program():
        return "virtiofsd, which would share them, is not installed (Debian 12: in qemu-system-common)"
    return ""


def start_shares(
    mounts: tuple[MountPlan, ...], runtime_dir: str, log: int, stack: ExitStack, *, enter: Callable[[], None]
) -> Shares | None:  # fmt: skip
    """Serve the binds among `mounts`; None without any, or where they cannot be shared. What virtiofsd says goes to `log`.

    `stack` closes the socket, upon which virtiofsd ends; whoever calls waits for its pid. Raises `OSError`.
    """
    binds = tuple(mount for mount in mounts if mount.kind == "bind")
    if not binds or why_not():
        return None
    stage = f"{runtime_dir}/{STAGE}"
    os.makedirs(stage, mode=0o700, exist_ok=True)
    listener = unix.listen(runtime_dir, SOCKET)
    try:
        os.set_blocking(listener, True)
        socket = unix.connect(runtime_dir, SOCKET)
        stack.callback(os.close, socket)
        # The connection waits in the listener's queue until virtiofsd is there to accept it: nobody has to wait.
        options = f"source={stage},sandbox=chroot,xattr,cache=auto,log_level=warn"
        argv = [find_program(), f"--fd={child.FIRST_FD}", "-f", "-o", options]
        pid = child.start(child.Launch(argv, (listener,), log, enter, _stage(binds, stage)))
    finally:
        os.close(listener)
        os.unlink(f"{runtime_dir}/{SOCKET}")
    return Shares(socket, pid, tuple((bind.target, f"{TAG}/{number}") for number, bind in enumerate(binds)))


def _stage(binds: tuple[MountPlan, ...], stage: str) -> Callable[[], None]:
    def prepare() -> None:
        """In the child: what virtiofsd will see, and no network."""
        namespaces.unshare(namespaces.CLONE_NEWNS | namespaces.CLONE_NEWNET | namespaces.CLONE_NEWIPC)
        kernel.mount("", "/", "", kernel.MS_SLAVE | kernel.MS_REC)
        kernel.mount(
            "shares", stage, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC, "mode=755,size=64k"
        )
        for number, bind in enumerate(binds):
            place = f"{stage}/{number}"
            if stat.S_ISDIR(os.stat(bind.source).st_mode):
                os.mkdir(place, 0o755)
            else:
                os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o644))
            kernel.mount(bind.source, place, "", kernel.MS_BIND | kernel.MS_REC)
            if bind.read_only:
                tree = os.open(place, os.O_PATH | os.O_CLOEXEC)
                kernel.mount_setattr(tree, set_=kernel.MOUNT_ATTR_RDONLY, recursive=True)
                os.close(tree)
        tree = os.open(stage, os.O_PATH | os.O_CLOEXEC)
        kernel.mount_setattr(tree, set_=kernel.MOUNT_ATTR_RDONLY)
        os.close(tree)

    return prepare
