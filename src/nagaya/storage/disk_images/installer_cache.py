"""Installers that were fetched, for the machines that come after: a directory each, named by the content of its package.

    $XDG_CACHE_HOME/nagaya/installers/ID/linux, initrd.gz   the installer
                                     /ID/installer.json     `Record`
                                     /.build-…/             one that is being fetched; see `workplace`
                                     /lock                  held by whoever fetches, copies from it, or removes

One is complete, and on disk, before its directory has its name. What is in it is checked each time that it is used.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from nagaya.errors import HostError, IntegrityError, NotFound, UsageError
from nagaya.static import NamedTuple
from nagaya.storage import paths, records
from nagaya.storage.digests import digest_file
from nagaya.storage.disk_images.installer import INITRAMFS, KERNEL, InstallerFiles
from nagaya.storage.lock import FileLock
from nagaya.storage.tree import remove_tree

ID_DIGITS = 16
UNUSED_S = 30 * 24 * 3600.0
"""What nobody has used for so long `prune` removes."""
_DIGITS = frozenset("0123456789abcdef")
_RECORD, _LOCK, _GONE = "installer.json", "lock", ".build-gone-"  # which `workplace` removes, after a kill


class Record(NamedTuple):
    """installer.json. `digest` is the package's; `asked_ns`: when its archive was last known to have no newer one."""

    package: str
    version: str
    suite: str
    architecture: str
    digest: str
    kernel_digest: str
    initramfs_digest: str
    size_bytes: int
    fetched_ns: int
    asked_ns: int


class Kept(NamedTuple):
    id: str
    path: str
    used_ns: int
    record: Record

    @property
    def files(self) -> InstallerFiles:
        return InstallerFiles(f"{self.path}/{KERNEL}", f"{self.path}/{INITRAMFS}")


def cache_directory() -> str:
    """Where this user's are."""
    return paths.cache_directory("installers")


@contextmanager
def open_cache() -> Iterator[str]:
    """The directory, made and locked. Raises `HostError`."""
    directory = cache_directory()
    try:
        paths.make_directory(directory)
        lock = FileLock(f"{directory}/{_LOCK}")
        lock.acquire()
    except OSError as error:
        raise HostError.from_os(error, "cannot use the cache of installers") from None
    with lock:
        yield directory


def list_kept() -> list[Kept]:
    """Every whole one, the one that was used last first. Raises `HostError`."""
    directory = cache_directory()
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise HostError.from_os(error, "cannot read the cache of installers") from None
    found = [kept for name in names if (kept := _load(directory, name)) is not None]
    return sorted(found, key=lambda kept: kept.used_ns, reverse=True)


def _load(directory: str, name: str) -> Kept | None:
    if not _is_id(name):
        return None
    path = f"{directory}/{name}"
    try:
        record = records.load(f"{path}/{_RECORD}", Record)
        if sum(os.stat(f"{path}/{part}").st_size for part in (KERNEL, INITRAMFS)) != record.size_bytes:
            return None
        return Kept(name, path, os.stat(path).st_mtime_ns, record)
    except (OSError, IntegrityError):
        return None


def _is_id(name: str) -> bool:
    return len(name) == ID_DIGITS and _DIGITS.issuperset(name)


def get(name: str) -> Kept:
    """The one whose id begins with `name`. Raises `NotFound`, `UsageError`."""
    found = [kept for kept in list_kept() if name and kept.id.startswith(name)]
    if not found:
        raise NotFound(f"there is no installer '{name}'", hint="'nagaya installer ls' lists them")
    if len(found) > 1:
        raise UsageError(f"'{name}' begins the ids of {len(found)} installers", hint="give more digits of the id")
    return found[0]


def find(package: str) -> Kept | None:
    """The one of that package, whole and unchanged: a damaged one is removed. The caller holds the lock."""
    for kept in list_kept():
        if kept.record.package == package:
            if _is_unchanged(kept):
                return kept
            remove(kept.id)
    return None


def _is_unchanged(kept: Kept) -> bool:
    expected = (kept.record.kernel_digest, kept.record.initramfs_digest)
    try:
        return tuple(digest_file(path)[0] for path in kept.files[:2]) == expected
    except OSError:
        return False


def keep(directory: str, made: str, record: Record) -> Kept:
    """Put what is in the directory `made` in the place of all others of its package. The caller holds the lock."""
    name = record.digest[:ID_DIGITS]
    files = InstallerFiles(f"{made}/{KERNEL}", f"{made}/{INITRAMFS}")
    try:
        record = record._replace(
            kernel_digest=digest_file(files.kernel)[0], initramfs_digest=digest_file(files.initramfs)[0],
            size_bytes=sum(os.stat(path).st_size for path in files[:2]), fetched_ns=time.time_ns(), asked_ns=time.time_ns(),
        )  # fmt: skip
        for path in files[:2]:
            records.sync(path)
        records.store(f"{made}/{_RECORD}", record, durable=True)
        old = [kept.id for kept in list_kept() if kept.record.package == record.package]
        for one in {*old, name}:  # a damaged one may have the name, too
            remove(one)
        os.rename(made, f"{directory}/{name}")
        records.sync(directory)
    except OSError as error:
        raise HostError.from_os(error, "cannot keep the installer") from None
    kept = _load(directory, name)
    if kept is None:
        raise IntegrityError("the installer that was just kept cannot be read", hint=f"look at {directory}")
    return kept


def note_use(kept: Kept, *, asked: bool) -> None:
    """It is used now; with `asked`, its archive has just said that there is no newer one."""
    try:
        if asked:
            records.store(f"{kept.path}/{_RECORD}", kept.record._replace(asked_ns=time.time_ns()))
        os.utime(kept.path)
    except OSError as error:
        raise HostError.from_os(error, "cannot use the cache of installers") from None


def remove(name: str) -> None:
    """Take one away; its name goes first, so that no half of it is found. The caller holds the lock. Raises `HostError`."""
    directory = cache_directory()
    gone = f"{directory}/{_GONE}{os.getpid()}-{name}"
    try:
        os.rename(f"{directory}/{name}", gone)
        remove_tree(gone)
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError.from_os(error, f"cannot remove the installer {name}") from None


def prune() -> list[str]:
    """Remove what nobody has used for `UNUSED_S`, what is damaged, and what is left of kills; the ids. The caller holds the lock."""
    directory = cache_directory()
    whole = {kept.id: kept for kept in list_kept()}
    oldest_ns = time.time_ns() - int(UNUSED_S * 1e9)
    removed = []
    try:
        for name in sorted(os.listdir(directory)):
            if _is_id(name) and (name not in whole or whole[name].used_ns < oldest_ns):
                remove(name)
                removed.append(name)
            elif name.startswith(".build-") and name != ".build-lock":  # whoever makes one holds our lock
                remove_tree(f"{directory}/{name}")
    except OSError as error:
        raise HostError.from_os(error, "cannot prune the installers") from None
    return removed
