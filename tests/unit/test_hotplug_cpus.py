"""CPUs that come and go, with a QEMU that is a double: what is plugged where, and what failures leave."""

from __future__ import annotations

from typing import Any

import pytest

from nagaya.engines.qemu import hotplug_cpus
from nagaya.errors import Conflict, Unsupported
from nagaya.protocol.qmp import QmpError


class Qemu:
    """A monitor of a machine with eight places, two threads a core, told of in QEMU's order: the last one first."""

    def __init__(self, cpus: int) -> None:
        self.taken = [number < cpus for number in range(8)]
        self.most = 8
        self.keeps: set[int] = set()  # CPUs that the system does not let go of

    def command(self, name: str, **arguments: Any) -> Any:
        if name == "query-hotpluggable-cpus":
            return [self._tell(number) for number in reversed(range(8))]
        if name == "device_add":
            assert arguments.pop("driver") == "max-x86_64-cpu"
            number = arguments["core-id"] * 2 + arguments["thread-id"]
            assert sorted(arguments) == ["core-id", "die-id", "socket-id", "thread-id"] and not self.taken[number]
            if number >= self.most:
                raise QmpError("no memory")
            self.taken[number] = True
        elif name == "device_del":
            number = int(arguments["id"].rpartition("/")[2])
            self.taken[number] = number in self.keeps
        return {}

    def _tell(self, number: int) -> dict[str, Any]:
        props = {"core-id": number // 2, "thread-id": number % 2, "socket-id": 0, "die-id": 0, "node-id": 0}
        place: dict[str, Any] = {"props": props, "vcpus-count": 1, "type": "max-x86_64-cpu"}
        return {**place, "qom-path": f"/machine/unattached/{number}"} if self.taken[number] else place


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotplug_cpus, "LETS_GO_WITHIN_S", 0.01)
    monkeypatch.setattr(hotplug_cpus, "_LOOK_AGAIN_S", 0.001)


def test_the_first_places_are_taken() -> None:
    qemu = Qemu(1)
    for wanted in (4, 4, 2, 3, 8, 1):
        hotplug_cpus.set_cpus(qemu, wanted)  # type: ignore[arg-type]
        assert qemu.taken == [number < wanted for number in range(8)]
        hotplug_cpus.check_number(qemu, wanted)  # type: ignore[arg-type]


def test_as_before_when_qemu_takes_no_more() -> None:
    qemu = Qemu(2)
    qemu.most = 4
    with pytest.raises(Unsupported, match="no memory"):
        hotplug_cpus.set_cpus(qemu, 6)  # type: ignore[arg-type]
    assert sum(qemu.taken) == 2


def test_as_before_when_the_system_keeps_one() -> None:
    qemu = Qemu(6)
    qemu.keeps = {3}
    with pytest.raises(Conflict, match="not let go of a CPU"):
        hotplug_cpus.set_cpus(qemu, 2)  # type: ignore[arg-type]
    assert qemu.taken == [number < 6 for number in range(8)]
    qemu.taken[3] = False  # it lets go after all, later
    with pytest.raises(Conflict, match="5 CPUs at the moment, and 6 on record"):
        hotplug_cpus.check_number(qemu, 6)  # type: ignore[arg-type]
