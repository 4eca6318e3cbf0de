"""From a layer's or archive's file to the plain tar in it: decompressed and hashed in a thread of its own.

zlib and hashlib release the GIL, so that the second core decompresses while the first writes files.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from types import TracebackType

from nagaya.errors import IntegrityError, LaunchError, Unsupported, UsageError
from nagaya.static import Any, BinaryIO, NamedTuple, Self

CHUNK = 1 << 20
READ = 256 << 10
QUEUE = 16  # chunks that may wait
MAX_BYTES = 64 << 30
MAX_RATIO = 1000
RATIO_FROM = 64 << 20  # a ratio means little before there are so many bytes

GZIP, ZSTD, XZ, BZIP2, PLAIN = "gzip", "zstd", "xz", "bzip2", "none"
_MAGIC = (
    (b"\x1f\x8b", GZIP), (b"\x28\xb5\x2f\xfd", ZSTD), (b"\xfd7zXZ\0", XZ), (b"BZh", BZIP2),
)  # fmt: skip


class Limits(NamedTuple):
    """How much a stream may unfold to. `ratio` 0 = any."""

    bytes: int
    ratio: int


def default_limits() -> Limits:
    """64 GiB and 1000:1; NAGAYA_MAX_LAYER_BYTES sets the first and lifts the second. Raises `UsageError`."""
    text = os.environ.get("NAGAYA_MAX_LAYER_BYTES", "")
    if not text:
        return Limits(MAX_BYTES, MAX_RATIO)
    if not (text.isascii() and text.isdigit()) or not int(text[:20]) > 0:
        raise UsageError(f"NAGAYA_MAX_LAYER_BYTES is '{text[:40]}', which is no number of bytes")
    return Limits(int(text), 0)


def find_compression(start: bytes) -> str:
    """How a stream that begins with `start` (6 bytes are enough) is compressed: GZIP, ZSTD, XZ, BZIP2 or PLAIN."""
    if start[1:4] == b"\x2a\x4d\x18" and start[0] & 0xF0 == 0x50:
        return ZSTD  # a skippable frame comes first (zstd:chunked)
    return next((name for magic, name in _MAGIC if start.startswith(magic)), PLAIN)


class TarStream:
    """The plain bytes of the tar in `source`, as an iterator of chunks; a context manager.

    Decompresses by what the content is, whatever the media type said. At the end `diff_id` and `size` are known.
    Raises `IntegrityError` for damaged compression and for more than `limits`, from the iteration.
    """

    def __init__(self, source: BinaryIO, *, like: str = "sha256:", limits: Limits | None = None) -> None:
        import hashlib  # lazy: 3 ms
        import threading

        self._limits = limits or default_limits()
        self._source = source
        self._consumed = 0
        self._call: Callable[[int], object] | None = None
        self._algorithm = like.partition(":")[0]
        self._hash = hashlib.new(self._algorithm)
        self.size = 0
        self._chunks: deque[bytes] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._ended = self._abandoned = False
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="decompress", daemon=True)

    @property
    def diff_id(self) -> str:
        """Digest of the plain tar (of the same algorithm as `like`); only after the last chunk."""
        return f"{self._algorithm}:{self._hash.hexdigest()}"

    def on_chunk(self, call: Callable[[int], object]) -> None:
        """Have `call(bytes read of the source)` called by whoever iterates, after each chunk."""
        self._call = call

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._changed:
            self._abandoned = True
            self._chunks.clear()
            self._changed.notify_all()
        self._thread.join()

    def __iter__(self) -> Iterator[bytes]:
        while True:
            with self._changed:
                while not self._chunks and not self._ended:
                    self._changed.wait()
                if not self._chunks:
                    if self._problem is not None:
                        raise self._problem
                    return
                chunk = self._chunks.popleft()
                self._changed.notify_all()
            if self._call is not None:
                self._call(self._consumed)
            yield chunk

    # -- in the thread

    def _run(self) -> None:
        try:
            with closing(self._inflate()) as chunks:
                for chunk in chunks:
                    self._account(chunk)
                    if not self._pass_on(chunk):
                        return
        except BaseException as problem:
            self._problem = problem
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _pass_on(self, chunk: bytes) -> bool:
        """Queue a chunk when there is room; False when nobody wants it any more."""
        with self._changed:
            while len(self._chunks) >= QUEUE and not self._abandoned:
                self._changed.wait()
            self._chunks.append(chunk)
            self._changed.notify_all()
            return not self._abandoned

    def _account(self, chunk: bytes) -> None:
        self.size += len(chunk)
        limits = self._limits
        if self.size > limits.bytes:
            raise IntegrityError(
                f"it unfolds to more than {limits.bytes} bytes",
                hint="NAGAYA_MAX_LAYER_BYTES=N allows more, if you trust it",
            )
        if limits.ratio and self.size > RATIO_FROM and self.size > limits.ratio * self._consumed:
            raise IntegrityError(
                f"it unfolds to more than {limits.ratio} times its size, as a decompression bomb does",
                hint=f"NAGAYA_MAX_LAYER_BYTES={limits.bytes} lifts this check, if you trust it",
            )
        self._hash.update(chunk)

    def _inflate(self) -> Generator[bytes, None, None]:
        start = self._read()
        while 0 < len(start) < 6 and (more := self._read()):
            start += more
        kind = find_compression(start)
        if kind == GZIP:
            return _inflate_gzip(start, self._read)
        if kind == ZSTD:
            return _inflate_zstd(start, self._read)
        if kind in (XZ, BZIP2):
            return _inflate_members(kind, start, self._read)
        return self._plain(start)

    def _plain(self, start: bytes) -> Generator[bytes, None, None]:
        while start:
            yield start
            start = self._read(CHUNK)

    def _read(self, size: int = READ) -> bytes:
        data = self._source.read(size)
        self._consumed += len(data)
        return data


def _inflate_gzip(data: bytes, read: Callable[[], bytes]) -> Generator[bytes, None, None]:
    """All members of a gzip file (RFC 1952): pigz and estargz write several."""
    import zlib

    while True:
        inflater = zlib.decompressobj(31)
        while not inflater.eof:
            if not data and not (data := read()):
                raise IntegrityError("it is truncated: its compression ends early")
            try:
                yield inflater.decompress(data, CHUNK)
            except zlib.error as error:
                raise IntegrityError(f"its gzip compression is damaged ({error})") from None
            data = inflater.unconsumed_tail
        data = _skip_zeros(inflater.unused_data, read)
        if not data:
            return
        if not data.startswith(b"\x1f"):
            raise IntegrityError("there is something behind the end of its compression")


def _skip_zeros(data: bytes, read: Callable[[], bytes]) -> bytes:
    """What follows a member's end and its padding."""
    while not (data := data.lstrip(b"\0")):
        data = read()
        if not data:
            return b""
    return data


def _inflate_members(kind: str, data: bytes, read: Callable[[], bytes]) -> Generator[bytes, None, None]:
    import bz2  # lazy: 2 ms each, and images rarely have either
    import lzma

    def make() -> Any:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 30) if kind == XZ else bz2.BZ2Decompressor()

    while True:
        inflater = make()
        while not inflater.eof:
            if inflater.needs_input and not data and not (data := read()):
                raise IntegrityError("it is truncated: its compression ends early")
            try:
                yield inflater.decompress(data, CHUNK)
            except (OSError, ValueError, lzma.LZMAError) as error:
                raise IntegrityError(f"its {kind} compression is damaged ({error})") from None
            data = b""
        data = _skip_zeros(inflater.unused_data, read)
        if not data:
            return


def _inflate_zstd(data: bytes, read: Callable[[], bytes]) -> Generator[bytes, None, None]:
    """By the `zstandard` module where it is installed, else by the `zstd` command."""
    try:
        import zstandard  # type: ignore[import-not-found, unused-ignore]  # optional
    except ImportError:
        return _inflate_by_command(data, read)
    return _inflate_by_module(zstandard, data, read)


class _Rest:
    """`read(size)` over a first piece and a function for the others, as the zstandard module wants it."""

    def __init__(self, data: bytes, read: Callable[[], bytes]) -> None:
        self._data = data
        self._read = read

    def read(self, size: int = -1) -> bytes:
        data = self._data or self._read()
        self._data = data[size:] if size >= 0 else b""
        return data[:size] if size >= 0 else data


def _inflate_by_module(module: Any, data: bytes, read: Callable[[], bytes]) -> Generator[bytes, None, None]:
    reader = module.ZstdDecompressor(max_window_size=1 << 27).stream_reader(
        _Rest(data, read), read_size=READ, read_across_frames=True
    )
    try:
        while chunk := reader.read(CHUNK):
            yield chunk
    except module.ZstdError as error:
        raise IntegrityError(f"its zstd compression is damaged ({error})") from None


def _inflate_by_command(data: bytes, read: Callable[[], bytes]) -> Generator[bytes, None, None]:
    import subprocess  # lazy: 10 ms
    import threading

    try:
        child = subprocess.Popen(
            ["zstd", "-dcq", "--memory=128MB"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except FileNotFoundError:
        raise Unsupported(
            "a layer is compressed with zstd, and there is no program to decompress it",
            hint="install it: apt install zstd",
            finding="no 'zstd' command and no 'zstandard' module",
        ) from None
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    feeding = child.stdin
    problems: list[BaseException] = []

    def feed() -> None:
        piece = data
        try:
            while piece:
                feeding.write(piece)
                piece = read()
            feeding.close()
        except BrokenPipeError:
            pass  # it found damage, and its status says so
        except BaseException as problem:
            problems.append(problem)
            child.kill()

    feeder = threading.Thread(target=feed, name="zstd", daemon=True)
    feeder.start()
    try:
        while chunk := child.stdout.read(CHUNK):
            yield chunk
        complaint = child.stderr.read(4096).decode(errors="replace").strip()
        status = child.wait()
        if problems:
            raise problems[0]
        if status == 1:
            raise IntegrityError(f"its zstd compression is damaged ({complaint or 'unreadable'})")
        if status:
            raise LaunchError(f"zstd failed with status {status}", command="zstd -dc", status=status)
    finally:
        child.kill()
        child.wait()
        feeder.join()
        child.stdout.close()
        child.stderr.close()
