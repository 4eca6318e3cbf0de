"""The one thread that owns a group of devices: it waits for kicks and back ends, and runs what they call for.

Not the supervisor's loop: that one has timers and is its process's main thread; this one is called into by others.
"""

from __future__ import annotations

import _thread
import os
import select
import sys
from collections import deque
from collections.abc import Callable

from nagaya.kernel.light_threads import Thread
from nagaya.static import Generic, TypeVar

T = TypeVar("T")


class _Call(Generic[T]):
    """A function on its way to the loop's thread, and its result on the way back."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._done = _thread.allocate_lock()
        self._done.acquire()
        self._error: BaseException | None = None
        self._result: T

    def run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:  # the caller's to handle, on the caller's thread
            self._error = error
        self._done.release()

    def wait(self) -> T:
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return self._result


class Loop:
    """One thread and its epoll. `watch`, `unwatch` and `call` may be used from any thread.

    Until `start` and after `close` there is no thread: `call` then runs the function at once, where it is called.
    """

    def __init__(self, name: str = "devices") -> None:
        self.name = name
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._registered: dict[int, int] = {}
        self._lock = _thread.allocate_lock()
        self._calls: deque[_Call[object]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._thread: Thread | None = None
        self._stopping = False
        self.is_held = False
        """Whether its thread stands (`hold`)."""

    def watch(self, fd: int, callback: Callable[[], None], *, readable: bool = True, writable: bool = False) -> None:
        """Call back on the loop's thread while `fd` is ready, or broken. Watching again replaces what was asked."""
        mask = (select.EPOLLIN if readable else 0) | (select.EPOLLOUT if writable else 0)
        with self._lock:
            self._callbacks[fd] = callback
            if fd not in self._registered:
                self._epoll.register(fd, mask)
            elif self._registered[fd] != mask:
                self._epoll.modify(fd, mask)
            self._registered[fd] = mask

    def unwatch(self, fd: int) -> None:
        """Forget `fd`; to be called before it is closed. Off the loop's thread, one last call may be under way."""
        with self._lock:
            self._callbacks.pop(fd, None)
            if self._registered.pop(fd, None) is not None:
                self._epoll.unregister(fd)

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the loop's thread; its result, or its exception."""
        call = _Call(function)
        with self._lock:
            thread = self._thread
            elsewhere = thread is not None and not thread.is_current and not self._stopping
            if elsewhere:
                self._calls.append(call)  # type: ignore[arg-type]  # nobody looks at the result before `wait`
                os.eventfd_write(self._wake_fd, 1)  # under the lock: once `close` has it, the descriptor may be gone
        return call.wait() if elsewhere else function()

    def hold(self) -> Callable[[], None]:
        """Have the thread stand between two callbacks until the answer is called; nothing changes meanwhile."""
        standing, gone_on = _thread.allocate_lock(), _thread.allocate_lock()
        standing.acquire()
        gone_on.acquire()

        def stand() -> None:
            standing.release()
            gone_on.acquire()

        with self._lock:
            if self._thread is None or self._stopping:
                return lambda: None
            self._calls.append(_Call(stand))  # nobody waits for its end
            os.eventfd_write(self._wake_fd, 1)
        standing.acquire()
        self.is_held = True

        def release() -> None:
            self.is_held = False
            gone_on.release()

        return release

    def start(self) -> None:
        self._thread = Thread(self.run)  # `threading`'s would have us wait until it runs

    def close(self) -> None:
        """End the thread after the calls that it has been given, and wait for it. May be called twice."""
        with self._lock:
            self._stopping = True
            thread = self._thread
        if thread is not None and not thread.is_current:
            os.eventfd_write(self._wake_fd, 1)
            thread.join()
            self._thread = None
        with self._lock:  # devices closed later on still ask to have their descriptors forgotten
            self._callbacks.clear()
            self._registered.clear()
        if not self._epoll.closed:
            self._epoll.close()
            os.close(self._wake_fd)

    def run(self) -> None:
        """What the thread does, for a caller that is one itself; returns after `close`."""
        while True:
            for fd, _ in self._epoll.poll():
                if fd == self._wake_fd:
                    if self._answer():
                        return
                    continue
                callback = self._callbacks.get(fd)  # an earlier callback of this round may have forgotten it
                if callback is not None:
                    try:
                        callback()
                    except Exception:
                        # A bug of ours, in one device: the others go on, and this one is not asked for ever.
                        self.unwatch(fd)
                        sys.excepthook(*sys.exc_info())

    def _answer(self) -> bool:
        """Run what other threads asked for; True when it is time to end."""
        os.eventfd_read(self._wake_fd)
        while True:
            with self._lock:
                if not self._calls:
                    return self._stopping
                call = self._calls.popleft()
            call.run()
