"""The UART, register by register, as a driver uses it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from nagaya.engines.kvm.serial import COM1_PORT, Serial

DATA, ENABLE, IDENTIFY, LINE, MODEM, STATUS, MODEM_STATUS, SCRATCH = range(COM1_PORT, COM1_PORT + 8)
ON_RECEIVED, ON_EMPTIED = 1, 2
NO_CAUSE, EMPTIED, RECEIVED = 0xC1, 0xC2, 0xC4
READY, ALL_SENT = 0x01, 0x60
LOOPBACK, DLAB = 0x10, 0x80


class Wire:
    """A UART with a pipe behind it; `levels` are the changes of its interrupt line."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self.writer, False)
        self.levels: list[int] = []
        self.serial = Serial(self.writer, self.levels.append)

    def read(self, port: int) -> int:
        return self.serial.read_port(port, 1)

    def write(self, port: int, value: int) -> None:
        self.serial.write_port(port, 1, value)

    def said(self) -> bytes:
        try:
            return os.read(self.reader, 1 << 16)
        except BlockingIOError:
            return b""


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    os.close(made.reader)
    os.close(made.writer)


def test_bytes_go_out(wire: Wire) -> None:
    for byte in b"hello\n":
        assert wire.read(STATUS) & ALL_SENT == ALL_SENT
        wire.write(DATA, byte)
    assert wire.said() == b"hello\n"
    assert wire.serial.sent == 6
    assert wire.levels == []  # nobody asked for interrupts


def test_only_a_byte_of_a_wider_write_goes_out(wire: Wire) -> None:
    wire.serial.write_port(DATA, 4, 0x11223341)
    assert wire.said() == b"A"


def test_bytes_come_in(wire: Wire) -> None:
    assert wire.read(STATUS) & READY == 0
    assert wire.read(DATA) == 0
    assert wire.serial.receive(b"ab") == 2
    assert wire.read(STATUS) & READY
    assert bytes([wire.read(DATA), wire.read(DATA)]) == b"ab"
    assert wire.read(STATUS) & READY == 0


def test_no_more_comes_in_than_there_is_room_for(wire: Wire) -> None:
    assert wire.serial.receive(bytes(range(10))) == 10
    assert wire.serial.receive(bytes(range(10, 30))) == 6
    assert wire.serial.receive(b"more") == 0
    assert [wire.read(DATA) for _ in range(16)] == list(range(16))
    assert wire.serial.receive(b"more") == 4


def test_fifo_is_cleared(wire: Wire) -> None:
    wire.serial.receive(b"old")
    wire.write(IDENTIFY, 0x01)  # the FIFO control register: on, nothing to clear
    assert wire.read(STATUS) & READY
    wire.write(IDENTIFY, 0x03)
    assert wire.read(STATUS) & READY == 0


def test_divisor_is_behind_its_latch(wire: Wire) -> None:
    wire.write(LINE, DLAB | 3)
    assert (wire.read(DATA), wire.read(ENABLE)) == (12, 0)  # 9600 baud
    wire.write(DATA, 1)
    wire.write(ENABLE, 2)
    assert (wire.read(DATA), wire.read(ENABLE)) == (1, 2)
    wire.write(LINE, 3)
    assert (wire.read(LINE), wire.read(ENABLE)) == (3, 0)
    assert wire.said() == b""


def test_interrupt_for_what_comes_in(wire: Wire) -> None:
    wire.serial.receive(b"1")
    assert wire.levels == []
    wire.write(ENABLE, ON_RECEIVED)
    assert wire.levels == [1]
    assert wire.read(IDENTIFY) == RECEIVED
    assert wire.levels == [1]  # reading the cause does not end it
    wire.read(DATA)
    assert wire.levels == [1, 0]
    assert wire.read(IDENTIFY) == NO_CAUSE
    wire.serial.receive(b"2")
    assert wire.levels == [1, 0, 1]
    wire.write(ENABLE, 0)
    assert wire.levels == [1, 0, 1, 0]


def test_interrupt_when_all_is_sent(wire: Wire) -> None:
    wire.write(ENABLE, ON_EMPTIED)
    assert wire.levels == [1]  # it is empty already: drivers start by this
    assert wire.read(IDENTIFY) == EMPTIED
    assert wire.levels == [1, 0]  # reading it is what ends it
    assert wire.read(IDENTIFY) == NO_CAUSE
    wire.write(DATA, 0x41)
    assert wire.levels == [1, 0, 1]
    wire.read(IDENTIFY)
    wire.write(ENABLE, ON_EMPTIED)  # was on: nothing new
    assert wire.levels == [1, 0, 1, 0]
    wire.write(ENABLE, 0)
    wire.write(ENABLE, ON_EMPTIED)
    assert wire.levels == [1, 0, 1, 0, 1]


def test_what_came_in_is_the_more_urgent(wire: Wire) -> None:
    wire.write(ENABLE, ON_EMPTIED | ON_RECEIVED)
    wire.serial.receive(b"x")
    assert wire.read(IDENTIFY) == RECEIVED
    wire.read(DATA)
    assert wire.read(IDENTIFY) == EMPTIED


def test_loopback(wire: Wire) -> None:
    wire.write(MODEM, LOOPBACK)
    wire.write(DATA, 0x55)
    assert wire.said() == b""
    assert wire.read(DATA) == 0x55
    # DTR, RTS, OUT1, OUT2 come back as DSR, CTS, RI, DCD: a driver's test for a UART.
    for output, status in ((1, 0x20), (2, 0x10), (4, 0x40), (8, 0x80), (0xA, 0x90)):
        wire.write(MODEM, LOOPBACK | output)
        assert wire.read(MODEM_STATUS) == status
    wire.write(MODEM, 0x0B)
    assert wire.read(MODEM_STATUS) == 0xB0


def test_loopback_takes_no_more_than_its_fifo(wire: Wire) -> None:
    wire.write(MODEM, LOOPBACK)
    for byte in range(20):
        wire.write(DATA, byte)
    assert [wire.read(DATA) for _ in range(17)] == [*range(16), 0]


def test_scratch_and_what_cannot_be_written(wire: Wire) -> None:
    wire.write(SCRATCH, 0xA5)
    assert wire.read(SCRATCH) == 0xA5
    before = [wire.read(port) for port in (STATUS, MODEM_STATUS)]
    wire.write(STATUS, 0)
    wire.write(MODEM_STATUS, 0)
    assert [wire.read(port) for port in (STATUS, MODEM_STATUS)] == before
    wire.write(ENABLE, 0xF0)
    assert wire.read(ENABLE) == 0


def test_full_pipe_loses_bytes_and_does_not_wait(wire: Wire) -> None:
    try:
        while True:
            os.write(wire.writer, bytes(1 << 16))
    except BlockingIOError:
        pass
    wire.write(DATA, 0x41)
    assert wire.serial.sent == 1


def test_whatever_is_wrong_behind_it_is_not_the_guests_end() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "wb") as full:
        for fd in (writer, full.fileno()):
            Serial(fd, lambda level: None).write_port(DATA, 1, 0x41)
    os.close(writer)
    controller, terminal = os.openpty()
    os.close(controller)
    Serial(terminal, lambda level: None).write_port(DATA, 1, 0x41)
    os.close(terminal)


def test_what_is_typed_waits_until_the_guest_has_room(wire: Wire) -> None:
    serial = wire.serial
    text = bytes(range(100))
    typist = threading.Thread(target=serial.type_in, args=(text,))
    typist.start()
    got = bytearray()
    while len(got) < len(text):
        if serial.read_port(COM1_PORT + 5, 1) & 1:
            got.append(serial.read_port(COM1_PORT, 1))
    typist.join(10)
    assert bytes(got) == text and not typist.is_alive()


def test_nobody_types_at_a_machine_that_is_gone(wire: Wire) -> None:
    serial = wire.serial
    typist = threading.Thread(target=serial.type_in, args=(bytes(100),))
    typist.start()
    serial.close()
    typist.join(10)
    assert not typist.is_alive()
