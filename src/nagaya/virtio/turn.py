"""Fairness on the loop: a device with more work than its share asks for another turn, after the others' ones."""

from __future__ import annotations

import os
from collections.abc import Callable

from nagaya.virtio.loop import Loop


class Turn:
    """One call back on the loop for each time that it is asked for. Loop thread only."""

    def __init__(self) -> None:
        self._fd = -1  # an eventfd that is always ready
        self._loop: Loop | None = None
        self._callback: Callable[[], None] | None = None

    def ask(self, loop: Loop, callback: Callable[[], None]) -> None:
        """Have `callback` called in the loop's next round; asking twice before it gives one call."""
        if self._fd < 0:
            self._fd = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        if self._callback is None:
            self._loop = loop
            loop.watch(self._fd, self._come)
        self._callback = callback

    def cancel(self) -> None:
        """There will be no call."""
        if self._loop is not None:
            self._loop.unwatch(self._fd)
        self._loop = self._callback = None

    def close(self) -> None:
        self.cancel()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _come(self) -> None:
        callback = self._callback
        self.cancel()
        if callback is not None:
            callback()
