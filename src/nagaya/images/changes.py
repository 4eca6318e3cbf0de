"""What a machine has changed of its image, read from its overlay's directories without mounting anything."""

from __future__ import annotations

import os
import stat

from nagaya.errors import HostError
from nagaya.static import NamedTuple

DEPTH_MAX = 300
PATH_MAX = 4095


class Change(NamedTuple):
    """One changed path, as `docker diff` has them."""

    kind: str  # "A" added, "C" changed, "D" deleted
    path: str  # absolute inside the machine


class _Below(NamedTuple):
    """What the lower layers together have at one path."""

    found: os.stat_result | None
    directories: tuple[str, ...]  # that together make it, topmost first, if it is a directory


def diff(upper: str, lower: tuple[str, ...]) -> list[Change]:
    """The changes in `upper` over `lower` (topmost first), by path. A directory with changes in it counts as changed.

    Nothing is looked up through a link: each level goes on from the directories of the one above.
    """
    changes: list[Change] = []
    try:
        if os.path.isdir(upper):
            _compare(upper, lower, "", changes)
    except OSError as error:
        raise HostError.from_os(error, "cannot read the machine's changes") from None
    return sorted(changes, key=lambda change: change.path.split("/"))


def _compare(upper: str, lower: tuple[str, ...], path: str, changes: list[Change]) -> None:
    try:
        names = os.listdir(upper)
    except FileNotFoundError:  # a running machine removed it
        return
    for name in names:
        here = f"{path}/{name}"
        try:
            found = os.lstat(f"{upper}/{name}")
        except FileNotFoundError:
            continue
        below = _look_up(lower, name)
        if _is_whiteout(found):
            if below.found is not None:
                changes.append(Change("D", here))
            continue
        if not stat.S_ISDIR(found.st_mode):
            changes.append(Change("C" if below.found is not None else "A", here))
            continue
        count = len(changes)
        if here.count("/") > DEPTH_MAX or len(os.fsencode(upper)) > PATH_MAX - 512:
            # a machine's own doing: that its changes are there is enough to say
            changes.append(Change("C" if below.found is not None else "A", here))
            continue
        opaque = _is_opaque(f"{upper}/{name}")
        _compare(f"{upper}/{name}", () if opaque else below.directories, here, changes)
        if opaque:
            _add_hidden(f"{upper}/{name}", below.directories, here, changes)
        if below.found is None:
            changes.append(Change("A", here))
        elif len(changes) > count or not _same(found, below.found):
            changes.append(Change("C", here))


def _look_up(lower: tuple[str, ...], name: str) -> _Below:
    """`name` in the overlay of the directories `lower`."""
    top: os.stat_result | None = None
    directories: list[str] = []
    for directory in lower:
        path = f"{directory}/{name}"
        try:
            found = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if _is_whiteout(found):
            break
        if not stat.S_ISDIR(found.st_mode):
            top = top or found
            break
        top = top or found
        directories.append(path)
        if _is_opaque(path):
            break
    return _Below(top, tuple(directories))


def _add_hidden(upper: str, lower: tuple[str, ...], path: str, changes: list[Change]) -> None:
    """What an opaque directory hides of those below it and does not have itself."""
    there = set(os.listdir(upper))
    names = {name for directory in lower for name in os.listdir(directory)}
    hidden = (name for name in names - there if _look_up(lower, name).found is not None)
    changes.extend(Change("D", f"{path}/{name}") for name in hidden)


def _is_whiteout(found: os.stat_result) -> bool:
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def _is_opaque(path: str) -> bool:
    for name in ("trusted.overlay.opaque", "user.overlay.opaque"):
        try:
            if os.getxattr(path, name, follow_symlinks=False) == b"y":
                return True
        except OSError:
            continue
    return False


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_mode, one.st_uid, one.st_gid, one.st_mtime_ns) == (
        other.st_mode, other.st_uid, other.st_gid, other.st_mtime_ns,
    )  # fmt: skip
