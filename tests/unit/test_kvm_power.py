"""The registers by which a guest ends its machine."""

from __future__ import annotations

import pytest

from nagaya.engines.kvm import power
from nagaya.engines.kvm.bus import Bus
from nagaya.engines.kvm.power import Power
from nagaya.engines.kvm.vcpu import Ending

KEYBOARD_PORT = 0x64


class Rig:
    def __init__(self) -> None:
        self.endings: list[Ending] = []
        self.power = Power(self.endings.append)
        self.bus = Bus()
        self.power.attach(self.bus)

    def kinds(self, port: int, value: int, size: int = 1) -> list[str]:
        self.bus.write_port(port, size, value)
        return [ending.kind for ending in self.endings]


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_soft_off_is_sleep_type_5_with_enable(rig: Rig) -> None:
    assert rig.kinds(power.SLEEP_CONTROL_PORT, 0x34) == ["power-off"]


def test_only_soft_off_ends_it(rig: Rig) -> None:
    for value in range(256):
        if value & 0x3C != 0x34:
            assert rig.kinds(power.SLEEP_CONTROL_PORT, value) == []
    assert rig.kinds(power.SLEEP_STATUS_PORT, 0x34) == []
    assert rig.bus.read_port(power.SLEEP_STATUS_PORT, 1) == 0


@pytest.mark.parametrize(("port", "value"), [(power.RESET_PORT, power.RESET_VALUE), (KEYBOARD_PORT, 0xFE)])
def test_reset(rig: Rig, port: int, value: int) -> None:
    for other in range(256):
        if other != value:
            assert rig.kinds(port, other) == []
    assert rig.kinds(port, value) == ["reset"]


def test_keyboard_controller_is_never_busy(rig: Rig) -> None:
    assert rig.bus.read_port(KEYBOARD_PORT, 1) == 0


@pytest.mark.parametrize(("size", "value"), [(1, 0), (1, 0xFF), (2, 0x1234), (4, 0xFFFF_FFFF)])
def test_exit_port_gives_its_value(rig: Rig, size: int, value: int) -> None:
    assert rig.kinds(power.EXIT_PORT, value, size) == ["exit"]
    assert rig.endings[0].status == value


def test_ports_after_the_exit_port_are_its_own_and_do_nothing(rig: Rig) -> None:
    for port in range(power.EXIT_PORT + 1, power.EXIT_PORT + 4):
        assert rig.kinds(port, 1) == []


def test_panic_is_remembered_and_ends_nothing(rig: Rig) -> None:
    assert rig.bus.read_port(power.PANIC_PORT, 1) == 3
    assert rig.kinds(power.PANIC_PORT, 2) == []
    assert not rig.power.panicked
    assert rig.kinds(power.PANIC_PORT, 1) == []
    rig.bus.write_port(power.PANIC_PORT, 1, 0)
    assert rig.power.panicked
