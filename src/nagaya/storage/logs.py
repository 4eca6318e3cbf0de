"""A machine's output on disk: CRI log lines, `TIME STREAM P|F TEXT`, one line of output each.

`F` closes a line of the program's output, `P` is a part whose newline has not come yet. The format is the one that
Kubernetes' container runtimes write (k8s.io/cri-api, "logging"), so `less` and log shippers read it as it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from nagaya.model.spec import LogLimits
from nagaya.static import NamedTuple

_STREAMS = {1: b" stdout ", 2: b" stderr "}


class LogLine(NamedTuple):
    """One piece of output. `data` has no newline; `partial` says that none followed it."""

    time_ns: int
    stream: str
    data: bytes
    partial: bool


class LogWriter:
    """Appends output and rotates by size: `log`, `log.1` … `log.N`, where N is `limits.files` - 1."""

    def __init__(self, directory: str, limits: LogLimits) -> None:
        self._path = f"{directory}/log"
        self._limits = limits
        self._fd = self._open()
        self._size = os.fstat(self._fd).st_size
        self._second = -1
        self._stamp = ""
        self.lost = ""  # why output could not be written, once that happened

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def _time(self) -> bytes:
        seconds, rest = divmod(time.time_ns(), 1_000_000_000)
        if seconds != self._second:
            self._second = seconds
            self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        return f"{self._stamp}.{rest:09d}Z".encode()

    def write(self, stream: int, data: bytes) -> None:
        """Append one chunk of stream 1 (stdout) or 2 (stderr). A full disk loses log, never the machine."""
        head = self._time() + _STREAMS[stream]
        lines = data.split(b"\n")
        last = lines.pop()
        text = b"".join([head + b"F " + line + b"\n" for line in lines])
        if last:
            text += head + b"P " + last + b"\n"
        try:
            os.write(self._fd, text)
            self._size += len(text)
            if self._size >= self._limits.max_bytes:
                self._rotate()
        except OSError as error:
            self.lost = error.strerror or str(error)

    def _rotate(self) -> None:
        for number in range(self._limits.files - 1, 0, -1):
            older = f"{self._path}.{number}"
            newer = f"{self._path}.{number - 1}" if number > 1 else self._path
            try:
                os.replace(newer, older)
            except FileNotFoundError:
                pass
        if self._limits.files == 1:
            os.unlink(self._path)
        # Opened before the old one is closed: were this to fail, a closed number would soon be another file's.
        fd = self._open()
        os.close(self._fd)
        self._fd, self._size = fd, 0

    def close(self) -> None:
        os.close(self._fd)


def parse_line(raw: bytes) -> LogLine | None:
    """One line of a log file (without its newline), or None when it is damaged or was cut off by a crash."""
    parts = raw.split(b" ", 3)
    if len(parts) != 4 or parts[2] not in (b"P", b"F") or parts[1] not in (b"stdout", b"stderr"):
        return None
    time_ns = parse_time(parts[0])
    return None if time_ns < 0 else LogLine(time_ns, parts[1].decode(), parts[3], parts[2] == b"P")


_days: dict[bytes, int] = {}


def parse_time(text: bytes) -> int:
    """Unix nanoseconds of `2026-11-23T13:37:50.123456789Z`, or -1."""
    import calendar  # lazy: only readers of logs need it

    if len(text) != 30 or text[19:20] != b"." or text[29:] != b"Z" or not text[20:29].isdigit():
        return -1
    second = text[:19]
    if second not in _days:
        try:
            parsed = time.strptime(second.decode("ascii"), "%Y-%m-%dT%H:%M:%S")
        except ValueError:
            return -1
        if len(_days) > 256:
            _days.clear()
        _days[second] = calendar.timegm(parsed)
    return _days[second] * 1_000_000_000 + int(text[20:29])


class LogReader:
    """Reads a machine's log from the oldest rotated file to the end, and on from there at each `read`."""

    def __init__(self, directory: str, files: int) -> None:
        self._path = f"{directory}/log"
        self._names = [f"{self._path}.{number}" for number in range(files - 1, 0, -1)] + [self._path]
        self._fd = -1
        self._rest = b""

    def read(self) -> Iterator[LogLine]:
        """All lines that have been written and not yet read. Follows rotation."""
        for name in self._names if self._fd < 0 else ():
            try:
                fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            self._switch(fd)
            yield from self._drain()
        while self._fd >= 0:
            yield from self._drain()
            successor = self._successor()
            if successor < 0:
                return
            yield from self._drain()  # what was written between our end of file and the rotation
            self._switch(successor)

    def _switch(self, fd: int) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._rest = fd, b""

    def _successor(self) -> int:
        """The file that came after ours in the chain, or -1 while ours is still the newest."""
        ours = os.fstat(self._fd)
        chain = list(reversed(self._names))  # newest first
        for at, name in enumerate(chain):
            if _is_at(name, ours):
                if not at:
                    return -1
                try:
                    fd = os.open(chain[at - 1], os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    return -1  # in the midst of a rotation: its writer is about to make it
                if _is_at(name, ours):
                    return fd
                os.close(fd)  # there was another rotation meanwhile, and that is not what came next
                return self._successor()
        for name in self._names:  # ours was rotated away while we slept: go on with the oldest there is
            try:
                return os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
        return -1

    def _drain(self) -> Iterator[LogLine]:
        while chunk := os.read(self._fd, 1 << 16):
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            for raw in lines:
                line = parse_line(raw)
                if line is not None:
                    yield line

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _is_at(path: str, file: os.stat_result) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (file.st_dev, file.st_ino)
