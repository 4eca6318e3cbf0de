"""The descriptors that QEMU is born with: it opens nothing by itself."""

from __future__ import annotations

import os
from contextlib import ExitStack

from nagaya.engines.vm import child
from nagaya.kernel import unix


class Inherited:
    """What QEMU is to inherit: each descriptor gets the number that it will have there, and is closed here by `stack`."""

    def __init__(self, stack: ExitStack) -> None:
        self.fds: list[int] = []
        self._stack = stack

    def add(self, fd: int) -> int:
        self._stack.callback(os.close, fd)
        self.fds.append(fd)
        return child.FIRST_FD + len(self.fds) - 1

    def lend(self, fd: int) -> int:
        """The same of one that somebody else closes."""
        self.fds.append(fd)
        return child.FIRST_FD + len(self.fds) - 1

    def connect(self) -> tuple[int, int]:
        """A stream socket to QEMU: (our end, which does not block; the number of QEMU's)."""
        ours, theirs = unix.socket_pair()
        os.set_blocking(ours, False)
        return ours, self.add(theirs)
