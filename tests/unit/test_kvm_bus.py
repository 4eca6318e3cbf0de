"""Who answers at which port and which address."""

from __future__ import annotations

import pytest

from nagaya.engines.kvm.bus import Bus


class Spy:
    """Answers with what it was asked, and remembers what it was told."""

    def __init__(self) -> None:
        self.written: list[tuple[int, ...] | tuple[int, bytes]] = []

    def read_port(self, port: int, size: int) -> int:
        return port << 8 | size

    def write_port(self, port: int, size: int, value: int) -> None:
        self.written.append((port, size, value))

    def read(self, offset: int, size: int) -> bytes:
        return bytes([offset & 0xFF]) * size

    def write(self, offset: int, data: bytes) -> None:
        self.written.append((offset, data))


def test_ports_belong_to_a_device() -> None:
    bus, spy = Bus(), Spy()
    bus.add_ports(0x3F8, 8, spy)
    assert bus.read_port(0x3F8, 1) == 0x3F801
    assert bus.read_port(0x3FF, 4) == 0x3FF04
    bus.write_port(0x3FA, 2, 7)
    assert spy.written == [(0x3FA, 2, 7)]


@pytest.mark.parametrize(("size", "value"), [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFFFFFF)])
def test_port_of_nobody(size: int, value: int) -> None:
    bus = Bus()
    bus.add_ports(0x3F8, 8, Spy())
    for port in (0, 0x3F7, 0x400, 0xFFFF):
        assert bus.read_port(port, size) == value
        bus.write_port(port, size, 1)


def test_pages_belong_to_a_device_whole() -> None:
    bus, first, second = Bus(), Spy(), Spy()
    bus.add_pages(0xD000_0000, 0x200, first)
    bus.add_pages(0xD000_1000, 0x1001, second)  # two pages
    assert bus.read_memory(0xD000_0010, 4) == b"\x10" * 4
    assert bus.read_memory(0xD000_0FFF, 1) == b"\xff"
    bus.write_memory(0xD000_0FF8, b"12345678")
    bus.write_memory(0xD000_2004, b"ab")
    assert first.written == [(0xFF8, b"12345678")]
    assert second.written == [(0x1004, b"ab")]


def test_address_of_nobody() -> None:
    bus = Bus()
    bus.add_pages(0xD000_0000, 0x1000, Spy())
    for gpa in (0, 0xCFFF_FFFF, 0xD000_1000, 1 << 60):
        assert bus.read_memory(gpa, 3) == b"\xff\xff\xff"
        bus.write_memory(gpa, b"123")


def test_two_devices_at_one_place_are_refused() -> None:
    bus = Bus()
    bus.add_ports(0x60, 5, Spy())
    with pytest.raises(ValueError, match="0x64"):
        bus.add_ports(0x64, 1, Spy())
    bus.add_pages(0x1000, 0x1000, Spy())
    with pytest.raises(ValueError, match="0x1000"):
        bus.add_pages(0x1000, 1, Spy())
