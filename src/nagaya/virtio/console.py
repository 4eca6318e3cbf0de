"""virtio-console (virtio 1.2, section 5.3): the machine's console, and named byte channels like the agent's.

No byte is lost or copied on the way. While the guest offers no buffer, the back end is not read; while the back end
takes nothing, the guest's own buffers hold its output, partly written ones included.
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
import struct
from collections import deque
from collections.abc import Callable, Sequence

from nagaya.errors import GuestFault
from nagaya.static import Any
from nagaya.virtio.device import CONSOLE, Activated, guard
from nagaya.virtio.queue import Chain, Queue
from nagaya.virtio.turn import Turn
from nagaya.virtio.views import after, gather, scatter

F_SIZE = 1 << 0
F_MULTIPORT = 1 << 1

DEVICE_READY = 0
PORT_ADD = 1
PORT_READY = 3
CONSOLE_PORT = 4
RESIZE = 5
PORT_OPEN = 6
PORT_NAME = 7

CONTROL_RECEIVE, CONTROL_TRANSMIT = 2, 3
QUEUE_SIZE = 128
_MESSAGE = struct.Struct("<IHH")  # struct virtio_console_control: id, event, value
_SIZE = struct.Struct("<HH")
_BURST = 64
"""Chains moved before the other devices on the loop have their turn."""
_MOST_UNREAD = 512
"""Control messages that may wait for the guest. It decides how many there are, and must not fill our memory so."""


def queue_numbers(port: int) -> tuple[int, int]:
    """The receive and the transmit queue of a port; the control queues sit between port 0's and port 1's."""
    return (2 * port + 2, 2 * port + 3) if port else (0, 1)


def own_descriptor(fd: int) -> int:
    """A non-blocking descriptor for what `fd` is open on, for a `Port` to have; `fd` stays the caller's.

    A terminal or pipe is opened anew, for the mode belongs to the opening, and other processes share the caller's.
    A socket cannot be, nor what another user made: its mode changes for all.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
        flags = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        try:
            return os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except PermissionError:  # another user's, as after su(1)
            pass
    made = os.dup(fd)
    os.set_blocking(made, False)
    return made


def _is_pollable(fd: int) -> bool:
    if fd < 0:
        return False
    with select.epoll() as probe:
        try:
            probe.register(fd)
        except PermissionError:  # a regular file, or /dev/null: always ready, and epoll refuses it
            return False
    return True


class Port:
    """One port and its back end: two non-blocking descriptors, or one (a socket, a terminal) as both.

    The descriptors belong to the port from here on. Without an `output_fd`, what the guest writes is dropped.
    """

    def __init__(self, name: str, *, console: bool = False, input_fd: int = -1, output_fd: int = -1) -> None:
        """`name` is what the guest sees: /dev/virtio-ports/NAME; with `console` it is a terminal, hvc0."""
        self.name = name
        self.console = console
        self.input_bytes = 0
        self.output_bytes = 0
        self.dropped_bytes = 0
        self.guest_open = False
        self._input_fd = input_fd
        self._output_fd = output_fd
        self._turn = Turn()
        self._receive: Queue | None = None
        self._transmit: Queue | None = None
        self._held: tuple[Chain, int] | None = None  # output that the back end did not take, and how much it did
        self._skip = 0  # bytes of the next buffer that were written before the machine was saved
        self._starved = False  # the guest has no buffer for input
        self._live: Activated | None = None
        self._watched: set[int] = set()
        self._input_polls = _is_pollable(input_fd)
        self._lost: Callable[[], None] = self._forget

    @property
    def host_open(self) -> bool:
        return self._input_fd >= 0 or self._output_fd >= 0

    def start(
        self,
        live: Activated,
        *,
        queues: tuple[Queue | None, Queue | None],
        lost: Callable[[], None],
    ) -> None:
        """Use these queues, receive and transmit; `lost` is called when the back end goes away."""
        self._live, self._lost = live, lost
        self._receive, self._transmit = queues
        self._starved = False

    @property
    def holds(self) -> bool:
        """Whether the back end has not taken all of a buffer."""
        return self._held is not None

    def save(self) -> dict[str, Any]:
        """See `Device.save`."""
        return {
            "guest_open": self.guest_open, "host_open": self.host_open, "written": self._held[1] if self._held else 0,
        }  # fmt: skip

    def go_on(self, saved: dict[str, Any]) -> None:
        """As `save` had it."""
        self.guest_open = saved["guest_open"]
        self._skip = saved["written"]

    def take_waiting(self) -> bytes:
        """What the back end has sent and the guest has not been given, for another host to give it. While held."""
        waiting = b""
        while self._input_fd >= 0:
            try:
                data = os.read(self._input_fd, 1 << 16)
            except OSError:
                break
            if not data:
                break
            waiting += data
        return waiting

    def stop(self) -> None:
        """Touch no queue any more. What the back end has not taken yet of the guest's buffers is gone with them."""
        self._forget()
        self._live = self._receive = self._transmit = self._held = None
        self.guest_open = False

    def attach(self, input_fd: int, output_fd: int) -> None:
        """Take these descriptors in place of the old ones, which are closed."""
        self._close_descriptors()
        self._input_fd, self._output_fd = input_fd, output_fd
        self._input_polls = _is_pollable(input_fd)
        self.move()

    def detach(self) -> None:
        """Close the back end. Output that it had not taken is dropped, with what follows."""
        self._close_descriptors()
        self.transmit()

    def close(self) -> None:
        self._close_descriptors()
        self._turn.close()

    def _close_descriptors(self) -> None:
        self._forget()
        for fd in {self._input_fd, self._output_fd} - {-1}:
            os.close(fd)
        self._input_fd = self._output_fd = -1

    def move(self) -> None:
        """The back end is ready for something."""
        self.transmit()
        self.receive()

    def feed(self) -> None:
        """The guest has added buffers for input."""
        self._starved = False
        self.receive()

    def receive(self) -> None:
        """From the back end into the guest's buffers, until either has no more."""
        queue = self._receive
        if queue is None or self._input_fd < 0 or not self.guest_open or self._starved:
            self._watch()
            return
        queue.disarm()
        for _ in range(_BURST):
            chain = queue.pop()
            if chain is None:
                if queue.rearm():
                    continue
                self._starved = True
                break
            if not chain.writable_bytes:
                raise GuestFault(f"port {self.name} was given a buffer for input that takes none")
            count = self._read(chain)
            if count <= 0:
                queue.undo_pop()
                break
            queue.publish(chain, count)
            self.input_bytes += count
        queue.signal()
        self._watch()

    def _read(self, chain: Chain) -> int:
        """How many bytes there were; 0 when there are none just now, or never again."""
        try:
            count = os.readv(self._input_fd, chain.writable)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:  # a terminal that hung up, a reset connection
            count = 0
        if not count:
            self._input_ended()
        return count

    def _input_ended(self) -> None:
        """Nothing more to read. That says nothing of the other direction, unless both are one broken connection."""
        fd = self._input_fd
        if fd == self._output_fd:
            poll = select.poll()
            poll.register(fd, 0)
            if any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0)):
                self._break()
                self.transmit()
                return
        if self._live is not None and fd in self._watched:
            self._live.loop.unwatch(fd)
            self._watched.remove(fd)
        if fd != self._output_fd:
            os.close(fd)
        self._input_fd = -1

    def transmit(self) -> None:
        """From the guest's buffers to the back end, until either has no more."""
        queue = self._transmit
        if queue is None:
            return
        if self._held is None or self._write(queue, *self._held):
            queue.disarm()
            for _ in range(_BURST):
                chain = queue.pop()
                if chain is None:
                    if queue.rearm():
                        continue
                    break
                skip, self._skip = min(self._skip, chain.readable_bytes), 0
                if not self._write(queue, chain, skip):
                    break
            else:
                self._ask_turn()
        queue.signal()
        self._watch()

    def _write(self, queue: Queue, chain: Chain, done: int) -> bool:
        """Write what follows the first `done` bytes of a chain; False when the back end is full."""
        self._held = None
        if self._output_fd >= 0 and chain.readable_bytes:
            try:
                count = os.writev(self._output_fd, after(chain.readable, done))
            except (BlockingIOError, InterruptedError):
                count = 0
            except OSError:  # nobody reads any more
                self._break()
                count = 0
            done += count
            self.output_bytes += count
            if self._output_fd >= 0 and done < chain.readable_bytes:
                self._held = (chain, done)
                return False
        self.dropped_bytes += chain.readable_bytes - done
        queue.publish(chain, 0)
        return True

    def _break(self) -> None:
        self._close_descriptors()
        self._lost()

    def _watch(self) -> None:
        """Ask the loop for what can be gone on with, and for no more: it would call back without end."""
        if self._live is None:
            return
        wanted: dict[int, tuple[bool, bool]] = {}
        if self._input_fd >= 0 and self._receive is not None and self.guest_open and not self._starved:
            if self._input_polls:
                wanted[self._input_fd] = (True, False)
            else:
                self._ask_turn()
        if self._held is not None:
            wanted[self._output_fd] = (self._output_fd in wanted, True)
        for fd in self._watched - wanted.keys():
            self._live.loop.unwatch(fd)
        for fd, (readable, writable) in wanted.items():
            self._live.loop.watch(fd, self._guarded_move, readable=readable, writable=writable)
        self._watched = set(wanted)

    def _ask_turn(self) -> None:
        if self._live is not None:
            self._turn.ask(self._live.loop, self._guarded_move)

    def _guarded_move(self) -> None:
        guard(self._live, self.move)

    def _forget(self) -> None:
        if self._live is not None:
            for fd in self._watched:
                self._live.loop.unwatch(fd)
        self._turn.cancel()
        self._watched = set()


class Console:
    """The device: `ports[0]` is there for every driver, the others for those that know several ports."""

    device_id = CONSOLE

    def __init__(self, name: str, ports: Sequence[Port], *, columns: int = 0, rows: int = 0) -> None:
        """`columns` and `rows` are the size of the consoles' windows; 0 when nobody knows."""
        self.name = name
        self.ports = tuple(ports)
        self.features = F_SIZE | F_MULTIPORT
        count = len(self.ports)
        self.queue_sizes = (QUEUE_SIZE,) * (2 * count + 2)
        self._window = (columns, rows)
        self._config = self._make_config()
        self._live: Activated | None = None
        self._unread: deque[bytes] = deque()
        self._turn = Turn()
        self._messages = 0

    def _make_config(self) -> bytes:
        return struct.pack("<HHI", *self._window, len(self.ports))

    def read_config(self, offset: int, size: int) -> bytes:
        return self._config[offset : offset + size]

    def write_config(self, offset: int, data: bytes) -> None:
        """Only the emergency write can be written, and it is not offered."""

    def resize(self, columns: int, rows: int) -> None:
        """The window of the consoles has another size. Loop thread."""
        self._window = (columns, rows)
        self._config = self._make_config()
        if self._live is None:
            return
        if self._live.features & F_SIZE:
            self._live.config_changed()
        for number, port in enumerate(self.ports):
            if port.console and port.guest_open:
                guard(self._live, lambda number=number: self._send_size(number))  # type: ignore[misc]

    def attach(self, number: int, *, input_fd: int, output_fd: int) -> None:
        """Give a port another back end: non-blocking descriptors, the port's from here on. Loop thread."""
        port = self.ports[number]
        was_open = port.host_open
        guard(self._live, lambda: port.attach(input_fd, output_fd))
        if not was_open:
            guard(self._live, lambda: self._send(number, PORT_OPEN, 1))

    def detach(self, number: int) -> None:
        """Take a port's back end away, and tell the guest. Loop thread."""
        port = self.ports[number]
        if port.host_open:
            guard(self._live, port.detach)
            guard(self._live, lambda: self._send(number, PORT_OPEN, 0))

    def activate(self, live: Activated) -> None:
        self._live = live
        for number, port in enumerate(self.ports):
            if number and not live.features & F_MULTIPORT:
                break
            receive, transmit = (live.queues[index] for index in queue_numbers(number))
            port.start(
                live,
                queues=(receive, transmit),
                lost=lambda number=number: self._send(number, PORT_OPEN, 0),  # type: ignore[misc]
            )
            port.guest_open = not live.features & F_MULTIPORT  # a driver without control messages is always there
            if live.saved is not None:
                port.go_on(live.saved["ports"][number])
            port.move()
        if live.features & F_MULTIPORT:
            if live.saved is not None:
                self._go_on(live.saved)
            self._take_messages()

    def _go_on(self, saved: dict[str, Any]) -> None:
        """The driver knows the ports; of their other ends it knows what was true when it was saved."""
        self._unread.extend(bytes.fromhex(message) for message in saved["unread"])
        for number, port in enumerate(self.ports):
            if port.guest_open and port.host_open != saved["ports"][number]["host_open"]:
                self._send(number, PORT_OPEN, int(port.host_open))
        self._deliver()

    def kicked(self, queue: int) -> None:
        if queue == CONTROL_RECEIVE:
            self._deliver()
        elif queue == CONTROL_TRANSMIT:
            self._take_messages()
        else:
            port = self.ports[queue // 2 - 1 if queue > CONTROL_TRANSMIT else 0]
            if queue % 2:
                port.transmit()
            else:
                port.feed()

    def reset(self) -> None:
        for port in self.ports:
            port.stop()
        self._turn.cancel()
        self._unread.clear()
        self._live = None

    def close(self) -> None:
        self.reset()
        for port in self.ports:
            port.close()
        self._turn.close()

    def save(self) -> dict[str, Any]:
        """Output that a back end has taken in part is told with how much that was, for its next one."""
        unpopped = {queue_numbers(number)[1]: int(port.holds) for number, port in enumerate(self.ports)}
        ports = [port.save() for port in self.ports]
        return {"ports": ports, "unread": [message.hex() for message in self._unread], "unpopped": unpopped}

    def counters(self) -> dict[str, int]:
        return {
            "input_bytes": sum(port.input_bytes for port in self.ports),
            "output_bytes": sum(port.output_bytes for port in self.ports),
            "dropped_bytes": sum(port.dropped_bytes for port in self.ports),
            "control_messages": self._messages,
        }

    def _take_messages(self) -> None:
        """The control queue from the guest."""
        live = self._live
        queue = live.queues[CONTROL_TRANSMIT] if live is not None and live.features & F_MULTIPORT else None
        if live is None or queue is None:
            return
        queue.disarm()
        for _ in range(_BURST):
            chain = queue.pop()
            if chain is None:
                if queue.rearm():
                    continue
                break
            message = gather(chain.readable, _MESSAGE.size)
            if len(message) < _MESSAGE.size:
                raise GuestFault(f"a control message of {len(message)} bytes on {self.name}")
            queue.publish(chain, 0)
            self._messages += 1
            self._take_message(*_MESSAGE.unpack(message))
        else:
            self._turn.ask(live.loop, lambda: guard(self._live, self._take_messages))
        queue.signal()

    def _take_message(self, number: int, event: int, value: int) -> None:
        if event == DEVICE_READY:
            if value:
                for new in range(len(self.ports)):
                    self._send(new, PORT_ADD)
            return
        if event not in (PORT_READY, PORT_OPEN):
            return  # from a later version of the standard
        if number >= len(self.ports):
            raise GuestFault(f"{self.name} has no port {number}")
        if event == PORT_OPEN:
            self._guest_opened(number, bool(value))
        elif value:
            self._introduce(number)

    def _introduce(self, number: int) -> None:
        """The driver has made the port: say what it is."""
        port = self.ports[number]
        if port.console:
            self._send(number, CONSOLE_PORT, 1)
            self._send_size(number)
        if port.name:
            self._send(number, PORT_NAME, 1, port.name.encode())
        if port.host_open:
            self._send(number, PORT_OPEN, 1)

    def _guest_opened(self, number: int, is_open: bool) -> None:
        """Drivers throw away what arrives at a closed port, so nothing does."""
        port = self.ports[number]
        port.guest_open = is_open
        port.receive()
        if is_open and port.console:
            self._send_size(number)

    def _send_size(self, number: int) -> None:
        columns, rows = self._window
        live = self._live
        if columns and rows and live is not None and live.features & F_SIZE:
            # The standard has the columns first. Linux has read the rows first since 2.6.35, and guests are Linux.
            self._send(number, RESIZE, 0, _SIZE.pack(rows, columns))

    def _send(self, number: int, event: int, value: int = 0, more: bytes = b"") -> None:
        live = self._live
        if live is None or not live.features & F_MULTIPORT:
            return
        if len(self._unread) >= _MOST_UNREAD:
            raise GuestFault(f"the driver of {self.name} does not read its control messages")
        self._unread.append(_MESSAGE.pack(number, event, value) + more)
        self._deliver()

    def _deliver(self) -> None:
        """The control queue to the guest, as far as it has buffers."""
        live = self._live
        queue = live.queues[CONTROL_RECEIVE] if live is not None else None
        if queue is None:
            return
        while self._unread:
            chain = queue.pop()
            if chain is None:
                if queue.rearm():
                    continue
                break
            message = self._unread.popleft()
            if scatter(chain.writable, message) < len(message):
                raise GuestFault(f"a buffer of {chain.writable_bytes} bytes for a control message on {self.name}")
            queue.publish(chain, len(message))
        queue.signal()
