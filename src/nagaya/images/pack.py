"""Packing directories into layers: deterministic tar, deterministic gzip, straight into the blob store.

The same files make the same bytes: entries are sorted, only what matters is recorded, and the gzip header says
nothing of when or where. What is packed may be a machine's own, and change while it is read: links are never
followed, and a file that shrinks is padded with zeros.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections import deque
from collections.abc import Callable, Iterator

from nagaya.errors import HostError, Unsupported
from nagaya.images.content import Blobs
from nagaya.images.manifest import OCI_LAYER_GZIP, Descriptor
from nagaya.images.progress import Progress, Silent
from nagaya.images.tar import BLOCK, CHAR, DIRECTORY, FIFO, FILE, LINK, SYMLINK
from nagaya.images.tar import BLOCK_DEVICE as BLOCK_DEV
from nagaya.static import NamedTuple

GZIP_LEVEL = 6
GZIP_BLOCK = 512 << 10
DEPTH_MAX = 300
PATH_MAX = 4095
WINDOW = 32 << 10  # deflate looks back so far (RFC 1951)
_KEPT_XATTRS = ("user.", "trusted.", "system.posix_acl_", "security.capability")
_NODES = {stat.S_IFCHR: CHAR, stat.S_IFBLK: BLOCK_DEV, stat.S_IFIFO: FIFO}
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Packed(NamedTuple):
    """A layer made by `pack_layer`."""

    descriptor: Descriptor
    diff_id: str
    entries: int  # 0 = nothing was there


def pack_layer(blobs: Blobs, directory: str, *, overlay: bool, progress: Progress | None = None) -> Packed:
    """Pack `directory` into a gzip-compressed layer blob.

    With `overlay` it is the upper directory of an overlay: its whiteouts become `.wh.` files, and overlayfs's own
    attributes stay out. Sockets are left out, as in every image. Raises `HostError`, and `Unsupported` for an upper
    directory with redirects, which only overlayfs can read.
    """
    import hashlib  # lazy: 3 ms

    progress = progress or Silent()
    key = f"pack {directory}"
    progress.start(key, "packing", 0)
    digest = hashlib.sha256()
    done = 0
    try:
        with blobs.new() as blob, GzipWriter(blob.write) as compressed:

            def write(data: bytes) -> None:
                nonlocal done
                digest.update(data)
                compressed.write(data)
                done += len(data)
                progress.advance(key, done)

            packer = Packer(write, overlay=overlay)
            packer.pack(directory)
            packer.close()
            compressed.close()
    except OSError as error:
        raise HostError.from_os(error, "cannot pack the files") from None
    progress.finish(key)
    return Packed(Descriptor(OCI_LAYER_GZIP, blob.digest, blob.size), f"sha256:{digest.hexdigest()}", packer.entries)


def compress_blob(blobs: Blobs, chunks: Iterator[bytes]) -> Descriptor:
    """Compress a plain tar into a layer blob."""
    with blobs.new() as blob, GzipWriter(blob.write) as compressed:
        for chunk in chunks:
            compressed.write(chunk)
        compressed.close()
    return Descriptor(OCI_LAYER_GZIP, blob.digest, blob.size)


class GzipWriter:
    """Compresses on all cores: each block by itself, given the 32 KiB before it, as pigz does.

    The result is one plain gzip member, and depends on the content alone. A context manager; `close` ends the member.
    """

    def __init__(self, write: Callable[[bytes], object], *, level: int = GZIP_LEVEL) -> None:
        from concurrent.futures import Future, ThreadPoolExecutor  # lazy: 8 ms

        self._write = write
        self._level = level
        workers = min(os.cpu_count() or 1, 8)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="gzip")
        self._waiting: deque[Future[bytes]] = deque()
        self._most = 2 * workers
        self._parts: list[bytes] = []
        self._held = 0
        self._before = b""
        self._crc = 0
        self._size = 0
        write(b"\x1f\x8b\x08\0\0\0\0\0\0\xff")  # RFC 1952: deflate, no flags, no time, unknown system

    def __enter__(self) -> GzipWriter:
        return self

    def __exit__(self, *rest: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def write(self, data: bytes) -> None:
        self._parts.append(data)
        self._held += len(data)
        if self._held >= GZIP_BLOCK:
            held = b"".join(self._parts)
            whole = len(held) - len(held) % GZIP_BLOCK
            for at in range(0, whole, GZIP_BLOCK):
                self._submit(held[at : at + GZIP_BLOCK])
            self._parts = [held[whole:]]
            self._held = len(held) - whole

    def close(self) -> None:
        self._submit(b"".join(self._parts))
        while self._waiting:
            self._write(self._waiting.popleft().result())
        self._write(b"\x03\0")  # an empty last block
        self._write((self._crc & 0xFFFFFFFF).to_bytes(4, "little") + (self._size & 0xFFFFFFFF).to_bytes(4, "little"))

    def _submit(self, block: bytes) -> None:
        self._crc = zlib.crc32(block, self._crc)
        self._size += len(block)
        self._waiting.append(self._pool.submit(_deflate, block, self._before, self._level))
        self._before = block[-WINDOW:]
        while len(self._waiting) > self._most:
            self._write(self._waiting.popleft().result())


def _deflate(block: bytes, before: bytes, level: int) -> bytes:
    deflater = zlib.compressobj(level, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, before)
    return deflater.compress(block) + deflater.flush(zlib.Z_SYNC_FLUSH)


class Packer:
    """Writes a tar stream: ustar headers, preceded by a pax header where ustar has no room."""

    def __init__(self, write: Callable[[bytes], object], *, overlay: bool) -> None:
        self._write = write
        self._overlay = overlay
        self._plain_user = os.geteuid()  # 0 = root, whose layers have owners
        self._space = b"user." if self._plain_user else b"trusted."  # as `unpack` marks
        self._seen: dict[tuple[int, int], bytes] = {}
        self.entries = 0

    def pack(self, directory: str) -> None:
        """Everything below `directory`, and itself as "./"."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._add_directory(fd, b"")
        finally:
            os.close(fd)

    def close(self) -> None:
        self._write(bytes(2 * BLOCK))

    def _add_directory(self, fd: int, path: bytes) -> None:
        """Goes as deep as the tree, one descriptor and two frames a level."""
        xattrs = _read_xattrs(fd)
        if self._overlay and b"trusted.overlay.redirect" in xattrs:
            raise Unsupported(
                "the machine's changes have redirected directories, which a layer cannot express",
                finding=f"{os.fsdecode(path)} has the attribute trusted.overlay.redirect",
            )
        if path.count(b"/") > DEPTH_MAX or len(path) > PATH_MAX:
            raise Unsupported(
                f"a directory is nested deeper than {DEPTH_MAX} levels", finding=os.fsdecode(path[:200]) + "…"
            )
        opaque = self._overlay and xattrs.get(self._space + b"overlay.opaque") == b"y"
        names = sorted(os.fsencode(name) for name in os.listdir(fd))
        self._add(path + b"/" if path else b"./", DIRECTORY, os.fstat(fd), xattrs=xattrs)
        if path:
            self.entries += 1
        if opaque:
            self._add_mark((path + b"/" if path else b"") + b".wh..wh..opq")
        for name in names:
            try:
                self._add_member(fd, name, path + b"/" + name if path else name)
            except (FileNotFoundError, NotADirectoryError):
                continue  # removed or replaced while we read: a machine that was not paused

    def _add_member(self, parent: int, name: bytes, path: bytes) -> None:
        found = os.lstat(name, dir_fd=parent)
        kind = stat.S_IFMT(found.st_mode)
        if kind == stat.S_IFDIR:
            fd = os.open(name, _OPEN | os.O_DIRECTORY, dir_fd=parent)
            try:
                self._add_directory(fd, path)
            finally:
                os.close(fd)
            return
        if kind == stat.S_IFSOCK:
            return
        self.entries += 1
        if self._overlay and kind == stat.S_IFCHR and found.st_rdev == 0:
            self._add_mark(path[: len(path) - len(name)] + b".wh." + name)
            return
        if found.st_nlink > 1:
            earlier = self._seen.setdefault((found.st_dev, found.st_ino), path)
            if earlier != path:
                self._add(path, LINK, found, link=earlier)
                return
        if kind == stat.S_IFREG:
            self._add_file(parent, name, path)
            return
        xattrs = _read_xattrs(b"/proc/self/fd/%d/%s" % (parent, name))
        if kind == stat.S_IFLNK:
            self._add(path, SYMLINK, found, link=os.readlink(name, dir_fd=parent), xattrs=xattrs)
        else:
            self._add(path, _NODES[kind], found, xattrs=xattrs)

    def _add_file(self, parent: int, name: bytes, path: bytes) -> None:
        fd = os.open(name, _OPEN, dir_fd=parent)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):  # swapped since lstat
                raise FileNotFoundError
            self._add(path, FILE, found, size=found.st_size, xattrs=_read_xattrs(fd))
            left = found.st_size
            while left:
                data = os.read(fd, min(left, 1 << 20)) or bytes(min(left, 1 << 20))  # it shrank: zeros
                self._write(data)
                left -= len(data)
            self._write(bytes(-found.st_size & (BLOCK - 1)))
        finally:
            os.close(fd)

    def _add_mark(self, path: bytes) -> None:
        """An empty file that stands for something deleted, as plain as can be."""
        self._add(path, FILE, os.stat_result((stat.S_IFREG | 0o644, 0, 0, 1, 0, 0, 0, 0, 0, 0)))

    def _add(
        self,
        path: bytes,
        kind: bytes,
        found: os.stat_result,
        *,
        size: int = 0,
        link: bytes = b"",
        xattrs: dict[bytes, bytes] | None = None,
    ) -> None:
        pax: list[tuple[bytes, bytes]] = []
        seconds, fraction = divmod(found.st_mtime_ns or 0, 1_000_000_000)
        if fraction or not 0 <= seconds < 1 << 33:
            pax.append((b"mtime", _format_time(found.st_mtime_ns)))
            seconds = min(max(seconds, 0), (1 << 33) - 1)
        owner = (found.st_uid, found.st_gid)
        if self._plain_user and found.st_uid == self._plain_user:
            owner = (0, 0)  # as this user's machines show it
        numbers = [(b"uid", owner[0], 7), (b"gid", owner[1], 7), (b"size", size, 11)]
        for name, value, digits in numbers:
            if value >= 1 << (3 * digits):
                pax.append((name, b"%d" % value))
        prefix, short = _split_name(path)
        if not short:
            pax.append((b"path", path))
            short = path[:100].rstrip(b"/") if kind != DIRECTORY else path[:99] + b"/"
        if len(link) > 100:
            pax.append((b"linkpath", link))
        for name, data in sorted((xattrs or {}).items()):
            if name.decode("utf-8", "surrogateescape").startswith(_KEPT_XATTRS) and b".overlay." not in name:
                pax.append((b"SCHILY.xattr." + name, data))
        if any(key in (b"path", b"linkpath") and not _is_utf8(value) for key, value in pax):
            pax.append((b"hdrcharset", b"BINARY"))
        if pax:
            body = b"".join(_format_record(key, value) for key, value in sorted(pax))
            self._write(_format_header(b"PaxHeaders/" + short[:80].replace(b"/", b"_"), b"x", len(body)))
            self._write(body + bytes(-len(body) & (BLOCK - 1)))
        device = kind in (CHAR, BLOCK_DEV)
        self._write(
            _format_header(
                short,
                kind,
                size,
                prefix=prefix,
                mode=stat.S_IMODE(found.st_mode),
                owner=owner,
                seconds=seconds,
                link=link[:100],
                device=(os.major(found.st_rdev), os.minor(found.st_rdev)) if device else (0, 0),
            )
        )


def _read_xattrs(target: int | bytes) -> dict[bytes, bytes]:
    found = {}
    try:
        names = os.listxattr(target) if isinstance(target, int) else os.listxattr(target, follow_symlinks=False)
        for name in names:
            if name == "security.selinux":
                continue
            if isinstance(target, int):
                found[os.fsencode(name)] = os.getxattr(target, name)
            else:
                found[os.fsencode(name)] = os.getxattr(target, name, follow_symlinks=False)
    except OSError as error:
        import errno

        if error.errno not in (errno.EOPNOTSUPP, errno.ENODATA, errno.EPERM):
            raise
    return found


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _split_name(path: bytes) -> tuple[bytes, bytes]:
    """ustar's prefix and name; empty when the path does not fit them or is no ASCII."""
    if not path.isascii():
        return b"", b""
    if len(path) <= 100:
        return b"", path
    if len(path) <= 256:
        cut = path.find(b"/", len(path) - 101, len(path) - 1)
        if 0 < cut <= 155:
            return path[:cut], path[cut + 1 :]
    return b"", b""


def _format_header(
    name: bytes,
    kind: bytes,
    size: int,
    *,
    prefix: bytes = b"",
    mode: int = 0o644,
    owner: tuple[int, int] = (0, 0),
    seconds: int = 0,
    link: bytes = b"",
    device: tuple[int, int] = (0, 0),
) -> bytes:
    """A ustar header; numbers that do not fit were put into a pax header by the caller, and are zero here."""
    uid, gid = (number if number < 1 << 21 else 0 for number in owner)
    fields = [
        name[:100].ljust(100, b"\0"), b"%07o\0%07o\0%07o\0" % (mode, uid, gid),
        b"%011o\0%011o\0" % (size if size < 1 << 33 else 0, seconds), b" " * 8, kind, link.ljust(100, b"\0"),
        b"ustar\x0000", bytes(64), b"%07o\0%07o\0" % device, prefix.ljust(155, b"\0"), bytes(12),
    ]  # fmt: skip
    header = b"".join(fields)
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def _format_record(key: bytes, value: bytes) -> bytes:
    """`LENGTH KEY=VALUE\\n`, where the length counts itself."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) > len(str(rest)):
        length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _format_time(time_ns: int) -> bytes:
    sign = b"-" if time_ns < 0 else b""
    seconds, fraction = divmod(abs(time_ns), 1_000_000_000)
    return sign + (b"%d.%09d" % (seconds, fraction)).rstrip(b"0").rstrip(b".")
