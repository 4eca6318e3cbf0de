"""A monitor connection with a QEMU that is played: answers, events, silence, and ends."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from nagaya.engines.qemu.monitor import MAX_EVENTS, Monitor, MonitorClosed
from nagaya.engines.qemu.pc import WholeMachineEngine
from nagaya.engines.qemu.process import QemuProcess
from nagaya.protocol.qmp import Event, QmpError

GREETING = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}


class Played:
    def __init__(self) -> None:
        ours, self.qemu = socket.socketpair()
        ours.setblocking(False)
        self.monitor = Monitor(ours.detach())

    def say(self, *messages: object) -> None:
        self.qemu.sendall(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))

    def heard(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.qemu.recv(65536).splitlines()]


@pytest.fixture
def played() -> Iterator[Played]:
    made = Played()
    yield made
    made.monitor.close()
    made.qemu.close()


def test_negotiation(played: Played) -> None:
    played.say(GREETING, {"return": {}, "id": 1})
    played.monitor.negotiate(1)
    assert played.heard() == [{"execute": "qmp_capabilities", "id": 1}]


def test_events_on_the_way_are_kept(played: Played) -> None:
    played.say(GREETING, {"event": "STOP"}, {"return": 5, "id": 1}, {"event": "RESUME"})
    assert played.monitor.command("one") == 5
    assert played.monitor.events == [Event("STOP", {}), Event("RESUME", {})]
    played.say(*[{"event": f"E{number}"} for number in range(MAX_EVENTS + 5)])
    assert played.monitor.drain()
    assert len(played.monitor.events) == MAX_EVENTS and played.monitor.events[-1].name == f"E{MAX_EVENTS + 4}"


def test_a_refusal_is_raised_and_the_next_command_goes_on(played: Played) -> None:
    played.say(GREETING, {"error": {"class": "GenericError", "desc": "no such thing"}, "id": 1})
    with pytest.raises(QmpError, match="no such thing"):
        played.monitor.command("one")
    played.say({"return": {}, "id": 2})
    assert played.monitor.command("two") == {}


def test_a_pause_that_comes_too_late_is_taken_back(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would know that the machine stands."""
    monkeypatch.setattr(
        "nagaya.engines.qemu.monitor.Monitor.command.__kwdefaults__", {"timeout_s": 0.05, "descriptor": -1}
    )
    qemu = QemuProcess()
    qemu._monitor = played.monitor
    played.say(GREETING)
    with pytest.raises(QmpError, match="does not answer"):
        qemu.pause()
    assert [message["execute"] for message in played.heard()] == ["stop", "cont"]
    played.say({"return": {}, "id": 1}, {"return": {}, "id": 2}, {"return": "mine", "id": 3})
    assert played.monitor.command("next") == "mine"


def test_silence_is_an_error_and_a_late_answer_none(played: Played) -> None:
    played.say(GREETING)
    with pytest.raises(QmpError, match="does not answer") as caught:
        played.monitor.command("slow", timeout_s=0.05)
    assert json.loads(caught.value.sent) == {"execute": "slow", "id": 1}
    played.say({"return": "late", "id": 1}, {"return": "mine", "id": 2})
    assert played.monitor.command("next") == "mine"


def test_the_end_of_qemu(played: Played) -> None:
    played.say(GREETING)
    assert played.monitor.drain()
    played.qemu.close()
    assert not played.monitor.drain()
    with pytest.raises(MonitorClosed):
        played.monitor.command("one")


def test_a_qemu_that_breaks_the_rules_is_not_listened_to(played: Played) -> None:
    played.say(GREETING)
    played.qemu.sendall(b"nonsense\n")
    assert not played.monitor.drain()


def test_a_button_that_is_pressed_while_qemu_ends(played: Played) -> None:
    """A supervisor presses it again every few seconds; what has just heard it is no reason to break."""
    engine = WholeMachineEngine("emulated")
    engine._qemu._monitor = played.monitor
    played.qemu.close()
    with pytest.raises(MonitorClosed):
        played.monitor.command("system_powerdown")
    engine.power_down()
