"""A plain user's network for a virtual machine: passt, which makes the machine's connections as its own.

Needs no rights at all. Nobody can reach the machine; what it may reach is what the user may, but for the host itself.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from nagaya.engines.vm import child
from nagaya.errors import Unsupported
from nagaya.kernel import unix
from nagaya.net.plan import USER_ADDRESS, USER_GATEWAY, USER_NAMESERVER, USER_PREFIX
from nagaya.static import NamedTuple

PROGRAM = "passt"


class UserLink(NamedTuple):
    """A running passt. `socket` carries frames, each behind its length in 4 bytes; it ends when that is closed."""

    socket: int
    pid: int


def require_passt() -> None:
    """Raise `Unsupported` when passt is not installed."""
    if not any(os.access(f"{place}/{PROGRAM}", os.X_OK) for place in child.ENVIRONMENT["PATH"].split(":")):
        raise Unsupported(
            "a plain user's machine of type 'kvm' needs passt for its network, and it is not installed",
            hint="as root: apt-get install passt; or use --network none",
            finding=f"it was looked for in {child.ENVIRONMENT['PATH']}",
        )


def start_passt(log: int, stack: ExitStack) -> UserLink:
    """Start it for one machine. `stack` closes the socket; whoever calls waits for its pid. Raises `OSError`."""
    ours, theirs = unix.socket_pair()
    stack.callback(os.close, ours)
    try:
        argv = [
            PROGRAM, "--foreground", "--quiet", "--fd", str(child.FIRST_FD), "--ipv4-only", "--address", USER_ADDRESS,
            "--netmask", str(USER_PREFIX), "--gateway", USER_GATEWAY, "--dns-forward", USER_NAMESERVER, "--no-map-gw",
            "--tcp-ports", "none", "--udp-ports", "none",
        ]  # fmt: skip
        pid = child.start(child.Launch(argv, (theirs,), log))
    finally:
        os.close(theirs)
    os.set_blocking(ours, False)
    return UserLink(ours, pid)
