"""The agent's functions on a container that does not run: its root is mounted for one process alone."""

from __future__ import annotations

import os

from nagaya.engines.container import rootfs
from nagaya.engines.container.engine import agent_path
from nagaya.kernel import mount as kernel
from nagaya.kernel import namespaces, process
from nagaya.storage.plan import RootfsPlan


def start_applet(layout: RootfsPlan, argv: tuple[str, ...], stdin: int, stdout: int, stderr: int) -> int:
    """Start `nagaya-agent --applet ARGV` in the container's root with these descriptors; answers its pid.

    The mount lives in that process's own mount namespace, and goes with it. Raises `OSError`.
    """
    program = process.sealed_copy(agent_path())
    pid = os.fork()
    if pid:
        os.close(program)
        return pid
    try:
        for source, target in ((stdin, 0), (stdout, 1), (stderr, 2)):
            os.dup2(source, target)
        _enter_root(layout)
        process.execute_fd(program, ["nagaya-agent", "--applet", *argv], [])
    except OSError as error:
        os.write(2, f"{error.strerror}\n".encode())
    finally:
        os._exit(1)


def _enter_root(layout: RootfsPlan) -> None:
    namespaces.unshare(namespaces.CLONE_NEWNS)
    kernel.mount("", "/", "", kernel.MS_PRIVATE | kernel.MS_REC)
    rootfs.prepare(layout)
    target = f"{os.path.dirname(layout.upper)}/rootfs"
    if not os.path.isdir(target):
        os.mkdir(target, 0o755)
    try:
        root = rootfs.mount_overlay(layout, target)
    except OSError as error:
        if not rootfs.cannot_overlay(error):
            raise
        root = rootfs.mount_copy(layout, target)
    # tar-in finds its way through /proc/self/fd; an empty /proc of the image's own would hide that.
    try:
        kernel.mount("proc", f"{target}/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    except FileNotFoundError:
        pass  # an image without /proc: extended attributes are then not kept
    os.fchdir(root)
    os.chroot(".")
