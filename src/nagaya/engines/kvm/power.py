"""How a guest ends its machine: ACPI's registers, the keyboard controller's reset line, and an exit port for tests."""

from __future__ import annotations

from nagaya.engines.kvm.bus import Bus
from nagaya.engines.kvm.vcpu import Ending
from nagaya.static import Callable

SLEEP_CONTROL_PORT = 0x600
SLEEP_STATUS_PORT = 0x601
RESET_PORT = 0x602
RESET_VALUE = 1
SLEEP_TYPE_S5 = 5
EXIT_PORT = 0xF4
PANIC_PORT = 0x505
_KEYBOARD_PORT = 0x64
_PULSE_RESET = 0xFE
_SLEEP_ENABLE = 1 << 5
_SLEEP_TYPE_SHIFT = 2
_PANICKED = 1
_CRASH_LOADED = 2


class Power:
    """The registers that end a machine: `end` hears why. ACPI 6.5, section 4.8.3.7 "Sleep Control and Status Registers"."""

    def __init__(self, end: Callable[[Ending], None]) -> None:
        self._end = end
        self.panicked = False

    def attach(self, bus: Bus) -> None:
        for port, count in ((SLEEP_CONTROL_PORT, 3), (_KEYBOARD_PORT, 1), (PANIC_PORT, 1), (EXIT_PORT, 4)):
            bus.add_ports(port, count, self)

    def read_port(self, port: int, size: int) -> int:
        """See `PortDevice`."""
        if port == PANIC_PORT:
            return _PANICKED | _CRASH_LOADED  # the events that it takes: QEMU's docs/specs/pvpanic
        # Of the keyboard controller: its buffers are empty, so that a kernel that reboots through it does not wait.
        return 0

    def write_port(self, port: int, size: int, value: int) -> None:
        """See `PortDevice`."""
        value &= 0xFF if port != EXIT_PORT else 0xFFFF_FFFF
        if port == SLEEP_CONTROL_PORT:
            if value & _SLEEP_ENABLE and value >> _SLEEP_TYPE_SHIFT & 7 == SLEEP_TYPE_S5:
                self._end(Ending("power-off", "the guest powered itself off"))
        elif (port == RESET_PORT and value == RESET_VALUE) or (port == _KEYBOARD_PORT and value == _PULSE_RESET):
            self._end(Ending("reset", "the guest asked for a reset"))
        elif port == PANIC_PORT:
            self.panicked |= bool(value & _PANICKED)
        elif port == EXIT_PORT:
            self._end(Ending("exit", "the guest wrote to the exit port", value))
