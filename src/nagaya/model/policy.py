"""What holds for every program in a machine."""

from __future__ import annotations

from nagaya.static import NamedTuple


class ProcessPolicy(NamedTuple):
    """What the agent applies to each program right before it executes it (see docs/agent-protocol.md)."""

    capabilities: int  # bit mask: bounding, permitted and effective
    no_new_privileges: bool
    seccomp: bytes = b""  # an array of struct sock_filter, or nothing
    rlimits: tuple[tuple[int, int, int], ...] = ()  # (resource, soft, hard); 2**64-1 = unlimited


APPLET = ProcessPolicy(capabilities=0, no_new_privileges=False)
"""The agent's own functions: they have what the agent has, whatever a policy says (guest/policy.c)."""
