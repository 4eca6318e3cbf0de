"""virtio-rng (virtio 1.2, section 5.4): the host's random bytes for the guest."""

from __future__ import annotations

import os

from nagaya.errors import GuestFault
from nagaya.static import Any
from nagaya.virtio.device import ENTROPY, Activated, guard
from nagaya.virtio.queue import Chain
from nagaya.virtio.turn import Turn

QUEUE_SIZE = 64
MOST_BYTES = 4096
"""For one request: a guest that asks for a gigabyte gets a page, and may ask again."""
_BURST = 32
"""Requests before the other devices on the loop have their turn."""


class Rng:
    """An entropy source. Drivers ask for as much as they need, and take what they get."""

    device_id = ENTROPY
    features = 0
    queue_sizes = (QUEUE_SIZE,)

    def __init__(self, name: str = "rng0") -> None:
        self.name = name
        self._live: Activated | None = None
        self._turn = Turn()
        self._counters = {"requests": 0, "bytes": 0}

    def read_config(self, offset: int, size: int) -> bytes:
        """See `Device`: it has no configuration."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """See `Device`."""

    def activate(self, live: Activated) -> None:
        """See `Device`."""
        self._live = live

    def kicked(self, queue: int) -> None:
        """See `Device`."""
        live = self._live
        requests = live.queues[0] if live is not None else None
        if live is None or requests is None:
            return
        requests.disarm()
        for _ in range(_BURST):
            chain = requests.pop()
            if chain is None:
                if requests.rearm():
                    continue
                break
            requests.publish(chain, self._fill(chain))
        else:
            self._turn.ask(live.loop, self._go_on)
        requests.signal()

    def _go_on(self) -> None:
        guard(self._live, lambda: self.kicked(0))

    def _fill(self, chain: Chain) -> int:
        if not chain.writable:
            raise GuestFault("a request for random bytes without a place for them")
        place = chain.writable[0]
        size = min(len(place), MOST_BYTES)
        place[:size] = os.urandom(size)
        self._counters["requests"] += 1
        self._counters["bytes"] += size
        return size

    def reset(self) -> None:
        """See `Device`."""
        self._turn.cancel()
        self._live = None

    def close(self) -> None:
        """See `Device`."""
        self._turn.close()

    def save(self) -> dict[str, Any]:
        """See `Device`: no request outlives the call that serves it."""
        return {}

    def counters(self) -> dict[str, int]:
        """See `Device`."""
        return dict(self._counters)
