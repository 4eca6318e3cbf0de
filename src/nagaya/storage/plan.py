"""Rootfs and mounts as data: printable and testable before anything is mounted."""

from __future__ import annotations

from typing import NamedTuple


class RootfsPlan(NamedTuple):
    """An overlay: read-only `lower` directories, topmost first, under a writable `upper` with its `work`."""

    lower: tuple[str, ...]
    upper: str
    work: str
    read_only: bool = False


class MountPlan(NamedTuple):
    """A mount whose source is a host path already checked to exist ("" for tmpfs)."""

    kind: str  # "bind" | "tmpfs"
    source: str
    target: str
    read_only: bool
    propagation: str
    size_bytes: int
    mode: int
    options: tuple[str, ...]
    owned: bool = False  # the machine's own (a volume): its owners are the machine's ids, in a user namespace too
