"""The supervisor's event loop: epoll, timers, nothing else (importing asyncio costs 43 ms)."""

from __future__ import annotations

import heapq
import select
import time
from collections.abc import Callable

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
_ENDED = select.EPOLLHUP | select.EPOLLERR


class Timer:
    """One call in the future; `cancel` forgets it."""

    __slots__ = ("call", "due")

    def __init__(self, due: float, call: Callable[[], None]) -> None:
        self.due = due
        self.call: Callable[[], None] | None = call

    def __lt__(self, other: Timer) -> bool:
        return self.due < other.due

    def cancel(self) -> None:
        self.call = None


class Loop:
    """Calls back when descriptors are ready and when timers are due, until `stop`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._calls: dict[int, Callable[[int], None]] = {}
        self._masks: dict[int, int] = {}
        self._fresh: set[int] = set()  # watched since the events at hand were taken
        self._timers: list[Timer] = []
        self._running = True

    def watch(self, fd: int, call: Callable[[int], None], mask: int = READ) -> None:
        """Call `call(events)` when `fd` is ready; a hang-up counts as readable. Watching again changes the mask."""
        if fd not in self._masks:
            self._epoll.register(fd, mask)
            self._fresh.add(fd)
        elif self._masks[fd] != mask:
            self._epoll.modify(fd, mask)
        self._calls[fd] = call
        self._masks[fd] = mask

    def forget(self, fd: int) -> None:
        """Stop watching; call it before closing the descriptor."""
        if self._masks.pop(fd, None) is not None:
            del self._calls[fd]
            self._epoll.unregister(fd)

    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        timer = Timer(time.monotonic() + seconds, call)
        heapq.heappush(self._timers, timer)
        return timer

    def stop(self) -> None:
        self._running = False

    def run(self) -> None:
        while self._running:
            ready = self._epoll.poll(self._next_timeout())
            self._fresh.clear()
            for fd, events in ready:
                call = self._calls.get(fd)  # an earlier callback of this round may have forgotten it
                if call is not None and fd not in self._fresh:  # or closed it, and the number is another one's by now
                    call(events | READ if events & _ENDED else events)
            now = time.monotonic()
            while self._timers and self._timers[0].due <= now:
                due = heapq.heappop(self._timers).call
                if due is not None:
                    due()

    def _next_timeout(self) -> float:
        while self._timers and self._timers[0].call is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0].due - time.monotonic()) if self._timers else -1

    def close(self) -> None:
        self._epoll.close()
