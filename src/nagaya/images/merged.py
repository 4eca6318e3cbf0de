"""What an image's layers show together: overlayfs's rules, applied without a mount.

The rules (kernel: Documentation/filesystems/overlayfs.rst): of two entries of one name the topmost counts; directories
of one name are one directory, with the attributes of the topmost; a character device 0/0 hides the name in what is
below; a directory with the attribute `overlay.opaque` hides what is below it.
"""

from __future__ import annotations

import errno
import os
import stat

from nagaya.errors import Unsupported
from nagaya.static import NamedTuple

_NO_XATTRS: tuple[tuple[str, bytes], ...] = ()


class Node:
    """A directory of the merged tree with its attributes, or a file under one of its names."""

    __slots__ = ("children", "found", "layers", "path", "xattrs")

    def __init__(self, path: bytes, found: os.stat_result) -> None:
        self.path = path  # where the topmost layer has it on the host
        self.found = found
        self.layers: list[bytes] = []  # of a directory: all that make it, topmost first
        self.children: list[tuple[bytes, Node]] = []
        self.xattrs = _NO_XATTRS  # of a directory, without overlayfs's own


class Merged(NamedTuple):
    """What layers are together."""

    directories: list[Node]  # each before those in it
    marked: bool  # there are marks that only overlayfs understands: deletions, its attributes on directories
    dangling: bool  # there are deletions that overlayfs would list: where a directory is one layer's alone


def merge(lower: tuple[str, ...]) -> Merged:
    """Merge the layers `lower`, topmost first.

    Raises `OSError`, and `Unsupported` for a path that is too long to be opened at once.
    """
    try:
        return _merge(lower)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise Unsupported(
            "the image has a path that is too long for this host",
            finding=f"{os.fsdecode(error.filename or b'')[:200]}… is longer than 4095 bytes",
        ) from None


def _merge(lower: tuple[str, ...]) -> Merged:
    space = "trusted." if os.geteuid() == 0 else "user."  # as `unpack` marks
    top = os.fsencode(lower[0])
    root = Node(top, os.lstat(top))
    root.layers = [os.fsencode(layer) for layer in lower]
    nodes: list[Node] = []
    marked = dangling = False
    waiting = [root]
    while waiting:
        node = waiting.pop()
        nodes.append(node)
        node.xattrs, own = _read_xattrs(node.path, f"{space}overlay.")
        deletes = _read_directory(node, f"{space}overlay.opaque")
        marked = marked or own or deletes
        dangling = dangling or (deletes and len(node.layers) == 1)
        waiting += [child for _, child in reversed(node.children) if stat.S_ISDIR(child.found.st_mode)]
    return Merged(nodes, marked, dangling)


def _read_directory(node: Node, opaque: str) -> bool:
    """Fill in `children`, by name; whether there are deletions."""
    found: dict[bytes, Node] = {}
    closed: set[bytes] = set()  # names of which lower layers have no more to say
    marked = False
    for layer in node.layers:
        with os.scandir(layer) as entries:
            for entry in entries:
                name = entry.name
                if name in closed:
                    continue
                state = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(state.st_mode):
                    child = found.get(name)
                    if child is None:
                        child = found[name] = Node(entry.path, state)
                    child.layers.append(entry.path)
                    if _is_opaque(entry.path, opaque):
                        closed.add(name)
                    continue
                closed.add(name)
                if stat.S_ISCHR(state.st_mode) and state.st_rdev == 0:
                    marked = True
                elif name not in found:  # else an upper directory hides it
                    found[name] = Node(entry.path, state)
    node.children = sorted(found.items())
    return marked


def _is_opaque(path: bytes, attribute: str) -> bool:
    try:
        return os.getxattr(path, attribute, follow_symlinks=False) == b"y"
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return False
        raise


def _read_xattrs(path: bytes, own: str) -> tuple[tuple[tuple[str, bytes], ...], bool]:
    """(attributes to keep, whether there were overlayfs's own)."""
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return _NO_XATTRS, False
        raise
    if not names:
        return _NO_XATTRS, False
    kept = [name for name in names if not name.startswith(own)]
    xattrs = tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in sorted(kept))
    return xattrs, len(kept) != len(names)
