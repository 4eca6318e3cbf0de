"""The frame that both our stream protocols (agent, control) are made of.

    u32 length of payload | u16 type | u16 flags, zero | u32 channel      little-endian, then the payload

The peer is hostile: the length is checked before anything is buffered, and the decoder holds at most one
frame beyond what it was fed.
"""

from __future__ import annotations

from struct import Struct

from nagaya.errors import RemoteError
from nagaya.static import NamedTuple

HEADER = Struct("<IHHI")
MAX_PAYLOAD = 1 << 20


class Frame(NamedTuple):
    type: int
    channel: int
    payload: bytes


def encode(type_: int, channel: int = 0, payload: bytes | memoryview = b"") -> bytes:
    """One frame as bytes. `payload` is at most `MAX_PAYLOAD` bytes."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"payload of {len(payload)} bytes is longer than {MAX_PAYLOAD}")
    return HEADER.pack(len(payload), type_, 0, channel) + payload


class Decoder:
    """Cuts a byte stream into frames. Raises `RemoteError` at the first violation and must not be fed again."""

    def __init__(self, *, max_payload: int = MAX_PAYLOAD) -> None:
        self._max = max_payload
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        buffer = self._buffer
        buffer += data
        frames: list[Frame] = []
        at = 0
        while len(buffer) - at >= HEADER.size:
            length, type_, flags, channel = HEADER.unpack_from(buffer, at)
            if length > self._max or flags:
                raise RemoteError(f"protocol violation: frame of type {type_} with length {length}, flags {flags}")
            end = at + HEADER.size + length
            if len(buffer) < end:
                break
            frames.append(Frame(type_, channel, bytes(memoryview(buffer)[at + HEADER.size : end])))
            at = end
        if at:
            del buffer[:at]
        return frames

    def rest(self) -> bytes:
        """What has come of a frame that is not complete."""
        return bytes(self._buffer)

    @property
    def pending(self) -> int:
        """Bytes held of a frame that is not complete: non-zero at end of stream means a cut-off peer."""
        return len(self._buffer)
