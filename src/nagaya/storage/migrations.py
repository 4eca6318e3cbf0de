"""What both sides of a migration keep on disk, so that a machine runs on one of them whoever is killed when.

    source  MACHINE/leaving.json      from before the source says COMMIT: the machine may run on the target
    target  MACHINE/incoming/         from the beginning: the machine is not this store's, and goes with its supervisor
            MACHINE/arrived/          the same, renamed: from here on the machine is this store's
            ROOT/migrations/ID        which machine arrived by it; stays when that is removed later on

The one step that decides is the rename on the target: to `arrived` by the supervisor when it hears COMMIT, or to `refused`
by whoever asks on the source's behalf whether it has heard it. Only one of the two finds `incoming`.
"""

from __future__ import annotations

import os

from nagaya.errors import Conflict, IntegrityError
from nagaya.static import NamedTuple
from nagaya.storage import records
from nagaya.storage.paths import Paths, make_directory

LEAVING = "leaving.json"
INCOMING, ARRIVED, REFUSED = "incoming", "arrived", "refused"
SOCKET = "stream.sock"
_RECORD, _DESCRIBED = "migration.json", "described.json"


class Leaving(NamedTuple):
    """`to` is where the target listens, as the command had it."""

    id: str
    to: str
    since_ns: int


class Incoming(NamedTuple):
    id: str
    machine_id: str


# -- the source


def store_leaving(machine_dir: str, leaving: Leaving) -> None:
    """Durable when it returns: the target may be told to go ahead. Raises `OSError`."""
    records.store(f"{machine_dir}/{LEAVING}", leaving, durable=True)


def find_leaving(machine_dir: str) -> Leaving | None:
    """Of a machine that has been handed over, or may have been. One that cannot be read counts as such too."""
    try:
        return records.load(f"{machine_dir}/{LEAVING}", Leaving)
    except FileNotFoundError:
        return None
    except IntegrityError:
        return Leaving("", "", 0)


def remove_leaving(machine_dir: str) -> None:
    """The machine is this store's again. Raises `OSError`."""
    try:
        os.unlink(f"{machine_dir}/{LEAVING}")
    except FileNotFoundError:
        return
    records.sync(machine_dir)


def refuse_left(machine_dir: str, name: str) -> None:
    """Raise `Conflict` for a machine of which nobody here knows whether it runs elsewhere."""
    leaving = find_leaving(machine_dir)
    if leaving is not None:
        raise Conflict(
            f"machine '{name}' was handed over to {leaving.to or 'another store'}, which did not say that it runs there",
            hint=f"'nagaya migrate resolve {name} --to {leaving.to or 'ADDRESS'}' asks; or look there yourself, then"
            " --here or --there",
            state="handed over",
        )


# -- the target


def begin_arrival(machine_dir: str, migration_id: str, machine_id: str, described: str) -> str:
    """Mark a machine that is only coming, of which its engine has `described` what it is made of. Raises `OSError`."""
    place = f"{machine_dir}/{INCOMING}"
    os.mkdir(place, 0o700)
    records.write_file(f"{place}/{_DESCRIBED}", described.encode())
    records.store(f"{place}/{_RECORD}", Incoming(migration_id, machine_id), durable=True)
    records.sync(machine_dir)
    return place


def load_described(place: str) -> str:
    """What `begin_arrival` was given. Raises `OSError`."""
    with open(f"{place}/{_DESCRIBED}", encoding="utf-8") as file:
        return file.read()


def is_incoming(machine_dir: str) -> bool:
    """Whether the machine has not arrived, or never will."""
    return os.path.lexists(f"{machine_dir}/{INCOMING}") or os.path.lexists(f"{machine_dir}/{REFUSED}")


def commit_arrival(machine_dir: str) -> bool:
    """The machine is this store's from here on, through a power cut too; False when it was refused meanwhile."""
    try:
        os.rename(f"{machine_dir}/{INCOMING}", f"{machine_dir}/{ARRIVED}")
    except FileNotFoundError:
        return False
    records.sync(machine_dir)
    return True


def note_arrival(paths: Paths, machine_dir: str) -> None:
    """For who asks after the machine has been removed here, or has gone on to somewhere else. Raises `OSError`."""
    found = records.load(f"{machine_dir}/{ARRIVED}/{_RECORD}", Incoming)
    make_directory(f"{paths.root}/migrations")
    records.store(f"{paths.root}/migrations/{found.id}", found)


def settle_arrival(paths: Paths, migration_id: str, machine_id: str) -> bool:
    """Whether the machine has arrived by this migration; if not, it never will: the source's is the one that runs.

    Raises `OSError`.
    """
    machine_dir, wanted = paths.machine(machine_id), Incoming(migration_id, machine_id)
    try:
        if records.load(f"{machine_dir}/{INCOMING}/{_RECORD}", Incoming) == wanted:
            os.rename(f"{machine_dir}/{INCOMING}", f"{machine_dir}/{REFUSED}")
            records.sync(machine_dir)
            return False
    except (FileNotFoundError, IntegrityError):
        pass  # it is not on its way, or no longer
    for path in (f"{machine_dir}/{ARRIVED}/{_RECORD}", f"{paths.root}/migrations/{migration_id}"):
        try:
            found = records.load(path, Incoming)
        except (FileNotFoundError, NotADirectoryError, IntegrityError):
            continue
        if found == wanted:
            return True
    return False
