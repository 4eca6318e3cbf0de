"""Relaying TCP connections between a published port and the machine, by splice(2): the bytes never come up to us.

A connection keeps two descriptors; a pipe is borrowed from a pool only while bytes are under way. Ends are told on one
by one (a FIN for a FIN), and what breaks off on one side breaks off on the other (a RST for a RST).
"""

from __future__ import annotations

import errno
import fcntl
import os
import select

from nagaya.kernel import inet, unix
from nagaya.supervisor.loop import READ, WRITE, Loop, Timer

MOST_CONNECTIONS = 4000
PIPE_BYTES = 256 << 10
SMALL_BYTES = 16 << 10  # less than this at once: most likely there is no more to read yet
BURST = 8  # pipefuls that a connection may move before others get their turn
IDLE_PIPES = 32
RETRY_S = 0.1
_SPLICE = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_HANG_UP, _ERROR = select.EPOLLHUP, select.EPOLLERR


class Pipes:
    """Empty pipes, kept for the next who needs one."""

    def __init__(self) -> None:
        self._idle: list[tuple[int, int]] = []

    def take(self) -> tuple[int, int]:
        """(read end, write end). Raises `OSError` when there are no descriptors left."""
        if self._idle:
            return self._idle.pop()
        pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            pass  # this user has too much in pipes already: the usual 64 KiB do as well
        return pipe

    def give_back(self, pipe: tuple[int, int], *, empty: bool = True) -> None:
        if empty and len(self._idle) < IDLE_PIPES:
            self._idle.append(pipe)
            return
        for fd in pipe:
            os.close(fd)

    def close(self) -> None:
        for pipe in self._idle:
            for fd in pipe:
                os.close(fd)
        self._idle = []


class _Way:
    """One direction of a connection."""

    __slots__ = ("ended", "finished", "held", "pipe", "sink", "source")

    def __init__(self, source: int, sink: int) -> None:
        self.source = source
        self.sink = sink
        self.pipe: tuple[int, int] | None = None
        self.held = 0  # bytes in the pipe, which the sink does not take now
        self.ended = False  # the source has nothing more
        self.finished = False  # and the sink knows it


class _Connection:
    """A client's connection and ours to the machine."""

    __slots__ = ("_client", "_connected", "_hung_up", "_inward", "_machine", "_outward", "_relay", "open")

    def __init__(self, relay: TcpRelay, client: int, machine: int) -> None:
        self._relay = relay
        self._client = client
        self._machine = machine
        self._inward = _Way(client, machine)
        self._outward = _Way(machine, client)
        self._connected = False
        self._hung_up: set[int] = set()
        self.open = True
        # Nothing is read from the client before there is somebody to send it to.
        relay.loop.watch(machine, self._machine_ready, WRITE)
        relay.loop.watch(client, self._client_ready, 0)

    def _client_ready(self, events: int) -> None:
        self._ready(self._client, self._inward, self._outward, events)

    def _machine_ready(self, events: int) -> None:
        if not self._connected:
            if inet.take_error(self._machine):
                self.break_off()
                return
            self._connected = True
        self._ready(self._machine, self._outward, self._inward, events)

    def _ready(self, fd: int, reads: _Way, writes: _Way, events: int) -> None:
        """`reads` takes from `fd`, `writes` gives to it."""
        reading = self._connected and not reads.ended and not reads.held
        try:
            if events & WRITE and self._connected:
                self._move(writes)
            if events & READ and reading:
                self._move(reads)
            elif events & _ERROR:
                self._pass_last_words()
                self.break_off()
                return
            elif events & _HANG_UP:
                self._hung_up.add(fd)  # reported again and again for as long as we watch: see `_watch`
        except OSError:
            self._pass_last_words()
            self.break_off()
            return
        if self._inward.finished and self._outward.finished:
            self._close()
            return
        self._watch(self._client, self._inward, self._outward)
        self._watch(self._machine, self._outward, self._inward)

    def _watch(self, fd: int, reads: _Way, writes: _Way) -> None:
        mask = READ if self._connected and not reads.ended and not reads.held else 0
        if writes.held or (fd == self._machine and not self._connected):
            mask |= WRITE
        if not mask and fd in self._hung_up:
            self._relay.loop.forget(fd)
        else:  # with an empty mask a broken connection is still told
            self._relay.loop.watch(fd, self._client_ready if fd == self._client else self._machine_ready, mask)

    def _move(self, way: _Way, *, breaking: bool = False) -> int:
        """As much as both sides take now, within a burst; how many bytes. Raises `OSError` when one of them is gone.

        `breaking`: the connection is broken off next, so an end is none. (A socket tells of a RST once, and then of an end.)
        """
        moved, pipe = 0, way.pipe
        if pipe is None:
            pipe = way.pipe = self._relay.pipes.take()
        for _ in range(BURST):
            if not way.held:
                try:
                    way.held = os.splice(way.source, pipe[1], PIPE_BYTES, flags=_SPLICE)
                except BlockingIOError:
                    break
                if not way.held:
                    way.ended = True
                    break
            taken = way.held
            try:
                while way.held:
                    passed = os.splice(pipe[0], way.sink, way.held, flags=_SPLICE)
                    way.held -= passed
                    moved += passed
            except BlockingIOError:
                break
            if taken < SMALL_BYTES:
                break
        if not way.held:
            self._relay.pipes.give_back(pipe)
            way.pipe = None
            if way.ended and not way.finished and not breaking:
                way.finished = True
                inet.end_writing(way.sink)
        return moved

    def _pass_last_words(self) -> None:
        """One side is gone, and takes no more; what it had said before that is still here, as far as the other takes it now.

        A server that does not want the rest of a request answers so, and breaks off.
        """
        for way in (self._inward, self._outward):
            try:
                for _ in range(BURST):
                    if not self._connected or way.finished or not self._move(way, breaking=True):
                        break
            except OSError:
                continue  # that is the side that is gone

    def break_off(self) -> None:
        self._let_go()
        inet.reset(self._client)
        inet.reset(self._machine)
        self._relay.gone(self)

    def _close(self) -> None:
        self._let_go()
        os.close(self._client)
        os.close(self._machine)
        self._relay.gone(self)

    def _let_go(self) -> None:
        self.open = False
        for way in (self._inward, self._outward):
            self._relay.loop.forget(way.source)
            if way.pipe is not None:
                self._relay.pipes.give_back(way.pipe, empty=not way.held)
                way.pipe = None


class TcpRelay:
    """All TCP ports of one machine. At most `most` connections; further ones wait in the listeners' queues."""

    def __init__(self, loop: Loop, *, most: int = MOST_CONNECTIONS) -> None:
        self.loop = loop
        self.pipes = Pipes()
        self._most = most
        self._connections: set[_Connection] = set()
        self._listeners: list[tuple[int, str, int]] = []
        self._resting: Timer | None = None
        self._full = False

    def add(self, listener: int, address: str, port: int) -> None:
        """Relay what comes to `listener` to the machine's `address` and `port`."""
        self._listeners.append((listener, address, port))
        self._listen(listener, address, port)

    def _listen(self, listener: int, address: str, port: int) -> None:
        self.loop.watch(listener, lambda events: self._accept(listener, address, port))

    def _accept(self, listener: int, address: str, port: int) -> None:
        if len(self._connections) >= self._most:
            self._stop_accepting()
            self._full = True
            return
        try:
            client = unix.accept(listener)
        except (BlockingIOError, ConnectionAbortedError, InterruptedError):
            return
        except OSError:  # no descriptor, or no memory, for it: it waits
            self._stop_accepting()
            self._resting = self.loop.after(RETRY_S, self._accept_again)
            return
        os.set_blocking(client, False)
        try:
            machine = inet.connect_tcp(address, port)
        except OSError as error:
            inet.reset(client)
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL):
                self._stop_accepting()
                self._resting = self.loop.after(RETRY_S, self._accept_again)
            return
        inet.tune(client)
        inet.tune(machine)
        self._connections.add(_Connection(self, client, machine))

    def _stop_accepting(self) -> None:
        for listener, _, _ in self._listeners:
            self.loop.forget(listener)

    def _accept_again(self) -> None:
        self._resting = None
        for listener, address, port in self._listeners:
            self._listen(listener, address, port)

    def gone(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        if self._full:
            self._full = False
            self._accept_again()

    @property
    def connections(self) -> int:
        return len(self._connections)

    def close(self) -> None:
        """Break off every connection; the listeners are their owner's."""
        self._full = False
        if self._resting is not None:
            self._resting.cancel()
        self._stop_accepting()
        for connection in list(self._connections):
            connection.break_off()
        self.pipes.close()
