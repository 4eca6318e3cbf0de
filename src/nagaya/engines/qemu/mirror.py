"""Where QEMU copies a disk to that moves: an NBD server whose disk is the frames of a migration (NBD, doc/proto.md).

QEMU's `blockdev-mirror` connects to the other end of a pair of sockets, and then writes: all that is in use, and what the guest
writes meanwhile. Nothing is ever read. Each write is a frame on its way when it is answered.
"""

from __future__ import annotations

import os
from struct import Struct

from nagaya.errors import RemoteError
from nagaya.migration import frames
from nagaya.migration.stream import Stream

_GREETING, _OPTION_MAGIC, _REPLY_MAGIC = b"NBDMAGICIHAVEOPT", b"IHAVEOPT", 0x3E889045565A9
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_OPTION, _OPTION_REPLY = Struct(">8sII"), Struct(">QIII")
_OPT_ABORT, _OPT_GO = 2, 7
_ACK, _INFO, _UNSUPPORTED = 1, 3, 1 << 31 | 1
_EXPORT = Struct(">HQH")
_HAS_FLAGS, _SEND_FLUSH, _SEND_TRIM, _SEND_WRITE_ZEROES = 1, 4, 32, 64
_REQUEST, _REPLY = Struct(">IHHQQI"), Struct(">IIQ")
_REQUEST_MAGIC, _SIMPLE_REPLY_MAGIC = 0x25609513, 0x67446698
_WRITE, _DISCONNECT, _FLUSH, _TRIM, _WRITE_ZEROES = 1, 2, 3, 4, 6
_NOT_SUPPORTED = 95
_MOST_OPTION_BYTES, _MOST_WRITE_BYTES = 4096, 32 << 20


class MirrorServer:
    """Serves one connection, `fd`, which is the caller's; `serve` blocks until QEMU has ended it."""

    def __init__(self, fd: int, size_bytes: int, stream: Stream) -> None:
        self._fd, self._size_bytes, self._stream = fd, size_bytes, stream

    def serve(self) -> None:
        """Raises `RemoteError` when QEMU breaks the protocol, or the stream breaks; `OSError`."""
        self._write(_GREETING + Struct(">H").pack(_FIXED_NEWSTYLE | _NO_ZEROES))
        self._read(4)  # the client's flags, which say that it knows ours
        if self._negotiate():
            while self._answer():
                continue

    def _negotiate(self) -> bool:
        """Until it has chosen the one disk that there is; False when it goes."""
        while True:
            magic, option, length = _OPTION.unpack(self._read(_OPTION.size))
            if magic != _OPTION_MAGIC or length > _MOST_OPTION_BYTES:
                raise RemoteError("QEMU's NBD client sent what makes no sense")
            self._read(length)
            if option == _OPT_GO:
                flags = _HAS_FLAGS | _SEND_FLUSH | _SEND_TRIM | _SEND_WRITE_ZEROES
                self._reply(option, _INFO, _EXPORT.pack(0, self._size_bytes, flags))
                self._reply(option, _ACK)
                return True
            self._reply(option, _ACK if option == _OPT_ABORT else _UNSUPPORTED)
            if option == _OPT_ABORT:
                return False

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self._write(_OPTION_REPLY.pack(_REPLY_MAGIC, option, kind, len(data)) + data)

    def _answer(self) -> bool:
        """One request; False for the last."""
        magic, _, kind, cookie, start, count = _REQUEST.unpack(self._read(_REQUEST.size))
        if magic != _REQUEST_MAGIC or (kind == _WRITE and count > _MOST_WRITE_BYTES):
            raise RemoteError("QEMU's NBD client sent what makes no sense")
        error = 0
        if kind == _DISCONNECT:
            return False
        if kind == _WRITE:
            for at in range(start, start + count, frames.DATA_BYTES):
                data = self._read(min(frames.DATA_BYTES, start + count - at))
                self._stream.send(frames.BLOCKS, at, data)
        elif kind in (_TRIM, _WRITE_ZEROES):
            if count:
                self._stream.send(frames.HOLE, start, frames.LENGTH.pack(count))
        elif kind != _FLUSH:  # what is under way is waited for by rounds
            error = _NOT_SUPPORTED
        self._write(_REPLY.pack(_SIMPLE_REPLY_MAGIC, error, cookie))
        return True

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = os.read(self._fd, count - len(data))
            if not part:
                raise RemoteError("QEMU has ended the copying of the machine's disk")
            data += part
        return bytes(data)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
