"""`nagaya generate systemd`: a unit that starts and stops a machine with the host."""

from __future__ import annotations

import os
import sys

from nagaya.cli import values
from nagaya.cli.commands.autostart import STOP_S
from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Flag, Parsed
from nagaya.errors import HostError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.model.spec import MachineSpec

_START_S = 300  # until its program, or its firmware, runs
COMMON_UNIT = "nagaya-autostart.service"
_MORE_S = 30  # than the machine's own time to stop, before systemd kills what is left


def systemd(context: Context, parsed: Parsed) -> int:
    """Print the unit, or with --files write it to a file in this directory and print that one's name."""
    paths = context.host.paths
    if parsed.switch("all") == bool(parsed.words) or (
        parsed.switch("all") and (parsed.texts("after") or parsed.given("delay"))
    ):
        raise UsageError("'nagaya generate systemd' needs a machine, or --all alone")
    if parsed.switch("all"):
        program = (_program(), "--root", paths.root, "--run-dir", paths.run)
        text = plan_common_unit(program, stop_s=STOP_S, user=os.geteuid() != 0)
        return _put(text, COMMON_UNIT, to_file=parsed.switch("files"))
    spec = context.host.machines.get(parsed.words[0]).spec
    after = [context.host.machines.get(name).spec.name for name in parsed.texts("after")]
    if spec.name in after:
        raise UsageError(f"'{spec.name}' cannot start after itself")
    delay_s = values.parse_timeout(parsed.text("delay"), "--delay") if parsed.given("delay") else 0.0
    text = plan_unit(
        spec, program=_program(), root=paths.root, run=paths.run, after=tuple(after), delay_s=delay_s,
        user=os.geteuid() != 0,
    )  # fmt: skip
    return _put(text, unit_name(spec.name), to_file=parsed.switch("files"))


def _put(text: str, name: str, *, to_file: bool) -> int:
    if not to_file:
        print(text, end="")
        return 0
    try:
        with open(name, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise HostError.from_os(error, "cannot write the unit") from None
    print(name)
    return 0


def _program() -> str:
    return os.path.abspath(sys.argv[0]) if os.path.basename(sys.argv[0]) == "nagaya" else "/usr/local/bin/nagaya"


def unit_name(name: str) -> str:
    """Of the machine's unit. A machine's name has no letter that systemd would want escaped."""
    return f"nagaya-{name}.service"


def plan_unit(
    spec: MachineSpec, *, program: str, root: str, run: str, after: tuple[str, ...], delay_s: float, user: bool
) -> str:
    """The unit's text (systemd.service(5)). The machine's supervisor restarts it by its own policy; systemd does not.

    Its processes are in the unit's control group: `stop` has ended all of them by the time that systemd looks.
    """
    others = "".join(f" {unit_name(name)}" for name in after)
    command = " ".join(_quote(word) for word in (program, "--root", root, "--run-dir", run))
    lines = [
        "[Unit]",
        f"Description=Machine {spec.name} (Nagaya)",
        f"After={'' if user else 'network-online.target local-fs.target'}{others}".rstrip(),
        *(() if user else ("Wants=network-online.target",)),
        *((f"Wants={others.strip()}",) if others else ()),
        "",
        "[Service]",
        "Type=oneshot",
        "RemainAfterExit=yes",
        *((f"ExecStartPre=/bin/sleep {delay_s:g}",) if delay_s else ()),
        f"ExecStart={command} start {spec.name}",
        f"ExecStop={command} stop {spec.name}",
        f"TimeoutStartSec={_START_S + delay_s:g}",
        f"TimeoutStopSec={spec.stop_timeout_s + _MORE_S:g}",
        "# The machine is stopped by ExecStop; its processes are not systemd's to end before that.",
        "KillMode=mixed",
        "Delegate=yes",
        "",
        "[Install]",
        f"WantedBy={'default.target' if user else 'multi-user.target'}",
    ]
    return "\n".join(line for line in lines if line != "After=") + "\n"


def plan_common_unit(program: tuple[str, ...], *, stop_s: float, user: bool) -> str:
    """One unit for all: it starts what 'nagaya autostart enable' has named, and stops all that run when the host stops.

    Machines that somebody started by hand are in other control groups: systemd stops this unit before it ends those.
    """
    command = " ".join(_quote(word) for word in program)
    lines = [
        "[Unit]",
        "Description=Machines that start with the host (Nagaya)",
        *(() if user else ("After=network-online.target local-fs.target", "Wants=network-online.target")),
        "",
        "[Service]",
        "Type=oneshot",
        "RemainAfterExit=yes",
        f"ExecStart=-{command} autostart start",
        f"ExecStop={command} autostart stop --timeout {stop_s:g}",
        "TimeoutStartSec=infinity",
        f"TimeoutStopSec={stop_s + _MORE_S:g}",
        "KillMode=mixed",
        "Delegate=yes",
        "",
        "[Install]",
        f"WantedBy={'default.target' if user else 'multi-user.target'}",
    ]
    return "\n".join(lines) + "\n"


def _quote(word: str) -> str:
    """For systemd's command lines: quoted, with its two special letters doubled."""
    word = word.replace("%", "%%").replace("$", "$$")
    plain = all(letter.isalnum() or letter in "/._-=:@%$" for letter in word)
    return word if plain else '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'


SYSTEMD = Command(
    systemd,
    usage="MACHINE | --all",
    words=(0, 1),
    flags=(
        Flag("--all", "One unit for all machines of 'nagaya autostart'"),
        Flag("--files", "Write it to nagaya-MACHINE.service in this directory, and print that name"),
        Flag("--after", "Start it after this machine", value="MACHINE", many=True),
        Flag("--delay", "Seconds to wait before it is started", value="SECONDS"),
    ),
    about="A unit that starts the machine when the host starts, and stops it in good order when the host stops.",
    examples=(
        ("nagaya generate systemd web", ""),
        ("nagaya generate systemd --files --after db --delay 5 web", "then copy it to /etc/systemd/system"),
    ),
)
