"""A first program for guest kernels, packed as an initramfs."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("kernel_init.c")
_FLAGS = [
    "-O2",
    "-ffreestanding",
    "-fno-tree-loop-distribute-patterns",
    "-fno-stack-protector",
    "-nostdlib",
    "-static",
    "-s",
]


def compile_init(target: Path) -> Path:
    """kernel_init.c as a static program without a C library."""
    subprocess.run(["gcc", *_FLAGS, "-o", str(target), str(SOURCE)], check=True)
    return target


def pack_initramfs(target: Path, init: Path) -> Path:
    """An uncompressed cpio archive in the "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    console = os.makedev(5, 1)
    with target.open("wb") as file:
        for inode, (name, mode, device, data) in enumerate(
            (
                ("dev", stat.S_IFDIR | 0o755, 0, b""),
                ("dev/console", stat.S_IFCHR | 0o600, console, b""),
                ("init", stat.S_IFREG | 0o755, 0, init.read_bytes()),
                ("TRAILER!!!", 0, 0, b""),
            )
        ):
            numbers = (
                inode, mode, 0, 0, 1, 0, len(data), 0, 0, os.major(device), os.minor(device), len(name) + 1, 0,
            )  # fmt: skip
            header = b"070701" + b"".join(b"%08x" % number for number in numbers) + name.encode() + b"\0"
            file.write(header + b"\0" * (-len(header) % 4) + data + b"\0" * (-len(data) % 4))
    return target
