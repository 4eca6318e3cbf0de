"""Directories for what is being made: gone when it is finished, and after a kill when the next one is made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from nagaya.storage.lock import FileLock
from nagaya.storage.paths import make_directory
from nagaya.storage.tree import remove_tree

_PREFIX = ".build-"


@contextmanager
def open_workplace(directory: str) -> Iterator[str]:
    """A new one in `directory`, which apt's own user can get through. Those of makers that were killed are removed."""
    make_directory(directory, 0o711)
    os.chmod(directory, 0o711)
    place = f"{directory}/{_PREFIX}{os.urandom(8).hex()}"
    with FileLock(f"{directory}/{_PREFIX}lock"):  # between the two steps a new one looks like an abandoned one
        for name in os.listdir(directory):
            if name.startswith(_PREFIX) and name != f"{_PREFIX}lock":
                _remove_abandoned(f"{directory}/{name}")
        os.mkdir(place, 0o755)
        lock = FileLock(f"{place}/lock")
        lock.acquire()
    try:
        yield place
    finally:
        remove_tree(place)
        lock.release()


def _remove_abandoned(place: str) -> None:
    """Nobody holds the lock of one whose maker is gone."""
    old = FileLock(f"{place}/lock")
    try:
        if old.acquire(wait=False):
            remove_tree(place)
            old.release()
    except FileNotFoundError:
        remove_tree(place)
