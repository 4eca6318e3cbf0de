"""What a supervisor knows of its machine's programs, as a snapshot keeps it, and how another one goes on with it."""

from __future__ import annotations

import time

from nagaya.errors import IntegrityError
from nagaya.protocol.agent import WINDOW, SavedLink
from nagaya.protocol.setup import with_machine_id, with_time
from nagaya.static import NamedTuple
from nagaya.storage import records, snapshots


class SavedProgram(NamedTuple):
    """`owed` is output that had been received and not yet been credited, in bytes."""

    channel: int
    main: bool
    tty: bool
    stdin: bool  # whether it was given an input, and that has not been closed
    owed: int


class SavedPrograms(NamedTuple):
    link: SavedLink
    programs: tuple[SavedProgram, ...]
    out_of_memory: bool = False


def renew(setup: bytes, saved: str, machine_dir: str, machine_id: str) -> bytes:
    """CONTINUE's payload for a machine that goes on from `saved`: what SETUP would be, now."""
    payload = with_time(setup, time.time_ns())
    if snapshots.is_of_another(saved, machine_dir, machine_id):
        payload = with_machine_id(payload, machine_id)
    return payload


class CarriedPrograms(NamedTuple):
    """The same of a machine that moves while it runs, with what is on its way to the agent and from it, as hexadecimal."""

    saved: SavedPrograms
    begun: str
    unsent: str


def parse_carried(data: object) -> CarriedPrograms:
    """What another host says of the programs, checked. Raises `IntegrityError`."""
    carried = records.from_data(CarriedPrograms, data, what="the machine's programs")
    try:
        bytes.fromhex(carried.begun), bytes.fromhex(carried.unsent)
    except ValueError:
        raise IntegrityError("the machine's programs are not in order") from None
    return carried._replace(saved=_checked(carried.saved))


def store(path: str, saved: SavedPrograms) -> None:
    records.store(path, saved)


def load(path: str) -> SavedPrograms:
    """Read and check. Raises `IntegrityError`."""
    try:
        saved = records.load(path, SavedPrograms)
    except FileNotFoundError:
        raise IntegrityError("the snapshot does not say which programs ran") from None
    return _checked(saved)


def _checked(saved: SavedPrograms) -> SavedPrograms:
    channels = {one.channel for one in saved.link.channels}
    known = [one.channel for one in saved.programs]
    mains = sum(one.main for one in saved.programs)
    whole = set(known) == channels and len(known) == len(channels) and mains == 1
    if not whole or not all(0 <= one.owed <= WINDOW for one in saved.programs):
        raise IntegrityError("the saved machine's programs are not in order")
    return saved
