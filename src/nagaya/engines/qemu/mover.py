"""The process that moves a machine, at either side: a child of the supervisor's with what it needs, and no rights but those."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterable

from nagaya.engines.vm.parts import user_id
from nagaya.kernel import namespaces
from nagaya.kernel.process import PR_SET_NO_NEW_PRIVS, become, close_all_but, die_with, prctl
from nagaya.static import NoReturn


class Mover:
    """One at a time; the machine's QEMU goes on without it."""

    def __init__(self) -> None:
        self._pid = 0

    def start(
        self, machine_id: str, log_path: str, fds: Iterable[int], work: Callable[[], None], *, enter: Callable[[], None]
    ) -> None:
        """Fork: `work` is done there, with `fds` and nothing else open, as the machine's own user. Raises `OSError`.

        `enter`: into the machine's control group.
        """
        self.end()
        parent = os.getpid()
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            pid = os.fork()
            if pid == 0:
                gc.disable()  # a collection would write to, and so copy, every page that we share with the supervisor
                _run(machine_id, log, parent, tuple(fds), work, enter)
        finally:
            os.close(log)
        self._pid = pid

    def end(self) -> None:
        """Kill it, if it has not ended, and reap it."""
        pid, self._pid = self._pid, 0
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _run(
    machine_id: str, log: int, parent: int, fds: tuple[int, ...], work: Callable[[], None], enter: Callable[[], None]
) -> NoReturn:
    status = 1
    try:
        os.setpgid(0, 0)
        null = os.open("/dev/null", os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        close_all_but(fds)
        for number in (signal.SIGPIPE, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN if number == signal.SIGPIPE else signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        enter()
        if os.geteuid() == 0:
            namespaces.unshare(namespaces.CLONE_NEWIPC | namespaces.CLONE_NEWNET)
            id_ = user_id(machine_id)
            become(id_)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        die_with(parent, status)  # only now: whoever changes its ids loses it
        work()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)
