"""The process of a machine: forked by the supervisor, with the machine's descriptors, and as few rights as they allow.

It says on its control socket that the machine runs, or why not; then it answers requests there, a JSON line each, until
the machine has ended. When the supervisor is gone, so is the machine.
"""

from __future__ import annotations

import _socket
import errno
import gc
import json
import os
import signal
import sys
import time

from nagaya.engines.base import Incoming
from nagaya.engines.kvm.machine import Machine
from nagaya.engines.kvm.saved import MOST_BASES, Files
from nagaya.engines.kvm.vcpu import Ending
from nagaya.errors import HostError, LaunchError, NagayaError, to_wire
from nagaya.kernel import namespaces
from nagaya.kernel.light_threads import Thread
from nagaya.kernel.process import PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, become, close_all_but, die_with, prctl
from nagaya.protocol.agent import SETUP
from nagaya.protocol.frame import encode
from nagaya.protocol.setup import with_time
from nagaya.static import Any, Callable, Iterator, NamedTuple, NoReturn

BROKEN = 1
_ORDERLY = ("power-off", "reset", "exit", "stopped")  # kinds of endings that somebody wanted
_MOST_LINE_BYTES = 1 << 16
_MOST_FDS = 3 + 1 + MOST_BASES


class FirstWord(NamedTuple):
    """What a guest's agent, which waits for it, is told on the supervisor's behalf: its SETUP.

    A supervisor hears that the machine runs when it has run for a while; by then, the agent has begun. And the time that
    a set-up sets the guest's clock to is the time when it is sent.
    """

    fd: int  # the supervisor's end of the agent's stream: one of those that the child keeps, until this is sent
    setup: bytes

    def say(self) -> None:
        """Raises `OSError` when there is no room for all of it, on a host whose sockets have little."""
        frame = encode(SETUP, 0, with_time(self.setup, time.time_ns()))
        if os.write(self.fd, frame) < len(frame):  # it is a stream, and cannot be taken back
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        os.close(self.fd)


class Plan(NamedTuple):
    """What the child is to do. `control` and all that `assemble` uses are descriptors that it keeps."""

    assemble: Callable[[], Machine]
    control: int
    kept: tuple[int, ...]
    log: int  # its standard error
    enter: Callable[[], None]  # the machine's control group, still with all rights
    id: int = -1  # user and group to become; -1 = stay who we are
    reboots: bool = False  # a guest that asks for a reset gets it; otherwise that is the machine's end
    incoming: Incoming | None = None  # what the machine, which `assemble` makes bare, comes from
    first_word: FirstWord | None = None


def start(plan: Plan) -> int:
    """Fork. The child's pid."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        gc.disable()  # a collection would write to, and so copy, every page that we share with the supervisor
        _run(plan, parent)
    return pid


def _run(plan: Plan, parent: int) -> NoReturn:
    """In the child; never returns. Its status says whether the machine ended as machines do."""
    status = BROKEN
    try:
        os.setpgid(0, 0)
        _keep_only(plan)
        plan.enter()
        for number in (signal.SIGPIPE, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN if number == signal.SIGPIPE else signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        machine = plan.assemble()
        machine.make()
        userfault_fd = _open_userfaultfd() if plan.incoming is not None else -1
        _give_up_rights(plan)
        die_with(parent, BROKEN)  # once more: who changes its ids loses it
        if plan.first_word is not None:
            plan.first_word.say()
        if plan.incoming is None:
            machine.start()
        _send(plan.control, {"running": True})
        Thread(_serve, machine, plan.control)
        if plan.incoming is not None:
            from nagaya.engines.kvm.arriving import arrive  # lazy: migrations alone

            arrive(machine, plan.incoming, userfault_fd, process=os.getpid())
        ending = machine.wait()
        while plan.reboots and ending is not None and ending.kind == "reset":
            machine.reset()
            ending = machine.wait()
        assert ending is not None
        machine.close()  # the disks are free when the supervisor hears of the end
        _send(plan.control, {"ended": ending.kind, "reason": ending.reason})
        status = 0 if ending.kind in _ORDERLY else BROKEN
    except NagayaError as error:
        _send(plan.control, {"failed": to_wire(error)})
    except OSError as error:
        _send(plan.control, {"failed": to_wire(HostError.from_os(error, "cannot start the machine"))})
    except BaseException:
        sys.excepthook(*sys.exc_info())
        _send(plan.control, {"failed": to_wire(LaunchError("the machine's VMM broke"))})
    finally:
        sys.stderr.flush()
        os._exit(status)  # the kernel takes everything back, and nobody waits for an interpreter's end


def _keep_only(plan: Plan) -> None:
    """Standard output and error to the log, and no descriptors but those that are meant for us."""
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(plan.log, 1)
    os.dup2(plan.log, 2)
    close_all_but((plan.control, *plan.kept, *(plan.incoming.fds if plan.incoming is not None else ())))


def _give_up_rights(plan: Plan) -> None:
    """All is open by now: from here on the process reads, writes and runs what it holds, and no more."""
    if plan.id >= 0:
        namespaces.unshare(namespaces.CLONE_NEWIPC | namespaces.CLONE_NEWNET)
        become(plan.id)
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def _open_userfaultfd() -> int:
    """What brings memory that is missing; -1 where this user may not have it, and machines come whole."""
    from nagaya.kernel.userfaultfd import open_userfaultfd  # lazy: migrations alone

    try:
        return open_userfaultfd()
    except OSError:
        return -1


# -- requests


def _serve(machine: Machine, control: int) -> None:
    """Answer the supervisor until it is gone, and then end: nobody would hear of this machine any more."""
    for request, fds in _lines(control):
        try:
            answer = None
            if request["do"] == "save":
                _save(machine, request, fds)
            elif request["do"] == "leave":
                from nagaya.engines.kvm import leaving  # lazy: migrations alone
                from nagaya.migration.departure import Terms

                leaving.start(machine, (fds[0], fds[1]), fds[2], Terms(**request["terms"]))
            elif request["do"] == "log-disk":
                machine.log_disk(request["disk"], request["on"])
            elif request["do"] == "take-disk-log":
                answer = {"runs": machine.take_disk_log(request["disk"])}
            else:
                answer = _ANSWERS[request["do"]](machine)
            _send(control, {"to": request["number"], "done": answer})
        except NagayaError as error:
            _send(control, {"to": request["number"], "error": to_wire(error)})
    os._exit(BROKEN)


def _save(machine: Machine, request: dict[str, Any], fds: list[int]) -> None:
    """Into files that the supervisor has made, and compared with such as it has opened: we have no right to either."""
    from nagaya.engines.kvm.behind import Order  # lazy: most machines are never saved
    from nagaya.engines.kvm.saved import unpack

    memory, state, answer, *bases = fds
    try:
        base = unpack(request["base"], bases) if bases else None
        machine.save_behind(Order(Files(memory, state), answer, request["notes"], base, request["place"]))
    finally:
        for fd in fds:
            os.close(fd)


def _pause(machine: Machine) -> None:
    machine.pause()


def _resume(machine: Machine) -> None:
    machine.resume()


def _counters(machine: Machine) -> dict[str, Any]:
    return {"counters": machine.counters(), "faults": machine.faults(), "processes": machine.processes()}


def _press(machine: Machine) -> None:
    machine.press_power_button()


def _end(machine: Machine) -> None:
    machine.end(Ending("stopped", "the machine was switched off"))


def _describe(machine: Machine) -> dict[str, Any]:
    return machine.describe()


_ANSWERS: dict[str, Callable[[Machine], Any]] = {
    "pause": _pause,
    "resume": _resume,
    "counters": _counters,
    "press": _press,
    "end": _end,
    "describe": _describe,
}


def _lines(fd: int) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Requests, and the descriptors that came with each: one request at a time is under way."""
    buffered = b""
    fds: list[int] = []
    control = _socket.socket(fileno=os.dup(fd))
    while True:
        line, found, rest = buffered.partition(b"\n")
        if found:
            buffered = rest
            came, fds = fds, []
            yield json.loads(line), came
            continue
        data, rights, _, _ = control.recvmsg(
            _MOST_LINE_BYTES, _socket.CMSG_SPACE(4 * _MOST_FDS), _socket.MSG_CMSG_CLOEXEC
        )
        if not data:
            return
        buffered += data
        for _, _, packed in rights:
            fds += memoryview(packed).cast("i")


def _send(fd: int, message: dict[str, Any]) -> None:
    data = memoryview(json.dumps(message).encode() + b"\n")
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        os._exit(BROKEN)  # the supervisor is gone
