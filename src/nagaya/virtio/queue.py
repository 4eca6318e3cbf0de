"""A split virtqueue from the device's side (virtio 1.2, section 2.7), straight on guest memory.

The rings are shared with a driver that may change any byte at any time. Each field is read once, into a local, before
it is checked; whatever comes out wrong is a `GuestFault`.

Order of memory accesses: x86 keeps stores in order, and loads in order, and so do we, one bytecode after another; a load
may overtake an older store, though, which `_fence` prevents where the two sides would otherwise miss each other's word.
"""

from __future__ import annotations

import _thread
import struct
from collections.abc import Callable, Iterator, Sequence

from nagaya.errors import GuestFault
from nagaya.memory import GuestMemory
from nagaya.static import NamedTuple

MOST_ENTRIES = 1 << 15
MOST_CHAIN_BYTES = (1 << 32) - 1
"""A used element tells the bytes written in 32 bits; one buffer may be named many times over in a chain."""
DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT = 1, 2, 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1
_DESCRIPTOR = struct.Struct("<QIHH")  # struct virtq_desc: addr, len, flags, next
_unpack = _DESCRIPTOR.unpack_from
_FLAGS, _INDEX, _RING = 0, 1, 2
"""Fields of struct virtq_avail, and the first two of struct virtq_used, in units of 16 bits."""


class Chain(NamedTuple):
    """One request: the guest's buffers, in order, as slices of its memory. Nothing in them can be relied on twice."""

    head: int
    readable: tuple[memoryview, ...]
    writable: tuple[memoryview, ...]
    readable_bytes: int
    writable_bytes: int


class Queue:
    """One queue between DRIVER_OK and reset. Not for several threads: the device's loop owns it."""

    def __init__(
        self,
        memory: GuestMemory,
        *,
        index: int,
        size: int,
        descriptors: int,
        available: int,
        used: int,
        event_index: bool,
        indirect: bool,
        interrupt: Callable[[], None],
    ) -> None:
        """`descriptors`, `available` and `used` are the guest's addresses; `interrupt` raises the queue's interrupt.

        Raises `GuestFault` for rings that are misaligned, of an impossible size, or not inside memory.
        """
        if not 0 < size <= MOST_ENTRIES or size & (size - 1):
            raise GuestFault(f"queue {index} has {size} entries")
        if descriptors % 16 or available % 2 or used % 4:
            raise GuestFault(f"queue {index} is misaligned")
        self.index, self.size = index, size
        self.descriptors, self.available, self.used = descriptors, available, used
        self.interrupt = interrupt
        self.next_available = 0
        self.next_used = 0
        self._memory = memory
        self._event_index, self._indirect = event_index, indirect
        self._mask = size - 1
        self._table = memory.slice(descriptors, _DESCRIPTOR.size * size)
        self._available = memory.slice(available, 2 * (_RING + size + 1)).cast("H")  # and used_event after the ring
        self._used = memory.slice(used, 4).cast("H")
        self._elements = memory.slice(used + 4, 8 * size).cast("I")  # id and length, by turns
        self._avail_event = memory.slice(used + 4 + 8 * size, 2).cast("H")
        self._signalled = 0  # next_used when the driver was last asked whether it wants an interrupt
        self._lock = _thread.allocate_lock()

    def peek_available(self) -> int:
        """How many chains wait. Raises `GuestFault` when the driver claims more than there can be."""
        count = (self._available[_INDEX] - self.next_available) & 0xFFFF
        if count > self.size:
            raise GuestFault(f"queue {self.index} of {self.size} entries has {count} chains")
        return count

    def pop(self) -> Chain | None:
        """The next chain, or None. It is the device's until `publish`."""
        if not self.peek_available():
            return None
        head = self._available[_RING + (self.next_available & self._mask)]
        chain = self._follow(head)
        self.next_available = (self.next_available + 1) & 0xFFFF
        return chain

    def undo_pop(self) -> None:
        """Put the chain popped last back, then the one before it, and so on."""
        self.next_available = (self.next_available - 1) & 0xFFFF

    def _follow(self, head: int) -> Chain:
        size, table, entries = self.size, self._table, self.size
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        readable_bytes = writable_bytes = count = 0
        number = head
        while True:
            if number >= entries:
                raise GuestFault(f"descriptor {number} of {entries} in queue {self.index}")
            address, length, flags, following = _unpack(table, number * 16)
            if flags & DESC_F_INDIRECT:
                if table is not self._table or not self._indirect or flags & DESC_F_NEXT:
                    raise GuestFault(f"an indirect table where none may be in queue {self.index}")
                if not length or length % 16 or length > 16 * MOST_ENTRIES:
                    raise GuestFault(f"an indirect table of {length} bytes in queue {self.index}")
                table, entries, number = self._memory.slice(address, length), length // 16, 0
                continue
            count += 1
            if count > size:  # a loop, most likely
                raise GuestFault(f"a chain of more than {size} descriptors in queue {self.index}")
            if not length:
                raise GuestFault(f"a descriptor of no bytes in queue {self.index}")
            if flags & DESC_F_WRITE:
                writable.append(self._memory.slice(address, length))
                writable_bytes += length
            elif writable:
                raise GuestFault(f"a readable descriptor after a writable one in queue {self.index}")
            else:
                readable.append(self._memory.slice(address, length))
                readable_bytes += length
            if not flags & DESC_F_NEXT:
                if readable_bytes + writable_bytes > MOST_CHAIN_BYTES:
                    raise GuestFault(f"a chain of 4 GiB or more in queue {self.index}")
                return Chain(head, tuple(readable), tuple(writable), readable_bytes, writable_bytes)
            number = following

    def publish(self, chain: Chain | int, written_bytes: int) -> None:
        """Give a chain back, the first `written_bytes` of its writable part filled."""
        writes = self._memory.writes
        if writes is not None and writes.on:
            self._mark(chain)
        head = chain if isinstance(chain, int) else chain.head
        element = 2 * (self.next_used & self._mask)
        self._elements[element] = head
        self._elements[element + 1] = written_bytes
        self.next_used = (self.next_used + 1) & 0xFFFF
        self._used[_INDEX] = self.next_used  # after the element: x86 does not reorder stores

    def publish_all(self, pairs: Sequence[tuple[Chain, int]]) -> None:
        """Give several back at once: the driver sees all of them, or none."""
        writes = self._memory.writes
        if writes is not None and writes.on:
            for chain, _ in pairs:
                self._mark(chain)
        index = self.next_used
        for chain, written_bytes in pairs:
            element = 2 * (index & self._mask)
            self._elements[element] = chain.head
            self._elements[element + 1] = written_bytes
            index = (index + 1) & 0xFFFF
        self.next_used = index
        self._used[_INDEX] = index

    def _mark(self, chain: Chain | int) -> None:
        """Log what was written; the ring itself, which is written all the time, its transport tells of in the end."""
        self._memory.mark_views((self._follow(chain) if isinstance(chain, int) else chain).writable)

    def signal(self) -> None:
        """Interrupt the driver if something was published since the last time, and it wants to know.

        To be called before 65536 chains were published: the index has come round by then, and looks as if none were.
        """
        new, old = self.next_used, self._signalled
        if new == old:
            return
        self._fence()
        self._signalled = new
        if self._event_index:
            event = self._available[_RING + self.size]
            wanted = (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
        else:
            wanted = not self._available[_FLAGS] & AVAIL_F_NO_INTERRUPT
        if wanted:
            self.interrupt()

    def disarm(self) -> None:
        """Work is under way: the driver need not tell of more."""
        if not self._event_index:  # with it, an event behind us is as good as none
            self._used[_FLAGS] = USED_F_NO_NOTIFY

    def rearm(self) -> bool:
        """Have the driver tell of the next chain. True when there is one already: it may not tell of that."""
        if self._event_index:
            self._avail_event[0] = self.next_available
        else:
            self._used[_FLAGS] = 0
        self._fence()
        return self.peek_available() > 0

    def chains(self) -> Iterator[Chain]:
        """Pop until there are no more, without notifications meanwhile.

        A driver may keep this going for as long as it likes: only for queues that have a bound of their own.
        """
        while True:
            self.disarm()
            while (chain := self.pop()) is not None:
                yield chain
            if not self.rearm():
                return

    def published(self) -> int:
        """next_used, of a queue on which somebody else publishes: as the driver sees it."""
        return self._used[_INDEX]

    def state(self) -> tuple[int, int]:
        """What a snapshot needs beside the guest's memory: next_available, next_used."""
        return self.next_available, self.next_used

    def restore(self, state: tuple[int, int]) -> None:
        self.next_available, self.next_used = state
        self._signalled = self.next_used

    def _fence(self) -> None:
        """No load after this before the stores ahead of it: taking a lock is an atomic read-modify-write, hence a fence."""
        with self._lock:
            pass
