"""A machine's phases and what may follow what: everything about transitions is in this file."""

from __future__ import annotations

from nagaya.errors import Conflict
from nagaya.model.spec import PortMapping
from nagaya.static import NamedTuple

CREATED = "created"  # never started
STARTING = "starting"  # being created by `run`, or booting
RUNNING = "running"
PAUSED = "paused"
RESTARTING = "restarting"  # ended; its restart policy waits before the next start
EXITED = "exited"

PHASES = (CREATED, STARTING, RUNNING, PAUSED, RESTARTING, EXITED)
ALIVE = (STARTING, RUNNING, PAUSED, RESTARTING)  # phases that a held lock must back

# command -> phases in which it is accepted
ACCEPTS: dict[str, tuple[str, ...]] = {
    "start": (CREATED, EXITED),
    "stop": (STARTING, RUNNING, PAUSED, RESTARTING),
    "kill": (STARTING, RUNNING, PAUSED, RESTARTING),
    "pause": (RUNNING,),
    "unpause": (PAUSED,),
    "exec": (RUNNING,),
    "attach": (RUNNING, PAUSED),
    "top": (RUNNING, PAUSED),
    "stats": (RUNNING, PAUSED),
    "screen": (RUNNING, PAUSED),  # a picture of it
    "keys": (RUNNING,),
    "login": (RUNNING,),  # by ssh
    "disc": (RUNNING, PAUSED),
    "plug": (RUNNING, PAUSED),  # disks in and out, and their size
    "snapshot": (RUNNING, PAUSED),
    "fork": (RUNNING,),
    "migrate": (RUNNING,),
    "remove": (CREATED, EXITED),
}


# Where the command's word is no verb.
_SAID = {
    "attach": "attach to it", "exec": "run a program in it", "top": "list its programs", "stats": "measure it",
    "screen": "show its screen", "keys": "press its keys", "login": "log in to it", "disc": "change its disc",
    "plug": "change its disks",
}  # fmt: skip


def require(command: str, phase: str, name: str) -> None:
    """Raise `Conflict` unless `command` is accepted in `phase`."""
    accepted = ACCEPTS[command]
    if phase in accepted:
        return
    hint = ""
    if command == "remove":
        hint = f"stop it first with 'nagaya stop {name}', or use 'nagaya rm -f {name}'"
    elif command == "start" and phase in (RUNNING, PAUSED):
        hint = f"'nagaya attach {name}' shows its output"
    elif phase in (CREATED, EXITED):
        hint = f"start it with 'nagaya start {name}'"
    elif phase == PAUSED:
        hint = f"let it go on with 'nagaya unpause {name}'"
    raise Conflict(
        f"machine '{name}' is {phase}: cannot {_SAID.get(command, f'{command} it')}",
        hint=hint,
        state=phase,
        required=" or ".join(accepted),
    )


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
    ports: tuple[PortMapping, ...] = ()  # as published at the last start: with the ports that the host chose
    warnings: tuple[str, ...] = ()
    installing: bool = False  # its system was being installed at the last start, and was not there at the end of it
    origin: str = ""  # how it came to run: "boot", "template", "saved"; "" = there is one way only; FORK: not yet


FORK = "fork"


def is_unborn(state: MachineState) -> bool:
    """Whether it is a fork that never came to run: of a command that was cut off, none such is left."""
    return state.origin == FORK and not state.started_ns
