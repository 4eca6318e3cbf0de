"""Bytes spread over the memoryviews of a descriptor chain: guests may cut their buffers wherever they like.

Nothing here copies more than its caller says, however long the guest's buffers are.
"""

from __future__ import annotations

from collections.abc import Sequence


def gather(views: Sequence[memoryview], size_bytes: int) -> bytes:
    """A copy of the first `size_bytes` bytes, or of all there are when that is less."""
    if views and len(views[0]) >= size_bytes:
        return bytes(views[0][:size_bytes])
    parts = []
    for view in views:
        part = bytes(view[:size_bytes])
        parts.append(part)
        size_bytes -= len(part)
        if not size_bytes:
            break
    return b"".join(parts)


def scatter(views: Sequence[memoryview], data: bytes | bytearray | memoryview) -> int:
    """Copy `data` to the front of `views`; how much of it fitted."""
    done = 0
    for view in views:
        part = min(len(view), len(data) - done)
        view[:part] = data[done : done + part]
        done += part
        if done == len(data):
            break
    return done


def after(views: Sequence[memoryview], skip_bytes: int) -> list[memoryview]:
    """What follows the first `skip_bytes` bytes."""
    for number, view in enumerate(views):
        if skip_bytes < len(view):
            return [view[skip_bytes:], *views[number + 1 :]] if skip_bytes else list(views[number:])
        skip_bytes -= len(view)
    return []


def first(views: Sequence[memoryview], size_bytes: int) -> list[memoryview]:
    """The first `size_bytes` bytes, or all there are when that is less."""
    found = []
    for view in views:
        if size_bytes <= 0:
            break
        found.append(view[:size_bytes] if size_bytes < len(view) else view)
        size_bytes -= len(view)
    return found
