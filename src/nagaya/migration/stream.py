"""The stream between two Nagayas: whole frames over one descriptor or two, with an end to every wait."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

from nagaya.errors import RemoteError
from nagaya.migration import frames
from nagaya.migration.frames import Frame

PATIENCE_S = 30.0
"""Without a byte in the direction that is waited for, the other side is taken for gone."""
_MOST_WRITE_BYTES = 1 << 20


class Stream:
    """Reads not a byte beyond the frame that was asked for: another process may go on with the descriptors.

    `alarm` is a descriptor, and `on_alarm` what to call when it is readable while the stream is waited for; what that
    raises comes out of the call. The descriptors are the caller's.
    """

    def __init__(
        self, read_fd: int, write_fd: int, *, alarm: int = -1, on_alarm: Callable[[], None] | None = None
    ) -> None:
        self.read_fd, self.write_fd = read_fd, write_fd
        self.patience_s = PATIENCE_S
        self.sent_bytes = 0
        self._alarm, self._on_alarm = alarm, on_alarm
        for fd in (read_fd, write_fd):
            os.set_blocking(fd, False)

    def greet(self) -> None:
        """Tell the version that we speak, and hear the other side's. Raises `RemoteError`."""
        self._write(frames.preface())
        frames.check_preface(self._read(frames.PREFACE_BYTES))

    def send(self, type_: int, where: int = 0, payload: bytes | memoryview = b"") -> None:
        """One frame. Of a payload that somebody else may write to, a copy. Raises `RemoteError`."""
        self._write(frames.encode(type_, where, payload))
        if len(payload):
            self._write(payload)

    def send_json(self, type_: int, value: object) -> None:
        header, payload = frames.encode_json(type_, value)
        self._write(header + payload)

    def receive(self, *, patience_s: float | None = None) -> Frame:
        """The next frame, checked. Raises `RemoteError`."""
        type_, length, where, sum_ = frames.parse_header(self._read(frames.HEADER.size, patience_s))
        payload = self._read(length) if length else b""
        frames.check_payload(type_, payload, sum_)
        return Frame(type_, where, payload)

    def expect(self, type_: int, *, patience_s: float | None = None) -> Frame:
        """That frame and no other. Raises what a refusal says, and `RemoteError`."""
        frame = self.receive(patience_s=patience_s)
        if frame.type in (frames.REFUSE, frames.ABORT):
            raise frames.parse_refusal(frame)
        if frame.type != type_:
            raise frames.unexpected(frame)
        return frame

    def is_readable(self) -> bool:
        """Whether something has come, be it the end."""
        poll = select.poll()
        poll.register(self.read_fd, select.POLLIN)
        return bool(poll.poll(0))

    def _read(self, count: int, patience_s: float | None = None) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                part = os.read(self.read_fd, count - len(data))
            except BlockingIOError:
                self._wait(self.read_fd, select.POLLIN, self.patience_s if patience_s is None else patience_s)
                continue
            except OSError as error:
                raise RemoteError(f"the stream to the other side broke: {error.strerror}") from None
            if not part:
                raise RemoteError("the stream ended: the other side has given up, or is gone")
            data += part
        return bytes(data)

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            try:
                written = os.write(self.write_fd, view[:_MOST_WRITE_BYTES])
            except BlockingIOError:
                self._wait(self.write_fd, select.POLLOUT, self.patience_s)
                continue
            except OSError as error:
                raise RemoteError(f"the stream to the other side broke: {error.strerror}") from None
            self.sent_bytes += written
            view = view[written:]

    def _wait(self, fd: int, mask: int, patience_s: float) -> None:
        poll = select.poll()
        poll.register(fd, mask)
        if self._alarm >= 0:
            poll.register(self._alarm, select.POLLIN)
        deadline_s = time.monotonic() + patience_s
        while True:
            left_s = deadline_s - time.monotonic()
            ready = dict(poll.poll(max(0.0, left_s) * 1000))
            if self._alarm in ready and self._on_alarm is not None:
                self._on_alarm()
            if fd in ready:
                return
            if left_s <= 0:
                raise RemoteError(f"the other side has been silent for {patience_s:.0f} s")
