"""A benchmark in a network namespace of its own: its bridges and rules are nobody else's, and go when it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from nagaya.kernel import namespaces, netlink
from nagaya.kernel.mount import MS_PRIVATE, MS_REC, mount


def run_apart(call: Callable[[], bool]) -> bool:
    """In a child: whoever leaves a network namespace does so for good."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        kept = False
        try:
            namespaces.unshare(namespaces.CLONE_NEWNET | namespaces.CLONE_NEWNS)
            mount("", "/", "", MS_REC | MS_PRIVATE)
            with netlink.Netlink() as link:
                link.set_up(netlink.index_of("lo"))
            kept = call()
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            os._exit(not kept)
    return os.waitpid(pid, 0)[1] == 0
