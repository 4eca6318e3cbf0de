"""A program whose whole tree of processes ends with it, and with us: it is the first one of a PID namespace of its own.

What a parent's death tells a child (PR_SET_PDEATHSIG) reaches no grandchild; a PID namespace whose first process ends has
none left (pid_namespaces(7)).
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable

from nagaya.kernel import mount, namespaces
from nagaya.kernel.process import PR_SET_PDEATHSIG, close_all_but, die_with, prctl


def enclose(enter: Callable[[], None]) -> Callable[[], None]:
    """What a child of ours is to call before it executes such a program, after `enter`. Needs root.

    The child itself stays as it is, and passes the program's status on. Mounts that are made inside are seen inside alone.
    """
    parent = os.getpid()

    def begin() -> None:
        enter()  # first: with other credentials the kernel may forget what follows (prctl(2))
        die_with(parent, 127)
        namespaces.unshare(namespaces.CLONE_NEWPID | namespaces.CLONE_NEWNS)
        mount.mount("", "/", "", mount.MS_REC | mount.MS_SLAVE)
        between = os.pidfd_open(os.getpid())
        pid = os.fork()
        if pid:
            _pass_on(pid)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if select.select([between], [], [], 0)[0]:  # getppid(2) does not tell: the parent is outside of the namespace
            os._exit(127)
        os.close(between)

    return begin


def _pass_on(pid: int) -> None:
    """In the child between; never returns. What it has open somebody else may wait for the end of."""
    close_all_but((), first=0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os._exit(status if status >= 0 else 128 - status)
