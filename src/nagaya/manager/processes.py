"""The processes inside a machine, as its agent sees them: a guest's word, which is checked."""

from __future__ import annotations

import json

from nagaya.errors import NagayaError, RemoteError
from nagaya.static import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.manager.machine import Machine

LIST_WITHIN_S = 30.0
COUNT_WITHIN_S = 5.0  # for a reading of `stats`: a guest may hang, or be very busy


class ProcessRow(NamedTuple):
    """A process inside a machine, numbered as the machine itself sees it."""

    pid: int
    ppid: int
    user: str
    cpu_s: float
    memory_bytes: int
    command: str


def list_processes(machine: Machine) -> list[ProcessRow]:
    """All of them. Raises `RemoteError`."""
    return [_parse_process(line) for line in _read_lines(machine, LIST_WITHIN_S)]


def count_processes(machine: Machine) -> int:
    """How many, the agent among them; -1 when it does not say so in time, or the machine has ended, or has no agent."""
    try:
        return len(_read_lines(machine, COUNT_WITHIN_S))
    except NagayaError:
        return -1


def _read_lines(machine: Machine, timeout_s: float) -> list[bytes]:
    with machine.applet(("ps",)) as attachment:
        status, out, err = attachment.communicate(timeout_s=timeout_s)
    if status:
        raise RemoteError(f"the agent could not list processes: {err.decode(errors='replace').strip()}")
    return out.splitlines()


def _parse_process(line: bytes) -> ProcessRow:
    """One line of the agent's `ps`, which is the guest's word: checked. Raises `RemoteError`."""
    try:
        data = json.loads(line)
        return ProcessRow(
            pid=int(data["pid"]),
            ppid=int(data["ppid"]),
            user=str(data.get("user") or data["uid"]),
            cpu_s=int(data["cpu_ms"]) / 1000,
            memory_bytes=int(data["rss_bytes"]),
            command=str(data["command"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise RemoteError("the machine's agent answered nonsense to 'ps'") from None
