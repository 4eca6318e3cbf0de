"""Taking a snapshot of a machine that runs: hold the agent, pause, save the memory, copy the disks (copying.py), go on.

The supervisor serves its clients meanwhile, whose requests to the agent wait. Where the engine can
write the memory behind the machine's back, that goes on when the machine does; the client is answered at its end.
"""

from __future__ import annotations

import os
import time

from nagaya.errors import Conflict, HostError, NagayaError, RemoteError
from nagaya.model.state import PAUSED
from nagaya.protocol import control
from nagaya.protocol.setup import time_payload
from nagaya.storage import snapshots
from nagaya.supervisor import resuming
from nagaya.supervisor.copying import Disks
from nagaya.supervisor.programs import Programs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.engines.base import Writing
    from nagaya.supervisor.client import Client
    from nagaya.supervisor.supervisor import Supervisor

HELD_WITHIN_S = 60.0  # the guest writes out what it has in memory first
THAW_TRIES = 60
THAW_AGAIN_S = 2.0


class Saving:
    """One snapshot of `machine` into the directory `place`, for `client`, which is answered at the end."""

    what = "has a snapshot taken of it"

    def __init__(self, machine: Supervisor, client: Client, place: str, *, memory: bool, base: str = "") -> None:
        """`base` is the memory of an earlier snapshot, to which a difference will do."""
        self.client = client
        self._machine = machine
        self._place = place
        self._memory = memory
        self._base = base
        self._writing: Writing | None = None
        self._warnings: list[str] = []
        self._was_paused = machine.state.phase == PAUSED
        self._frozen = False  # the file systems of a whole machine
        self._held = False  # HOLD was sent, and CONTINUE was not
        self._stopped = False  # it was us who paused the machine
        self._held_at_ns = self._paused_at_ns = 0
        self._times = {"paused_ms": 0.0, "stood_ms": 0.0}
        self._over = False
        self._disks = Disks(
            machine.loop, os.path.dirname(os.path.dirname(place)), place,
            log=machine.engine if "disk-log" in machine.engine.capabilities and not self._was_paused else None,  # type: ignore[arg-type]
            on_failed=self._fail,
        )  # fmt: skip

    def begin(self) -> None:
        """Raises `NagayaError` and `OSError`; nothing has happened then."""
        machine = self._machine
        assert machine.booted is not None
        # An agent has to be held where a kernel of the machine's own has to write out what it has, or the agent is saved, too.
        if not machine.booted.setup and not (self._memory and isinstance(machine.programs, Programs)):
            self._freeze()
            try:
                self._stop()
            except BaseException:
                self._thaw()
                raise
            return
        try:
            self._disks.begin(self._hold)
        except BaseException:
            self._disks.close()
            raise

    def _hold(self) -> None:
        machine = self._machine
        assert isinstance(machine.programs, Programs)
        self._held = True
        self._held_at_ns = time.monotonic_ns()
        machine.set_timer("held", HELD_WITHIN_S, self._not_held)
        machine.programs.hold(self._agent_held)

    def _freeze(self) -> None:
        """A whole machine's file systems, where its system has QEMU's agent. Disks and memory go together without."""
        engine = self._machine.engine
        if self._memory or self._was_paused or "guest-agent" not in engine.capabilities:
            return
        try:
            self._frozen = engine.freeze()  # type: ignore[attr-defined]
        except NagayaError as problem:
            self._frozen = True  # for all we know
            self._warnings.append(f"its file systems could not be frozen: {problem.message}")

    def _thaw(self, tries: int = THAW_TRIES) -> None:
        """Again and again, should it fail: its system stands until then."""
        machine = self._machine
        if not self._frozen or machine.booted is None:
            return
        try:
            machine.engine.thaw()  # type: ignore[attr-defined]
            self._frozen = False
        except NagayaError:
            if tries:
                machine.set_timer("thaw", THAW_AGAIN_S, lambda: self._thaw(tries - 1))

    def _not_held(self) -> None:
        self._fail(RemoteError(f"the machine's agent did not come to rest within {HELD_WITHIN_S:.0f} s"))

    def _agent_held(self, errno: int) -> None:
        if self._over:
            return
        self._machine.cancel_timer("held")
        if errno:
            self._warnings.append(
                f"the machine's disk could not be frozen ({os.strerror(errno)}): what it has is that of a power cut"
            )
        try:
            self._disks.catch_up(self._stop)
        except NagayaError as problem:
            self._fail(problem)
        except OSError as error:
            self._fail(HostError.from_os(error, "cannot save the machine"))

    def _stop(self) -> None:
        """Pause, and save what is in memory; then the disks."""
        machine = self._machine
        self._paused_at_ns = time.monotonic_ns()
        if not self._was_paused:
            machine.engine.pause()  # type: ignore[attr-defined]
            self._stopped = True
        try:
            if self._memory:
                os.makedirs(f"{self._place}/{snapshots.MEMORY}", 0o700, exist_ok=True)  # a fork's is somewhere else
                self._save(f"{self._place}/{snapshots.MEMORY}")
                if isinstance(machine.programs, Programs):  # whole machines have none
                    resuming.store(f"{self._place}/{snapshots.PROGRAMS}", machine.programs.save(machine.main))
            self._disks.finish(self._copied)
        except BaseException:
            self._go_on()
            raise

    def _save(self, directory: str) -> None:
        engine = self._machine.engine
        if "save-behind" in engine.capabilities:
            self._writing = engine.begin_save(directory, base=self._base)  # type: ignore[attr-defined]
        else:
            engine.save(directory)  # type: ignore[attr-defined]

    def _copied(self) -> None:
        self._go_on()
        if self._writing is not None:
            self._machine.loop.watch(self._writing.fd, self._written)
        else:
            self._succeed()

    def _written(self, events: int) -> None:
        assert self._writing is not None
        try:
            self._writing.finish()
        except NagayaError as problem:
            self._fail(problem)
        else:
            self._succeed()

    def _succeed(self) -> None:
        self._end()
        self.client.finish(control.reply(**self._times, warnings=self._warnings))

    def _go_on(self) -> None:
        """Let the machine run as it ran before, if it still is there."""
        machine = self._machine
        if machine.booted is None or machine.programs is None:
            return
        try:
            if self._stopped:
                self._stopped = False
                machine.engine.resume()  # type: ignore[attr-defined]
                self._times["paused_ms"] = round((time.monotonic_ns() - self._paused_at_ns) / 1e6, 1)
        finally:
            self._thaw()
            if self._held:
                self._held = False
                assert isinstance(machine.programs, Programs)
                self._times["stood_ms"] = round((time.monotonic_ns() - self._held_at_ns) / 1e6, 1)
                machine.programs.go_on(time_payload(time.time_ns()))

    def _fail(self, problem: NagayaError) -> None:
        self.abandon()
        self.client.fail(problem)

    def abandon(self) -> None:
        """Nothing comes of it: the client has gone, or the machine has ended or is to end. It goes on where it was."""
        if self._over:
            return
        self._end()
        try:
            self._go_on()
        except RemoteError:
            return  # it did not answer in time: it goes on when it does, for it has been asked to

    def stopped(self) -> None:
        """`abandon`, for who asks the machine to end while it is being saved."""
        self.abandon()
        self.client.fail(Conflict("the machine was asked to end while its snapshot was being taken"))

    def _end(self) -> None:
        self._over = True
        self._machine.cancel_timer("held")
        self._machine.saving = None
        self._disks.close()
        if self._writing is not None:
            self._machine.loop.forget(self._writing.fd)
            self._writing.close()  # its writer ends, if it has not
            self._writing = None
