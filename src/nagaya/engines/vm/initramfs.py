"""The initramfs of a virtual machine: the guest agent as /init, and the empty directories that it mounts things at.

A cpio archive in the "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst), uncompressed: the
agent is small, and unpacking would be the guest kernel's work. The same agent makes the same bytes.
"""

from __future__ import annotations

import os
import stat

from nagaya.errors import HostError

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
    entries = [(name, stat.S_IFDIR | 0o755, 0, b"") for name in DIRECTORIES]
    if modules:
        entries.append(("modules", stat.S_IFDIR | 0o755, 0, b""))
    for number, (name, content) in enumerate(modules):
        entries.append((f"modules/{number:03}-{name}", stat.S_IFREG | 0o644, 0, content))
    entries += [("dev/console", stat.S_IFCHR | 0o600, _CONSOLE, b""), ("init", stat.S_IFREG | 0o755, 0, agent)]
    parts = [_entry(number, *entry) for number, entry in enumerate(entries, 1)]
    return b"".join((*parts, _entry(0, "TRAILER!!!", 0, 0, b"")))


def _entry(inode: int, name: str, mode: int, device: int, data: bytes) -> bytes:
    numbers = (
        inode, mode, 0, 0, 1, 0, len(data), 0, 0, os.major(device), os.minor(device), len(name) + 1, 0,
    )  # fmt: skip
    head = b"070701" + b"".join(b"%08x" % number for number in numbers) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
