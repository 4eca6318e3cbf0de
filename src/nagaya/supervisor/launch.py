"""Starting a supervisor: from the CLI by fork (no second interpreter), from anywhere else by executing one.

Either way the launcher gets one connected socket, whose first frame says that the machine runs (REPLY) or why it
does not (ERROR), and which then carries the program's streams when asked to. And either way the supervisor shares the
launcher's command lock until it has recorded that the machine starts: a launcher that is killed in between leaves no
moment in which somebody could start the machine a second time, or remove it under its supervisor.
"""

from __future__ import annotations

import fcntl
import os
import sys

from nagaya.errors import HostError
from nagaya.kernel import unix
from nagaya.storage.lock import FileLock
from nagaya.storage.paths import Paths

_may_fork = False


def allow_fork() -> None:
    """Called by the CLI: this process has one thread and nothing that a forked copy could upset."""
    global _may_fork
    _may_fork = True


def will_fork() -> bool:
    """Whether supervisors will be forks of this process: what it has imported by then, they need not."""
    return _may_fork and not _has_threads()


def launch(
    paths: Paths, machine_id: str, *, command: FileLock, attach: bool, size: tuple[int, int], saved: str = ""
) -> int:
    """Start the supervisor of a machine whose command lock we hold; answers the launcher's end of the socket.

    `saved` is the directory of a snapshot to go on from; "" = boot.
    """
    ours, theirs = unix.socket_pair()
    try:
        if will_fork():
            _fork(paths, machine_id, ours, theirs, command.fd, attach=attach, size=size, saved=saved)
        else:
            _execute(paths, machine_id, theirs, command.fd, attach=attach, size=size, saved=saved)
    except OSError as error:
        os.close(ours)
        raise HostError.from_os(error, "cannot start a supervisor process") from None
    finally:
        os.close(theirs)
    return ours


def _has_threads() -> bool:
    threading = sys.modules.get("threading")
    return threading is not None and threading.active_count() > 1


def _fork(
    paths: Paths, machine_id: str, ours: int, theirs: int, command: int, *, attach: bool, size: tuple[int, int],
    saved: str,
) -> None:  # fmt: skip
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork():
        return
    status = 1
    try:
        os.close(ours)
        from nagaya.supervisor.entry import run  # lazy: only the child needs it

        status = run(paths, machine_id, theirs, command, attach=attach, size=size, saved=saved)
    finally:
        os._exit(status)  # never unwind into the CLI's own frames


def _execute(
    paths: Paths, machine_id: str, theirs: int, command: int, *, attach: bool, size: tuple[int, int], saved: str
) -> None:
    """Execute `python -m nagaya.supervisor`; the intermediate exits at once, so no zombie is left to the caller."""
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    argv = [sys.executable, "-m", "nagaya.supervisor", paths.root, paths.run, machine_id]
    argv += ["1" if attach else "0", str(size[0]), str(size[1]), saved]
    # They become the child's 3 and 4; a dup2 onto itself would keep close-on-exec, and onto each other lose one.
    sources = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (theirs, command)]
    try:
        actions = [(os.POSIX_SPAWN_DUP2, source, target) for target, source in enumerate(sources, start=3)]
        pid = os.posix_spawn(sys.executable, argv, environment, file_actions=actions, setsid=True)
        _, status = os.waitpid(pid, 0)
    finally:
        for source in sources:
            os.close(source)
    if status:
        raise OSError(0, f"the supervisor's interpreter ended with status {os.waitstatus_to_exitcode(status)}")
