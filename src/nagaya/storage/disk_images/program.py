"""qemu-img: run with what one job needs, no network, and limits; its progress and its failures in our words."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
from collections.abc import Callable

from nagaya.errors import Conflict, HostError, IntegrityError, LaunchError, NagayaError, Unsupported
from nagaya.kernel import capabilities, namespaces
from nagaya.kernel.process import PR_SET_NO_NEW_PRIVS, close_all_but, die_with, prctl
from nagaya.static import NamedTuple, NoReturn

PROGRAM = "qemu-img"
_PLACES = "/usr/bin:/usr/local/bin:/bin"
MEMORY_BYTES = 4 << 30  # of address space: the tables of a hostile image are not to eat the host's memory
LOOK_S = 20  # of CPU time, for what only looks
# What root keeps for it: reading and writing other users' files, and nothing else.
_KEEP = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
_IN_USE = ("Failed to get", "Is another process using the image")
Progress = Callable[[float], None]


class Done(NamedTuple):
    """How it ended. `said` is its standard error."""

    status: int
    output: bytes
    said: str


def find_program() -> str:
    """The path of qemu-img. Raises `Unsupported`."""
    for place in (*os.environ.get("PATH", "").split(":"), *_PLACES.split(":")):
        if place.startswith("/") and os.access(f"{place}/{PROGRAM}", os.X_OK):
            return f"{place}/{PROGRAM}"
    raise Unsupported(
        "disk images need qemu-img, and it is not installed",
        hint="as root: apt-get install qemu-utils",
        finding="it was looked for in PATH",
    )


def run(
    argv: list[str], *, what: str, fds: tuple[int, ...] = (), look: bool = False, accept: tuple[int, ...] = (0,)
) -> Done:
    """Run one command to its end. `fds` keep their numbers there. `look`: it only reads, and must be quick.

    Raises an error that begins with `what` for a status that is not in `accept`.
    """
    return _run(argv, what=what, fds=fds, look=look, accept=accept, progress=None)


def run_long(argv: list[str], progress: Progress | None, *, what: str, fds: tuple[int, ...] = ()) -> Done:
    """The same for what takes its time; `argv` has -p, and `progress` gets what share of it is done."""
    return _run(argv, what=what, fds=fds, look=False, accept=(0,), progress=progress)


def _run(
    argv: list[str], *, what: str, fds: tuple[int, ...], look: bool, accept: tuple[int, ...], progress: Progress | None
) -> Done:
    path, parent = find_program(), os.getpid()
    out, their_out = os.pipe2(os.O_CLOEXEC)
    err, their_err = os.pipe2(os.O_CLOEXEC)
    # Without subprocess, whose import takes as long as qemu-img does for a linked clone.
    pid = os.fork()
    if pid == 0:
        _execute([path, *argv], fds, (their_out, their_err), parent, look=look)
    os.close(their_out)
    os.close(their_err)
    try:
        output, said = _collect(out, err, progress)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(out)
        os.close(err)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    done = Done(status, output, said.decode("utf-8", "replace").strip())
    if status not in accept:
        raise _failure(done, what)
    return done


def _execute(argv: list[str], fds: tuple[int, ...], ends: tuple[int, int], parent: int, *, look: bool) -> NoReturn:
    """In the child; never returns."""
    try:
        above = max((2, *fds, *ends)) + 1
        out, err = (fcntl.fcntl(end, fcntl.F_DUPFD, above) for end in ends)  # out of the way of 0, 1 and 2
        null = fcntl.fcntl(os.open("/dev/null", os.O_RDONLY), fcntl.F_DUPFD, above)
        for target, source in enumerate((null, out, err)):
            os.dup2(source, target)
        for fd in fds:
            os.set_inheritable(fd, True)
        close_all_but(fds)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
            signal.signal(number, signal.SIG_DFL)
        give_up(parent, look=look)
        os.execve(argv[0], argv, {"PATH": os.defpath, "LC_ALL": "C", "HOME": "/"})
    except OSError as error:
        os.write(2, f"{PROGRAM} cannot be executed: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def give_up(parent: int, *, look: bool) -> None:
    """In the child: what a program that reads disks may do."""
    die_with(parent, 127)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    if look:
        resource.setrlimit(resource.RLIMIT_CPU, (LOOK_S, LOOK_S))
    if os.geteuid() == 0:
        namespaces.unshare(namespaces.CLONE_NEWNET | namespaces.CLONE_NEWIPC)
        capabilities.limit_bounding_set(_KEEP)


def _collect(out: int, err: int, progress: Progress | None) -> tuple[bytes, bytes]:
    """Both outputs; "    (12.34/100%)\\r" among the first is told to `progress`."""
    import select

    poll, kept = select.poll(), {out: bytearray(), err: bytearray()}
    for fd in kept:
        poll.register(fd, select.POLLIN)
    waiting = set(kept)
    while waiting:
        for fd, _ in poll.poll():
            data = os.read(fd, 65536)
            if not data:
                poll.unregister(fd)
                waiting.discard(fd)
                continue
            kept[fd] += data
            if len(kept[fd]) > 8 << 20:
                raise LaunchError("qemu-img says more than can be meant")
            if fd == out and progress is not None:
                share = parse_share(bytes(kept[out][-64:]))
                del kept[out][:-64]
                if share is not None:
                    progress(share)
    return bytes(kept[out]), bytes(kept[err])


def parse_share(tail: bytes) -> float | None:
    """The last whole "(12.34/100%)" in qemu-img's output, as 0.1234."""
    end = tail.rfind(b"/100%)")
    start = tail.rfind(b"(", 0, end) if end >= 0 else -1
    if start < 0:
        return None
    try:
        return min(1.0, float(tail[start + 1 : end]) / 100)
    except ValueError:
        return None


def _failure(done: Done, what: str) -> NagayaError:
    said = done.said.splitlines()[-1] if done.said else ""
    reason = said.removeprefix("qemu-img: ")
    if any(text in done.said for text in _IN_USE):
        return Conflict(
            f"{what}: the disk is in use by another program", hint="stop the QEMU that has it", state="in use"
        )
    if "No space left" in done.said or "File too large" in done.said:
        return HostError(f"{what}: {reason}", hint="free some space, or choose another place", operation=what)
    if done.status in (-signal.SIGXCPU, -signal.SIGABRT, -signal.SIGSEGV) or "Cannot allocate memory" in done.said:
        return IntegrityError(f"{what}: the image needs more memory or time than a sound one would")
    return LaunchError(
        f"{what}: {reason or f'qemu-img ended with status {done.status}'}",
        command=PROGRAM, status=done.status, log_tail=done.said[-2000:],
    )  # fmt: skip
