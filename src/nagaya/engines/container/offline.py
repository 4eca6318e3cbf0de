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
    root = _mount_root(layout, target)
    # tar-in finds its way through /proc/self/fd; an empty /proc of the image's own would hide that.
    try:
        place = kernel.open_in_root(root, "proc", os.O_PATH | os.O_DIRECTORY, follow=False)
    except OSError:
        pass  # an image without a /proc to mount on: extended attributes are then not kept
    else:
        flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
        kernel.mount("proc", f"/proc/self/fd/{place}", "proc", flags)
        os.close(place)
    os.fchdir(root)
    os.chroot(".")


def _mount_root(layout: RootfsPlan, target: str) -> int:
    if not rootfs.has_copy(layout):
        try:
            return rootfs.mount_overlay(layout, target)
        except OSError as error:
            if not rootfs.cannot_overlay(error):
                raise
    return rootfs.mount_copy(layout, target)
