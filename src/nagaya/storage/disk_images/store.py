"""The disks of a store, ROOT/disks/NAME.EXTENSION, and disks anywhere else by their path.

A disk appears whole, by rename, or not at all. What is being made has a name that begins with `.tmp-` and its maker's
lock; the next one that makes a disk there removes those that nobody holds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from nagaya.errors import Conflict, HostError, IntegrityError, NagayaError, NotFound, Unsupported, UsageError
from nagaya.kernel.locks import pack_lock
from nagaya.static import Any, NamedTuple
from nagaya.storage import records
from nagaya.storage.disk_images import program
from nagaya.storage.disk_images.chain import Chain, choose_format, open_chain, read_top, take_lock
from nagaya.storage.disk_images.copy import copy_sparse
from nagaya.storage.disk_images.formats import FORMATS, Format, find_by_extension, get_format
from nagaya.storage.disk_images.headers import MOST_BYTES, SECTOR
from nagaya.storage.paths import make_directory

_ALLOWED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
TEMPORARY = ".tmp-"
Progress = Callable[[float], None]


class Disk(NamedTuple):
    """A disk image. `name` is "" for one that is not in the store; `backing` is the path of what it stands on."""

    name: str
    path: str
    format: str
    virtual_bytes: int
    actual_bytes: int
    created_ns: int
    backing: str = ""


class Snapshot(NamedTuple):
    """A state that a qcow2 image keeps in itself."""

    id: str
    name: str
    created_ns: int


class Details(NamedTuple):
    """`chain` has the paths of all layers, the disk's own first."""

    disk: Disk
    chain: tuple[str, ...]
    snapshots: tuple[Snapshot, ...]


class CheckResult(NamedTuple):
    """What qemu-img found: damaged, leaked (space that is lost, and nothing else) and repaired clusters."""

    corruptions: int
    leaks: int
    repaired: int
    total_clusters: int

    @property
    def clean(self) -> bool:
        return not self.corruptions and not self.leaks


class Disks:
    """The disks of the store at `root`. A text with a '/', or that ends as a disk's file does, is a path."""

    def __init__(self, root: str) -> None:
        self.directory = f"{root}/disks"

    # -- finding

    def locate(self, text: str) -> str:
        """The path of the disk that `text` means. Raises `NotFound`, `UsageError`."""
        if is_path(text):
            return os.path.abspath(text)
        for path in self._files(_checked(text)):
            return path
        raise NotFound(f"there is no disk '{text}'", hint="'nagaya disk ls' lists them; a file needs a '/' in its path")

    def list(self) -> list[Disk]:
        """The store's disks by name; what is broken is left out, and `info` tells why."""
        found = []
        for entry in sorted(self._entries()):
            try:
                found.append(self.get(f"{self.directory}/{entry}"))
            except NagayaError:
                continue
        return found

    def get(self, text: str, *, format: str = "") -> Disk:
        """What the image's own header says; looks at nothing below it."""
        return self.info(text, format=format, deep=False).disk

    def info(self, text: str, *, format: str = "", allow_backing: bool = False, deep: bool = True) -> Details:
        """All about a disk, also while a machine uses it. Raises as `open_chain`."""
        path = self.locate(text)
        with ExitStack() as stack:
            if not deep:
                return Details(self._describe_top(path, format), (), ())
            chain = self._open(path, stack, format=format, allow_backing=allow_backing, lock=False)
            disk = self._describe(chain)
            snapshots: tuple[Snapshot, ...] = ()
            if get_format(disk.format).layers:
                data = _json(
                    program.run(["info", "-U", "--output=json", _locator(chain, alone=True)], fds=chain.descriptors, look=True,
                                what=f"cannot look at disk '{text}'").output
                )  # fmt: skip
                snapshots = tuple(_snapshot(each) for each in data.get("snapshots", ()))
            return Details(disk, tuple(layer.path for layer in chain.layers), snapshots)

    # -- making

    def create(self, text: str, size_bytes: int, *, format: str = "") -> Disk:
        """A new, empty disk. Raises `Conflict` when there is one, `UsageError` for a size or a name that is none."""
        size_bytes = _checked_size(size_bytes)
        target = self._target(text, format)
        with self._making(target) as temporary:
            argv = ["create", "-q", "-f", target.format.driver, *_options(target.format), temporary, str(size_bytes)]
            program.run(argv, what=f"cannot make disk '{text}'")
        return self.get(target.path, format=target.format.name)

    def convert(
        self,
        source: str,
        target: str,
        *,
        format: str = "",
        to: str = "",
        compress: bool = False,
        force: bool = False,
        allow_backing: bool = False,
        progress: Progress | None = None,
    ) -> Disk:
        """The whole content of `source`, backing files included, as a new disk of its own."""
        made = self._target(target, to)
        if compress and made.format.name not in ("qcow2", "vmdk"):
            raise Unsupported(f"{made.format.name} cannot be compressed", hint="qcow2 and vmdk can")
        with ExitStack() as stack:
            chain = self._open(self.locate(source), stack, format=format, allow_backing=allow_backing)
            with self._making(made, replace=force) as temporary:
                argv = ["convert", "-p", *(() if made.format.in_order else ("-W",)), "-O", made.format.driver]
                if compress and made.format.name == "vmdk":
                    argv += ["-c", "-o", "subformat=streamOptimized"]
                else:
                    argv += [*_options(made.format), *(("-c",) if compress else ())]
                program.run_long(
                    [*argv, _locator(chain), temporary], progress,
                    what=f"cannot convert disk '{source}'", fds=chain.descriptors,
                )  # fmt: skip
        return self.get(made.path, format=made.format.name)

    def clone(
        self,
        source: str,
        target: str,
        *,
        linked: bool = False,
        format: str = "",
        allow_backing: bool = False,
        progress: Progress | None = None,
    ) -> Disk:
        """A copy, in which the file system shares blocks where it can; `linked`: a qcow2 disk that stands on `source`.

        Nobody may write to a disk that others stand on: see `dependants`.
        """
        path = self.locate(source)
        with ExitStack() as stack:
            chain = self._open(path, stack, format=format, allow_backing=allow_backing)
            if chain.top.header.extents:
                raise Unsupported("a VMDK in several files cannot be cloned", hint="convert it: nagaya disk convert")
            made = self._target(target, "qcow2" if linked else chain.top.format)
            with self._making(made) as temporary:
                if linked:
                    self._make_link(chain, made, temporary)
                else:
                    if chain.top.header.backing and os.path.dirname(made.path) != os.path.dirname(chain.top.path):
                        raise Unsupported(
                            "a disk that stands on another one can be copied within its directory only",
                            hint="make a whole one: nagaya disk convert",
                        )
                    copy_sparse(chain.top.fd, temporary, progress)
        return self.get(made.path, format=made.format.name)

    def _make_link(self, chain: Chain, made: _Target, temporary: str) -> None:
        base, place = chain.top, os.path.dirname(os.path.realpath(os.path.dirname(made.path)) + "/")
        # Beside it by name alone, so that both can be moved together.
        name = os.path.basename(base.path) if os.path.dirname(base.path) == place else base.path
        if ":" in name.split("/", 1)[0]:
            raise UsageError(f"a disk cannot stand on '{name}': QEMU takes what is before the ':' for a protocol")
        argv = ["create", "-q", "-u", "-f", "qcow2", *_options(made.format), "-F", base.driver, "-b", name]
        program.run([*argv, temporary, str(base.header.virtual_bytes)], what=f"cannot clone disk '{base.path}'")

    # -- changing

    def resize(self, text: str, size: str, bytes_: int, *, format: str = "", shrink: bool = False) -> Disk:
        """Make a disk `bytes_` large, or with a `size` of "+" or "-" so much more or less. Raises `Conflict` in use."""
        path = self.locate(text)
        with ExitStack() as stack:
            chain = self._open_to_change(path, stack, format=format)
            now = chain.top.header.virtual_bytes
            wanted = self.plan_size(now, size, bytes_)
            kind = get_format(chain.top.format)
            if not kind.resizes:
                raise Unsupported(
                    f"a {kind.name} image cannot be resized in place",
                    hint="convert it to qcow2 first: nagaya disk convert",
                )
            if wanted < now and not shrink:
                raise UsageError(
                    f"disk '{text}' has {now} bytes, and {wanted} would cut its end off",
                    hint="shrink the file systems on it first, and then say --shrink",
                )
            argv = ["resize", "-q", *(("--shrink",) if shrink else ()), _locator(chain), str(wanted)]
            program.run(argv, what=f"cannot resize disk '{text}'", fds=chain.descriptors)
        return self.get(path, format=chain.top.format)

    def plan_size(self, now_bytes: int, sign: str, bytes_: int) -> int:
        """What a disk of `now_bytes` is to become. Raises `UsageError` for a size that no disk has."""
        return _checked_size(now_bytes + bytes_ if sign == "+" else now_bytes - bytes_ if sign == "-" else bytes_)

    def snapshot(self, text: str, action: str, name: str, *, format: str = "") -> None:
        """`action` create, apply or rm: of a state kept inside a qcow2 image that nobody uses."""
        flag = {"create": "-c", "apply": "-a", "rm": "-d"}[action]
        path = self.locate(text)
        if not name or len(name) > 255 or not name.isprintable() or name.startswith("-"):
            raise UsageError(f"'{name}' is not a valid name of a snapshot")
        known = [each.name for each in self.info(text, format=format, allow_backing=True).snapshots]
        if action == "create" and name in known:
            raise Conflict(f"disk '{text}' has a snapshot '{name}' already", hint="choose another name")
        if action != "create" and name not in known:
            raise NotFound(f"disk '{text}' has no snapshot '{name}'", hint=f"nagaya disk snapshot ls {text}")
        with ExitStack() as stack:
            chain = self._open_to_change(path, stack, format=format)
            if not get_format(chain.top.format).layers:
                raise Unsupported(
                    f"a {chain.top.format} image holds no snapshots", hint="qcow2 does: nagaya disk convert"
                )
            argv = ["snapshot", "-q", flag, name, _locator(chain, alone=True)]
            program.run(argv, what=f"cannot change the snapshots of disk '{text}'", fds=chain.descriptors)

    def check(self, text: str, *, format: str = "", repair: bool = False) -> CheckResult:
        """Look whether the image's own tables are right; `repair` mends leaks, and damage where that loses nothing."""
        path = self.locate(text)
        kind = get_format(choose_format(path, format))
        if not kind.checks:
            raise Unsupported(f"a {kind.name} image has no tables that could be checked")
        if repair and not kind.layers:
            raise Unsupported(f"a {kind.name} image cannot be repaired", hint="qcow2 can")
        with ExitStack() as stack:
            chain = self._open(path, stack, format=kind.name, writable=repair, allow_backing=True)
            argv = ["check", "--output=json", *(("-r", "all") if repair else ()), _locator(chain, alone=True)]
            done = program.run(
                argv, what=f"cannot check disk '{text}'", fds=chain.descriptors, look=not repair, accept=(0, 2, 3)
            )
        data = _json(done.output)
        if _number(data, "check-errors"):
            raise IntegrityError(f"disk '{text}' could not be read to its end")
        return CheckResult(
            corruptions=_number(data, "corruptions"),
            leaks=_number(data, "leaks"),
            repaired=_number(data, "corruptions-fixed") + _number(data, "leaks-fixed"),
            total_clusters=_number(data, "total-clusters"),
        )

    def remove(self, text: str, *, force: bool = False, in_use: frozenset[str] = frozenset()) -> None:
        """Remove a disk that no machine has and no other stands on. `force` forgives one that is not there."""
        try:
            path = os.path.realpath(self.locate(text))
            if not stat.S_ISREG(os.lstat(path).st_mode):
                raise UsageError(f"'{path}' is no file")
        except (NotFound, FileNotFoundError):
            if force:
                return
            raise NotFound(f"there is no disk '{text}'", hint="'nagaya disk ls' lists them all") from None
        if path in in_use:
            raise Conflict(f"disk '{text}' belongs to a machine", hint="'nagaya ps -a' lists them; remove it first")
        self.refuse_dependants(path)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise HostError.from_os(error, "cannot remove the disk") from None
        try:
            take_lock(fd, path, exclusive=True)
            os.unlink(path)
        finally:
            os.close(fd)

    def refuse_taken(self, text: str) -> None:
        """Raise `Conflict` when there is such a disk already, before much is done for a new one of that name."""
        target = self._target(text, "")
        if os.path.lexists(target.path):
            raise _taken(target)

    def dependants(self, path: str) -> builtins_list[str]:
        """The paths of the disks in the same directory, and of the store, that stand on the one at `path`."""
        path, found = os.path.realpath(path), []
        places = {os.path.dirname(path), os.path.realpath(self.directory)}
        for place in places:
            for name in _names(place):
                other = f"{place}/{name}"
                kind = find_by_extension(name)
                if kind is None or not kind.layers or other == path:
                    continue
                try:
                    backing = self._describe_top(other, "").backing
                except NagayaError:
                    continue  # what cannot be read stands on nothing
                if backing and os.path.realpath(backing) == path:
                    found.append(other)
        return sorted(found)

    def refuse_dependants(self, path: str) -> None:
        """Raise `Conflict` when other disks stand on the one at `path`."""
        others = self.dependants(path)
        if others:
            raise Conflict(
                f"disk '{path}' must stay as it is: '{others[0]}' stands on it"
                + (f", and {len(others) - 1} more" if len(others) > 1 else ""),
                hint="remove those first, or make them whole: nagaya disk convert",
            )

    # -- inside

    def _open(
        self,
        path: str,
        stack: ExitStack,
        *,
        format: str,
        writable: bool = False,
        allow_backing: bool = False,
        lock: bool = True,
    ) -> Chain:
        return open_chain(
            path, stack, format=format, writable=writable, allow_backing=allow_backing, lock=lock,
            allowed=(self.directory,),
        )  # fmt: skip

    def _open_to_change(self, path: str, stack: ExitStack, *, format: str) -> Chain:
        chain = self._open(path, stack, format=format, writable=True, allow_backing=True)
        self.refuse_dependants(chain.top.path)
        return chain

    def _describe(self, chain: Chain) -> Disk:
        top = chain.top
        return self._disk(top.path, top.fd, top.format, top.header.virtual_bytes, top.header.backing)

    def _describe_top(self, path: str, format: str) -> Disk:
        with ExitStack() as stack:
            top = read_top(path, stack, format=format)
            return self._disk(top.path, top.fd, top.format, top.header.virtual_bytes, top.header.backing)

    def _disk(self, path: str, fd: int, format: str, virtual_bytes: int, backing: str) -> Disk:
        found = os.fstat(fd)
        place, file = os.path.split(path)
        kind = find_by_extension(file)
        ours = kind is not None and place == os.path.realpath(self.directory)
        return Disk(
            name=file[: -len(kind.extension)] if ours and kind is not None else "",
            path=path,
            format=format,
            virtual_bytes=virtual_bytes,
            actual_bytes=found.st_blocks * SECTOR,
            created_ns=found.st_mtime_ns,
            backing=os.path.join(place, backing) if backing else "",
        )

    def _entries(self) -> builtins_list[str]:
        return [name for name in _names(self.directory) if not name.startswith(".") and find_by_extension(name)]

    def _files(self, name: str) -> builtins_list[str]:
        paths = (f"{self.directory}/{name}{kind.extension}" for kind in FORMATS)
        return [path for path in paths if os.path.lexists(path)]

    def _target(self, text: str, format: str) -> _Target:
        """Where a new disk goes, and what it is. Raises `UsageError`, `Conflict`."""
        if is_path(text):
            by_name = find_by_extension(text)
            kind = get_format(format) if format else by_name
            if kind is None:
                raise UsageError(
                    f"what format '{text}' is to have does not follow from its name",
                    hint="end it in .qcow2, .raw, .vmdk, .vdi, .vhd or .vhdx, or say the format",
                )
            path = os.path.abspath(text)
            if not os.path.isdir(os.path.dirname(path)):
                raise NotFound(f"there is no directory '{os.path.dirname(path)}'", hint="make it first")
            return _Target(path, kind, text)
        kind = get_format(format or "qcow2")
        make_directory(self.directory, 0o711)
        others = self._files(_checked(text))
        path = f"{self.directory}/{text}{kind.extension}"
        if others and others != [path]:
            raise Conflict(f"there is a disk '{text}' already", hint="choose another name, or remove it")
        return _Target(path, kind, text)

    @contextmanager
    def _making(self, target: _Target, *, replace: bool = False) -> Iterator[str]:
        """The path of a file, locked and as yet empty, that becomes the target when the block is left in peace."""
        place = os.path.dirname(target.path)
        _sweep(place)
        if not replace and os.path.lexists(target.path):
            raise _taken(target)
        temporary = f"{place}/{TEMPORARY}{os.urandom(8).hex()}{target.format.extension}"
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise HostError.from_os(error, f"cannot make disk '{target.text}'") from None
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, pack_lock(fcntl.F_WRLCK, start=0, length=1))
            yield temporary
            os.fsync(fd)
            _put(temporary, target, replace=replace)
        except OSError as error:
            raise HostError.from_os(error, f"cannot make disk '{target.text}'") from None
        finally:
            try:
                os.unlink(temporary)
            except FileNotFoundError:
                pass  # renamed
            os.close(fd)


builtins_list = list  # `Disks.list` hides the type's name from annotations in its own class


class _Target(NamedTuple):
    path: str
    format: Format
    text: str  # as the user wrote it


def is_path(text: str) -> bool:
    """Whether it names a file, and not a disk of the store."""
    return "/" in text or find_by_extension(text) is not None


def _checked(name: str) -> str:
    if not name or len(name) > 128 or not name[0].isalnum() or not _ALLOWED.issuperset(name):
        raise UsageError(
            f"'{name}' is not a valid name of a disk",
            hint="use letters, digits, '_', '.' and '-'; the path of a file needs a '/'",
        )
    return name


def _checked_size(size_bytes: int) -> int:
    if not 1 <= size_bytes <= MOST_BYTES:
        raise UsageError(
            f"a disk cannot have {size_bytes} bytes", hint=f"from 1 byte to {MOST_BYTES >> 40} TiB, for example 20g"
        )
    return size_bytes + -size_bytes % SECTOR


def _taken(target: _Target) -> Conflict:
    return Conflict(
        f"there is a disk '{target.text}' already", hint="choose another name, or remove it: nagaya disk rm"
    )


def _put(temporary: str, target: _Target, *, replace: bool) -> None:
    """Rename it into place; never over a disk that appeared meanwhile, unless `replace`, nor over one in use."""
    place = os.path.dirname(target.path)
    if replace and os.path.lexists(target.path):
        old = os.open(target.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            take_lock(old, target.path, exclusive=True)
            os.rename(temporary, target.path)
        finally:
            os.close(old)
    else:
        try:
            os.link(temporary, target.path)  # unlike rename(2) it fails when there is one
        except FileExistsError:
            raise _taken(target) from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            os.rename(temporary, target.path)  # a file system without hard links
    records.sync(place)


def _sweep(place: str) -> None:
    """Remove what makers that were killed have left: nobody holds its lock."""
    for name in _names(place):
        if not name.startswith(TEMPORARY) or find_by_extension(name) is None:
            continue
        try:
            fd = os.open(f"{place}/{name}", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, pack_lock(fcntl.F_WRLCK, start=0, length=1))
            os.unlink(f"{place}/{name}")
        except OSError:
            continue  # its maker lives
        finally:
            os.close(fd)


def _names(place: str) -> list[str]:
    try:
        return os.listdir(place)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise HostError.from_os(error, "cannot list the disks") from None


def _options(kind: Format) -> list[str]:
    return ["-o", kind.options] if kind.options else []


def _locator(chain: Chain, *, alone: bool = False) -> str:
    import json  # lazy: as below

    return "json:" + json.dumps(chain.node(alone=alone))


def _json(output: bytes) -> dict[str, Any]:
    try:
        import json  # lazy: 5 ms, and a clone needs none

        data = json.loads(output)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise IntegrityError("qemu-img answered what is no JSON object")
    return data


def _number(data: dict[str, Any], name: str) -> int:
    value = data.get(name, 0)
    return value if type(value) is int else 0


def _snapshot(data: dict[str, Any]) -> Snapshot:
    """A guest's QEMU may have written it."""
    try:
        created_ns = int(data["date-sec"]) * 1_000_000_000 + int(data["date-nsec"])
        return Snapshot(str(data["id"]), str(data["name"]), created_ns)
    except (KeyError, TypeError, ValueError):
        raise IntegrityError("qemu-img told of a snapshot what cannot be") from None
