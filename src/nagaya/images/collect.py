"""Removing images, and collecting what no image needs.

An image is gone with its record; its blobs and layers are garbage from then on. They are deleted under the exclusive
lock, which waits for whoever adds to the store: content that is there already may be just what they count on. Removing
one image does not wait: if somebody is adding, its garbage stays for the next time.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from nagaya.errors import Conflict, HostError, NagayaError
from nagaya.images.image import Image
from nagaya.images.locks import Lock
from nagaya.images.rootimage import DIRECTORY as ROOTS
from nagaya.images.rootimage import root_image_path
from nagaya.images.store import ImageStore, Pruned
from nagaya.storage.tree import remove_tree


def remove(store: ImageStore, reference: str, *, force: bool, in_use: Callable[[], frozenset[str]]) -> list[str]:
    """See `ImageStore.remove`."""
    image = store.get(reference)
    lines: list[str] = []
    with store.claims(shared=False), store.naming() as names:
        mine = sorted(name for name, image_id in names.items() if image_id == image.id)
        going = _going(image, mine, reference, force=force)
        last = len(going) == len(mine)
        used = image.id in in_use()
        if last and used and not force:
            raise Conflict(
                f"image '{reference}' is used by a machine",
                hint="remove the machine first ('nagaya ps -a' shows it), or take only the name away with --force",
                state="in use",
            )
        for name in going:
            del names[name]
            lines.append(f"untagged: {name}")
        delete = last and not used
        if delete:
            store.index.remove(image.id)
            lines.append(f"deleted: {image.id}")
    for name in going:
        store.on_event("untag", image.id, name)
    if delete:
        store.on_event("delete", image.id, going[0] if going else "")
        sweep(store)
    return lines


def sweep(store: ImageStore, *, partial: bool = False) -> None:
    """Delete what no image needs, unless somebody is adding to the store just now: then it waits for the next time."""
    lock = Lock(f"{store.root}/lock")
    if lock.acquire(wait=False):
        try:
            _collect(store, partial=partial)
        finally:
            lock.release()


def _going(image: Image, mine: list[str], reference: str, *, force: bool) -> list[str]:
    """Which of the image's names go: the one that was given; all of them when it was given by id."""
    if not mine:
        return []
    by_id = image.id.removeprefix("sha256:").startswith(reference.removeprefix("sha256:"))
    if not by_id:
        from nagaya.images.references import parse_reference

        parsed = parse_reference(reference)
        for name in (f"{parsed.familiar}@{parsed.digest}", parsed.name):
            if name in mine:
                return [name]
    if len(mine) > 1 and not force:
        raise Conflict(
            f"image {image.id[7:19]} has {len(mine)} names: {', '.join(mine)}",
            hint="name the one to take away, or take all with --force",
        )
    return mine


def prune(store: ImageStore, *, all: bool, in_use: Callable[[], frozenset[str]]) -> Pruned:
    """See `ImageStore.prune`."""
    removed: list[str] = []
    with Lock(f"{store.root}/lock"):
        with store.claims(shared=False), store.naming() as names:
            named = set(names.values())
            _clear_unfinished(store.root)
            used = in_use()
            for image_id in store.index.ids():
                damaged = store.index.load(image_id) is None
                if damaged or (image_id not in used and (all or image_id not in named)):
                    store.index.remove(image_id)
                    removed.append(image_id)
            gone = [name for name, image_id in names.items() if image_id in removed or not _exists(store, image_id)]
            for name in gone:
                del names[name]
        freed = _collect(store, partial=True)
    for image_id in removed:
        store.on_event("delete", image_id, "")
    if removed or freed:
        store.on_event("prune", "", "")
    return Pruned(tuple(removed), freed)


def _exists(store: ImageStore, image_id: str) -> bool:
    return store.index.load(image_id) is not None


def _collect(store: ImageStore, *, partial: bool) -> int:
    """Delete what no record names; the caller holds the exclusive lock. Answers the bytes that this frees.

    With `partial` interrupted downloads go too.
    """
    blobs: set[str] = set()
    layers: set[str] = {"empty"}
    roots: set[str] = set()
    for image_id in store.index.ids():
        record = store.index.load(image_id)
        if record is not None:
            blobs.update((record.id, record.digest, *record.blobs))
            layers.update(diff_id.partition(":")[2] for diff_id in record.layers)
            roots.add(os.path.basename(root_image_path(store.root, record.layers)))
    try:
        freed = (
            _collect_blobs(store, blobs)
            + _collect_named(store.layers.directory, layers)
            + _collect_named(f"{store.root}/{ROOTS}", roots)
            + _clear_unfinished(f"{store.root}/records")
        )
        return freed + (_collect_partial(store) if partial else 0)
    except NagayaError:
        raise
    except OSError as error:
        raise HostError.from_os(error, "cannot clean up the image store") from None


def _collect_blobs(store: ImageStore, kept: set[str]) -> int:
    freed = 0
    for algorithm in _entries(f"{store.root}/blobs"):
        for name in _entries(f"{store.root}/blobs/{algorithm}"):
            if f"{algorithm}:{name}" not in kept:
                freed += _delete(f"{store.root}/blobs/{algorithm}/{name}")
    return freed


def _collect_named(directory: str, kept: set[str]) -> int:
    """Layers or root images, and what killed makers of them left: nobody makes any while the lock is ours."""
    freed = 0
    for name in _entries(directory):
        if name.removesuffix(".json") in kept:
            continue
        if name.endswith(".lock"):
            os.unlink(f"{directory}/{name}")
        else:
            freed += _delete(f"{directory}/{name}")
    return freed


def _clear_unfinished(directory: str) -> int:
    """Files there that somebody was killed at; the caller holds the lock under which they are written."""
    return sum(_delete(f"{directory}/{name}") for name in _entries(directory) if name.endswith(".tmp"))


def _collect_partial(store: ImageStore) -> int:
    directory = store.blobs.partial_directory
    return sum(_delete(f"{directory}/{name}") for name in _entries(directory))


def _entries(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _delete(path: str) -> int:
    """Remove a file or a tree; answers the bytes on disk that it had. A layer first loses the name that says whole."""
    try:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode):
            os.unlink(path)
            return found.st_blocks * 512
        if not path.endswith(".tmp"):
            os.rename(path, f"{path}.gone.tmp")
            path = f"{path}.gone.tmp"
    except FileNotFoundError:
        return 0
    size = _measure(path)
    remove_tree(path)
    return size


def _measure(path: str) -> int:
    """Bytes on disk of a tree; a file with several names counts once. What is nested beyond PATH_MAX is not counted."""
    total = 0
    seen: set[int] = set()
    waiting = [path]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
            found = [entry.stat(follow_symlinks=False) for entry in entries]
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            continue
        waiting += [entry.path for entry, state in zip(entries, found, strict=True) if stat.S_ISDIR(state.st_mode)]
        for state in found:
            if state.st_nlink == 1 or stat.S_ISDIR(state.st_mode) or state.st_ino not in seen:
                total += state.st_blocks * 512
            if state.st_nlink > 1:
                seen.add(state.st_ino)
    return total
