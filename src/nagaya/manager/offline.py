"""The agent's functions for a machine that does not run, with the same face as for one that does."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from nagaya.engines import open_engine
from nagaya.errors import Conflict, HostError
from nagaya.model.state import CREATED, EXITED
from nagaya.storage import machines, rootfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.manager.machine import Machine

CHUNK = 256 << 10
Write = Callable[[bytes], object]
Read = Callable[[int], bytes] | None
Streams = Callable[[Write, Read], tuple[int, str]]


@contextmanager
def open_offline(
    machine: Machine, argv: tuple[str, ...], *, data_disk: bool = False, locked: bool = False
) -> Iterator[Streams]:
    """A function that runs the applet to its end. The machine cannot be started meanwhile.

    `locked` is for who holds its command lock already.
    """
    machine.need_agent("look into it")
    with nullcontext() if locked else machine.lock():
        if machines.load_state(machine.paths, machine.id).phase not in (CREATED, EXITED):
            raise Conflict(f"machine '{machine.name}' has just been started", hint="try again")
        engine = open_engine(machine.spec.type)
        plan = rootfs.plan_disks if engine.rootfs_kind == "disk" else rootfs.plan_rootfs
        layout = plan(machine.directory, machine.spec)

        def run(write: Write, read: Read) -> tuple[int, str]:
            ends = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
            (stdin, feed), (out, stdout), (err, stderr) = ends
            try:
                pid = engine.start_applet(  # type: ignore[attr-defined]
                    layout, argv, stdin, stdout, stderr, data_disk=data_disk
                )
            except OSError as error:
                raise HostError.from_os(error, f"cannot open the root of machine '{machine.name}'") from None
            finally:
                for fd in (stdin, stdout, stderr):
                    os.close(fd)
            try:
                complaint = _pump(feed, out, err, write, read)
            finally:
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            return abs(status), complaint

        yield run


def _pump(feed: int, out: int, err: int, write: Write, read: Read) -> str:
    """Feed and drain until both outputs are closed; what came on standard error. Closes all three."""
    complaint = bytearray()
    poll = select.poll()
    for fd in (out, err):
        poll.register(fd, select.POLLIN)
    pending = b""
    if read is None:
        os.close(feed)
        feed = -1
    else:
        os.set_blocking(feed, False)
        poll.register(feed, select.POLLOUT)
    reading = {out, err}
    try:
        while reading:
            for fd, _ in poll.poll():
                if fd == feed:
                    pending, ended = _feed(feed, pending, read)
                    if ended:
                        poll.unregister(feed)
                        os.close(feed)
                        feed = -1
                    continue
                data = os.read(fd, CHUNK)
                if not data:
                    poll.unregister(fd)
                    reading.discard(fd)
                elif fd == out:
                    write(data)
                elif len(complaint) < 4096:
                    complaint += data
    finally:
        for fd in (feed, out, err):
            if fd >= 0:
                os.close(fd)
    return complaint.decode(errors="replace").strip()


def _feed(feed: int, pending: bytes, read: Read) -> tuple[bytes, bool]:
    """Write one piece; what is left of it, and whether the input has ended (or nobody wants it)."""
    if not pending and read is not None:
        pending = read(CHUNK)
        if not pending:
            return b"", True
    try:
        return pending[os.write(feed, pending) :], False
    except BlockingIOError:
        return pending, False
    except BrokenPipeError:
        return b"", True
