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

import os
import time
from collections.abc import Callable

from nagaya.engines.base import Booted, Incoming
from nagaya.errors import Conflict, NagayaError, from_wire, to_wire
from nagaya.kernel import unix
from nagaya.migration import report
from nagaya.static import Any
from nagaya.storage import migrations
from nagaya.supervisor import resuming
from nagaya.supervisor.programs import Programs
from nagaya.supervisor.stream import Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.supervisor.supervisor import Supervisor


class Arriving:
    """The machine of `machine`, which comes over a stream that whoever made its directory `place` hands us there."""

    def __init__(self, machine: Supervisor, place: str) -> None:
        self._machine = machine
        self._place = place
        self._lines = report.Lines()
        self._ours = -1
        self._stream: Stream | None = None
        self._carried: resuming.CarriedPrograms | None = None
        machine.discards = True

    def boot(self, boot: Callable[[str, Incoming | None], Booted]) -> Booted:
        """Make the machine's walls, with nothing in them yet. Raises `NagayaError`, `OSError`."""
        place = unix.connect(self._place, migrations.SOCKET)
        try:
            read, write = unix.receive_fds(place, 2)
        finally:
            os.close(place)
        ours, theirs = unix.socket_pair()
        try:
            booted = boot("", Incoming(read, write, theirs, migrations.load_described(self._place)))
        except BaseException:
            os.close(ours)
            raise
        finally:
            for fd in (read, write, theirs):
                os.close(fd)
        self._ours = ours
        return booted

    def begin(self) -> None:
        """Listen to its process, which receives."""
        self._stream = Stream(self._machine.loop, self._ours, on_data=self._received, on_closed=lambda: None)

    def _received(self, data: bytes) -> None:
        try:
            for message in self._lines.feed(data):
                self._handle(message)
        except NagayaError:
            self._machine.engine.kill()  # its process is broken

    def _handle(self, message: dict[str, Any]) -> None:
        what = message.get("what")
        try:
            if what == "programs":
                self._carried = resuming.parse_carried(message.get("programs"))
                self._answer("taken")
            elif what == "early":
                self._go_on()
                self._answer("taken")
            elif what == "committed":
                self._commit()
            elif what == "running":
                self._run()
            elif what == "failed":
                self._machine.fail_start(from_wire(message.get("error")))
        except NagayaError as problem:
            self._answer("error", error=to_wire(problem))

    def _commit(self) -> None:
        """The one step by which it becomes this store's."""
        machine = self._machine
        if not migrations.commit_arrival(machine.paths.machine(machine.spec.id)):
            raise Conflict(
                "the source has asked what became of the machine before it said that it may run: it stays there"
            )
        machine.discards = machine.spec.auto_remove
        self._go_on()
        self._answer("recorded")

    def _go_on(self) -> None:
        """Speak to the programs, once: they run, or are about to."""
        carried, self._carried = self._carried, None
        if carried is not None:
            machine = self._machine
            assert isinstance(machine.programs, Programs)
            machine.adopt_main(machine.programs.resume_carried(carried, log=machine.log))
            machine.programs.set_clock(time.time_ns())

    def _run(self) -> None:
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

    def _answer(self, what: str, **details: object) -> None:
        if self._stream is not None:
            self._stream.send(report.encode({"what": what, **details}))
