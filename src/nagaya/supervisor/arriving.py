"""A machine on its way from another host, as its supervisor-to-be sees it: its process does the work, and asks where it must.

    from the process                   to it
    programs (programs)                taken, or an error
    early: it is about to run          taken: its programs are spoken to; its memory follows
    committed: the source said so      recorded: it is this store's; or an error, when somebody had refused it by then
    running                            -
    failed (error)                     -: it ends, and nothing of it stays

Until "recorded" the machine is not this store's: it goes with whichever of its processes ends first.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from nagaya.engines.base import Booted, Incoming
from nagaya.errors import Conflict, NagayaError, from_wire, to_wire
from nagaya.static import Any
from nagaya.storage import migrations
from nagaya.supervisor import resuming
from nagaya.supervisor.moving import Worker
from nagaya.supervisor.programs import Programs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.supervisor.supervisor import Supervisor


class Arriving:
    """The machine of `machine`, which comes over a stream that whoever made its directory `place` hands us there."""

    def __init__(self, machine: Supervisor, place: str) -> None:
        self._machine = machine
        self._place = place
        self._worker = Worker(on_message=self._handle, on_broken=machine.engine.kill, on_lost=self._lost)
        self._runs = False
        self._carried: resuming.CarriedPrograms | None = None
        machine.discards = True

    def boot(self, boot: Callable[[str, Incoming | None], Booted]) -> Booted:
        """Make the machine's walls, with nothing in them yet. Raises `NagayaError`, `OSError`."""
        described = migrations.load_described(self._place)
        return self._worker.start(
            self._place, migrations.SOCKET, lambda stream, report_fd: boot("", Incoming(*stream, report_fd, described))
        )

    def begin(self) -> None:
        """Listen to its process, which receives."""
        self._worker.listen(self._machine.loop)

    def _lost(self) -> None:
        """Nobody else lets it run."""
        if not self._runs:
            self._machine.engine.kill()

    def _handle(self, message: dict[str, Any]) -> None:
        what = message.get("what")
        try:
            if what == "programs":
                self._carried = resuming.parse_carried(message.get("programs"))
                self._worker.answer("taken")
            elif what == "early":
                self._go_on()
                self._worker.answer("taken")
            elif what == "committed":
                self._commit()
            elif what == "running":
                self._run()
            elif what == "failed":
                self._machine.fail_start(from_wire(message.get("error")))
                self._machine.engine.kill()
        except NagayaError as problem:
            self._worker.answer("error", error=to_wire(problem))

    def _commit(self) -> None:
        """The one step by which it becomes this store's."""
        machine = self._machine
        if not migrations.commit_arrival(machine.paths.machine(machine.spec.id)):
            raise Conflict(
                "the source has asked what became of the machine before it said that it may run: it stays there"
            )
        machine.discards = machine.spec.auto_remove
        self._go_on()
        self._worker.answer("recorded")

    def _go_on(self) -> None:
        """Speak to the programs, once: they run, or are about to."""
        carried, self._carried = self._carried, None
        if carried is not None:
            machine = self._machine
            assert isinstance(machine.programs, Programs)
            machine.adopt_main(machine.programs.resume_carried(carried, log=machine.log))
            machine.programs.set_clock(time.time_ns())

    def _run(self) -> None:
        self._runs = True
        machine = self._machine
        machine.started(0)
        machine.record("arrive")
        self._announce()
        try:
            migrations.note_arrival(machine.paths, machine.paths.machine(machine.spec.id))
        except (OSError, NagayaError):
            return  # it is known by the machine itself, for as long as that is here

    def _announce(self) -> None:
        from nagaya.net import live  # lazy: a machine without networks does without
        from nagaya.net.announce import announce_gateways

        plan = live.load(self._machine.paths, self._machine.spec.id)
        if plan is not None and not plan.is_user:
            try:
                announce_gateways(plan)
            except OSError:
                return  # then the machine finds out by itself, in half a minute
