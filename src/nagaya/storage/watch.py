"""Waiting for a directory to change: inotify(7), so that following a log or the events polls nothing."""

from __future__ import annotations

import os
import select

from nagaya.kernel.inotify import IN_ATTRIB, IN_CREATE, IN_DELETE, IN_MODIFY, IN_MOVED_TO, add_watch, inotify_init


class Watch:
    """Watches one directory's entries from the moment it is made: look at the files *after* making it."""

    def __init__(self, directory: str) -> None:
        self._fd = inotify_init()
        try:
            add_watch(self._fd, directory, IN_MODIFY | IN_CREATE | IN_MOVED_TO | IN_DELETE | IN_ATTRIB)
        except OSError:
            os.close(self._fd)
            raise

    def wait(self, timeout_s: float | None = None, *, also: int = -1) -> bool:
        """Block until something changed (or descriptor `also` is readable: True) or the time is over."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if also >= 0:
            poll.register(also, select.POLLIN)
        ready = poll.poll(None if timeout_s is None else max(0, int(timeout_s * 1000)))
        fds = [fd for fd, _ in ready]
        if self._fd in fds:
            os.read(self._fd, 1 << 16)
        return also in fds

    def close(self) -> None:
        os.close(self._fd)
