"""`threading` for whoever starts quickly: a thread to wait for, and a condition, of the same behaviour.

Importing `threading` brings `functools` and `collections`: 2.4 ms of a machine that is there for 10.
"""

from __future__ import annotations

import _thread
import time

from nagaya.static import Any, Callable


class Thread:
    """Runs `target` from the moment it is made. No program waits for it at its end."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self._target, self._arguments = target, arguments
        self._id = 0
        self._running = _thread.allocate_lock()
        self._running.acquire()
        try:
            _thread.start_new_thread(self._run, ())
        except BaseException:
            self._running.release()
            raise

    def _run(self) -> None:
        self._id = _thread.get_ident()
        try:
            self._target(*self._arguments)
        finally:
            self._running.release()

    def is_alive(self) -> bool:
        """Whether it has not ended yet."""
        return self._running.locked()

    @property
    def is_current(self) -> bool:
        """Whether it is the one that asks."""
        return self.is_alive() and self._id == _thread.get_ident()

    def join(self) -> None:
        """Until it has ended."""
        with self._running:
            pass


class Condition:
    """A lock that its holder may take again, as a signal's handler does, and that a `wait` gives up meanwhile."""

    def __init__(self) -> None:
        self._lock = _thread.RLock()
        self._waiters: list[_thread.LockType] = []

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *raised: object) -> None:
        self._lock.release()

    def wait_for(self, predicate: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Until it is so, or the time is over; whether it is. The caller holds the lock once, and has it when it looks."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not predicate():
            left_s = -1.0 if deadline_s is None else deadline_s - time.monotonic()
            if deadline_s is not None and left_s <= 0:
                return False
            self._wait(left_s)
        return True

    def _wait(self, timeout_s: float) -> None:
        waiter = _thread.allocate_lock()
        waiter.acquire()
        self._waiters.append(waiter)
        self._lock.release()
        try:
            waiter.acquire(timeout=timeout_s)
        finally:
            self._lock.acquire()
            if waiter in self._waiters:  # nobody has called it
                self._waiters.remove(waiter)

    def notify_all(self) -> None:
        """The caller, who holds the lock, has changed what the others wait for."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.release()
