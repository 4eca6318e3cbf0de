"""Reading a machine's log: a part of it, the end of it, or all that is still to come."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

from nagaya.errors import NagayaError
from nagaya.manager.attachment import Connection, connect
from nagaya.protocol import control
from nagaya.storage.logs import LogLine, LogReader
from nagaya.storage.watch import Watch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.manager.machine import Machine


def read_logs(machine: Machine, *, follow: bool, since_ns: int, until_ns: int, tail: int) -> Iterator[LogLine]:
    """Lines from `since_ns` to `until_ns` (0 = open), at first only the last `tail` (-1 = all)."""
    watch = Watch(machine.directory) if follow else None
    reader = LogReader(machine.directory, machine.spec.log.files)
    waiter = _waiter(machine) if follow else None
    try:
        written = (line for line in reader.read() if line.time_ns >= since_ns and not 0 < until_ns < line.time_ns)
        yield from written if tail < 0 else deque(written, maxlen=tail)
        while watch is not None and waiter is not None:
            left = (until_ns - time.time_ns()) / 1e9 if until_ns else None
            if left is not None and left <= 0:
                return
            ended = watch.wait(left, also=waiter.fd)
            for line in reader.read():
                if line.time_ns >= since_ns and not 0 < until_ns < line.time_ns:
                    yield line
            if ended:
                return
    finally:
        reader.close()
        if watch is not None:
            watch.close()
        if waiter is not None:
            waiter.close()


def _waiter(machine: Machine) -> Connection | None:
    """A connection that becomes readable when the machine has ended; None when it does not run."""
    try:
        connection = connect(machine.runtime_dir, machine.name)
    except NagayaError:
        return None
    connection.send(control.request("wait"))
    return connection
