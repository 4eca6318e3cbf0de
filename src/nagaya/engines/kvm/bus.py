"""Who answers at which port and which address. Filled before the first vCPU runs, and only read after that."""

from __future__ import annotations

from nagaya.memory import PAGE_BYTES
from nagaya.static import Protocol


class PortDevice(Protocol):
    """Something at I/O ports. vCPU threads, several at once."""

    def read_port(self, port: int, size: int) -> int:
        """What an `in` of 1, 2 or 4 bytes gets; too large a value is cut off."""

    def write_port(self, port: int, size: int, value: int) -> None:
        """An `out`."""


class MemoryDevice(Protocol):
    """Something at pages of addresses where there is no RAM. vCPU threads, several at once."""

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes, from 1 to 8."""

    def write(self, offset: int, data: bytes) -> None:
        """From 1 to 8 bytes."""


class Bus:
    """Ports and pages. What nobody answers for reads as all ones, and takes every write."""

    def __init__(self) -> None:
        self._ports: dict[int, PortDevice] = {}
        self._pages: dict[int, tuple[int, MemoryDevice]] = {}

    def add_ports(self, first: int, count: int, device: PortDevice) -> None:
        for port in range(first, first + count):
            if port in self._ports:
                raise ValueError(f"two devices at port {port:#x}")
            self._ports[port] = device

    def add_pages(self, gpa: int, size_bytes: int, device: MemoryDevice) -> None:
        """`gpa` is at a page's start; a device has its pages for itself."""
        for page in range(gpa // PAGE_BYTES, -(-(gpa + size_bytes) // PAGE_BYTES)):
            if page in self._pages:
                raise ValueError(f"two devices at {page * PAGE_BYTES:#x}")
            self._pages[page] = (gpa, device)

    def read_port(self, port: int, size: int) -> int:
        device = self._ports.get(port)
        return (1 << 8 * size) - 1 if device is None else device.read_port(port, size)

    def write_port(self, port: int, size: int, value: int) -> None:
        device = self._ports.get(port)
        if device is not None:
            device.write_port(port, size, value)

    def read_memory(self, gpa: int, size: int) -> bytes:
        found = self._pages.get(gpa // PAGE_BYTES)
        if found is None:
            return b"\xff" * size
        start, device = found
        return device.read(gpa - start, size)

    def write_memory(self, gpa: int, data: bytes) -> None:
        found = self._pages.get(gpa // PAGE_BYTES)
        if found is not None:
            start, device = found
            device.write(gpa - start, data)
