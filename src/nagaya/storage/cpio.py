"""cpio archives in the "newc" format, which a kernel unpacks as its initramfs.

Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst. Archives may follow each other, compressed ones
too: each begins at a multiple of four bytes, and what a later one has replaces what an earlier one had.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from nagaya.static import NamedTuple


class Entry(NamedTuple):
    """One file of root's. `mode` has its kind, as stat(2) has it; a directory comes before what is in it."""

    name: str
    mode: int
    content: bytes = b""
    device: int = 0


def make_cpio(entries: Iterable[Entry]) -> bytes:
    """The archive. The same entries make the same bytes."""
    parts = [_pack(number, entry) for number, entry in enumerate(entries, 1)]
    return b"".join((*parts, _pack(0, Entry("TRAILER!!!", 0))))


def _pack(inode: int, entry: Entry) -> bytes:
    numbers = (
        inode, entry.mode, 0, 0, 1, 0, len(entry.content), 0, 0, os.major(entry.device), os.minor(entry.device),
        len(entry.name.encode()) + 1, 0,
    )  # fmt: skip
    head = b"070701" + b"".join(b"%08x" % number for number in numbers) + entry.name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + entry.content + bytes(-len(entry.content) % 4)
