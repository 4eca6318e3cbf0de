"""The supervisor process: cut loose from its launcher, take the lock, serve, and leave a note when it breaks."""

from __future__ import annotations

import fcntl
import os
import signal
import time

from nagaya.errors import Conflict, HostError, NagayaError
from nagaya.kernel.process import close_all_but
from nagaya.model.spec import MachineSpec
from nagaya.protocol import control
from nagaya.storage import machines
from nagaya.storage.lock import FileLock
from nagaya.storage.paths import Paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.supervisor.supervisor import Supervisor


def run(
    paths: Paths, machine_id: str, launcher_fd: int, command_fd: int, *, attach: bool, size: tuple[int, int],
    saved: str = "",
) -> int:  # fmt: skip
    """Serve one machine until it has ended. Errors before that go to the launcher; answers the exit status.

    `command_fd` holds the machine's command lock, which was taken for this start. `saved` as `launch` has it.
    """
    _cut_loose(launcher_fd, command_fd)
    command = FileLock.inherited(f"{paths.machine(machine_id)}/command.lock", command_fd)
    try:
        supervisor = _take_over(paths, machine_id, launcher_fd, command, attach=attach, size=size, saved=saved)
    except NagayaError as problem:
        return _report(launcher_fd, problem)
    except FileNotFoundError:
        return _report(launcher_fd, Conflict("the machine was removed before it could start"))
    except OSError as error:
        return _report(launcher_fd, HostError.from_os(error, "cannot supervise the machine"))
    try:  # from here on the launcher's socket is the supervisor's own
        supervisor.serve()
    except Exception as error:
        _leave_note(paths, supervisor.spec)
        supervisor.abandon(error)
        return 1
    return 0


def _take_over(
    paths: Paths, machine_id: str, launcher_fd: int, command: FileLock, *, attach: bool, size: tuple[int, int],
    saved: str,
) -> Supervisor:  # fmt: skip
    from nagaya.supervisor.supervisor import Supervisor

    spec = machines.load_spec(paths, machine_id)
    lock = machines.liveness_lock(paths, machine_id)
    # Whoever holds it is about to let go: its machine has ended by its record, or we would not have been started.
    lock.acquire()
    supervisor = Supervisor(paths, spec, launcher_fd, lock=lock, command=command, attach=attach, size=size, saved=saved)
    supervisor.watch_signals()
    return supervisor


def _cut_loose(launcher_fd: int, command_fd: int) -> None:
    """Own session, no terminal, no descriptor but the two that were meant for us, default signals, root directory."""
    try:
        os.setsid()
    except PermissionError:
        pass  # executed with setsid: we lead one already
    os.chdir("/")
    os.umask(0o022)
    # A forked supervisor inherits its launcher's lock files: the locks would be held until *we* end.
    close_all_but((launcher_fd, command_fd))
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGWINCH, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)


def _report(launcher_fd: int, problem: NagayaError) -> int:
    flags = fcntl.fcntl(launcher_fd, fcntl.F_GETFL)
    fcntl.fcntl(launcher_fd, fcntl.F_SETFL, flags & ~os.O_NONBLOCK)
    try:
        os.write(launcher_fd, control.error(problem))
    except OSError:
        pass  # the launcher is gone as well: nobody is left to tell
    return 1


def _leave_note(paths: Paths, spec: MachineSpec) -> None:
    """A defect of ours: keep the traceback with the machine, where `inspect` and a bug report find it."""
    import traceback  # lazy: never in a run that works

    try:
        with open(f"{paths.machine(spec.id)}/supervisor.err", "a", encoding="utf-8") as file:
            file.write(time.strftime("%Y-%m-%dT%H:%M:%SZ\n", time.gmtime()) + traceback.format_exc())
    except OSError:
        pass  # the store is full or gone; the machine's end is recorded by the next command's repair
