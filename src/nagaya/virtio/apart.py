"""Devices in a process of their own: what they compute takes no turn at Python from the vCPUs' threads.

The transport's registers stay with the machine. From DRIVER_OK on, the driver's kicks come to the other process, which
works on the guest's memory and raises the interrupt itself: no request passes through the machine's process.

One pair of sockets for each device: requests with one answer each, JSON with descriptors beside it; and news, which comes
unasked. The other process ends with the first of its sockets.
"""

from __future__ import annotations

import _socket
import errno
import mmap
import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from struct import Struct

from nagaya.errors import GuestFault, RemoteError
from nagaya.kernel.process import close_all_but, die_with
from nagaya.memory import GuestMemory, WriteLog
from nagaya.static import Any, NoReturn, Protocol
from nagaya.virtio.device import Activated, Device, QueuePlace, make_queue
from nagaya.virtio.loop import Loop
from nagaya.virtio.queue import Queue

_MOST_MESSAGE_BYTES = 1 << 16
_MOST_FDS = 2 + 64
_FD = Struct("i")
_SIGKILL = 9
_STEP_BYTES = 64  # of the page of flags: a cache line for each device


class Movable(Device, Protocol):
    """A device that may live in another process: its configuration space never changes."""

    def descriptors(self) -> tuple[int, ...]:
        """What it holds open."""


class Remote:
    """The machine's end of a device that works elsewhere: `Direct`."""

    direct = True

    def __init__(self, device: Movable, raised: memoryview) -> None:
        self.name, self.device_id = device.name, device.device_id
        self.features, self.queue_sizes = device.features, device.queue_sizes
        self.raised = raised
        """One byte, shared with the other process: it has raised an interrupt that the driver has not acknowledged."""
        self.on_lost: Callable[[str], None] | None = None
        """Hears that the other process is gone."""
        self._device = device
        self.writes: WriteLog | None = getattr(device, "writes", None)
        """The disk's log, which the other process marks: it was there before that was."""
        self._asking = threading.Lock()
        self._asks: _socket.socket | None = None
        self._news: _socket.socket | None = None
        self._live: Activated | None = None
        self._counters = device.counters()
        self._lost = ""

    def _connect(self, asks: _socket.socket, news: _socket.socket) -> None:
        self._asks, self._news = asks, news

    # -- Device

    def read_config(self, offset: int, size: int) -> bytes:
        """See `Device`."""
        return self._device.read_config(offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        """See `Device`: nothing in it can be written."""

    def activate(self, live: Activated) -> None:
        """See `Device`."""
        queues = [
            queue and QueuePlace(queue.index, queue.size, queue.descriptors, queue.available, queue.used)
            for queue in live.queues
        ]
        answer = self._ask(
            {
                "do": "activate", "features": live.features, "memory_bytes": live.memory.size_bytes, "queues": queues,
                "indices": [queue and queue.state() for queue in live.queues], "saved": live.saved,
            },
            (live.memory.fd, live.interrupt_fd, *live.kick_fds),
        )  # fmt: skip
        if "fault" in answer:
            raise GuestFault(answer["fault"])
        self._live = live
        if self._news is not None:
            live.loop.watch(self._news.fileno(), self._hear)

    def kicked(self, queue: int) -> None:
        """See `Device`: never, for the other process waits for the kicks."""

    def is_raised(self) -> bool:
        """See `Direct`."""
        return bool(self.raised[0])

    def acknowledged(self) -> None:
        """See `Direct`."""
        self.raised[0] = 0

    def reset(self) -> None:
        """See `Device`."""
        live, self._live = self._live, None
        if live is not None and self._news is not None:
            live.loop.unwatch(self._news.fileno())
        if not self._lost:
            self._ask({"do": "reset"})
            # What was wrong before the reset came before its answer, and is nothing to the next activation.
            while self._read_news():
                pass
        self.raised[0] = 0

    def descriptors(self) -> tuple[int, ...]:
        """What the device holds open, here too."""
        return self._device.descriptors()

    def close(self) -> None:
        """See `Device`."""
        for held in (self._asks, self._news):
            if held is not None:
                held.close()
        self._asks = self._news = None
        self._device.close()

    def save(self) -> dict[str, Any]:
        """See `Device`; "indices" are its queues', which nobody but the other process counts."""
        answer = self._ask({"do": "save"})
        if "fault" in answer:
            raise RemoteError(answer["fault"])
        saved: dict[str, Any] = answer["saved"]
        return saved

    def hold(self) -> Callable[[], None]:
        """Have the other process stand until the answer is called, as `Loop.hold` does it here."""
        self._ask({"do": "hold"})
        return lambda: self._release()

    def _release(self) -> None:
        self._ask({"do": "go on"})

    def counters(self) -> dict[str, int]:
        """See `Device`."""
        if not self._lost and self._asks is not None:
            self._counters = self._ask({"do": "counters"}).get("counters", self._counters)
        return dict(self._counters)

    # -- the other process

    def _ask(self, request: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        """One request and its answer; a process that is gone is a fault, and is told to whoever wants to know."""
        import json  # lazy: only machines with such devices

        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, b"".join(map(_FD.pack, fds)))] if fds else []
        with self._asking:
            if self._asks is None:
                return {"fault": f"{self.name} is closed"}
            try:
                self._asks.sendmsg([json.dumps(request).encode()], rights)
                data = self._asks.recv(_MOST_MESSAGE_BYTES)
            except OSError:
                data = b""
        if data:
            answer: dict[str, Any] = json.loads(data)
            return answer
        self._lose()
        return {"fault": self._lost}

    def _read_news(self) -> str | None:
        """What the other process has to tell; "" when it is gone, None when there is nothing."""
        if self._news is None:
            return None
        try:
            return self._news.recv(_MOST_MESSAGE_BYTES, _socket.MSG_DONTWAIT).decode()
        except BlockingIOError:
            return None

    def _hear(self) -> None:
        text = self._read_news()
        if text is None:  # the loop saw it before a reset took it away
            return
        live = self._live
        if not text:
            if live is not None and self._news is not None:
                live.loop.unwatch(self._news.fileno())
            self._lose()
            text = self._lost
        if live is not None:
            live.fault(GuestFault(text))

    def _lose(self) -> None:
        if not self._lost:
            self._lost = f"the process of {self.name} has ended"
            if self.on_lost is not None:
                self.on_lost(self._lost)


class DeviceProcess:
    """The process, from `start` to `close`, and the machine's ends of its devices."""

    def __init__(self, devices: Sequence[Movable]) -> None:
        """The devices belong to it from here on. There is no process yet."""
        self._flags = mmap.mmap(-1, mmap.PAGESIZE)  # MAP_SHARED
        self._moved = tuple(devices)
        view = memoryview(self._flags)
        steps = range(0, _STEP_BYTES * len(self._moved), _STEP_BYTES)
        self.devices = tuple(Remote(device, view[at : at + 1]) for device, at in zip(self._moved, steps, strict=True))
        self.pid = 0
        self.memory_writes: WriteLog | None = None
        """The guest memory's log, for the other process to mark: to be set before `start`."""

    def start(self) -> None:
        """Fork. To be called before the machine has other threads, with the rights that the devices are to have.

        Raises `OSError`.
        """
        pairs = [(_pair(), _pair()) for _ in self._moved]
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            ends = [(asks[1], news[1]) for asks, news in pairs]
            _run(self._moved, self.devices, ends, parent, self.memory_writes)
        self.pid = pid
        for remote, (asks, news) in zip(self.devices, pairs, strict=True):
            asks[1].close()
            news[1].close()
            remote._connect(asks[0], news[0])

    def close(self) -> None:
        """End the process and wait for it: its files' locks are free then. May be called twice."""
        for remote in self.devices:
            remote.close()
        pid, self.pid = self.pid, 0
        if pid:
            os.kill(pid, _SIGKILL)  # no request is under way: the transports have reset the devices
            os.waitpid(pid, 0)


def _pair() -> tuple[_socket.socket, _socket.socket]:
    return _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC, 0)


# -- in the other process


def _run(
    devices: Sequence[Movable],
    remotes: Sequence[Remote],
    ends: Sequence[tuple[_socket.socket, _socket.socket]],
    parent: int,
    writes: WriteLog | None,
) -> NoReturn:
    """Serve until the machine's process is gone; never returns."""
    import gc

    try:
        gc.disable()  # a collection would write to, and so copy, every page that we share with the machine's process
        die_with(parent)
        kept = [end.fileno() for pair in ends for end in pair]
        # Above all not the virtual machine, which lives as long as anybody holds it, nor others' ends of our sockets.
        close_all_but([2, *kept, *(fd for device in devices for fd in device.descriptors())], first=0)
        loops = []
        for device, remote, (asks, news) in zip(devices, remotes, ends, strict=True):
            loop = Loop(device.name)
            served = _Served(device, loop, remote.raised, asks, news, writes)
            loop.watch(asks.fileno(), served.answer)
            loops.append(loop)
        for loop in loops[1:]:
            loop.start()
        loops[0].run()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


class _Served:
    """One device here: what a transport is to it at home, without the registers."""

    def __init__(
        self, device: Movable, loop: Loop, raised: memoryview, asks: _socket.socket, news: _socket.socket,
        writes: WriteLog | None,
    ) -> None:  # fmt: skip
        self._device, self._loop, self._raised = device, loop, raised
        self._asks, self._news = asks, news
        self._writes = writes
        self._memory: GuestMemory | None = None
        self._interrupt_fd = -1
        self._kick_fds: list[int] = []
        self._active = False
        self._queues: tuple[Queue | None, ...] = ()
        self._counts = {"kicks": 0, "interrupts": 0}

    def answer(self) -> None:
        """Carry out one request."""
        import json

        data, fds = _receive(self._asks)
        if not data:
            os._exit(0)  # the machine is gone
        request = json.loads(data)
        if request["do"] == "activate":
            answer = self._activate(request, fds)
        elif request["do"] == "reset":
            self._stop()
            answer = {}
        elif request["do"] == "hold":
            self._stand()
            answer = {}
        elif request["do"] == "save":
            answer = {"saved": self._save()}
        else:
            answer = {"counters": {**self._device.counters(), **self._counts}}
        self._asks.send(json.dumps(answer).encode())

    def _activate(self, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        self._stop()
        memory_fd, self._interrupt_fd, *self._kick_fds = fds
        self._memory = GuestMemory(memory_fd, request["memory_bytes"])
        self._memory.writes = self._writes
        try:
            queues = tuple(
                place and make_queue(self._memory, QueuePlace(*place), request["features"], self._interrupt)
                for place in request["queues"]
            )
            for queue, indices in zip(queues, request["indices"], strict=True):
                if queue is not None:
                    queue.restore(tuple(indices))
            self._queues = queues
            self._active = True
            for number, fd in enumerate(self._kick_fds):
                if queues[number] is not None:
                    self._loop.watch(fd, partial(self._kicked, number))
            self._device.activate(
                Activated(
                    self._memory, queues, request["features"], self._loop, self._interrupt, self._fail,
                    saved=request["saved"],
                )
            )  # fmt: skip
        except GuestFault as fault:
            self._stop()
            return {"fault": str(fault)}
        return {}

    def _save(self) -> dict[str, Any]:
        queues = [queue and queue.state() for queue in self._queues]
        return {**self._device.save(), "indices": queues}

    def _stand(self) -> None:
        """Answer, and nothing else, until told to go on: no kick is looked at."""
        import json

        self._asks.send(b"{}")
        while True:
            data, _ = _receive(self._asks)
            if not data:
                os._exit(0)
            what = json.loads(data)["do"]
            if what == "go on":
                return
            answer = (
                {"saved": self._save()} if what == "save" else {"counters": {**self._device.counters(), **self._counts}}
            )
            self._asks.send(json.dumps(answer).encode())

    def _interrupt(self) -> None:
        self._raised[0] = 1
        self._counts["interrupts"] += 1
        os.eventfd_write(self._interrupt_fd, 1)

    def _kicked(self, number: int) -> None:
        try:
            os.eventfd_read(self._kick_fds[number])
        except BlockingIOError:
            return
        self._counts["kicks"] += 1
        if self._active:
            try:
                self._device.kicked(number)
            except GuestFault as fault:
                self._fail(fault)

    def _fail(self, fault: GuestFault) -> None:
        self._stop()
        self._news.send(str(fault).encode()[: _MOST_MESSAGE_BYTES // 2])

    def _stop(self) -> None:
        """Let go of the guest's memory, and of what came with it."""
        for fd in self._kick_fds:
            self._loop.unwatch(fd)
            os.close(fd)
        self._kick_fds = []
        self._queues = ()
        if self._active:
            self._active = False
            self._device.reset()
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        if self._interrupt_fd >= 0:
            os.close(self._interrupt_fd)
            self._interrupt_fd = -1


def _receive(asks: _socket.socket) -> tuple[bytes, list[int]]:
    """One message and its descriptors; b"" when the other end is gone."""
    try:
        data, rights, _, _ = asks.recvmsg(
            _MOST_MESSAGE_BYTES, _socket.CMSG_SPACE(_FD.size * _MOST_FDS), _socket.MSG_CMSG_CLOEXEC
        )
    except OSError as error:
        if error.errno in (errno.ECONNRESET, errno.EPIPE):
            return b"", []
        raise
    return data, [fd for _, _, packed in rights for (fd,) in _FD.iter_unpack(packed)]
