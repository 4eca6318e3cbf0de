"""A machine on its way to another host, as its supervisor sees it: its process does the work, and asks where it must.

    from the process                   to it
    progress                           abort, at any time before "recorded": nothing shall come of it
    freeze                             frozen
    standing (waiting)                 carried (programs)
    ready: the target has all          recorded: that it may run there is on this host's disk
    gone                               -: it is killed, and the machine discarded
    stayed (error)                     -: the machine goes on here
    doubt (error)                      stay, when the user or the target has said that it does not run there

The words that the supervisor keeps on disk are `storage/migrations`'s.
"""

from __future__ import annotations

import time

from nagaya.errors import Conflict, NagayaError, RemoteError, from_wire
from nagaya.model.state import PAUSED, RUNNING
from nagaya.protocol import control
from nagaya.static import Any
from nagaya.storage import migrations
from nagaya.storage.records import to_data
from nagaya.supervisor.moving import Worker
from nagaya.supervisor.programs import Programs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.supervisor.client import Client
    from nagaya.supervisor.supervisor import Supervisor

_CUT_OFF = "the stream broke while the machine was handed over, and nobody here knows whether it runs there"


class Leaving:
    """One migration of `machine`, for `client`. It has the place, and the calls, of a snapshot that is being taken."""

    what = "is on its way to another host"

    def __init__(self, machine: Supervisor, client: Client, migration_id: str, to: str) -> None:
        self.client = client
        self._machine = machine
        self._record = migrations.Leaving(migration_id, to, time.time_ns())
        self._worker = Worker(on_message=self._handle, on_broken=machine.engine.kill, on_lost=self._lost)
        self._frozen = False
        self._waiting = b""  # what had been said to the agent, and did not reach it
        self._is_called_off = False
        self._recorded = False
        self._doubts = False
        self._gone = False
        self._resolver: Client | None = None

    def begin(self, socket: str, *, max_downtime_ms: int, post_copy: bool) -> None:
        """Raises `NagayaError` and `OSError`; nothing has happened then."""
        machine = self._machine
        self._worker.start(
            machine.paths.runtime(machine.spec.id), socket,
            lambda stream, report_fd: machine.engine.leave(  # type: ignore[attr-defined]
                stream, report_fd, max_downtime_ms=max_downtime_ms, post_copy=post_copy
            ),
        )  # fmt: skip
        self._worker.listen(machine.loop)

    # -- what the process says

    def _lost(self) -> None:
        """It ended without a word. Where it was the machine's own, that has ended too, and is heard of otherwise."""
        problem = RemoteError("the process that moved the machine ended")
        if self._gone or self._doubts:
            return
        if self._recorded:
            self._doubt(problem)
        elif self._machine.engine.recover():  # type: ignore[attr-defined]
            self._stay(problem)

    def _handle(self, message: dict[str, Any]) -> None:
        what = message.pop("what", "")
        if what == "progress":
            if self.client.open and not self.client.congested:
                self.client.send(control.progress(**message))
        elif what == "freeze":
            self._programs.freeze()
            self._frozen = True
            self._worker.answer("frozen")
        elif what == "standing":
            self._carry(bytes.fromhex(message["waiting"]))
        elif what == "ready":
            self._note()
        elif what == "gone":
            self._leave(message)
        elif what == "doubt":
            self._doubt(from_wire(message["error"]))
        elif what == "stayed":
            self._stay(from_wire(message["error"]))

    @property
    def _programs(self) -> Programs:
        assert isinstance(self._machine.programs, Programs)
        return self._machine.programs

    def _carry(self, waiting: bytes) -> None:
        self._waiting = waiting
        try:
            carried = self._programs.carry(self._machine.main, waiting)
        except (NagayaError, ValueError) as problem:
            self._call_off(str(problem))
            return
        self._worker.answer("carried", programs=to_data(carried))

    def _call_off(self, why: str) -> None:
        self._is_called_off = True
        self._worker.answer("abort", why=why)

    def _note(self) -> None:
        if self._is_called_off:
            return  # it hears of that in the place of an answer
        try:
            migrations.store_leaving(self._machine.paths.machine(self._machine.spec.id), self._record)
        except (OSError, NagayaError) as problem:
            self._call_off(f"that the machine is handed over cannot be written down: {problem}")
            return
        self._recorded = True
        self._worker.answer("recorded")

    def _leave(self, message: dict[str, Any]) -> None:
        """It runs there: nothing of it stays here."""
        machine = self._machine
        self._gone = True
        if self.client.open:
            self.client.send(control.progress(gone=True, **message))
            machine.waiters.append(self.client)  # answered when it has been discarded
        machine.record("migrate", to=self._record.to)
        machine.discards, machine.keep = True, False
        machine.state = machine.state._replace(stop_requested=True)
        machine.engine.kill()

    def _doubt(self, problem: NagayaError) -> None:
        """It stands, for it may run there."""
        self._doubts = True
        name, to = self._machine.spec.name, self._record.to
        self._machine.set_state(phase=PAUSED, error=f"{_CUT_OFF}: {problem.message}")
        self.client.fail(
            Conflict(
                f"machine '{name}': {_CUT_OFF} ({problem.message})",
                hint=f"'nagaya migrate resolve {name} --to {to or 'ADDRESS'}' asks, and lets it go on where it belongs",
                state="handed over",
            )
        )

    def _stay(self, problem: NagayaError) -> None:
        """Nothing comes of it: the machine goes on here, as if nothing had been."""
        machine = self._machine
        self._worker.close()
        machine.saving = None
        machine.engine.recover()  # type: ignore[attr-defined]
        try:
            migrations.remove_leaving(machine.paths.machine(machine.spec.id))
        except OSError:
            pass  # `resolve` removes it
        if self._frozen and isinstance(machine.programs, Programs):
            machine.programs.thaw(self._waiting)
            machine.programs.set_clock(time.time_ns())
        if self._doubts:
            machine.set_state(phase=RUNNING, error="")
        if self._resolver is not None:
            self._resolver.finish(control.reply())
        elif self.client.open:
            self.client.fail(problem)

    # -- what others ask

    def resolve(self, client: Client, *, runs_there: bool) -> None:
        """What the user, or the target, has said. Raises `Conflict` while nobody doubts, and `OSError`."""
        machine = self._machine
        if not self._doubts:
            raise Conflict(f"machine '{machine.spec.name}' {self.what}", hint="wait until it is there")
        if runs_there:
            machine.waiters.append(client)
            self._gone = True
            machine.discards, machine.keep = True, False
            machine.state = machine.state._replace(stop_requested=True)
            machine.engine.kill()
            return
        migrations.remove_leaving(machine.paths.machine(machine.spec.id))
        self._resolver = client
        if self._worker.is_there:
            self._worker.answer("stay")
        else:
            self._stay(Conflict("it does not run there"))

    def abandon(self) -> None:
        """The client has gone: nothing shall come of it, unless it is done."""
        if not self._recorded:
            self._call_off("the command that migrated the machine was ended")

    def stopped(self) -> None:
        """The machine has ended, or is asked to end."""
        machine = self._machine
        if machine.booted is None:
            self._worker.close()
            machine.saving = None
            if not self._gone:
                self.client.fail(Conflict("the machine ended while it was being migrated"))
        elif self._recorded:  # it may run there: what is here must not run again before its end
            machine.state = machine.state._replace(phase=RUNNING)
            machine.engine.kill()
        else:
            self._call_off("the machine was asked to end while it was being migrated")
