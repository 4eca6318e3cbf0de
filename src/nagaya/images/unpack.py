"""Unpacking tar streams that may be hostile: image layers into overlayfs's form, and what comes out of a machine.

Nothing outside the directory is ever touched. A path is walked one component at a time by openat(2) with O_NOFOLLOW
from a descriptor of the directory; files are made with O_EXCL; a link is made, and never followed. Parents'
descriptors are kept, so that the walk costs nothing for the next file of the same directory.

Overlayfs's form (kernel: Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories"): `.wh.NAME`
becomes a character device 0/0 called NAME, `.wh..wh..opq` the attribute trusted.overlay.opaque=y on its directory
(user.overlay.opaque for a plain user, whom the kernel keeps from `trusted.`; such a layer is to be mounted with
`userxattr`).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from types import TracebackType

from nagaya.errors import HostError, IntegrityError
from nagaya.images.tar import (
    BLOCK_DEVICE,
    CHAR,
    DIRECTORY,
    FIFO,
    FILE,
    LINK,
    SYMLINK,
    Entry,
    TarReader,
    refuse,
    show_name,
)
from nagaya.static import BinaryIO, NamedTuple, Self
from nagaya.storage.tree import remove_tree

PATH_MAX = 4095
OPEN_DIRECTORIES = 128  # kept between entries
KEPT_LEVELS = 32  # of one path
WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_WALK = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# What a stranger's names or sizes bring about, and no lack of the host's: a fault of the archive
_ARCHIVE_FAULTS = frozenset(
    (errno.ENAMETOOLONG, errno.EFBIG, errno.EINVAL, errno.EILSEQ, errno.EMLINK, errno.ENOTEMPTY)
)
_UPPER_SPACE = b"trusted.overlay."
_KEPT_XATTRS = (b"user.", b"trusted.", b"system.posix_acl_", b"security.capability")


class Unpacked(NamedTuple):
    """What an unpacking made."""

    size_bytes: int  # of file contents
    entries: int


class Policy(NamedTuple):
    """How entries become files."""

    owner: bool  # keep owners, set-id bits and privileged attributes
    overlay: bool  # turn whiteouts into overlayfs's form
    devices: bool  # make device nodes; refused otherwise
    fresh: bool  # the directory is new and ours alone
    rename: bytes = b""  # replaces the first component of every name
    upper: bool = False  # the content is in overlayfs's form already: keep its marks
    plain: bool = False  # by a plain user: no owners, no devices, and everything stays readable to that user


LAYER = Policy(owner=True, overlay=True, devices=True, fresh=True)
PLAIN_LAYER = LAYER._replace(owner=False, plain=True)


def unpack_layer(chunks: Iterator[bytes], directory: str) -> Unpacked:
    """Unpack a layer's plain tar into the new, empty `directory`, in overlayfs's form.

    Owners, modes, set-id bits, times, hard links, holes, devices and attributes come out as the layer has them (the
    machine's mount decides what a device or set-id bit is worth); `trusted.overlay.*` from the image is dropped, and
    security labels are the host's own business. Directories that are only implied are root's, 0755.
    A plain user's layer has neither owners nor devices; what shows it (`rootimage`) gives all to root.
    Raises `IntegrityError` naming the entry, `OSError` from the host; removing the directory is the caller's part.
    """
    with Unpacker(directory, LAYER if os.geteuid() == 0 else PLAIN_LAYER) as unpacker:
        return unpacker.run(TarReader(chunks))


def unpack_upper(stream: BinaryIO, directory: str) -> Unpacked:
    """Unpack a plain tar `stream` of an overlay's upper directory, from a virtual machine, into an empty `directory`.

    The machine is hostile: of overlayfs's marks deletions (devices 0/0) and opaque directories are taken over, which can
    only hide; what refers to other files is refused, and the rest dropped. A plain user gets neither owners nor devices.
    Raises `IntegrityError` naming the entry, `OSError` from the host.
    """
    root = os.geteuid() == 0
    policy = Policy(owner=root, overlay=False, devices=True, fresh=True, upper=True, plain=not root)
    return unpack_stream(stream, directory, policy)


def extract(stream: BinaryIO, directory: str, *, preserve_owner: bool, rename: str = "") -> None:
    """Unpack a plain tar `stream` from a machine, which is hostile, into the host's `directory`.

    `rename` replaces the first component of every name. Existing files are replaced, never written through;
    directories that are there keep their owner, mode and times. Without `preserve_owner` all belongs to the caller,
    and set-id bits, capabilities and other privileges are dropped. Device nodes are refused.
    Raises `IntegrityError` naming the entry, `OSError` from the host.
    """
    policy = Policy(owner=preserve_owner, overlay=False, devices=False, fresh=False, rename=os.fsencode(rename))
    unpack_stream(stream, directory, policy)


def unpack_stream(stream: BinaryIO, directory: str, policy: Policy) -> Unpacked:
    """Unpack a plain tar `stream` by `policy`; stops reading at the archive's end mark and what pads it."""
    with Unpacker(directory, policy) as unpacker:
        return unpacker.run(TarReader(_chunks(stream), require_end=True))


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    read = getattr(stream, "read1", stream.read)  # read1: what is there, without waiting for a whole chunk
    while chunk := read(1 << 20):
        yield chunk


class Unpacker:
    """Puts entries below one directory. A context manager: it holds descriptors."""

    def __init__(self, directory: str, policy: Policy) -> None:
        self._directory = directory
        self._policy = policy
        self._root = -1
        self._open: dict[bytes, int] = {}  # directories below the root: path -> descriptor
        self._finish: dict[bytes, Entry] = {}  # directories whose owner, mode and times are set at the end
        self._opaque: set[bytes] = set()
        self._whiteouts: set[bytes] = set()
        self._umask = _read_umask()
        self._chown = self._must_chown()
        self._written = 0
        self._space = b"trusted." if os.geteuid() == 0 else b"user."

    def _must_chown(self) -> bool:
        """Whether even root's files need chown: not when root makes them in a new directory without the set-gid bit."""
        if not self._policy.fresh or os.geteuid() or os.getegid():
            return True
        found = os.stat(self._directory)
        return found.st_gid != 0 or bool(found.st_mode & stat.S_ISGID)

    def __enter__(self) -> Self:
        self._root = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()
        os.close(self._root)

    def run(self, reader: TarReader) -> Unpacked:
        """Unpack everything."""
        count = 0
        make = {
            FILE: self._make_file, LINK: self._make_link, SYMLINK: self._make_symlink, CHAR: self._make_node,
            BLOCK_DEVICE: self._make_node, FIFO: self._make_node,
        }  # fmt: skip
        for entry in reader:
            count += 1
            if len(self._open) > OPEN_DIRECTORIES:
                self._close_oldest()
            path = self._path(entry.name)
            try:
                if entry.kind == DIRECTORY:
                    self._make_directory(path, entry)
                    continue
                if not path:
                    raise refuse(entry.name, "it would replace the root directory")
                parent_path, _, base = path.rpartition(b"/")
                parent = self._root if not parent_path else self._open.get(parent_path, -1)
                if parent < 0:
                    parent = self._open_directory(parent_path)
                if self._policy.overlay and base.startswith(WHITEOUT):
                    self._white_out(parent, parent_path, base, entry)
                    continue
                make[entry.kind](parent, base, path, entry, reader)
            except OSError as error:
                raise self._translate(error, entry) from None
        self._finish_directories()
        return Unpacked(self._written, count)

    # -- paths

    def _path(self, name: bytes) -> bytes:
        """The name relative to the root, without "." and doubled slashes. ".." has no honest use, and is refused."""
        if name.startswith(b"./"):
            name = name[2:]
        if b".." in name or b"//" in name or b"/./" in name or name[:1] in (b"/", b".") or name[-1:] in (b"/", b"."):
            parts = [part for part in name.split(b"/") if part not in (b"", b".")]
            if b".." in parts:
                raise refuse(name, "its path leads through '..'")
            name = b"/".join(parts)
        if len(name) > PATH_MAX:
            raise refuse(name, f"its path is longer than {PATH_MAX} bytes")
        if self._policy.rename and name:
            _, slash, rest = name.partition(b"/")
            name = self._policy.rename + slash + rest
        return name

    def _open_directory(self, path: bytes, *, make: bool = True) -> int:
        """A descriptor of the directory `path` below the root. Never through a link. With `make` it comes to be.

        Raises `FileNotFoundError` without `make`, `IntegrityError` when a component is no directory.
        """
        if not path:
            return self._root
        fd = self._open.get(path, -1)
        if fd >= 0:
            return fd
        parts = path.split(b"/")
        depth = len(parts) - 1
        while depth and b"/".join(parts[:depth]) not in self._open:
            depth -= 1
        fd = self._open[b"/".join(parts[:depth])] if depth else self._root
        passing = -1
        for number in range(depth, len(parts)):
            here = b"/".join(parts[: number + 1])
            try:
                fd = self._step(fd, parts[number], here, make=make)
            finally:
                if passing >= 0:
                    os.close(passing)
            passing = fd
            if len(parts) - number <= KEPT_LEVELS:
                self._open[here] = fd
                passing = -1
        return fd

    def _find_directory(self, path: bytes) -> int:
        """The same for a directory that an earlier entry made; -1 when a later one replaced it."""
        try:
            return self._open_directory(path, make=False)
        except (FileNotFoundError, IntegrityError):
            return -1

    def _close_oldest(self) -> None:
        """Between two entries only: descriptors in use must not be closed, nor their numbers come to mean others."""
        while len(self._open) > OPEN_DIRECTORIES:
            os.close(self._open.pop(next(iter(self._open))))

    def _step(self, parent: int, name: bytes, path: bytes, *, make: bool) -> int:
        if path in self._whiteouts and make:
            self._take_back_whiteout(parent, name, path, directory=True)
        try:
            return os.open(name, _WALK, dir_fd=parent)
        except FileNotFoundError:
            if not make:
                raise
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            raise refuse(path, "something was to be put below it, but it is no directory") from None
        os.mkdir(name, 0o755, dir_fd=parent)
        fd = os.open(name, _WALK, dir_fd=parent)
        if self._policy.fresh and path not in self._finish and (self._umask & 0o755 or self._chown):
            self._finish[path] = Entry(path, DIRECTORY, 0o755, 0, 0, -1, 0)
        return fd

    def _make_room(self, parent: int, base: bytes, path: bytes, *, directory: bool = False) -> bool:
        """Remove what an earlier entry (or the host) has at `path`. With `directory` one may stay: True then."""
        found = os.lstat(base, dir_fd=parent)
        if stat.S_ISDIR(found.st_mode):
            if directory:
                return True
            if not self._policy.fresh:
                raise IsADirectoryError(errno.EISDIR, "cannot overwrite a directory with something else", path)
            self._forget(path)
            remove_tree(f"/proc/self/fd/{parent}/{os.fsdecode(base)}")
            return False
        if path in self._whiteouts:
            self._take_back_whiteout(parent, base, path, directory=directory)
        else:
            os.unlink(base, dir_fd=parent)
        return False

    def _forget(self, path: bytes) -> None:
        """A directory goes: close what is open below it. The rest of what is known of it is checked at its use."""
        below = path + b"/"
        for known in [known for known in self._open if known == path or known.startswith(below)]:
            os.close(self._open.pop(known))

    # -- entries

    def _make_directory(self, path: bytes, entry: Entry) -> None:
        if not path:
            if self._policy.fresh:
                self._finish[path] = entry
            return
        parent_path, _, base = path.rpartition(b"/")
        if self._policy.overlay and base.startswith(WHITEOUT):
            raise refuse(entry.name, "a whiteout that is a directory")
        parent = self._open_directory(parent_path)
        try:
            os.mkdir(base, (entry.mode & 0o777) | 0o700, dir_fd=parent)
        except FileExistsError:
            if not self._make_room(parent, base, path, directory=True):
                os.mkdir(base, (entry.mode & 0o777) | 0o700, dir_fd=parent)
            elif not self._policy.fresh and path not in self._finish:
                return  # the host's own directory stays as it is
        self._finish[path] = entry

    def _make_file(self, parent: int, base: bytes, path: bytes, entry: Entry, reader: TarReader) -> None:
        mode = self._mode(entry)
        try:
            fd = os.open(base, _CREATE, mode & 0o777, dir_fd=parent)
        except FileExistsError:
            self._make_room(parent, base, path)
            fd = os.open(base, _CREATE, mode & 0o777, dir_fd=parent)
        try:
            if entry.sparse is None:
                for piece in reader.data():
                    while len(piece) > (count := os.write(fd, piece)):
                        piece = piece[count:]
            else:
                self._write_sparse(fd, entry, reader)
            self._written += entry.size
            if self._policy.owner and (self._chown or entry.uid or entry.gid):
                os.fchown(fd, entry.uid, entry.gid)
            if entry.xattrs:
                self._set_xattrs(fd, entry)
            if mode & (self._umask | 0o7000):  # after chown, which clears the set-id bits
                os.fchmod(fd, mode)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)

    def _write_sparse(self, fd: int, entry: Entry, reader: TarReader) -> None:
        os.ftruncate(fd, entry.real_size)
        fragments = iter(entry.sparse or ())
        offset = left = 0
        for piece in reader.data():
            while piece:
                while not left:
                    offset, left = next(fragments)
                count = os.pwrite(fd, piece[:left], offset)
                offset += count
                left -= count
                piece = piece[count:]

    def _make_link(self, parent: int, base: bytes, path: bytes, entry: Entry, reader: TarReader) -> None:
        target = self._path(entry.link)
        source_path, _, source = target.rpartition(b"/")
        if target == path:
            raise refuse(entry.name, "a hard link to itself")
        if not source or target in self._whiteouts:
            raise refuse(entry.name, f"a hard link to {show_name(entry.link)}, which is not there")
        try:
            source_parent = self._open_directory(source_path, make=False)
            parent = self._open_directory(path.rpartition(b"/")[0])  # opening the one may have closed the other
            try:
                os.link(source, base, src_dir_fd=source_parent, dst_dir_fd=parent, follow_symlinks=False)
            except FileExistsError:
                os.lstat(source, dir_fd=source_parent)
                self._make_room(parent, base, path)
                source_parent = self._open_directory(source_path, make=False)  # it may have been in what made room
                os.link(source, base, src_dir_fd=source_parent, dst_dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            raise refuse(entry.name, f"a hard link to {show_name(entry.link)}, which is not there") from None
        except PermissionError:
            raise refuse(entry.name, f"a hard link to {show_name(entry.link)}, which cannot have any") from None

    def _make_symlink(self, parent: int, base: bytes, path: bytes, entry: Entry, reader: TarReader) -> None:
        if not entry.link:
            raise refuse(entry.name, "a link to nothing")
        try:
            os.symlink(entry.link, base, dir_fd=parent)
        except FileExistsError:
            self._make_room(parent, base, path)
            os.symlink(entry.link, base, dir_fd=parent)
        if self._policy.owner and (self._chown or entry.uid or entry.gid):
            os.chown(base, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        if entry.xattrs:
            self._set_xattrs(b"/proc/self/fd/%d/%s" % (parent, base), entry)
        os.utime(base, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _make_node(self, parent: int, base: bytes, path: bytes, entry: Entry, reader: TarReader) -> None:
        """A device or FIFO. The OCI layer format has both; the machine's device rules decide what opening one does."""
        kind = {CHAR: stat.S_IFCHR, BLOCK_DEVICE: stat.S_IFBLK, FIFO: stat.S_IFIFO}[entry.kind]
        if entry.kind != FIFO:
            if not self._policy.devices:
                raise refuse(entry.name, "it is a device node, and those are not taken over")
            if self._policy.overlay and entry.kind == CHAR and not entry.major and not entry.minor:
                raise refuse(entry.name, "the device 0:0 is what overlayfs marks deleted files with")
        mode = self._mode(entry)
        device = os.makedev(entry.major, entry.minor)
        if self._policy.plain and entry.kind != FIFO and device:
            return  # mknod(2) is root's, but for 0/0
        try:
            os.mknod(base, kind | (mode & 0o777), device, dir_fd=parent)
        except FileExistsError:
            self._make_room(parent, base, path)
            os.mknod(base, kind | (mode & 0o777), device, dir_fd=parent)
        if self._policy.owner and (self._chown or entry.uid or entry.gid):
            os.chown(base, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        if mode & (self._umask | 0o7000) and self._policy.fresh:  # chmod follows links: only where nobody swaps any in
            os.chmod(base, mode, dir_fd=parent)
        if entry.xattrs:
            self._set_xattrs(b"/proc/self/fd/%d/%s" % (parent, base), entry)
        os.utime(base, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)

    # -- whiteouts

    def _white_out(self, parent: int, parent_path: bytes, base: bytes, entry: Entry) -> None:
        """What the layer deletes of those below it. Entries of the same layer win, in whatever order they come."""
        if base == OPAQUE:
            self._opaque.add(parent_path)
            return
        name = base[len(WHITEOUT) :]
        if name.startswith(WHITEOUT):  # .wh..wh.plnk, .wh..wh.aufs: aufs's own bookkeeping
            return
        if name in (b"", b".", b".."):
            raise refuse(entry.name, "a whiteout of nothing")
        path = parent_path + b"/" + name if parent_path else name
        try:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=parent)
            self._whiteouts.add(path)
        except FileExistsError:
            if stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
                self._opaque.add(path)

    def _take_back_whiteout(self, parent: int, base: bytes, path: bytes, *, directory: bool) -> None:
        """The layer deletes `path` and makes it anew; a new directory must hide the old one's content."""
        os.unlink(base, dir_fd=parent)
        self._whiteouts.discard(path)
        if directory:
            self._opaque.add(path)

    # -- attributes

    def _mode(self, entry: Entry) -> int:
        if self._policy.plain:
            return entry.mode | (0o700 if entry.kind == DIRECTORY else 0o400)
        return entry.mode if self._policy.owner else entry.mode & 0o1777

    def _set_xattrs(self, target: int | bytes, entry: Entry) -> None:
        for name, value in entry.xattrs:
            if self._policy.upper and name.startswith(_UPPER_SPACE):
                self._set_upper_mark(target, entry, name, value)
                continue
            if not name.startswith(_KEPT_XATTRS) or name.startswith((b"trusted.overlay.", b"user.overlay.")):
                continue
            if not self._policy.owner and not name.startswith(b"user."):
                continue
            if not isinstance(target, int) and name.startswith(b"user."):
                continue  # the kernel has them on files and directories only (xattr(7))
            try:
                if isinstance(target, int):
                    os.setxattr(target, name, value)
                else:
                    os.setxattr(target, name, value, follow_symlinks=False)
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP and name != b"security.capability":
                    continue  # this file system has no such attributes; without capabilities, though, programs break
                if error.errno in (errno.EINVAL, errno.ERANGE, errno.E2BIG):
                    raise refuse(entry.name, f"its attribute {show_name(name)} is malformed") from None
                raise

    def _set_upper_mark(self, target: int | bytes, entry: Entry, name: bytes, value: bytes) -> None:
        """One of overlayfs's own attributes. A redirect, or a file's metadata without its data, names another file."""
        mark = name[len(_UPPER_SPACE) :]
        if mark in (b"redirect", b"metacopy"):
            raise refuse(entry.name, f"its attribute {show_name(name)} refers to another file")
        if mark == b"opaque" and value == b"y" and entry.kind == DIRECTORY:
            os.setxattr(target, self._space + b"overlay.opaque", b"y")

    def _finish_directories(self) -> None:
        """Owners, modes, times of directories: deepest first, for a mode may close the way to what is below."""
        for path in self._opaque:
            walked = self._find_directory(path)
            if walked >= 0:
                fd = os.open(b".", _READ, dir_fd=walked)
                try:
                    os.setxattr(fd, self._space + b"overlay.opaque", b"y")
                finally:
                    os.close(fd)
            self._close_oldest()
        for path in sorted(self._finish, reverse=True):
            entry = self._finish[path]
            try:
                walked = self._find_directory(path)
                if walked >= 0:
                    self._finish_directory(walked, path, entry)
            except OSError as error:
                raise self._translate(error, entry) from None
            self._close_oldest()

    def _finish_directory(self, walked: int, path: bytes, entry: Entry) -> None:
        fd = os.open(b".", _READ, dir_fd=walked)
        try:
            if self._policy.owner and (self._chown or entry.uid or entry.gid):
                os.fchown(fd, entry.uid, entry.gid)
            if entry.xattrs:
                self._set_xattrs(fd, entry)
            mode = self._mode(entry)
            if not path or self._chown or mode & (self._umask | 0o7000) or mode & 0o700 != 0o700:
                os.fchmod(fd, mode)
            if entry.mtime_ns != -1:
                os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)

    def _translate(self, error: OSError, entry: Entry) -> Exception:
        """An archive's fault becomes an `IntegrityError`; the host's stays an `OSError`, with the entry's name."""
        if error.errno in _ARCHIVE_FAULTS:
            return refuse(entry.name, os.strerror(error.errno or 0).lower())
        if isinstance(error, IsADirectoryError):
            return HostError(f"{show_name(entry.name)}: {error.strerror}", operation="unpack", errno=errno.EISDIR)
        error.filename = os.fsdecode(entry.name)
        error.filename2 = None
        return error


def _read_umask() -> int:
    """The process's umask without changing it, which would race with other threads (proc(5), since Linux 4.7)."""
    with open("/proc/self/status", "rb") as stream:
        for line in stream:
            if line.startswith(b"Umask:"):
                return int(line[6:], 8)
    return 0o777


def as_layer_fault(error: IntegrityError, what: str) -> IntegrityError:
    """The same error, saying which layer or archive it is about."""
    return IntegrityError(f"{what}: {error.message}", hint=error.hint)
