"""virtio-rng (virtio 1.2, section 5.4): the host's random bytes for the guest."""

from __future__ import annotations

import os

from nagaya.errors import GuestFault
from nagaya.virtio.device import ENTROPY, Activated

QUEUE_SIZE = 64
MOST_BYTES = 4096
"""For one request: a guest that asks for a gigabyte gets a page, and may ask again."""


class Rng:
    """An entropy source. Drivers ask for as much as they need, and take what they get."""

    device_id = ENTROPY
    features = 0
    queue_sizes = (QUEUE_SIZE,)

    def __init__(self, name: str = "rng0") -> None:
        self.name = name
        self._live: Activated | None = None
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
        requests = self._live.queues[0] if self._live is not None else None
        if requests is None:
            return
        for chain in requests.chains():
            if not chain.writable:
                raise GuestFault("a request for random bytes without a place for them")
            place = chain.writable[0]
            size = min(len(place), MOST_BYTES)
            place[:size] = os.urandom(size)
            requests.publish(chain, size)
            self._counters["requests"] += 1
            self._counters["bytes"] += size
        requests.signal()

    def reset(self) -> None:
        """See `Device`."""
        self._live = None

    def close(self) -> None:
        """See `Device`."""

    def counters(self) -> dict[str, int]:
        """See `Device`."""
        return dict(self._counters)
