"""virtio-blk on a file that stands on another one (kernel/backing.py): what it has not written, it reads from there."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from nagaya.kernel import backing as files
from nagaya.virtio.blk import MOST_IOVECS, Blk, Request
from nagaya.virtio.views import after, first


class BackedBlk(Blk):
    """A disk whose file is new and empty, or has been used as one of these. One queue: a block is lifted by one at a time."""

    def __init__(self, name: str, path: str, backing: int, *, serial: str = "", fd: int = -1) -> None:
        """As `Blk`; `backing` is open for reading, and becomes the device's."""
        self._backing = backing
        self._backing_synced = False  # whoever made it did not wait for that
        super().__init__(name, path, serial=serial, fd=fd)

    def descriptors(self) -> tuple[int, ...]:
        """See `apart.Movable`: the file's, then that of what it stands on."""
        return (*super().descriptors(), self._backing)

    def _read(self, request: Request) -> None:
        views: Sequence[memoryview] = request.buffers
        begin, end = request.offset, request.offset + request.size_bytes
        for at, stop, own in files.layers(self._fd, begin, end):
            while at < stop:
                wanted = first(views, stop - at)[:MOST_IOVECS]
                count = os.preadv(self._fd if own else self._backing, wanted, at)
                if not count and own:
                    raise OSError(errno.EIO, "the disk ended")
                if not count:  # it was grown since: nothing of it is below
                    count = sum(len(view) for view in wanted)
                    for view in wanted:
                        view[:] = bytes(len(view))
                views = after(views, count)
                at += count

    def _write(self, request: Request) -> None:
        files.lift(self._fd, self._backing, request.offset, request.size_bytes)
        super()._write(request)
        if self._writes_through and not self._backing_synced:
            self._sync()

    def _sync(self) -> None:
        if not self._backing_synced:
            os.fdatasync(self._backing)
            self._backing_synced = True
        super()._sync()

    def _clear(self, offset: int, size_bytes: int, *, hint: bool, keep: bool) -> None:
        """A hole would show what is below: there, zeros are written, and a hint is not taken."""
        end = offset + size_bytes
        for start, stop in files.holes(self._backing, offset, end):
            super()._clear(start, stop - start, hint=hint, keep=keep)
        if not hint:
            files.write_zeros(self._fd, self._backing, offset, end)
