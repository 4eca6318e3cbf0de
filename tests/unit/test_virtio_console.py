"""virtio-console: the control protocol, and that no byte is lost whoever is slow."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import pytest

from nagaya.errors import GuestFault
from nagaya.virtio.console import (
    CONSOLE_PORT,
    CONTROL_RECEIVE,
    CONTROL_TRANSMIT,
    DEVICE_READY,
    F_MULTIPORT,
    F_SIZE,
    PORT_ADD,
    PORT_NAME,
    PORT_OPEN,
    PORT_READY,
    RESIZE,
    Console,
    Port,
    own_descriptor,
    queue_numbers,
)
from tests.virtio_rig import Rig

AGENT_IN, AGENT_OUT = queue_numbers(1)
Message = tuple[int, int, int, bytes]


class Machine:
    """A console on pipes and the agent's port on a socket, with a driver that knows both."""

    def __init__(self, *, features: int = F_SIZE | F_MULTIPORT) -> None:
        keyboard, self.keyboard = os.pipe2(os.O_NONBLOCK)
        self.screen, screen = os.pipe2(os.O_NONBLOCK)
        ours, self.agent = socket.socketpair()
        ours.setblocking(False)
        self.agent.settimeout(3)
        agent = ours.detach()
        self.console = Console(
            "console0",
            [
                Port("console", console=True, input_fd=keyboard, output_fd=screen),
                Port("org.nagaya.agent", input_fd=agent, output_fd=agent),
            ],
            columns=80,
            rows=25,
        )
        self.rig = Rig(self.console, features=features).start()
        for _ in range(32 if features & F_MULTIPORT else 0):
            self.rig.add(CONTROL_RECEIVE, room=(64,))

    def say(self, port: int, event: int, value: int = 1) -> None:
        self.rig.add(CONTROL_TRANSMIT, struct.pack("<IHH", port, event, value))

    def told(self, count: int | None = None) -> list[Message]:
        return [
            (*struct.unpack("<IHH", data[:8]), data[8:]) for data in self.rig.taken_data(CONTROL_RECEIVE, count=count)
        ]

    def open(self) -> Machine:
        self.say(0xFFFF_FFFF, DEVICE_READY)
        for port in range(2):
            self.say(port, PORT_READY)
            self.say(port, PORT_OPEN)
        self.told()
        return self

    def close(self) -> None:
        self.rig.close()
        self.agent.close()
        for fd in (self.keyboard, self.screen):
            os.close(fd)


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    assert made.rig.faults == []
    made.close()


def read_all(fd: int, size: int, rig: Rig) -> bytes:
    parts = bytearray()

    def more() -> bool:
        try:
            parts.extend(os.read(fd, 65536))
        except BlockingIOError:
            pass
        return len(parts) >= size

    rig.until(more)
    return bytes(parts)


def test_ports_are_introduced(machine: Machine) -> None:
    assert machine.console.read_config(0, 64) == struct.pack("<HHI", 80, 25, 2)
    machine.say(0xFFFF_FFFF, DEVICE_READY)
    assert machine.told() == [(0, PORT_ADD, 0, b""), (1, PORT_ADD, 0, b"")]
    machine.say(0, PORT_READY)
    assert machine.told() == [
        (0, CONSOLE_PORT, 1, b""),
        (0, RESIZE, 0, struct.pack("<HH", 25, 80)),
        (0, PORT_NAME, 1, b"console"),
        (0, PORT_OPEN, 1, b""),
    ]
    machine.say(1, PORT_READY)
    assert machine.told() == [(1, PORT_NAME, 1, b"org.nagaya.agent"), (1, PORT_OPEN, 1, b"")]


def test_input_waits_for_an_open_port_and_for_buffers(machine: Machine) -> None:
    machine.say(0xFFFF_FFFF, DEVICE_READY)
    machine.say(0, PORT_READY)
    os.write(machine.keyboard, b"hello")
    machine.rig.add(0, room=(2,))
    machine.rig.settle()
    assert machine.rig.taken(0) == []  # the driver would throw it away
    machine.say(0, PORT_OPEN)
    assert machine.rig.taken_data(0, count=1) == [b"he"]
    machine.rig.settle()
    machine.rig.add(0, room=(1, 1, 100))
    assert machine.rig.taken_data(0, count=1) == [b"llo"]


def test_output_that_nobody_reads_stays_with_the_guest(machine: Machine) -> None:
    machine.open()
    lines = [os.urandom(4000) for _ in range(60)]
    for line in lines:
        machine.rig.add(1, line[:1000], line[1000:])
    assert len(machine.rig.taken(1)) < 20  # a pipe holds 64 KiB
    assert read_all(machine.screen, 60 * 4000, machine.rig) == b"".join(lines)
    machine.rig.until(lambda: machine.console.counters()["output_bytes"] == 60 * 4000)
    assert machine.console.counters()["dropped_bytes"] == 0


def test_the_agents_stream_both_ways(machine: Machine) -> None:
    machine.open()
    data = os.urandom(100_000)
    machine.rig.add(AGENT_OUT, data)
    got = bytearray()
    while len(got) < len(data):
        got += machine.agent.recv(65536)
    assert got == data
    machine.agent.sendall(data[:10_000])
    back = b""
    while len(back) < 10_000:
        machine.rig.add(AGENT_IN, room=(333,))
        back += b"".join(machine.rig.taken_data(AGENT_IN, count=1))
    assert back == data[:10_000]


def test_a_lost_peer_closes_the_port_and_a_new_one_opens_it(machine: Machine) -> None:
    machine.open()
    machine.rig.add(AGENT_IN, room=(100,))
    machine.agent.close()
    assert machine.told(count=1) == [(1, PORT_OPEN, 0, b"")]
    machine.rig.add(AGENT_OUT, b"to nobody")
    assert len(machine.rig.taken(AGENT_OUT, count=1)) == 1
    assert machine.console.counters()["dropped_bytes"] == 9
    ours, machine.agent = socket.socketpair()
    ours.setblocking(False)
    fd = ours.detach()
    machine.rig.call(lambda: machine.console.attach(1, input_fd=fd, output_fd=fd))
    assert machine.told(count=1) == [(1, PORT_OPEN, 1, b"")]
    machine.agent.sendall(b"here again")
    assert machine.rig.taken_data(AGENT_IN, count=1) == [b"here again"]
    machine.rig.call(lambda: machine.console.detach(1))
    assert machine.told(count=1) == [(1, PORT_OPEN, 0, b"")]
    assert machine.agent.recv(1) == b""


def test_a_new_back_end_gets_what_the_old_one_did_not_take(machine: Machine) -> None:
    machine.open()
    data = os.urandom(200_000)
    machine.rig.add(1, data)
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    machine.rig.call(lambda: machine.console.attach(0, input_fd=-1, output_fd=write_end))
    old = b""
    try:
        while part := os.read(machine.screen, 65536):
            old += part
    except BlockingIOError:
        pass
    assert old + read_all(read_end, len(data) - len(old), machine.rig) == data
    os.close(read_end)


def test_half_a_connection_still_takes_output(machine: Machine) -> None:
    machine.open()
    machine.rig.add(AGENT_IN, room=(100,))
    machine.agent.shutdown(socket.SHUT_WR)
    machine.rig.settle()
    machine.rig.add(AGENT_OUT, b"the rest")
    assert machine.agent.recv(100) == b"the rest"
    assert machine.told() == []


def test_the_end_of_the_keyboard_leaves_the_screen(machine: Machine) -> None:
    machine.open()
    null = os.open("/dev/null", os.O_RDONLY)
    screen, write_end = os.pipe2(os.O_NONBLOCK)
    machine.rig.call(lambda: machine.console.attach(0, input_fd=null, output_fd=write_end))
    machine.rig.add(0, room=(100,))
    machine.rig.settle()
    assert machine.rig.taken(0) == []
    machine.rig.add(1, b"x")
    assert os.read(screen, 10) == b"x"
    assert machine.told() == []
    os.close(screen)


def test_files_as_back_ends(machine: Machine) -> None:
    machine.open()
    zero, null = os.open("/dev/zero", os.O_RDONLY), os.open("/dev/null", os.O_WRONLY)
    machine.rig.call(lambda: machine.console.attach(0, input_fd=zero, output_fd=null))
    for _ in range(100):  # more than a turn's worth
        machine.rig.add(0, room=(10,), kick=False)
        machine.rig.add(1, b"ten bytes.", kick=False)
    machine.rig.kick(0)
    machine.rig.kick(1)
    assert machine.rig.taken_data(0, count=100) == [bytes(10)] * 100
    assert len(machine.rig.taken(1, count=100)) == 100


def test_the_window_changes(machine: Machine) -> None:
    machine.open()
    machine.rig.call(lambda: machine.console.resize(132, 50))
    assert machine.told() == [(0, RESIZE, 0, struct.pack("<HH", 50, 132))]
    assert machine.rig.config_changes == 1
    assert machine.console.read_config(0, 4) == struct.pack("<HH", 132, 50)


def test_a_driver_of_one_port() -> None:
    machine = Machine(features=F_SIZE)
    os.write(machine.keyboard, b"hi")
    machine.rig.add(0, room=(100,))
    assert machine.rig.taken_data(0, count=1) == [b"hi"]
    machine.rig.add(1, b"ho")
    assert os.read(machine.screen, 10) == b"ho"
    machine.close()


def test_closed_after_its_loop() -> None:
    machine = Machine().open()
    machine.rig.add(0, room=(10,))
    machine.rig.add(1, bytes(200_000))
    machine.rig.loop.close()
    machine.close()


def test_reset_and_again(machine: Machine) -> None:
    machine.open()
    machine.rig.add(1, os.urandom(200_000))
    machine.rig.restart()
    while True:
        try:
            os.read(machine.screen, 65536)
        except BlockingIOError:
            break
    for _ in range(8):
        machine.rig.add(CONTROL_RECEIVE, room=(64,))
    machine.open()
    machine.rig.add(1, b"after")
    assert os.read(machine.screen, 100) == b"after"


@pytest.mark.parametrize("message", [b"", b"1234567", struct.pack("<IHH", 2, PORT_READY, 1)])
def test_wrong_messages_are_the_guests_fault(machine: Machine, message: bytes) -> None:
    with pytest.raises(GuestFault):
        machine.rig.add(CONTROL_TRANSMIT, *([message] if message else []), room=() if message else (8,))


def test_a_driver_that_never_reads_its_messages_is_stopped() -> None:
    machine = Machine()
    with pytest.raises(GuestFault, match="does not read"):
        for _ in range(1000):
            machine.say(0, PORT_READY)
    machine.close()


def test_many_control_messages_leave_turns_to_others(machine: Machine) -> None:
    """A driver that always has one more must not keep the loop from a reset, or from the other devices."""
    rig, counts = machine.rig, []

    def kick() -> None:
        rig.device.kicked(CONTROL_TRANSMIT)
        counts.append(rig.device.counters()["control_messages"])  # before anything else has its turn

    for _ in range(100):
        rig.add(CONTROL_TRANSMIT, struct.pack("<IHH", 0, 99, 1), kick=False)
    rig.call(kick)
    assert 0 < counts[0] < 100
    assert len(rig.taken(CONTROL_TRANSMIT, count=100)) == 100
    for _ in range(100):
        rig.add(CONTROL_TRANSMIT, struct.pack("<IHH", 0, 99, 1), kick=False)

    def kick_and_reset() -> None:
        kick()
        rig.device.reset()

    rig.call(kick_and_reset)
    rig.settle()
    assert counts[1] == rig.device.counters()["control_messages"] < 200


def test_buffers_that_take_nothing(machine: Machine) -> None:
    machine.open()
    os.write(machine.keyboard, b"x")
    with pytest.raises(GuestFault):
        machine.rig.add(0, b"readable only")
    machine.rig.faults.clear()


def test_own_descriptor_leaves_the_callers_mode() -> None:
    read_end, write_end = os.pipe()
    own = own_descriptor(write_end)
    assert not os.get_blocking(own)
    assert os.get_blocking(write_end)
    os.write(own, b"x")
    assert os.read(read_end, 1) == b"x"
    for fd in (read_end, write_end, own):
        os.close(fd)
