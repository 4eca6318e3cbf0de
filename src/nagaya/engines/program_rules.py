"""What may be asked for a machine's programs, behind every kind of wall: capabilities and resource limits by name."""

from __future__ import annotations

from nagaya.errors import UsageError
from nagaya.kernel import capabilities
from nagaya.model.spec import Security, Ulimit

# What Docker grants, so that images behave as people know them.
DEFAULT_CAPABILITIES = (
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "NET_RAW",
    "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
)  # fmt: skip

# getrlimit(2)'s numbers: x86-64, arm64 and riscv64 have the same.
RLIMITS = {
    "cpu": 0, "fsize": 1, "data": 2, "stack": 3, "core": 4, "rss": 5, "nproc": 6, "nofile": 7, "memlock": 8, "as": 9,
    "locks": 10, "sigpending": 11, "msgqueue": 12, "nice": 13, "rtprio": 14, "rttime": 15,
}  # fmt: skip
UNLIMITED = (1 << 64) - 1


def wanted_capabilities(security: Security) -> int:
    """The mask that the user asks for: the default set, less `cap_drop`, plus `cap_add` ("ALL" first, as Docker)."""
    granted = capabilities.mask(DEFAULT_CAPABILITIES)
    everything = (1 << len(capabilities.NAMES)) - 1
    add, drop = known_capabilities(security.cap_add), known_capabilities(security.cap_drop)
    if "ALL" in add:
        granted = everything
    if "ALL" in drop:
        granted = 0
    granted |= capabilities.mask(tuple(name for name in add if name != "ALL"))
    return granted & ~capabilities.mask(tuple(name for name in drop if name != "ALL"))


def known_capabilities(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names. Raises `UsageError` for one that there is not."""
    for name in names:
        if name != "ALL" and name not in capabilities.NUMBERS:
            raise UsageError(
                f"there is no capability '{name}'", hint="for example NET_ADMIN, or ALL; capabilities(7) lists them"
            )
    return names


def rlimits(ulimits: tuple[Ulimit, ...]) -> tuple[tuple[int, int, int], ...]:
    """(resource, soft, hard) for each ulimit. Raises `UsageError` for an unknown name or a soft above a hard limit."""
    made = []
    for limit in ulimits:
        if limit.name not in RLIMITS:
            raise UsageError(f"there is no resource limit '{limit.name}'", hint=f"one of: {', '.join(RLIMITS)}")
        soft = UNLIMITED if limit.soft == -1 else limit.soft
        hard = UNLIMITED if limit.hard == -1 else limit.hard
        if not 0 <= soft <= hard <= UNLIMITED:
            raise UsageError(f"--ulimit {limit.name}: the soft limit is above the hard limit")
        made.append((RLIMITS[limit.name], soft, hard))
    return tuple(made)
