"""A whole machine whose system is being installed: listening to the installer, on the serial console, until it has ended.

What it says is a guest's word: it decides over the guest's own machine alone.
"""

from __future__ import annotations

import os
import re

from nagaya.errors import LaunchError, NagayaError
from nagaya.model.spec import MachineSpec
from nagaya.model.state import PAUSED
from nagaya.storage.disk_images import installer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.supervisor.supervisor import Supervisor

ASKED_S = 15.0
"""A question that nobody has answered for so long is one that nobody will answer."""
SILENT_S = 3600.0
"""An installer tells of each package; emulated on a busy host, the longest step in between takes some minutes."""
_KEPT = 4096
# How its text interface asks (cdebconf, src/modules/frontend/text/text.c): for an answer, and for the Enter key. On some
# terminals the cursor goes to the next line then.
_ASKS = re.compile(rb"(?:Prompt: [^\n]*>|\[Press enter to continue\])\s*\Z")
_RULE = re.compile(r"^-{3,}$", re.MULTILINE)
_MOST_TOLD = 300


def find_installing(machine: Supervisor) -> Installing | None:
    """None when the machine's system is installed."""
    found = installer.is_installing(machine.paths.machine(machine.spec.id))
    machine.state = machine.state._replace(installing=found)
    return Installing(machine) if found else None


class Installing:
    """One installation, from its start to its end. `spec` is the machine with what the installer needs."""

    def __init__(self, machine: Supervisor) -> None:
        self.spec: MachineSpec = installer.with_disc(machine.spec)
        self._machine = machine
        self._directory = machine.paths.machine(machine.spec.id)
        self._tail = b""
        self._done = False

    def told(self) -> tuple[str, ...]:
        """What whoever starts the machine should know."""
        return (f"its system is being installed first; 'nagaya logs -f {self.spec.name}' shows how far it is",)

    def hear(self, data: bytes) -> None:
        """What the console has said."""
        said = self._tail + data.replace(b"\r", b"")
        self._done = self._done or installer.MARK in said
        self._tail = said[-_KEPT:]
        self._machine.set_timer("silence", SILENT_S, self._silent)
        if _ASKS.search(self._tail):
            self._machine.set_timer("question", ASKED_S, self._unanswered)
        else:
            self._machine.cancel_timer("question")

    def end(self, ended: os.waitid_result | None, status: int) -> int:
        """The installer has ended: put on record that the system is there, or say that it is not. The exit status."""
        problem: NagayaError = LaunchError("the installation did not finish; the next start begins it anew")
        if self._done and ended is not None and (ended.si_code, ended.si_status) == (os.CLD_EXITED, 0):
            try:
                installer.settle(self._directory)
                self._machine.state = self._machine.state._replace(installing=False)
                self._machine.record("installed")
                return status
            except NagayaError as error:
                problem = error
        self._machine.fail_start(problem)
        return status or 1

    def _unanswered(self) -> None:
        if self._machine.main is not None and self._machine.main.clients:
            self._machine.set_timer("question", ASKED_S, self._unanswered)  # somebody is looking at it
            return
        self._give_up(f"the installer asks what it has no answer to: {question(self._tail)}")

    def _silent(self) -> None:
        if self._machine.state.phase == PAUSED:
            self._machine.set_timer("silence", SILENT_S, self._silent)
            return
        self._give_up(f"the installer has said nothing for {SILENT_S / 60:.0f} minutes")

    def _give_up(self, reason: str) -> None:
        machine = self._machine
        machine.fail_start(LaunchError(f"{reason} (the next start installs anew)"))
        if machine.booted is not None:
            machine.engine.quit()  # type: ignore[attr-defined]
            machine.set_timer("shutdown", machine.booted.end_timeout_s, machine.engine.kill)


def question(said: bytes) -> str:
    """The last question in what an installer has said, on one line."""
    text = said.decode("utf-8", "replace").rpartition("Prompt: ")[0] or said.decode("utf-8", "replace")
    rules = list(_RULE.finditer(text))
    lines = [line for line in (text[rules[-1].end() :] if rules else text).splitlines() if line.strip()]
    told = " ".join(" ".join(lines[-8:]).split())
    told = "".join(letter if letter.isprintable() else " " for letter in told)
    return told if len(told) <= _MOST_TOLD else f"…{told[-_MOST_TOLD:]}"
