"""The initramfs of a virtual machine: the guest agent as /init, and the empty directories that it mounts things at.

A cpio archive, uncompressed: the agent is small, and unpacking would be the guest kernel's work. The same agent makes the
same bytes.
"""

from __future__ import annotations

import os
import stat

from nagaya.errors import HostError
from nagaya.storage.cpio import Entry, make_cpio

DIRECTORIES = ("dev", "proc", "sys", "lower", "data", "root", "files", "shares")
_CONSOLE = os.makedev(5, 1)  # the kernel opens it for /init before anything can be mounted


def make_initramfs(agent_path: str, *, modules: tuple[tuple[str, bytes], ...] = ()) -> bytes:
    """The archive. Raises `HostError` when the agent cannot be read.

    `modules` are (name, content) of kernel modules, not packed, in the order that the agent is to load them in: those
    that a distribution's kernel needs for its disks, their file systems and the agent's port.
    """
    try:
        with open(agent_path, "rb") as file:
            agent = file.read()
    except OSError as error:
        raise HostError.from_os(error, "cannot read the guest agent") from None
    entries = [Entry(name, stat.S_IFDIR | 0o755) for name in DIRECTORIES]
    if modules:
        entries.append(Entry("modules", stat.S_IFDIR | 0o755))
    for number, (name, content) in enumerate(modules):
        entries.append(Entry(f"modules/{number:03}-{name}", stat.S_IFREG | 0o644, content))
    entries.append(Entry("dev/console", stat.S_IFCHR | 0o600, device=_CONSOLE))
    return make_cpio((*entries, Entry("init", stat.S_IFREG | 0o755, agent)))
