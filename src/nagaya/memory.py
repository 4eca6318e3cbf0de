"""Guest memory: regions of one memfd, and checked slices of them.

A guest's addresses (`gpa`) become this process's (`hva`) here and nowhere else.
"""

from __future__ import annotations

import mmap
import os
from ctypes import addressof, c_char

from nagaya.errors import GuestFault, HostError, UsageError
from nagaya.static import NamedTuple

PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20
LOW_END_GPA = 0xC000_0000
"""RAM stops here: the rest below 4 GiB is for devices, and for the local APIC's and I/O APIC's fixed addresses."""
HIGH_START_GPA = 1 << 32
_MOST_BYTES = 1 << 46


class Region(NamedTuple):
    """A run of guest memory. `view` is all of it: format "B", writable; `file_offset` is where the memfd holds it."""

    gpa: int
    size_bytes: int
    file_offset: int
    hva: int
    view: memoryview


class GuestMemory:
    """All of a guest's RAM. Slices are of the memory itself: what the guest writes meanwhile shows in them."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        """Map the file `fd`, which then belongs to this object. Raises `OSError`."""
        self.fd = fd
        self.size_bytes = size_bytes
        self._map = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED)
        self._anchor = c_char.from_buffer(self._map)
        hva, view = addressof(self._anchor), memoryview(self._map)
        low = min(size_bytes, LOW_END_GPA)
        regions = [Region(0, low, 0, hva, view[:low])]
        if size_bytes > low:
            regions.append(Region(HIGH_START_GPA, size_bytes - low, low, hva + low, view[low:]))
        self.regions = tuple(regions)

    @classmethod
    def allocate(cls, size_bytes: int, *, huge: bool = False) -> GuestMemory:
        """New memory, all zeros. No page is taken before it is touched, except with `huge`, which reserves them all.

        Raises `UsageError` for a size that no guest can have, `HostError` when the host has not got it.
        """
        page_bytes = HUGE_PAGE_BYTES if huge else PAGE_BYTES
        if not 0 < size_bytes <= _MOST_BYTES:
            raise UsageError(
                f"{size_bytes} bytes cannot be a guest's memory",
                hint=f"from {page_bytes} bytes to {_MOST_BYTES >> 30} GiB",
            )
        if size_bytes % page_bytes:
            raise UsageError(f"{size_bytes} bytes cannot be a guest's memory", hint=f"a multiple of {page_bytes} bytes")
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

    def discard(self, gpa: int, size_bytes: int) -> None:
        """Give whole pages back to the host; the guest reads zeros there next. Raises `GuestFault`, `OSError`."""
        if gpa % PAGE_BYTES or size_bytes % PAGE_BYTES:
            raise GuestFault(f"{size_bytes} bytes at {gpa:#x} are not whole pages")
        if size_bytes:
            self._map.madvise(mmap.MADV_REMOVE, self.hva(gpa, size_bytes) - self.regions[0].hva, size_bytes)

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
        del self._anchor
        try:
            self._map.close()
        except BufferError:  # a slice lives on in a frame of some thread: the map goes when that does
            pass
        os.close(self.fd)
        self.fd = -1
