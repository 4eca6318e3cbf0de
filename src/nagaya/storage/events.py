"""What happened, for `nagaya events`: one JSON object a line, appended by whoever did it.

A line is one write(2) with O_APPEND, so writers in different processes do not mix. At 4 MiB the file becomes
`events.1`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator

from nagaya.static import NamedTuple

MAX_BYTES = 4 << 20


class Event(NamedTuple):
    """Something that happened to a machine, image or volume."""

    time_ns: int
    kind: str  # "machine" | "image" | "volume"
    action: str
    id: str
    name: str
    attributes: dict[str, str]


def record(path: str, kind: str, action: str, id: str, name: str, **attributes: str) -> None:
    """Append one event. Losing one (full disk, read-only store) must never fail the action that it tells of."""
    line = json.dumps(
        {"time": time.time_ns(), "kind": kind, "action": action, "id": id, "name": name, "attributes": attributes},
        separators=(",", ":"),
    ).encode()
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        return
    try:
        os.write(fd, line + b"\n")
        if os.fstat(fd).st_size > MAX_BYTES:
            os.replace(path, path + ".1")
    except OSError:
        return
    finally:
        os.close(fd)


def parse(raw: bytes) -> Event | None:
    """One line of the file, or None when it is damaged."""
    try:
        data = json.loads(raw)
        event = Event(
            int(data["time"]), str(data["kind"]), str(data["action"]), str(data["id"]), str(data["name"]),
            {str(key): str(value) for key, value in data["attributes"].items()},
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return event


def follow(path: str, *, since_ns: int, until_ns: int, wait: bool) -> Iterator[Event]:
    """Events from `since_ns` on; with `wait` also the coming ones, until `until_ns` (0 = without end)."""
    from nagaya.storage.watch import Watch  # lazy: only a follower watches

    watch = Watch(os.path.dirname(path)) if wait else None
    fd = -1
    try:
        for name in (path + ".1", path):
            if os.path.exists(name):
                fd = _reopen(fd, name)
                yield from _drain(fd, since_ns, until_ns)
        while watch is not None:
            if until_ns and time.time_ns() >= until_ns:
                return
            left = (until_ns - time.time_ns()) / 1e9 if until_ns else None
            watch.wait(left)
            if fd >= 0:
                yield from _drain(fd, since_ns, until_ns)
            if os.path.exists(path) and (fd < 0 or os.stat(path).st_ino != os.fstat(fd).st_ino):
                fd = _reopen(fd, path)
                yield from _drain(fd, since_ns, until_ns)
    finally:
        if fd >= 0:
            os.close(fd)
        if watch is not None:
            watch.close()


def _reopen(old: int, path: str) -> int:
    if old >= 0:
        os.close(old)
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _drain(fd: int, since_ns: int, until_ns: int) -> Iterator[Event]:
    rest = b""
    while chunk := os.read(fd, 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        for raw in lines:
            event = parse(raw)
            if event is not None and event.time_ns >= since_ns and not (until_ns and event.time_ns > until_ns):
                yield event
    if rest:  # a line that is being written: come back to it
        os.lseek(fd, -len(rest), os.SEEK_CUR)
