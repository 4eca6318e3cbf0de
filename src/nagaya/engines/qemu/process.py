"""QEMU's process: forked by the supervisor, with the descriptors it needs, no others, and as few rights as they allow."""

from __future__ import annotations

import fcntl
import gc
import os
import resource
import signal

from nagaya.kernel import namespaces
from nagaya.kernel.process import PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, prctl
from nagaya.static import NamedTuple, NoReturn

FIRST_FD = 3
# Above all ranges of user namespaces (engines/container/userns.py) and below 2**31, one id for each machine: QEMU that
# was taken over by its guest can neither trace nor signal another machine's.
FIRST_ID = 0x6E000000
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/", "LC_ALL": "C"}
FAILED = 127
MOST_FILES = 256


class Launch(NamedTuple):
    """A program and what it gets. `descriptors` become 3, 4, 5, ... in their order; `log` its two outputs."""

    argv: list[str]
    descriptors: tuple[int, ...]
    log: int
    id: int = -1  # user and group to become; -1 = stay who we are
    own_network: bool = True  # an empty network namespace; only root can


def user_id(machine_id: str) -> int:
    """The user that a machine's QEMU runs as, where root starts it."""
    return FIRST_ID + int(machine_id[:6], 16)


def start(launch: Launch) -> int:
    """Fork and execute. The child's pid: a failure before or of the execution is told in the log, and ends it."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        gc.disable()  # a collection would write to, and so copy, every page that we share with the supervisor
        _run(launch, parent)
    return pid


def _run(launch: Launch, parent: int) -> NoReturn:
    """In the child; never returns."""
    step = "cannot be started"
    try:
        os.setpgid(0, 0)
        _place(launch)
        for number in (signal.SIGPIPE, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if launch.id >= 0:
            step = "cannot be kept apart"
            namespaces.unshare(namespaces.CLONE_NEWIPC | (namespaces.CLONE_NEWNET if launch.own_network else 0))
            os.setgroups([])
            os.setresgid(launch.id, launch.id, launch.id)
            os.setresuid(launch.id, launch.id, launch.id)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the ids: changing them clears it
        if os.getppid() != parent:
            os._exit(FAILED)  # the supervisor was killed before we could ask to die with it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a guest's memory is nobody else's business
        resource.setrlimit(resource.RLIMIT_NOFILE, (MOST_FILES, MOST_FILES))
        step = "cannot be executed"
        os.chdir("/")
        os.execvpe(launch.argv[0], launch.argv, ENVIRONMENT)
    except OSError as error:
        os.write(2, f"{launch.argv[0]} {step}: {error.strerror}\n".encode())
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
