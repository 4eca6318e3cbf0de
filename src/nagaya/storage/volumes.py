"""Named volumes: directories that outlive machines, at ROOT/volumes/NAME/data."""

from __future__ import annotations

import os
import time

from nagaya.errors import Conflict, IntegrityError, NotFound, UsageError
from nagaya.static import NamedTuple
from nagaya.storage import records
from nagaya.storage.lock import FileLock
from nagaya.storage.paths import make_directory
from nagaya.storage.tree import remove_tree

_ALLOWED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
TRASH = ".trash-"


class Volume(NamedTuple):
    """`path` is the directory that machines mount."""

    name: str
    path: str
    created_ns: int
    labels: tuple[tuple[str, str], ...] = ()


class _Record(NamedTuple):
    created_ns: int
    labels: tuple[tuple[str, str], ...] = ()


class Volumes:
    """The volumes of the store at `root`."""

    def __init__(self, root: str) -> None:
        self._root = f"{root}/volumes"

    def create(self, name: str = "", *, labels: tuple[tuple[str, str], ...] = ()) -> Volume:
        """Make a volume. Raises `Conflict` when there is one of that name, `UsageError` for a bad name."""
        name = _checked(name or os.urandom(16).hex())
        if self._exists(name):
            raise Conflict(f"there is a volume '{name}' already", hint="use it, or choose another name")
        return self._make(name, labels)

    def ensure(self, name: str) -> Volume:
        """The volume of that name, made when missing."""
        return self.get(name) if self._exists(_checked(name)) else self._make(name, ())

    def get(self, name: str) -> Volume:
        try:
            record = records.load(f"{self._root}/{_checked(name)}/volume.json", _Record)
        except FileNotFoundError:
            raise NotFound(f"there is no volume '{name}'", hint="'nagaya volume ls' lists them all") from None
        return Volume(name, f"{self._root}/{name}/data", record.created_ns, record.labels)

    def list(self) -> list[Volume]:
        """All volumes by name. Finishes removals that were cut off."""
        found = []
        for name in sorted(self._names()):
            if name.startswith(TRASH):
                remove_tree(f"{self._root}/{name}")
            elif self._exists(name):
                try:
                    found.append(self.get(name))
                except (NotFound, IntegrityError):
                    continue
        return found

    def remove(self, name: str, *, force: bool = False, in_use: frozenset[str] = frozenset()) -> None:
        """Remove a volume and what it holds. One that a machine uses is refused; `force` forgives one not there."""
        if _checked(name) in in_use:
            raise Conflict(
                f"the volume '{name}' is used by a machine", hint="'nagaya ps -a --filter volume=NAME' shows by which"
            )
        trash = f"{self._root}/{TRASH}{os.urandom(8).hex()}"
        try:
            os.rename(f"{self._root}/{name}", trash)
        except FileNotFoundError:
            if force:
                return
            raise NotFound(f"there is no volume '{name}'", hint="'nagaya volume ls' lists them all") from None
        remove_tree(trash)

    def prune(self, *, in_use: frozenset[str] = frozenset()) -> builtins_list[str]:
        """Remove all volumes that no machine uses; their names."""
        removed = []
        for volume in self.list():
            if volume.name not in in_use:
                self.remove(volume.name, force=True)
                removed.append(volume.name)
        return removed

    def populate(self, volume: Volume, sources: tuple[str, ...]) -> None:
        """Fill an empty volume with what the image has at its place: layer directories, topmost first.

        Done in a copy beside it that is renamed into place, so that a kill leaves the volume empty and not half full.
        """
        with FileLock(f"{self._root}/{volume.name}/lock"):
            if os.listdir(volume.path):
                return
            from nagaya.storage.merge import merge_layers  # lazy: first use of a volume only

            copy = f"{self._root}/{volume.name}/copy"
            remove_tree(copy)
            os.mkdir(copy, 0o755)
            merge_layers(sources, copy)
            os.rename(copy, volume.path)  # rename(2) replaces an empty directory

    def _names(self) -> builtins_list[str]:
        try:
            return os.listdir(self._root)
        except FileNotFoundError:
            return []

    def _exists(self, name: str) -> bool:
        return os.path.exists(f"{self._root}/{name}/volume.json")

    def _make(self, name: str, labels: tuple[tuple[str, str], ...]) -> Volume:
        directory = f"{self._root}/{name}"
        make_directory(directory, 0o711)
        try:
            os.mkdir(f"{directory}/data", 0o755)
        except FileExistsError:
            pass  # a creation that was cut off, or one at the same time
        created = time.time_ns()
        records.store(f"{directory}/volume.json", _Record(created, labels), durable=True)
        return Volume(name, f"{directory}/data", created, labels)


builtins_list = list  # `Volumes.list` hides the type's name from annotations in its own class


def _checked(name: str) -> str:
    if not name or len(name) > 128 or not name[0].isalnum() or not _ALLOWED.issuperset(name):
        raise UsageError(
            f"'{name}' is not a valid volume name",
            hint="use letters, digits, '_', '.' and '-'; a path must begin with '/'",
        )
    return name
