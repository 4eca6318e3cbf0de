"""virtio-balloon (virtio 1.2, section 5.5): the guest lends memory back, tells of its use of it, and reports free pages.

Pages that the guest puts into the balloon, or reports as free, go back to the host at once. Taking them out again needs
nothing of us: the host fills them with zeros when they are touched.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from ctypes import addressof, c_char

from nagaya.errors import GuestFault
from nagaya.memory import PAGE_BYTES, GuestMemory
from nagaya.static import Any
from nagaya.virtio.device import BALLOON, Activated, guard
from nagaya.virtio.queue import Chain, Queue
from nagaya.virtio.turn import Turn
from nagaya.virtio.views import gather

F_STATS_VQ = 1 << 1
F_DEFLATE_ON_OOM = 1 << 2
F_REPORTING = 1 << 5

INFLATE, DEFLATE, STATISTICS = 0, 1, 2
QUEUE_SIZE = 128
STATISTIC_NAMES = (
    "swap_in_bytes", "swap_out_bytes", "major_faults", "minor_faults", "free_bytes", "total_bytes", "available_bytes",
    "disk_cache_bytes", "huge_page_allocations", "huge_page_failures",
)  # fmt: skip
"""By tag, VIRTIO_BALLOON_S_*."""
_STATISTIC = struct.Struct("<HQ")
_MOST_STATISTICS = 64
_ACTUAL_OFFSET = 4
_BURST = 32
_MOST_PAGES = 64 << 10
"""Page numbers in one request. Linux sends 256; the numbers are copied, and must not fill our memory."""


class Balloon:
    """The device. Its balloon is empty until `set_target`."""

    device_id = BALLOON

    def __init__(self, name: str, *, deflate_on_oom: bool = True) -> None:
        """`deflate_on_oom`: a guest in need may take pages out of the balloon without being asked."""
        self.name = name
        self.features = F_STATS_VQ | F_REPORTING | (F_DEFLATE_ON_OOM if deflate_on_oom else 0)
        # Reporting is queue 4. Linux before 6.11 leaves out the numbers of queues that it does not use, and so looks for
        # it at 3, where free page hints (not offered here) would be; later ones try 4, then 3.
        self.queue_sizes = (QUEUE_SIZE,) * 5
        self.target_bytes = 0
        self.statistics: dict[str, int] = {}
        """The guest's latest: see STATISTIC_NAMES. Empty before it has sent any."""
        self.statistics_received = 0
        """How often it has sent them: grows by one for each `request_statistics` that was answered."""
        self._actual_pages = 0
        self._live: Activated | None = None
        self._held: Chain | None = None  # the driver's buffer for statistics; to give it back is to ask for new ones
        self._turn = Turn()
        self._counts = dict.fromkeys(("inflated_bytes", "deflated_bytes", "reported_bytes", "discard_errors"), 0)

    @property
    def actual_bytes(self) -> int:
        """What the guest says is in the balloon."""
        return self._actual_pages * PAGE_BYTES

    def set_target(self, size_bytes: int) -> None:
        """Ask the guest to make the balloon this large; it does what it can. Loop thread."""
        self.target_bytes = size_bytes // PAGE_BYTES * PAGE_BYTES
        if self._live is not None:
            self._live.config_changed()

    def request_statistics(self) -> bool:
        """Ask for new `statistics`; False when the guest is not ready for the question. Loop thread."""
        queue = self._live.queues[STATISTICS] if self._live is not None else None
        held, self._held = self._held, None
        if queue is None or held is None:
            return False
        queue.publish(held, 0)
        queue.signal()
        return True

    def read_config(self, offset: int, size: int) -> bytes:
        config = struct.pack("<IIII", self.target_bytes // PAGE_BYTES, self._actual_pages, 0, 0)
        return config[offset : offset + size]

    def write_config(self, offset: int, data: bytes) -> None:
        if offset == _ACTUAL_OFFSET and len(data) == 4:
            self._actual_pages = int.from_bytes(data, "little")

    def activate(self, live: Activated) -> None:
        self._live = live
        if live.saved is not None:
            self._actual_pages = live.saved["actual_pages"]
        self._work()

    def kicked(self, queue: int) -> None:
        self._serve(queue)

    def reset(self) -> None:
        self._turn.cancel()
        self._live = self._held = None
        self._actual_pages = 0

    def close(self) -> None:
        self.reset()
        self._turn.close()

    def save(self) -> dict[str, Any]:
        """The driver's buffer for statistics is taken anew, with what it has in it."""
        return {"actual_pages": self._actual_pages, "unpopped": {STATISTICS: int(self._held is not None)}}

    def counters(self) -> dict[str, int]:
        return dict(self._counts)

    def _work(self) -> None:
        live = self._live
        if live is not None:
            for number in range(len(live.queues)):
                self._serve(number)

    def _guarded_work(self) -> None:
        guard(self._live, self._work)

    def _serve(self, number: int) -> None:
        live = self._live
        queue = live.queues[number] if live is not None else None
        if live is None or queue is None:
            return
        if number == STATISTICS and live.features & F_STATS_VQ:
            self._take_all(live, queue, self._take_statistics)
        elif number == INFLATE:
            self._take_all(live, queue, self._inflate)
        elif number == DEFLATE:
            self._take_all(live, queue, self._deflate)
        else:
            self._take_all(live, queue, self._report)

    def _take_all(self, live: Activated, queue: Queue, take: Callable[[GuestMemory, Chain], bool]) -> None:
        queue.disarm()
        for _ in range(_BURST):
            chain = queue.pop()
            if chain is None:
                if queue.rearm():
                    continue
                break
            if take(live.memory, chain):
                queue.publish(chain, 0)
        else:
            self._turn.ask(live.loop, self._guarded_work)
        queue.signal()

    def _inflate(self, memory: GuestMemory, chain: Chain) -> bool:
        for first, count in merge_pages(self._pages(chain)):
            self._discard(memory, first * PAGE_BYTES, count * PAGE_BYTES)
            self._counts["inflated_bytes"] += count * PAGE_BYTES
        return True

    def _deflate(self, memory: GuestMemory, chain: Chain) -> bool:
        self._counts["deflated_bytes"] += len(self._pages(chain)) * PAGE_BYTES
        return True

    def _pages(self, chain: Chain) -> Sequence[int]:
        """The request's page numbers, in units of 4 KiB whatever the guest's page size is."""
        if chain.readable_bytes % 4 or chain.readable_bytes > 4 * _MOST_PAGES:
            raise GuestFault(f"{chain.readable_bytes} bytes of page numbers on {self.name}")
        return memoryview(gather(chain.readable, chain.readable_bytes)).cast("I")

    def _report(self, memory: GuestMemory, chain: Chain) -> bool:
        """The buffers are the free pages themselves; the guest keeps off them until it has them back."""
        for view in chain.writable:
            gpa = _find_gpa(memory, view)
            self._discard(memory, gpa, len(view))
            self._counts["reported_bytes"] += len(view)
        return True

    def _take_statistics(self, memory: GuestMemory, chain: Chain) -> bool:
        if self._held is not None:
            raise GuestFault(f"two buffers with statistics at once on {self.name}")
        self._held = chain
        packed = gather(chain.readable, _MOST_STATISTICS * _STATISTIC.size)
        whole = len(packed) // _STATISTIC.size * _STATISTIC.size
        records = _STATISTIC.iter_unpack(packed[:whole])
        self.statistics = {STATISTIC_NAMES[tag]: value for tag, value in records if tag < len(STATISTIC_NAMES)}
        self.statistics_received += 1
        return False

    def _discard(self, memory: GuestMemory, gpa: int, size_bytes: int) -> None:
        try:
            memory.discard(gpa, size_bytes)
        except OSError:  # parts of huge pages, say: the host just does not get them back
            self._counts["discard_errors"] += 1


def merge_pages(pages: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of adjacent pages, as first page and count: one call to the host does for each."""
    runs: list[tuple[int, int]] = []
    for page in sorted(pages):
        if runs and runs[-1][0] <= page <= sum(runs[-1]):
            first, count = runs[-1]
            runs[-1] = (first, max(count, page - first + 1))
        else:
            runs.append((page, 1))
    return runs


def _find_gpa(memory: GuestMemory, view: memoryview) -> int:
    """Where the guest has the memory that `view` is of."""
    hva = addressof(c_char.from_buffer(view))
    for region in memory.regions:
        if 0 <= hva - region.hva < region.size_bytes:
            return region.gpa + hva - region.hva
    raise GuestFault("a reported page is not in the guest's memory")
