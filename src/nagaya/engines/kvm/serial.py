"""A 16550A UART, for what a kernel says before it has drivers, and when it panics. After TI's data sheet (SLLS057).

Every byte out is an exit: it is the console of those machines alone whose system knows no better one.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

COM1_PORT = 0x3F8
COM1_GSI = 4
PORTS = 8

_DATA, _ENABLE, _IDENTIFY, _LINE, _MODEM, _STATUS, _MODEM_STATUS, _SCRATCH = range(8)
_DLAB = 0x80
_LOOPBACK = 0x10
_RECEIVED, _EMPTIED = 0x01, 0x02
_NO_CAUSE, _CAUSE_EMPTIED, _CAUSE_RECEIVED = 0x01, 0x02, 0x04
_FIFOS_ON = 0xC0
_ALL_SENT = 0x60
_READY = 0x01
_CONNECTED = 0xB0
_FIFO_BYTES = 16


class Serial:
    """The UART at `COM1_PORT`. Bytes that the guest sends go to `write_fd`; `receive` and `type_in` give it some.

    `set_line(level)` drives its interrupt line.
    """

    def __init__(self, write_fd: int, set_line: Callable[[int], None]) -> None:
        self._write_fd = write_fd
        self._set_line = set_line
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._closed = False
        self._received: deque[int] = deque()
        self._level = 0
        self._emptied = False
        self._registers = [0] * PORTS
        self._divisor = [12, 0]
        self.sent = 0

    def receive(self, data: bytes) -> int:
        """Bytes for the guest; how many there was room for. Any thread."""
        with self._lock:
            taken = data[: _FIFO_BYTES - len(self._received)]
            self._received.extend(taken)
            self._update()
        return len(taken)

    def type_in(self, data: bytes) -> None:
        """The same, for all of `data`: waits until the guest has taken so much that the rest has room, or for `close`."""
        while data:
            data = data[self.receive(data) :]
            with self._lock:
                self._room.wait_for(lambda: self._closed or len(self._received) < _FIFO_BYTES)
                if self._closed:
                    return

    def close(self) -> None:
        """Nobody reads it any more."""
        with self._lock:
            self._closed = True
            self._room.notify_all()

    def read_port(self, port: int, size: int) -> int:
        """See `PortDevice`."""
        with self._lock:
            value = self._read(port & 7)
            self._update()
            if not self._received:
                self._room.notify_all()
        return value

    def write_port(self, port: int, size: int, value: int) -> None:
        """See `PortDevice`."""
        with self._lock:
            sent = self._write(port & 7, value & 0xFF)
            self._update()
        if sent:
            self._send(bytes([value & 0xFF]))

    def _read(self, register: int) -> int:
        if register in (_DATA, _ENABLE) and self._registers[_LINE] & _DLAB:
            return self._divisor[register]
        if register == _DATA:
            return self._received.popleft() if self._received else 0
        if register == _IDENTIFY:
            cause = self._cause()
            if cause == _CAUSE_EMPTIED:  # reading it is what ends it
                self._emptied = False
            return cause | _FIFOS_ON
        if register == _STATUS:
            return _ALL_SENT | (_READY if self._received else 0)
        if register == _MODEM_STATUS:
            modem = self._registers[_MODEM]
            if modem & _LOOPBACK:  # the outputs come back as inputs: drivers look for a UART by this
                return (modem & 1) << 5 | (modem & 2) << 3 | (modem & 4) << 4 | (modem & 8) << 4
            return _CONNECTED
        return self._registers[register]

    def _write(self, register: int, value: int) -> bool:
        """True when `value` is a byte to send."""
        if register in (_DATA, _ENABLE) and self._registers[_LINE] & _DLAB:
            self._divisor[register] = value
        elif register == _DATA:
            self._emptied = True
            if not self._registers[_MODEM] & _LOOPBACK:
                return True
            if len(self._received) < _FIFO_BYTES:
                self._received.append(value)
        elif register == _ENABLE:
            self._emptied |= bool(value & _EMPTIED & ~self._registers[_ENABLE])
            self._registers[_ENABLE] = value & 0x0F
        elif register == _IDENTIFY:  # written, it is the FIFO control register
            if value & 2:
                self._received.clear()
        elif register not in (_STATUS, _MODEM_STATUS):
            self._registers[register] = value
        return False

    def _cause(self) -> int:
        enabled = self._registers[_ENABLE]
        if enabled & _RECEIVED and self._received:
            return _CAUSE_RECEIVED
        return _CAUSE_EMPTIED if enabled & _EMPTIED and self._emptied else _NO_CAUSE

    def _update(self) -> None:
        level = int(self._cause() != _NO_CAUSE)
        if level != self._level:
            self._level = level
            self._set_line(level)

    def _send(self, data: bytes) -> None:
        self.sent += 1
        try:
            os.write(self._write_fd, data)
        except OSError:
            pass  # as on a wire that nobody reads: a terminal that is gone or a full disk is not the guest's end
