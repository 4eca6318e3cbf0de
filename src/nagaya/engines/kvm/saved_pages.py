"""The pages of a saved machine that differ from those of another save: found by comparing, so that no guest pays for a log.

A log of written pages, as KVM keeps one, costs the guest a fault for each, from one snapshot to the next; the process that
writes a snapshot behind the machine's back has the time to look at them all, and leaves out those that were written the
same again.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from contextlib import ExitStack

from nagaya.memory import PAGE_BYTES, GuestMemory, find_data
from nagaya.static import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.engines.kvm.saved import Saved

Runs = list[list[int]]
"""[first page, how many], in order."""
_ZEROS = bytes(PAGE_BYTES)
_CHUNK_PAGES = 512
_NOWHERE = 0xFF  # of a page: a difference says that it is zeros


class Layer(NamedTuple):
    """A difference: which pages the file `fd` has, and which are zeros now."""

    fd: int
    held: Runs
    zeros: Runs


def apply(layer: Layer, memory: GuestMemory) -> None:
    """Put a difference over what is in memory. Raises `OSError`."""
    whole = memory.whole
    for first, count in layer.held:
        at, end = first * PAGE_BYTES, (first + count) * PAGE_BYTES
        while at < end:
            done = os.preadv(layer.fd, [whole[at:end]], at)
            if not done:
                raise OSError(0, "the saved memory ended")
            at += done
    for first, count in layer.zeros:
        whole[first * PAGE_BYTES : (first + count) * PAGE_BYTES] = bytes(count * PAGE_BYTES)


class _Pages:
    """What each page is in a save, wherever it lies there."""

    def __init__(self, base: Saved, stack: ExitStack) -> None:
        size_bytes = base.state["memory_bytes"]
        self._owners = bytearray(size_bytes // PAGE_BYTES)
        self._in_use = bytearray(-(-len(self._owners) // _CHUNK_PAGES))
        self._views: list[memoryview] = []
        for number, fd in enumerate(base.fds):
            map_ = stack.enter_context(mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ))
            self._views.append(stack.enter_context(memoryview(map_)))
            layer = base.layers[number - 1] if number else None
            for start, end in find_data(fd, size_bytes):
                self._use(start // PAGE_BYTES, end // PAGE_BYTES)
            for first, count in layer.held if layer is not None else ():
                self._owners[first : first + count] = bytes((number,)) * count
                self._use(first, first + count)
            for first, count in layer.zeros if layer is not None else ():
                self._owners[first : first + count] = bytes((_NOWHERE,)) * count

    def _use(self, first: int, end: int) -> None:
        for chunk in range(first // _CHUNK_PAGES, -(-end // _CHUNK_PAGES)):
            self._in_use[chunk] = 1

    def in_use(self, chunk: int) -> bool:
        """Whether any of its pages may be something but zeros."""
        return bool(self._in_use[chunk])

    def read(self, page: int) -> bytes:
        owner = self._owners[page]
        if owner == _NOWHERE:
            return _ZEROS
        return self._views[owner][page * PAGE_BYTES : (page + 1) * PAGE_BYTES].tobytes()


def write_changed(fd: int, memory: GuestMemory, base: Saved, look_up: Callable[[], None]) -> tuple[Runs, Runs, int]:
    """Write the pages that are not what they are in `base` to the empty file `fd`: (held, zeros, bytes). Raises `OSError`."""
    os.ftruncate(fd, memory.size_bytes)
    whole, held, zeros = memory.whole, Collected(), Collected()
    count = memory.size_bytes // PAGE_BYTES
    used = bytearray(-(-count // _CHUNK_PAGES))
    for start, end in memory.used():
        for chunk in range(start // PAGE_BYTES // _CHUNK_PAGES, -(-end // PAGE_BYTES // _CHUNK_PAGES)):
            used[chunk] = 1
    with ExitStack() as stack:
        pages = _Pages(base, stack)
        for chunk, known in enumerate(used):
            if not known and not pages.in_use(chunk):
                continue
            look_up()
            for page in range(chunk * _CHUNK_PAGES, min((chunk + 1) * _CHUNK_PAGES, count)):
                mine = whole[page * PAGE_BYTES : (page + 1) * PAGE_BYTES].tobytes() if known else _ZEROS
                if mine == pages.read(page):
                    continue
                (zeros if mine == _ZEROS else held).add(page)
    for first, number in held.runs:
        start, end = first * PAGE_BYTES, (first + number) * PAGE_BYTES
        while start < end:
            start += os.pwrite(fd, whole[start:end], start)
    return held.runs, zeros.runs, sum(number for _, number in held.runs) * PAGE_BYTES


class Collected:
    """Pages that come in order, as runs."""

    def __init__(self) -> None:
        self.runs: Runs = []

    def add(self, page: int) -> None:
        if self.runs and sum(self.runs[-1]) == page:
            self.runs[-1][1] += 1
        else:
            self.runs.append([page, 1])


def fold(upper: Layer, lower: Layer | int, out: int, size_bytes: int) -> tuple[Runs | None, Runs, int]:
    """Write to the empty file `out` what a difference and that which it is one to are together.

    `lower` is a difference too, or the file of a whole memory: (held, zeros, bytes), held None for a whole. Raises `OSError`.
    """
    count = size_bytes // PAGE_BYTES
    owners = bytearray(count)  # 1: the lower has it, 2: the upper, 3: it is zeros
    below = (
        [[start // PAGE_BYTES, (end - start) // PAGE_BYTES] for start, end in find_data(lower, size_bytes)]
        if isinstance(lower, int)
        else lower.held
    )
    for runs, owner in (
        (below, 1), ([] if isinstance(lower, int) else lower.zeros, 3), (upper.held, 2), (upper.zeros, 3),
    ):  # fmt: skip
        for first, number in runs:
            owners[first : first + number] = bytes((owner,)) * number
    os.ftruncate(out, size_bytes)
    held, zeros, written = Collected(), Collected(), 0
    fds = {1: lower if isinstance(lower, int) else lower.fd, 2: upper.fd}
    page = 0
    while page < count:
        owner, end = owners[page], page + 1
        while end < count and owners[end] == owner:
            end += 1
        if owner in fds:
            _copy(fds[owner], out, page * PAGE_BYTES, end * PAGE_BYTES)
            written += end - page
        for one in range(page, end) if owner else ():
            (zeros if owner == 3 else held).add(one)
        page = end
    if isinstance(lower, int):
        return None, [], written * PAGE_BYTES
    return held.runs, zeros.runs, written * PAGE_BYTES


def _copy(source: int, target: int, at: int, end: int) -> None:
    while at < end:
        done = os.copy_file_range(source, target, end - at, at, at)
        if not done:
            raise OSError(0, "the saved memory ended")
        at += done
