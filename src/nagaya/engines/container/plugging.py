"""A network link for a container that runs: made from outside, set up by a child of ours inside."""

from __future__ import annotations

import os
from collections.abc import Callable

from nagaya.errors import HostError
from nagaya.kernel.namespaces import CLONE_NEWNET, setns
from nagaya.kernel.netlink import Netlink
from nagaya.net import links
from nagaya.net.plan import LinkPlan


def plug(link: LinkPlan, pid: int, pidfd: int) -> None:
    """Raises `HostError`; there is no link then. `pid` is our child, not waited for, and `pidfd` means it too."""
    try:
        with Netlink() as netlink:
            links.connect_link(netlink, link, pid)
            try:
                _inside(pidfd, lambda inside: links.configure_link(inside, link))
            except OSError:
                netlink.delete_link(link.host_link)
                raise
    except OSError as error:
        raise HostError.from_os(error, f"cannot connect the machine to the network '{link.network}'") from None


def unplug(link: LinkPlan, pidfd: int) -> None:
    """Delete a link that is inside alone. Raises `HostError`."""
    try:
        _inside(pidfd, lambda inside: inside.delete_link(link.name))
    except OSError as error:
        raise HostError.from_os(error, f"cannot cut the machine off the network '{link.network}'") from None


def route(link: LinkPlan, pidfd: int) -> None:
    """Make a link's gateways the machine's default routes, where it has none. Raises `HostError`."""
    try:
        _inside(pidfd, lambda inside: links.add_default_routes(inside, link))
    except OSError as error:
        raise HostError.from_os(error, "cannot set the machine's default route") from None


def _inside(pidfd: int, change: Callable[[Netlink], object]) -> None:
    """Do something in the machine's network namespace, in a child, for a process cannot be in two. Raises its `OSError`."""
    told, telling = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        number = 0
        try:
            setns(pidfd, CLONE_NEWNET)
            with Netlink() as netlink:
                change(netlink)
        except OSError as error:
            number = error.errno or 5
            os.write(telling, f"{error.strerror}".encode())
        finally:
            os._exit(min(number, 255))
    os.close(telling)
    try:
        text = os.read(told, 4096).decode(errors="replace")
        _, status = os.waitpid(child, 0)
    finally:
        os.close(told)
    if status:
        raise OSError(os.waitstatus_to_exitcode(status), text)
