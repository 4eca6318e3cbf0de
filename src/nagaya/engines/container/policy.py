"""From a machine's security settings to what binds its programs: capabilities, limits, seccomp."""

from __future__ import annotations

from nagaya.engines.program_rules import DEFAULT_CAPABILITIES as DEFAULT_CAPABILITIES
from nagaya.engines.program_rules import RLIMITS as RLIMITS
from nagaya.engines.program_rules import UNLIMITED as UNLIMITED
from nagaya.engines.program_rules import known_capabilities, wanted_capabilities
from nagaya.engines.program_rules import rlimits as rlimits
from nagaya.kernel import capabilities
from nagaya.model.spec import Security


def capability_mask(security: Security) -> int:
    """The programs' capabilities: what was asked for, of what this host's root has to give."""
    return wanted_capabilities(security) & capabilities.bounding_set()


def missing_capabilities(security: Security) -> tuple[str, ...]:
    """What was asked for by name and this host does not have to give."""
    held = capabilities.bounding_set()
    return tuple(
        name
        for name in known_capabilities(security.cap_add)
        if name != "ALL" and not held >> capabilities.NUMBERS[name] & 1
    )


def agent_mask(programs: int) -> int:
    """The agent's own: what it needs to start programs as any user and to copy files, and all that they may have."""
    return (programs | capabilities.mask(DEFAULT_CAPABILITIES)) & capabilities.bounding_set()


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
