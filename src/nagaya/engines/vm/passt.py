"""A user-mode network for a virtual machine: passt, which makes the machine's connections as its own.

Needs no rights at all. Nobody can reach the machine but by the ports that are led to it; what it may reach is what the
user may, but for the host itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

from nagaya.engines.vm import child
from nagaya.engines.vm.parts import user_id
from nagaya.errors import Unsupported
from nagaya.kernel import unix
from nagaya.kernel.process import become
from nagaya.net.plan import USER_NAMESERVER, LinkPlan, NetworkPlan
from nagaya.net.planning import PASST_PLACES, find_passt
from nagaya.static import NamedTuple

PROGRAM = "passt"


class UserLink(NamedTuple):
    """A running passt. `socket` carries frames, each behind its length in 4 bytes; it ends when that is closed."""

    socket: int
    pid: int


def require_passt() -> None:
    """Raise `Unsupported` when passt is not installed."""
    if not find_passt():
        raise Unsupported(
            "a user-mode network of a machine of type 'kvm' needs passt, and it is not installed",
            hint="as root: apt-get install passt; or use --network none",
            finding=f"it was looked for in {', '.join(PASST_PLACES)}",
        )


def plan_passt(link: LinkPlan, plan: NetworkPlan, socket: int) -> list[str]:
    """Its command line; `socket` is the number of its descriptor there."""
    argv = [
        find_passt() or PROGRAM, "--foreground", "--quiet", "--fd", str(socket), "--address", link.address,
        "--netmask", str(link.prefix), "--gateway", link.gateway, "--dns-forward", USER_NAMESERVER, "--no-map-gw",
        "--mtu", str(link.mtu), "--no-ra", "--no-dhcpv6",
    ]  # fmt: skip
    argv += ["--address", link.address6, "--gateway", link.gateway6] if link.address6 else ["--ipv4-only"]
    for protocol, option in (("tcp", "--tcp-ports"), ("udp", "--udp-ports")):
        ports = [port for port in plan.forwards if port.protocol == protocol]
        for port in ports:
            argv += [option, f"{port.host_address}/{port.host_port}:{port.guest_port}"]
        if not ports:
            argv += [option, "none"]
    return argv


def start_passt(
    link: LinkPlan, plan: NetworkPlan, machine_id: str, log: int, stack: ExitStack, *, enter: Callable[[], None]
) -> UserLink:  # fmt: skip
    """Start it for one machine, whose control group it enters. `stack` closes the socket; whoever calls waits for its pid. Raises `OSError`."""
    ours, theirs = unix.socket_pair()
    stack.callback(os.close, ours)
    try:
        argv = plan_passt(link, plan, child.FIRST_FD)
        pid = child.start(child.Launch(argv, (theirs,), log, enter, _plan_rights(machine_id)))
    finally:
        os.close(theirs)
    os.set_blocking(ours, False)
    return UserLink(ours, pid)


def _plan_rights(machine_id: str) -> Callable[[], None]:
    """Root's is the machine's user. It would become "nobody" by itself, and outlive its supervisor by that."""

    def give_up() -> None:
        if os.geteuid() == 0:
            id_ = user_id(machine_id)
            become(id_)

    return give_up
