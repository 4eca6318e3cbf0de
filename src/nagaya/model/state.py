"""A machine's phases and what may follow what: everything about transitions is in this file."""

from __future__ import annotations

from typing import NamedTuple

CREATED = "created"  # never started
RUNNING = "running"
PAUSED = "paused"
EXITED = "exited"

PHASES = (CREATED, RUNNING, PAUSED, EXITED)

# command -> phases in which it is accepted
ACCEPTS: dict[str, tuple[str, ...]] = {
    "start": (CREATED, EXITED),
    "stop": (RUNNING, PAUSED),
    "kill": (RUNNING, PAUSED),
    "pause": (RUNNING,),
    "unpause": (PAUSED,),
    "exec": (RUNNING,),
    "attach": (RUNNING, PAUSED),
    "top": (RUNNING, PAUSED),
    "stats": (RUNNING, PAUSED),
    "remove": (CREATED, EXITED),
}


class MachineState(NamedTuple):
    """What has become of a machine. `exit_code` is -1 until it has ended once; times are Unix ns, 0 = not yet."""

    phase: str = CREATED
    exit_code: int = -1
    error: str = ""  # why it ended, when its program did not end it
    started_ns: int = 0
    finished_ns: int = 0
    restarts: int = 0
    stop_requested: bool = False  # by the user: restart policies leave it alone
    oom_killed: bool = False
    pid: int = 0  # for display only
    address: str = ""
    warnings: tuple[str, ...] = ()
