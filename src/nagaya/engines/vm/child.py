"""Programs that work for one machine (QEMU, virtiofsd): children of its supervisor with the descriptors that they need
and no others, which die with it.
"""

from __future__ import annotations

import fcntl
import gc
import os
import resource
import signal
from collections.abc import Callable

from nagaya.kernel.process import PR_SET_NO_NEW_PRIVS, die_with, prctl
from nagaya.static import NamedTuple, NoReturn

FIRST_FD = 3
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/", "LC_ALL": "C"}
FAILED = 127


class Launch(NamedTuple):
    """A program and what it gets. `descriptors` become 3, 4, 5, ... in their order; `log` its two outputs."""

    argv: list[str]
    descriptors: tuple[int, ...]
    log: int
    enter: Callable[[], None]  # the machine's control group: called in the child, still with our rights: raises OSError
    prepare: Callable[[], None] = lambda: None  # then this, likewise


def start(launch: Launch) -> int:
    """Fork and execute. The child's pid: a failure before or of the execution is told in the log, and ends it."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        gc.disable()  # a collection would write to, and so copy, every page that we share with the supervisor
        _run(launch, parent)
    return pid


def end(pid: int) -> None:
    """Kill a child of ours that has not been reaped, for its pid is still its own, and reap it."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _run(launch: Launch, parent: int) -> NoReturn:
    """In the child; never returns."""
    step = "cannot be prepared"
    try:
        os.setpgid(0, 0)
        _place(launch)
        for number in (signal.SIGPIPE, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        launch.enter()
        launch.prepare()
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        die_with(parent, FAILED)  # only now: whoever changes its ids loses it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a guest's memory is nobody else's business
        step = "cannot be executed"
        os.chdir("/")
        os.execvpe(launch.argv[0], launch.argv, ENVIRONMENT)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        os.write(2, f"{launch.argv[0]} {step}: {error.strerror}{where}\n".encode())
    finally:
        os._exit(FAILED)


def _place(launch: Launch) -> None:
    """The descriptors to their numbers, and every other one closed."""
    last = FIRST_FD + len(launch.descriptors)
    # Out of the way first: a source may have a number that another one is to get.
    log = fcntl.fcntl(launch.log, fcntl.F_DUPFD, last)
    sources = [fcntl.fcntl(fd, fcntl.F_DUPFD, last) for fd in launch.descriptors]
    null = os.open("/dev/null", os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    for target, source in enumerate(sources, start=FIRST_FD):
        os.dup2(source, target)
    os.closerange(last, (1 << 31) - 1)
