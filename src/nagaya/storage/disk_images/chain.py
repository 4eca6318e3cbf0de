"""A disk image and all that lies under it, opened and locked once: nobody goes by a name any more afterwards.

QEMU and qemu-img get descriptors, and every layer's format and backing in words of ours: what a header says of other
files is looked at here, and nowhere else.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import ExitStack

from nagaya.errors import Conflict, HostError, IntegrityError, NagayaError, NotFound, UsageError
from nagaya.kernel.locks import pack_lock
from nagaya.static import Any, NamedTuple
from nagaya.storage.disk_images.formats import AMBIGUOUS, find_by_driver, find_by_extension, get_format
from nagaya.storage.disk_images.headers import Header, read_header, recognise

DEEPEST = 64
_PROTOCOL = ":"
_WITH_BACKING = ("qcow2", "vmdk")  # for QEMU; the others have nothing that could be said of it
# QEMU locks the bytes from 100 and from 200 on (block/file-posix.c); the first one is ours.
_LOCK_START, _LOCK_LENGTH = 0, 1


class Layer(NamedTuple):
    """One opened image. `locator` is how another process finds the very file that `fd` is."""

    path: str
    format: str
    driver: str  # QEMU's word for the format
    fd: int
    locator: str
    header: Header


class Chain(NamedTuple):
    """The layers, the one that a machine writes first. Their descriptors are closed by whoever opened the chain."""

    layers: tuple[Layer, ...]
    writable: bool

    @property
    def top(self) -> Layer:
        return self.layers[0]

    @property
    def descriptors(self) -> tuple[int, ...]:
        return tuple(layer.fd for layer in self.layers)

    def node(self, *, alone: bool = False, files: tuple[str, ...] = ()) -> dict[str, Any]:
        """The image as QEMU's block options. Nothing is left to a header: no backing is said to be none.

        `alone` is for what needs no content, but the tables of the first layer. `files`: other names for the layers.
        """
        node: dict[str, Any] | None = None
        for depth, layer in reversed(list(enumerate(self.layers[:1] if alone else self.layers))):
            file: dict[str, Any] = {"driver": "file", "filename": files[depth] if files else layer.locator}
            if depth or not self.writable:
                file["read-only"] = True
            above: dict[str, Any] = {"driver": layer.driver, "file": file}
            if layer.format in _WITH_BACKING:
                above["backing"] = node
            node = above
            if depth or not self.writable:
                node["read-only"] = True
        assert node is not None
        return node


def open_chain(
    path: str,
    stack: ExitStack,
    *,
    format: str = "",
    writable: bool = False,
    allowed: tuple[str, ...] = (),
    allow_backing: bool = False,
    lock: bool = True,
) -> Chain:
    """Open `path` and what it stands on; `stack` closes it all, and with that gives up the locks.

    `format` "" = as the name says. A backing file has to lie in the directory of the image that names it or in one of
    `allowed`, unless `allow_backing`. With `lock` the first is locked against all others, or, if not `writable`,
    against writers, and the layers below against writers. Raises `NotFound`, `UsageError`, `Conflict`, `IntegrityError`,
    `Unsupported`, `HostError`.
    """
    layers: list[Layer] = []
    seen: set[tuple[int, int]] = set()
    while True:
        first = not layers
        layer = _open_layer(path, stack, format=format, writable=writable and first, lock=lock, under=not first)
        found = os.fstat(layer.fd)
        if (found.st_dev, found.st_ino) in seen or len(layers) == DEEPEST:
            raise IntegrityError(f"disk '{layers[0].path}' stands on itself, or on more than {DEEPEST} others")
        seen.add((found.st_dev, found.st_ino))
        layers.append(layer)
        if not layer.header.backing:
            return Chain(tuple(layers), writable)
        path = resolve_backing(layer, allowed=allowed, allow_backing=allow_backing)
        format = _backing_format(layer, path)


def read_top(path: str, stack: ExitStack, *, format: str = "") -> Layer:
    """The image alone, not locked; what it stands on is not looked at. Raises as `open_chain`."""
    return _open_layer(path, stack, format=format, writable=False, lock=False, under=False)


def choose_format(path: str, format: str = "") -> str:
    """The format of the image at `path`: as said, else as its name says. Raises `UsageError`."""
    if format:
        return get_format(format).name
    by_name = find_by_extension(path)
    if by_name is None:
        raise UsageError(
            f"what format disk '{path}' has does not follow from its name",
            hint="say it, for example --disk-format raw: content is not trusted, for a guest may have written it",
        )
    return by_name.name


def resolve_backing(layer: Layer, *, allowed: tuple[str, ...], allow_backing: bool) -> str:
    """The path of the file that `layer` stands on. Raises `IntegrityError` for one that it may not name."""
    name, place = layer.header.backing, os.path.dirname(layer.path)
    if _PROTOCOL in name.split("/", 1)[0]:
        raise IntegrityError(
            f"disk '{layer.path}' names '{name}' as its backing file, which is no file",
            hint="only files may lie under a disk, whatever --allow-backing says",
        )
    path = os.path.realpath(os.path.join(place, name))
    inside = (os.path.realpath(place), *map(os.path.realpath, allowed))
    if not allow_backing and os.path.dirname(path) not in inside:
        raise IntegrityError(
            f"disk '{layer.path}' stands on '{name}', which lies outside its own directory",
            hint=f"if you trust it, allow that with --allow-backing; it would show what is in {path}",
        )
    return path


def _backing_format(layer: Layer, path: str) -> str:
    said = find_by_driver(layer.header.backing_format) if layer.header.backing_format else find_by_extension(path)
    if said is None or (not layer.header.backing_format and path.lower().endswith(AMBIGUOUS)):
        raise IntegrityError(
            f"disk '{layer.path}' does not say what format its backing file has",
            hint=f"write it down: qemu-img rebase -u -b {layer.header.backing} -F FORMAT {layer.path}",
        )
    return said.name


def _open_layer(path: str, stack: ExitStack, *, format: str, writable: bool, lock: bool, under: bool) -> Layer:
    path = os.path.realpath(path)
    name = choose_format(path, format)
    fd = _open(path, writable=writable, under=under)
    stack.callback(os.close, fd)
    if lock:
        take_lock(fd, path, exclusive=writable)
    try:
        header = read_header(fd, name)
    except NagayaError as problem:
        looks = recognise(fd)
        hint = f"it looks like {looks}: say --disk-format {looks}" if looks not in ("", name) else problem.hint
        raise type(problem)(f"disk '{path}' cannot be used: {problem.message}", hint=hint) from None
    if name == "raw" and not format and path.lower().endswith(AMBIGUOUS) and recognise(fd):
        raise UsageError(
            f"disk '{path}' is called like a raw one and looks like {recognise(fd)}",
            hint=f"say which: --disk-format {recognise(fd)}, or --disk-format raw if a guest wrote it like that",
        )
    locator = f"/proc/self/fd/{fd}"
    if header.extents:
        _check_extents(path, header.extents)
        locator = path  # QEMU looks for the others beside it
    return Layer(path, name, get_format(name).driver, fd, locator, header)


def _open(path: str, *, writable: bool, under: bool) -> int:
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        what = "backing file" if under else "disk"
        raise NotFound(f"there is no {what} '{path}'", hint="'nagaya disk ls' lists the disks of the store") from None
    except IsADirectoryError:
        raise UsageError(f"'{path}' is a directory, and no disk") from None
    except OSError as error:
        raise HostError.from_os(error, "cannot open the disk") from None
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        os.close(fd)
        raise UsageError(f"'{path}' is neither a file nor a block device, and no disk")
    return fd


def _check_extents(path: str, names: tuple[str, ...]) -> None:
    """A VMDK in several files: they lie beside it, and are files of their own."""
    for name in names:
        beside = os.path.join(os.path.dirname(path), name)
        if not name or "/" in name or _PROTOCOL in name or name in (".", ".."):
            raise IntegrityError(f"disk '{path}' names '{name}' as a part of it, which does not lie beside it")
        try:
            if not stat.S_ISREG(os.lstat(beside).st_mode):
                raise IntegrityError(f"disk '{path}' names '{name}' as a part of it, which is no plain file")
            fd = os.open(beside, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            raise NotFound(f"'{beside}', a part of disk '{path}', is missing or cannot be read") from None
        try:
            if os.pread(fd, 4, 0) == b"KDMV":
                read_header(fd, "vmdk")  # which could send QEMU on to other files
        finally:
            os.close(fd)


def take_lock(fd: int, path: str, *, exclusive: bool) -> None:
    """Lock an opened image for as long as any copy of `fd` is open. Raises `Conflict`."""
    try:
        kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, pack_lock(kind, start=_LOCK_START, length=_LOCK_LENGTH))
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise HostError.from_os(error, f"cannot lock disk '{path}'") from None
        raise Conflict(
            f"disk '{path}' is in use",
            hint="stop the machine that has it, or wait until the command that works on it has ended",
            state="in use",
        ) from None
