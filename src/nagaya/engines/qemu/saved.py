"""A machine's memory and devices in a directory: QEMU's own migration stream, and what it is a stream of.

state        QEMU's, as `migrate` writes it; pages of zeros take a byte each
machine.json `SavedMachine`: another QEMU, or another machine, cannot go on from it
"""

from __future__ import annotations

import os
import time

from nagaya.engines.qemu.arguments import Machine
from nagaya.engines.qemu.monitor import Monitor, MonitorClosed
from nagaya.engines.qemu.process import QemuProcess
from nagaya.engines.vm import child
from nagaya.errors import HostError, IntegrityError, RemoteError, Unsupported
from nagaya.protocol.qmp import QmpError
from nagaya.static import NamedTuple
from nagaya.storage import records

FORMAT = 1
STATE, RECORD = "state", "machine.json"
SAVED_WITHIN_S = 600.0
_STANDS_WITHIN_S = 5.0
_LOOK_AGAIN_S = 0.002
_FASTEST = 1 << 40  # bytes a second; QEMU's own idea is 128 MiB
_DESCRIPTOR = "snapshot"


class SavedMachine(NamedTuple):
    """What must be the same where a machine goes on."""

    format: int
    version: str  # QEMU's, with its package
    platform: str
    cpus: int
    memory_bytes: int
    cards: int
    tsc_khz: int
    devices: tuple[str, ...] = ()  # of a whole machine: what differs from one to the next, and where it is plugged in


def describe(machine: Machine) -> SavedMachine:
    """Without the version, which is whoever's reads or writes."""
    return SavedMachine(
        FORMAT, "", machine.board.platform, machine.cpus, machine.memory_bytes, len(machine.cards), machine.tsc_khz
    )


def read_version(monitor: Monitor) -> str:
    """QEMU's, as "7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"."""
    answer = monitor.command("query-version")
    try:
        numbers = answer["qemu"]
        return f"{int(numbers['major'])}.{int(numbers['minor'])}.{int(numbers['micro'])} ({answer['package']})"
    except (TypeError, KeyError, ValueError):
        raise QmpError("QEMU does not say which version it is") from None


def ask_version(program: str) -> str:
    """The same, of a program that does not run yet. Raises `Unsupported`."""
    import subprocess  # lazy: 16 ms, and only for a restore

    try:
        told = subprocess.run(
            [program, "--version"], capture_output=True, text=True, errors="replace", timeout=30, check=True,
            env=child.ENVIRONMENT, stdin=subprocess.DEVNULL,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise Unsupported(f"{program} cannot be run", finding=str(error)) from None
    return told.splitlines()[0].removeprefix("QEMU emulator version ") if told else ""


def write(monitor: Monitor, machine: SavedMachine, directory: str) -> None:
    """Save a machine that stands. Raises `HostError`, `RemoteError` with what QEMU says."""
    try:
        fd = os.open(f"{directory}/{STATE}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise HostError.from_os(error, "cannot save the machine's memory") from None
    try:
        monitor.command("getfd", fdname=_DESCRIPTOR, descriptor=fd)
        monitor.command("migrate-set-parameters", max_bandwidth=_FASTEST)
        await_migration(monitor, "migrate", f"fd:{_DESCRIPTOR}", "the machine's memory could not be saved")
        _await_stand(monitor)
        records.store(f"{directory}/{RECORD}", machine._replace(version=read_version(monitor)))
    except OSError as error:
        raise HostError.from_os(error, "cannot save the machine's memory") from None
    finally:
        os.close(fd)


def go_on(qemu: QemuProcess, machine: SavedMachine, directory: str) -> None:
    """Load what was saved into a QEMU that waits for it, and let the CPUs run. Raises `LaunchError` with its last words."""
    monitor = qemu.monitor
    check(machine._replace(version=read_version(monitor)), directory)
    state = os.open(f"{directory}/{STATE}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        monitor.command("getfd", fdname="state", descriptor=state)
        await_migration(monitor, "migrate-incoming", "fd:state", "the saved machine could not be loaded")
        monitor.command("cont")
    except MonitorClosed:
        raise qemu.last_words("QEMU could not go on from the saved machine") from None
    finally:
        os.close(state)


def await_migration(monitor: Monitor, command: str, uri: str, failure: str) -> None:
    """Start a migration, of either direction, and wait for its end. Raises `RemoteError`."""
    monitor.command("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    monitor.forget("MIGRATION")
    monitor.command(command, uri=uri)
    while (status := monitor.await_event("MIGRATION", SAVED_WITHIN_S).data.get("status")) != "completed":
        if status in ("failed", "cancelled"):
            told = monitor.command("query-migrate")
            why = told.get("error-desc", "") if isinstance(told, dict) else ""
            raise RemoteError(f"{failure}: {why or 'QEMU does not say why; the disk may be full'}")


def _await_stand(monitor: Monitor) -> None:
    """QEMU says that a migration is complete a moment before it lets the machine go on, and says nothing of that."""
    deadline_s = time.monotonic() + _STANDS_WITHIN_S
    while monitor.command("query-status").get("status") == "finish-migrate" and time.monotonic() < deadline_s:
        time.sleep(_LOOK_AGAIN_S)


def started_memory(directory: str, least_bytes: int) -> int:
    """With how much the machine saved there was started: a balloon may have had a part of that. Raises `IntegrityError`."""
    return max(_load(directory).memory_bytes, least_bytes)


def _load(directory: str) -> SavedMachine:
    try:
        return records.load(f"{directory}/{RECORD}", SavedMachine)
    except FileNotFoundError:
        raise IntegrityError(f"there is no saved machine in {directory}") from None


def check(now: SavedMachine, directory: str) -> None:
    """Raise `Unsupported` when a machine like `now`, whose `version` is told, could not go on from there; `IntegrityError`."""
    saved = _load(directory)
    if saved.format != FORMAT:
        raise Unsupported(f"the machine was saved in format {saved.format}, and this Nagaya knows {FORMAT}")
    if not os.path.isfile(f"{directory}/{STATE}"):
        raise IntegrityError(f"the saved machine in {directory} has no memory")
    compare(saved, now, hint="restore its disks alone: --no-memory")


def compare(then: SavedMachine, now: SavedMachine, *, hint: str) -> None:
    """Raise `Unsupported` when a machine that was like `then` could not go on as `now`."""
    if then.version != now.version:
        raise Unsupported(f"the machine's QEMU is {then.version}, and the one here {now.version}", hint=hint)
    for name, before, here in zip(then._fields, then, now, strict=True):
        if before != here:
            raise Unsupported(
                f"the machine has another {name.replace('_', ' ')} than it would have here ({before}, not {here})",
                hint=hint,
            )
