"""What a mount of the user's may be, behind every kind of wall."""

from __future__ import annotations

import os

from nagaya.errors import UsageError
from nagaya.kernel.mount import MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY
from nagaya.model.spec import Mount
from nagaya.storage.plan import MountPlan

# What may be mounted over in /proc, as runc has it: files that tell a machine of its own limits (lxcfs).
PROC_TARGETS = frozenset(
    f"/proc/{name}" for name in ("cpuinfo", "diskstats", "loadavg", "meminfo", "slabinfo", "stat", "swaps", "uptime")
)

_FLAGS = {
    "nosuid": (MS_NOSUID, True), "suid": (MS_NOSUID, False),
    "nodev": (MS_NODEV, True), "dev": (MS_NODEV, False),
    "noexec": (MS_NOEXEC, True), "exec": (MS_NOEXEC, False),
    "ro": (MS_RDONLY, True), "rw": (MS_RDONLY, False),
}  # fmt: skip
_IGNORED_OPTIONS = frozenset(("nocopy", "z", "Z", "bind", "rbind"))


def check_target(target: str) -> None:
    """Raise `UsageError` for a place that no mount of the user's may cover.

    /proc is where the kernel hides and protects things from the machine: a mount over it would undo that, and would
    turn what is written there (sysctls) into writes to files that somebody else chose (CVE-2019-16884, CVE-2025-52881).
    """
    place = os.path.normpath("/" + target.lstrip("/"))
    if not target.startswith("/"):
        raise UsageError(f"the mount target '{target}' is not an absolute path")
    if place == "/":
        raise UsageError("the machine's root cannot be mounted over", hint="mount it at a directory below /")
    if (place + "/").startswith("/proc/") and place not in PROC_TARGETS:
        raise UsageError(
            f"nothing can be mounted at '{place}': the machine's own /proc belongs there",
            hint="choose another target, for example /host" + place,
        )


def check_options(options: tuple[str, ...]) -> None:
    """Raise `UsageError` for a mount option that there is not."""
    for option in options:
        if option not in _FLAGS and option not in _IGNORED_OPTIONS:
            raise UsageError(f"unknown mount option '{option}'", hint=f"one of: {', '.join(_FLAGS)}")


def mount_flags(plan: MountPlan) -> int:
    """MS_RDONLY, MS_NOSUID, MS_NODEV and MS_NOEXEC as the user asked for, or as is usual. Raises `UsageError`."""
    flags = MS_NOSUID | MS_NODEV if plan.kind == "tmpfs" else 0
    if plan.kind == "tmpfs" and not {"exec", "noexec"} & set(plan.options):
        flags |= MS_NOEXEC
    check_options(plan.options)
    for option in plan.options:
        if option in _FLAGS:
            bit, on = _FLAGS[option]
            flags = flags | bit if on else flags & ~bit
    if plan.read_only:
        flags |= MS_RDONLY
    return flags


def covers(mounts: tuple[MountPlan, ...] | tuple[Mount, ...], target: str) -> bool:
    """Whether one of the user's mounts is at `target`, or at the directory that it is in: ours would hide part of it."""
    return any(os.path.normpath(plan.target) in (target, os.path.dirname(target)) for plan in mounts)
