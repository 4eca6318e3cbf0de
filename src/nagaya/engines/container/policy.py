"""From a machine's security settings to what binds its programs: capabilities, limits, seccomp."""

from __future__ import annotations

from nagaya.errors import UsageError
from nagaya.kernel import capabilities
from nagaya.model.spec import Security, Ulimit

# What Docker grants, so that images behave as people know them.
DEFAULT_CAPABILITIES = (
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "NET_RAW",
    "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
)  # fmt: skip

# getrlimit(2)'s numbers, x86-64 and arm64.
RLIMITS = {
    "cpu": 0, "fsize": 1, "data": 2, "stack": 3, "core": 4, "rss": 5, "nproc": 6, "nofile": 7, "memlock": 8, "as": 9,
    "locks": 10, "sigpending": 11, "msgqueue": 12, "nice": 13, "rtprio": 14, "rttime": 15,
}  # fmt: skip
UNLIMITED = (1 << 64) - 1


def capability_mask(security: Security) -> int:
    """The programs' capabilities: the default set, less `cap_drop`, plus `cap_add` ("ALL" first, as Docker)."""
    granted = capabilities.mask(DEFAULT_CAPABILITIES)
    everything = (1 << len(capabilities.NAMES)) - 1
    add, drop = _known(security.cap_add), _known(security.cap_drop)
    if "ALL" in add:
        granted = everything
    if "ALL" in drop:
        granted = 0
    granted |= capabilities.mask(tuple(name for name in add if name != "ALL"))
    granted &= ~capabilities.mask(tuple(name for name in drop if name != "ALL"))
    return granted & capabilities.bounding_set()


def missing_capabilities(security: Security) -> tuple[str, ...]:
    """What was asked for by name and this host does not have to give."""
    held = capabilities.bounding_set()
    return tuple(
        name for name in _known(security.cap_add) if name != "ALL" and not held >> capabilities.NUMBERS[name] & 1
    )


def agent_mask(programs: int) -> int:
    """The agent's own: what it needs to start programs as any user and to copy files, and all that they may have."""
    return (programs | capabilities.mask(DEFAULT_CAPABILITIES)) & capabilities.bounding_set()


def _known(names: tuple[str, ...]) -> tuple[str, ...]:
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


def settle_rlimits(
    wanted: tuple[tuple[int, int, int], ...],
) -> tuple[tuple[tuple[int, int, int], ...], tuple[str, ...]]:
    """The limits that this host lets us set, and a warning for each that it does not.

    Raising a hard limit takes CAP_SYS_RESOURCE in the initial user namespace (setrlimit(2)), which not every root has;
    and no number of files may go beyond fs.nr_open.
    """
    import resource  # lazy: only machines with ulimits

    settled, warnings = [], []
    names = {number: name for name, number in RLIMITS.items()}
    may_raise = bool(capabilities.get_sets().effective >> capabilities.NUMBERS["SYS_RESOURCE"] & 1)
    for number, soft, hard in wanted:
        ours = resource.getrlimit(number)[1]
        ceiling, reason = UNLIMITED if ours == resource.RLIM_INFINITY else ours, "no CAP_SYS_RESOURCE"
        if may_raise:
            ceiling, reason = (_files_at_most(), "fs.nr_open") if names[number] == "nofile" else (UNLIMITED, "")
        if hard > ceiling:
            warnings.append(
                f"this host does not allow to raise ulimit {names[number]} above {ceiling}: it stays there ({reason})"
            )
            soft, hard = min(soft, ceiling), ceiling
        settled.append((number, soft, hard))
    return tuple(settled), tuple(warnings)


def _files_at_most() -> int:
    with open("/proc/sys/fs/nr_open", encoding="ascii") as file:
        return int(file.read())


def make_room(limits: tuple[tuple[int, int, int], ...]) -> None:
    """Raise this process's hard limits to settled ones: what inherits them can set its own without privileges."""
    import resource  # lazy: only machines with ulimits

    for number, _, hard in limits:
        soft_now, hard_now = resource.getrlimit(number)
        if hard_now != resource.RLIM_INFINITY and hard > hard_now:
            resource.setrlimit(number, (soft_now, resource.RLIM_INFINITY if hard == UNLIMITED else hard))
