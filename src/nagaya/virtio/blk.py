"""virtio-blk (virtio 1.2, section 5.2) on a file or a block device: payload moves straight between it and guest memory."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time

from nagaya.errors import Conflict, GuestFault, HostError, NotFound, UsageError
from nagaya.kernel.files import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, fallocate
from nagaya.kernel.locks import pack_lock
from nagaya.memory import WriteLog
from nagaya.static import Any, NamedTuple
from nagaya.virtio.device import BLOCK, Activated, guard
from nagaya.virtio.queue import Chain, Queue
from nagaya.virtio.turn import Turn
from nagaya.virtio.views import after, gather, scatter

SECTOR_BYTES = 512
F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY = 1 << 2, 1 << 5, 1 << 6, 1 << 9, 1 << 10
F_MQ, F_DISCARD, F_WRITE_ZEROES = 1 << 12, 1 << 13, 1 << 14
T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2
QUEUE_SIZE = 256
SEGMENTS = 254
"""Of one request: its queue's size less header and status."""
ID_BYTES = 20
_UNMAP = 1
_HEADER = struct.Struct("<IIQ")  # struct virtio_blk_req: type, reserved, sector
_RANGE = struct.Struct("<QII")  # struct virtio_blk_discard_write_zeroes: sector, num_sectors, flags
# struct virtio_blk_config: capacity, size_max, seg_max, cylinders, heads, sectors, blk_size, physical_block_exp,
# alignment_offset, min_io_size, opt_io_size, writeback, unused, num_queues; discard: sectors, segments, alignment;
# write zeroes: sectors, segments, may_unmap, unused
_CONFIG = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")
_MOST_RANGE_SECTORS = 1 << 22  # 2 GiB in a request: a driver splits more, and other requests come between
_MOST_RANGES = 32
MOST_IOVECS = 1024  # IOV_MAX
LOG_BLOCK_BYTES = 64 << 10
_LOCK_TRIES, _LOCK_PAUSE_S = 15, 0.02
"""A machine that was killed a moment ago lets go of its disks when its processes are all gone."""
_BURST = 16
"""Requests before whoever waits for this loop has a turn: a reset, above all, and the driver's other queues."""


class Request(NamedTuple):
    """A request whose every field was checked. `buffers` are slices of the guest's memory."""

    type: int
    offset: int
    """In bytes, from the disk's start; of reads and writes."""
    buffers: tuple[memoryview, ...]
    size_bytes: int
    status: memoryview
    """The one byte that the driver waits for."""
    ranges: tuple[tuple[int, int, bool], ...] = ()
    """Of discard and write-zeroes: offset, size, may be unmapped."""


class Refused(Exception):
    """A well-formed request that the device does not carry out; `status` is what the driver is told."""

    def __init__(self, status: int) -> None:
        self.status = status


class Blk:
    """A disk. It holds a lock on its file: a second writer, or a writer beside readers, is a `Conflict`."""

    device_id = BLOCK

    def __init__(
        self, name: str, path: str, *, read_only: bool = False, queues: int = 1, serial: str = "", fd: int = -1
    ) -> None:
        """Opens `path`, a file of whole sectors or a block device. `serial`: at most 20 bytes, shown in the guest.

        `fd` is that file, opened and locked by somebody else already; it becomes the device's.

        Raises `NotFound`, `UsageError`, `Conflict`, `HostError`.
        """
        if not 1 <= queues <= 16:
            raise UsageError(f"a disk cannot have {queues} queues", hint="from 1 to 16")
        self.name = name
        self._id = os.fsencode(serial or name)[:ID_BYTES].ljust(ID_BYTES, b"\0")
        self._read_only = read_only
        self._fd = _open(path, read_only=read_only) if fd < 0 else fd
        try:
            self.size_bytes, self._block_bytes = _measure(self._fd, path)
        except BaseException:
            os.close(self._fd)
            raise
        self.writes = None if read_only else WriteLog(self.size_bytes, LOG_BLOCK_BYTES)
        """Where the disk is written, for who copies it meanwhile: shared with the process that the disk may move to."""
        self.queue_sizes = (QUEUE_SIZE,) * queues
        self.features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | (F_MQ if queues > 1 else 0)
        self.features |= F_RO if read_only else F_DISCARD | F_WRITE_ZEROES
        self._live: Activated | None = None
        self._writes_through = False
        self._turns = tuple(Turn() for _ in range(queues))
        self._counters = dict.fromkeys(
            ("reads", "read_bytes", "writes", "written_bytes", "flushes", "discards", "errors"), 0
        )

    # -- Device

    def read_config(self, offset: int, size: int) -> bytes:
        """See `Device`."""
        zeroing = 0 if self._read_only else _MOST_RANGE_SECTORS
        ranges = 0 if self._read_only else _MOST_RANGES
        block_sectors = self._block_bytes // SECTOR_BYTES
        config = _CONFIG.pack(
            self.size_bytes // SECTOR_BYTES, 0, SEGMENTS, 0, 0, 0, SECTOR_BYTES, block_sectors.bit_length() - 1, 0,
            min(block_sectors, 0xFFFF), 0, 1, 0, len(self.queue_sizes), zeroing, ranges, block_sectors, zeroing, ranges, 1,
        )  # fmt: skip
        return config[offset : offset + size]

    def write_config(self, offset: int, data: bytes) -> None:
        """See `Device`: nothing in it can be written."""

    def activate(self, live: Activated) -> None:
        """See `Device`."""
        self._live = live
        # Section 5.2.6.2: a driver that cannot ask for a flush takes a write that was answered for one that will last.
        self._writes_through = not live.features & F_FLUSH

    def kicked(self, queue: int) -> None:
        """See `Device`. One request after the other: several at once are the business of several queues."""
        live = self._live
        requests = live.queues[queue] if live is not None else None
        if live is None or requests is None:
            return
        requests.disarm()
        for _ in range(_BURST):
            chain = requests.pop()
            if chain is None:
                if requests.rearm():
                    continue
                break
            self._serve(requests, chain)
            requests.signal()  # each: the next one may take the disk a while
        else:
            self._turns[queue].ask(live.loop, lambda: self._go_on(queue))

    def _go_on(self, queue: int) -> None:
        guard(self._live, lambda: self.kicked(queue))

    def reset(self) -> None:
        """See `Device`."""
        for turn in self._turns:
            turn.cancel()
        self._live = None

    def close(self) -> None:
        """See `Device`."""
        for turn in self._turns:
            turn.close()
        for fd in self.descriptors() if self._fd >= 0 else ():
            os.close(fd)
        self._fd = -1

    def save(self) -> dict[str, Any]:
        """See `Device`: no request outlives the call that serves it."""
        return {}

    def counters(self) -> dict[str, int]:
        """See `Device`."""
        return dict(self._counters)

    def descriptors(self) -> tuple[int, ...]:
        """See `apart.Movable`."""
        return (self._fd,)

    # -- requests

    def _serve(self, requests: Queue, chain: Chain) -> None:
        try:
            request = parse(chain, self.size_bytes, read_only=self._read_only)
        except Refused as refused:
            self._counters["errors"] += 1
            chain.writable[-1][-1] = refused.status
            requests.publish(chain, 1)
            return
        try:
            written = self._carry_out(request)
            status = S_OK
        except OSError as error:
            self._counters["errors"] += 1
            written, status = 0, S_UNSUPP if error.errno == errno.EOPNOTSUPP else S_IOERR
        request.status[0] = status
        requests.publish(chain, written + 1)

    def _carry_out(self, request: Request) -> int:
        """How many bytes of the guest's it filled. Raises `OSError`."""
        counters = self._counters
        if request.type == T_IN:
            self._read(request)
            counters["reads"] += 1
            counters["read_bytes"] += request.size_bytes
            return request.size_bytes
        if request.type == T_OUT:
            self._write(request)
            counters["writes"] += 1
            counters["written_bytes"] += request.size_bytes
        elif request.type == T_FLUSH:
            self._sync()
            counters["flushes"] += 1
        elif request.type == T_GET_ID:
            scatter(request.buffers, self._id)
            return ID_BYTES
        else:
            for offset, size, unmap in request.ranges:
                self._clear(offset, size, hint=request.type == T_DISCARD, keep=not unmap)
                self._mark(offset, size)
            if self._writes_through:
                self._sync()
            counters["discards"] += 1
        return 0

    def _read(self, request: Request) -> None:
        done = 0
        while done < request.size_bytes:
            views = after(request.buffers, done) if done else request.buffers
            count = os.preadv(self._fd, views[:MOST_IOVECS], request.offset + done)
            if not count:  # the file was made shorter under us
                raise OSError(errno.EIO, "the disk ended")
            done += count

    def _write(self, request: Request) -> None:
        done = 0
        while done < request.size_bytes:
            views = after(request.buffers, done) if done else request.buffers
            flags = os.RWF_DSYNC if self._writes_through else 0
            count = os.pwritev(self._fd, views[:MOST_IOVECS], request.offset + done, flags)
            self._mark(request.offset + done, count)
            done += count

    def _sync(self) -> None:
        os.fdatasync(self._fd)

    def _clear(self, offset: int, size_bytes: int, *, hint: bool, keep: bool) -> None:
        """Make it zeros; where that is but a `hint`, or where it need not `keep` its place, they are a hole."""
        mode = FALLOC_FL_PUNCH_HOLE if hint or not keep else FALLOC_FL_ZERO_RANGE
        fallocate(self._fd, mode | FALLOC_FL_KEEP_SIZE, offset, size_bytes)

    def _mark(self, offset: int, size_bytes: int) -> None:
        if self.writes is not None and self.writes.on:
            self.writes.mark(offset, size_bytes)


def parse(chain: Chain, disk_bytes: int, *, read_only: bool) -> Request:
    """Check everything that the driver said. Raises `GuestFault`, and `Refused` for what a good driver may try."""
    if not chain.writable or chain.readable_bytes < _HEADER.size:
        raise GuestFault("a disk request without a header or a place for its status")
    kind, _, sector = _HEADER.unpack(gather(chain.readable, _HEADER.size))
    status = chain.writable[-1][-1:]  # section 5.2.6: drivers may frame a request as they like
    if kind == T_OUT:
        buffers, size = tuple(after(chain.readable, _HEADER.size)), chain.readable_bytes - _HEADER.size
    else:
        last = chain.writable[-1][:-1]
        buffers, size = (*chain.writable[:-1], *((last,) if len(last) else ())), chain.writable_bytes - 1
    offset = sector * SECTOR_BYTES
    if kind in (T_IN, T_OUT):
        if size % SECTOR_BYTES or offset + size > disk_bytes or (kind == T_OUT and read_only):
            raise Refused(S_IOERR)
        return Request(kind, offset, buffers, size, status)
    if kind == T_FLUSH:
        return Request(kind, 0, (), 0, status)
    if kind == T_GET_ID:
        if size < ID_BYTES:
            raise Refused(S_IOERR)
        return Request(kind, 0, buffers, ID_BYTES, status)
    if kind in (T_DISCARD, T_WRITE_ZEROES) and not read_only:
        return Request(kind, 0, (), 0, status, _parse_ranges(kind, chain, disk_bytes))
    raise Refused(S_UNSUPP)


def _parse_ranges(kind: int, chain: Chain, disk_bytes: int) -> tuple[tuple[int, int, bool], ...]:
    size = chain.readable_bytes - _HEADER.size
    if not size or size % _RANGE.size or size > _RANGE.size * _MOST_RANGES:
        raise Refused(S_IOERR)
    ranges = []
    data = gather(chain.readable, chain.readable_bytes)[_HEADER.size :]
    for sector, sectors, flags in _RANGE.iter_unpack(data):
        # Section 5.2.6.2: flags that are not known, and unmap where the whole request is one, are not supported.
        if flags & ~_UNMAP or (kind == T_DISCARD and flags):
            raise Refused(S_UNSUPP)
        if sectors > _MOST_RANGE_SECTORS or (sector + sectors) * SECTOR_BYTES > disk_bytes:
            raise Refused(S_IOERR)
        if sectors:
            ranges.append((sector * SECTOR_BYTES, sectors * SECTOR_BYTES, bool(flags & _UNMAP)))
    return tuple(ranges)


def _open(path: str, *, read_only: bool) -> int:
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK  # not to wait on a named pipe
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        raise NotFound(
            f"there is no disk {path}", hint="check its path, or make an empty one: truncate -s 1G FILE"
        ) from None
    except IsADirectoryError:
        raise UsageError(f"the disk {path} is a directory", hint="name a file or a block device") from None
    except OSError as error:
        raise HostError.from_os(error, f"cannot open the disk {path}") from None
    # One lock for each opening (F_OFD_SETLK), gone with the last descriptor of it, however this process ends.
    kind = fcntl.F_RDLCK if read_only else fcntl.F_WRLCK
    for patience in range(_LOCK_TRIES, -1, -1):
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, pack_lock(kind))
        except (BlockingIOError, PermissionError):
            if patience:
                time.sleep(_LOCK_PAUSE_S)
                continue
            os.close(fd)
            raise Conflict(
                f"the disk {path} is in use by another machine", hint="end that machine, or use a copy", state="in use"
            ) from None
        except OSError:  # a file system without locks
            pass
        break
    return fd


def _measure(fd: int, path: str) -> tuple[int, int]:
    """A disk's size in bytes, and the size of the host's blocks."""
    status = os.fstat(fd)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise UsageError(f"the disk {path} is neither a file nor a block device", hint="name a file or a block device")
    size = os.lseek(fd, 0, os.SEEK_END)
    if not size or size % SECTOR_BYTES:
        raise UsageError(
            f"the disk {path} has {size} bytes, which is not a whole number of sectors",
            hint=f"make it a multiple of {SECTOR_BYTES} bytes, for example with truncate",
        )
    block_bytes = status.st_blksize
    return size, block_bytes if SECTOR_BYTES <= block_bytes <= 1 << 16 and not block_bytes & (block_bytes - 1) else 4096
