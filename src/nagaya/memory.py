"""Guest memory: regions of one file, and checked slices of them.

New memory is a memfd, which other processes can map too. That of a machine that goes on from where it was saved is the
saved file itself, mapped copy-on-write: nothing is read before it is touched, nothing of it is ever written, and all
machines that came from it share what they have not changed. Nobody else can map such memory.

A guest's addresses (`gpa`) become this process's (`hva`) here and nowhere else.
"""

from __future__ import annotations

import errno
import mmap
import os
from ctypes import addressof, c_char

from nagaya.errors import GuestFault, HostError, UsageError
from nagaya.kernel.files import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    fallocate,
    map_copy_on_write,
    map_zeros,
)
from nagaya.static import Callable, Iterable, Iterator, NamedTuple

PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20
LOW_END_GPA = 0xC000_0000
"""RAM stops here: the rest below 4 GiB is for devices, and for the local APIC's and I/O APIC's fixed addresses."""
HIGH_START_GPA = 1 << 32
_MOST_BYTES = 1 << 46
_ZEROS = bytes(PAGE_BYTES)
_COPY_BYTES = 1 << 30
_CHUNK_BYTES = 512 * PAGE_BYTES  # of which the page map tells at once


class WriteLog:
    """Which blocks of something, a guest's memory or its disk, have been written: for who copies it meanwhile.

    In memory that processes forked from now on share. Off until `start`; a mark then costs one look. Marks come after the
    write that they tell of, and are taken before what they tell of is read: none is lost, whatever runs beside it.
    """

    def __init__(self, size_bytes: int, block_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.block_bytes = block_bytes
        self._map = mmap.mmap(-1, 1 + -(-size_bytes // block_bytes))  # MAP_SHARED, and no page of it taken yet

    @property
    def on(self) -> bool:
        return bool(self._map[0])

    def start(self) -> None:
        """From here on, writes are marked; of earlier ones nothing is known."""
        self._map[1:] = bytes(len(self._map) - 1)
        self._map[0] = 1

    def stop(self) -> None:
        self._map[0] = 0

    def mark(self, offset: int, size_bytes: int) -> None:
        """These bytes have been written, and lie inside. Any thread or process."""
        if size_bytes > 0:
            first, last = offset // self.block_bytes, (offset + size_bytes - 1) // self.block_bytes
            self._map[1 + first : 2 + last] = b"\1" * (last - first + 1)

    def take(self) -> list[tuple[int, int]]:
        """(offset, bytes) of what has been marked since the last time, in whole blocks; what was marked is forgotten."""
        runs = []
        at = self._map.find(b"\1", 1)
        while at > 0:
            end = self._map.find(b"\0", at)
            end = end if end > 0 else len(self._map)
            self._map[at:end] = bytes(end - at)
            offset = (at - 1) * self.block_bytes
            runs.append((offset, min((end - at) * self.block_bytes, self.size_bytes - offset)))
            at = self._map.find(b"\1", end)
        return runs


class Region(NamedTuple):
    """A run of guest memory. `view` is all of it: format "B", writable; `file_offset` is where the memfd holds it."""

    gpa: int
    size_bytes: int
    file_offset: int
    hva: int
    view: memoryview


def check_size(size_bytes: int, *, huge: bool = False) -> None:
    """Raise `UsageError` for a size of memory that no guest can have."""
    page_bytes = HUGE_PAGE_BYTES if huge else PAGE_BYTES
    if not 0 < size_bytes <= _MOST_BYTES:
        raise UsageError(
            f"{size_bytes} bytes cannot be a guest's memory", hint=f"from {page_bytes} bytes to {_MOST_BYTES >> 30} GiB"
        )
    if size_bytes % page_bytes:
        raise UsageError(f"{size_bytes} bytes cannot be a guest's memory", hint=f"a multiple of {page_bytes} bytes")


class GuestMemory:
    """All of a guest's RAM. Slices are of the memory itself: what the guest writes meanwhile shows in them."""

    def __init__(self, fd: int, size_bytes: int, *, private: bool = False) -> None:
        """Map the file `fd`, which then belongs to this object; `private`: copy-on-write. Raises `OSError`."""
        self.fd = fd
        self.size_bytes = size_bytes
        self.private = private
        self._detached = False
        self._pagemap = -1
        if private:
            self.open_page_map()
        self.writes: WriteLog | None = None
        """Where what this host writes for the guest is marked: KVM's own log has what the guest writes, and no more."""
        self._map = mmap.mmap(fd, size_bytes, mmap.MAP_PRIVATE if private else mmap.MAP_SHARED)
        self._anchor = c_char.from_buffer(self._map)
        hva, view = addressof(self._anchor), memoryview(self._map)
        self._bytes = view
        low = min(size_bytes, LOW_END_GPA)
        regions = [Region(0, low, 0, hva, view[:low])]
        if size_bytes > low:
            regions.append(Region(HIGH_START_GPA, size_bytes - low, low, hva + low, view[low:]))
        self.regions = tuple(regions)
        if private:
            self._map_holes()

    def _map_holes(self) -> None:
        """Have pages that the file has not got be zeros of our own: a touched hole would become a page of the file first."""
        end = 0
        for start, next_ in [*find_data(self.fd, self.size_bytes), (self.size_bytes, 0)]:
            if start - end >= HUGE_PAGE_BYTES:  # few: a process has room for 65,530 mappings
                map_zeros(self.regions[0].hva + end, start - end)
            end = next_

    @classmethod
    def allocate(cls, size_bytes: int, *, huge: bool = False) -> GuestMemory:
        """New memory, all zeros. No page is taken before it is touched, except with `huge`, which reserves them all.

        Raises `UsageError` for a size that no guest can have, `HostError` when the host has not got it.
        """
        check_size(size_bytes, huge=huge)
        flags = os.MFD_CLOEXEC | (os.MFD_HUGETLB | os.MFD_HUGE_2MB if huge else 0)
        try:
            fd = os.memfd_create("nagaya-guest-memory", flags)
        except OSError as error:
            raise HostError.from_os(error, "cannot allocate guest memory") from None
        try:
            os.ftruncate(fd, size_bytes)
            return cls(fd, size_bytes)
        except OSError as error:
            os.close(fd)
            hint = "reserve huge pages: sysctl vm.nr_hugepages" if huge else "ask for less memory"
            raise HostError.from_os(error, "cannot allocate guest memory", hint=hint) from None

    @classmethod
    def copy_of(cls, fd: int, size_bytes: int) -> GuestMemory:
        """New memory with what the file `fd` has, which stays the caller's: for who has to show it to other processes.

        Raises as `allocate`.
        """
        memory = cls.allocate(size_bytes)
        try:
            for start, end in find_data(fd, size_bytes):
                while start < end:
                    start += os.preadv(fd, [memory._bytes[start : min(end, start + _COPY_BYTES)]], start)
        except OSError as error:
            memory.close()
            raise HostError.from_os(error, "cannot read the saved memory") from None
        return memory

    def write_to(self, fd: int, look_up: Callable[[], None] = lambda: None) -> int:
        """Write what is in use to the empty file `fd`, and leave holes for the rest; how many bytes that was.

        The guest stands still meanwhile. `look_up` is called now and then, and may raise. Raises `OSError`.
        """
        os.ftruncate(fd, self.size_bytes)
        written = 0
        for start, end in self.used():
            for at in range(start, end, _CHUNK_BYTES):
                look_up()
                written += self._write_used(fd, at, min(at + _CHUNK_BYTES, end))
        return written

    def used(self) -> Iterator[tuple[int, int]]:
        """Where there may be something but zeros: offsets into the map, of whole pages."""
        if not self.private:
            yield from find_data(self.fd, self.size_bytes)
            return
        # What the file has, and what this process has made of it: a copy of its own, or one that is swapped out.
        in_file = bytearray(-(-self.size_bytes // _CHUNK_BYTES))
        for start, end in find_data(self.fd, self.size_bytes):
            for chunk in range(start // _CHUNK_BYTES, -(-end // _CHUNK_BYTES)):
                in_file[chunk] = 1
        first = self.regions[0].hva // PAGE_BYTES
        count = _CHUNK_BYTES // PAGE_BYTES
        nothing = bytes(8 * count)
        for chunk, known in enumerate(in_file):
            entries = b"" if known else os.pread(self._pagemap, len(nothing), 8 * (first + chunk * count))
            if known or entries != nothing[: len(entries)]:
                yield chunk * _CHUNK_BYTES, min((chunk + 1) * _CHUNK_BYTES, self.size_bytes)

    def _write_used(self, fd: int, start: int, end: int) -> int:
        view, written, run = self._bytes, 0, start
        for at in range(start, end, PAGE_BYTES):
            if view[at : at + PAGE_BYTES].tobytes() == _ZEROS:
                written += _write(fd, view[run:at], run)
                run = at + PAGE_BYTES
        return written + _write(fd, view[run:end], run)

    def slice(self, gpa: int, size_bytes: int) -> memoryview:
        """The memory itself, without a copy. Raises `GuestFault` unless it lies wholly inside one region."""
        for region in self.regions:
            offset = gpa - region.gpa
            if offset >= 0 and 0 <= size_bytes <= region.size_bytes - offset:
                return region.view[offset : offset + size_bytes]
        raise GuestFault(f"{size_bytes} bytes at {gpa:#x} are not in the guest's memory")

    def hva(self, gpa: int, size_bytes: int) -> int:
        """Where this process has those bytes. Raises `GuestFault` unless they lie wholly inside one region."""
        for region in self.regions:
            offset = gpa - region.gpa
            if offset >= 0 and 0 <= size_bytes <= region.size_bytes - offset:
                return region.hva + offset
        raise GuestFault(f"{size_bytes} bytes at {gpa:#x} are not in the guest's memory")

    def read(self, gpa: int, size_bytes: int) -> bytes:
        """A copy. Raises `GuestFault` unless the bytes lie wholly inside one region."""
        return bytes(self.slice(gpa, size_bytes))

    def write(self, gpa: int, data: bytes | memoryview) -> None:
        """Raises `GuestFault` unless all of it lies inside one region; nothing is written then."""
        self.slice(gpa, len(data))[:] = data
        self.mark(gpa, len(data))

    def mark(self, gpa: int, size_bytes: int) -> None:
        """This host has written there. Nothing happens unless somebody logs it."""
        if self.writes is not None and self.writes.on:
            self.writes.mark(self.offset(gpa, size_bytes), size_bytes)

    def mark_views(self, views: Iterable[memoryview]) -> None:
        """The same of slices of this memory, which are not empty."""
        if self.writes is not None:
            for view in views:
                self.writes.mark(addressof(c_char.from_buffer(view)) - self.regions[0].hva, len(view))

    def offset(self, gpa: int, size_bytes: int) -> int:
        """Where the file, and `whole`, has those bytes. Raises `GuestFault` unless they lie wholly inside one region."""
        return self.hva(gpa, size_bytes) - self.regions[0].hva

    def discard(self, gpa: int, size_bytes: int) -> None:
        """Give whole pages back to the host; the guest reads zeros there next. Raises `GuestFault`, `OSError`."""
        if gpa % PAGE_BYTES or size_bytes % PAGE_BYTES:
            raise GuestFault(f"{size_bytes} bytes at {gpa:#x} are not whole pages")
        if not size_bytes:
            return
        if self.private:  # dropping our copy would show the file's pages again
            map_zeros(self.hva(gpa, size_bytes), size_bytes)
        else:
            self._map.madvise(mmap.MADV_REMOVE, self.hva(gpa, size_bytes) - self.regions[0].hva, size_bytes)
        self.mark(gpa, size_bytes)

    def forget(self, offset: int, size_bytes: int) -> None:
        """Let whole pages be missing, of memory that is shared: the next who looks finds zeros, or waits (userfaultfd). Raises `OSError`."""
        self._map.madvise(mmap.MADV_REMOVE, offset, size_bytes)

    def open_page_map(self) -> None:
        """Be able to tell what is in use of memory that is private, or becomes so: whoever changed its ids may not ask. Raises `OSError`."""
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        if self._pagemap >= 0:
            os.close(self._pagemap)
        self._pagemap = fd

    def detach(self) -> None:
        """Go on copy-on-write: from here on `fd` has what the memory was at this moment, and nobody writes to it.

        For memory that no other process has mapped, while nobody uses it. Raises `OSError`.
        """
        if not self.private:
            map_copy_on_write(self.regions[0].hva, self.size_bytes, self.fd)
            self.private = self._detached = True
            self._map_holes()

    def drop_replaced(self) -> None:
        """After `detach`, when nobody reads what `fd` has any more: give back those of its pages that we have copies of.

        Punching a hole takes no copy away: that is the mapping's own. Raises `OSError`.
        """
        if not self._detached or self.fd < 0:
            return
        first, count = self.regions[0].hva // PAGE_BYTES, _CHUNK_BYTES // PAGE_BYTES
        for start, end in find_data(self.fd, self.size_bytes):
            for at in range(start, end, _CHUNK_BYTES):
                pages = min(count, (end - at) // PAGE_BYTES)
                entries = memoryview(os.pread(self._pagemap, 8 * pages, 8 * (first + at // PAGE_BYTES))).cast("Q")
                own = bytes(entry >> 61 & 5 == 4 for entry in entries)  # there, and not the file's (pagemap.rst)
                run = own.find(1)
                while run >= 0:
                    after = own.find(0, run)
                    after = after if after >= 0 else pages
                    fallocate(
                        self.fd,
                        FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                        at + run * PAGE_BYTES,
                        (after - run) * PAGE_BYTES,
                    )
                    run = own.find(1, after)

    def copy(self) -> GuestMemory:
        """New memory with what this has. Raises `HostError`."""
        copy = GuestMemory.allocate(self.size_bytes)
        try:
            for start, end in self.used():
                _write(copy.fd, self._bytes[start:end], start)
        except OSError as error:
            copy.close()
            raise HostError.from_os(error, "cannot copy guest memory") from None
        return copy

    @property
    def fds(self) -> tuple[int, ...]:
        """What it holds open."""
        return (self.fd, self._pagemap) if self._pagemap >= 0 else (self.fd,)

    @property
    def whole(self) -> memoryview:
        """All of it, by offsets into the file."""
        return self._bytes

    def keep_from_children(self) -> None:
        """Do not show the memory in processes forked from now on; they can map `fd` themselves."""
        self._map.madvise(mmap.MADV_DONTFORK)

    def close(self) -> None:
        """Unmap, as soon as nobody holds a slice any more, and close the memfd. May be called twice."""
        if self.fd < 0:
            return
        for region in self.regions:
            region.view.release()
        self.regions = ()
        self._bytes.release()
        if self._pagemap >= 0:
            os.close(self._pagemap)
        del self._anchor
        try:
            self._map.close()
        except BufferError:  # a slice lives on in a frame of some thread: the map goes when that does
            pass
        os.close(self.fd)
        self.fd = -1


def find_data(fd: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Where a sparse file has something, in whole pages. Raises `OSError`."""
    end = 0
    while end < size_bytes:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole follows
                return
            raise
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size_bytes)
        start -= start % PAGE_BYTES
        end += -end % PAGE_BYTES
        yield start, end


def _write(fd: int, view: memoryview, at: int) -> int:
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done : done + _COPY_BYTES], at + done)
    return done
