"""Having a virtual machine's inside follow what has changed of its networks, by the agent's `renew`."""

from __future__ import annotations

from collections.abc import Callable

from nagaya.errors import Conflict, ExecError, NagayaError, RemoteError, Unsupported
from nagaya.model.policy import APPLET
from nagaya.model.spec import Process
from nagaya.model.state import PAUSED
from nagaya.supervisor.programs import Program, Programs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.supervisor.supervisor import Supervisor

WITHIN_S = 30.0
NO_SUCH_APPLET = 127  # of an agent that was built before there was this one
_MOST_TEXT = 4096

Done = Callable[[NagayaError | None], None]


class Renewal:
    """One run of `renew`, of which this is the client. `on_done(problem)` is called once, soon after `WITHIN_S` at the latest."""

    def __init__(self, machine: Supervisor, payload: bytes, on_done: Done) -> None:
        self.program: Program | None = None
        self.wants_stdin = True
        self.congested = False
        self._text = b""
        self._machine = machine
        self._on_done: Done | None = on_done
        self._timer = machine.loop.after(WITHIN_S, self._timed_out)
        assert isinstance(machine.programs, Programs)
        try:
            program = machine.programs.spawn(Process(argv=("renew",), stdin=True), APPLET, applet=True)
        except BaseException:
            self._timer.cancel()
            raise
        program.on_failed, program.on_exited = self._failed, self._exited
        program.join(self, stdin=True)
        machine.programs.flush()
        if payload:
            program.feed(self, payload)
        program.end_stdin(self)

    # -- what a program asks of its clients

    def output(self, stream: int, data: bytes) -> None:
        """What `renew` complains about."""
        self._text = (self._text + data)[:_MOST_TEXT]

    def consumed_stdin(self, count: int) -> None:
        """See `Listener`; all of it waits in the program's queue."""

    # -- its end

    def _exited(self, status: int) -> None:
        if status == NO_SUCH_APPLET:
            self._done(ExecError("the machine's agent is an older one", status=status))
            return
        said = self._text.decode(errors="replace").strip().splitlines()
        reason = "".join(c if c.isprintable() else "?" for c in said[-1]) if said else f"status {status}"
        self._done(RemoteError(f"the machine's inside does not follow: {reason}") if status else None)

    def _failed(self, problem: NagayaError) -> None:
        self._done(RemoteError(f"the machine's inside does not follow: {problem.message}"))

    def _timed_out(self) -> None:
        self._done(RemoteError(f"the machine's agent has not answered for {WITHIN_S:.0f} s"))

    def _done(self, problem: NagayaError | None) -> None:
        self._timer.cancel()
        call, self._on_done = self._on_done, None
        if call is not None:
            call(problem)


def ask_first(machine: Supervisor, on_able: Callable[[], None], on_refused: Callable[[NagayaError], None]) -> None:
    """Find out whether the machine's agent can be told of a link at all. Raises `Conflict`."""
    if machine.state.phase == PAUSED:
        raise Conflict(
            f"machine '{machine.spec.name}' is paused, and has to set the link up itself",
            hint=f"let it go on with 'nagaya unpause {machine.spec.name}'",
            state=machine.state.phase,
            required="running",
        )

    def answered(problem: NagayaError | None) -> None:
        if isinstance(problem, ExecError):
            on_refused(
                Unsupported(
                    "the machine was started with an older agent, which is told of networks at its next start only",
                    hint=f"nagaya restart {machine.spec.name}",
                )
            )
        elif problem is not None:
            on_refused(problem)
        else:
            on_able()

    Renewal(machine, b"", answered)
