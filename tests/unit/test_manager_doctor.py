"""What `nagaya doctor` finds, for every answer about KVM."""

from __future__ import annotations

import pytest

from nagaya.engines.kvm import probe, speed
from nagaya.engines.qemu import engine
from nagaya.engines.qemu.boards import Board
from nagaya.errors import Unsupported
from nagaya.manager import doctor


@pytest.mark.parametrize(
    ("kind", "well", "status"),
    [(probe.HARDWARE, True, doctor.OK), (probe.PVM, False, doctor.LIMITED), (probe.PVM, True, doctor.OK)],
)
def test_a_kvm(monkeypatch: pytest.MonkeyPatch, kind: str, well: bool, status: str) -> None:
    monkeypatch.setattr(probe, "probe_kvm", lambda: probe.Finding(kind, "tried"))
    monkeypatch.setattr(speed, "has_quick_kernel", lambda: well)
    found = doctor.look_at_kvm()
    assert (found.status, found.how) == (status, "tried")


@pytest.mark.parametrize("message", ["this host has no KVM", "this user may not use /dev/kvm"])
def test_no_kvm(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def refuse() -> probe.Finding:
        raise Unsupported(message, hint="a hint", finding="opening it")

    monkeypatch.setattr(probe, "probe_kvm", refuse)
    assert doctor.look_at_kvm() == doctor.Finding("kvm", doctor.MISSING, message, "opening it", "a hint")
    assert not doctor.can_run([doctor.look_at_kvm()])


def test_what_can_be_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_require_parts", lambda board, kernel="": None)
    found = doctor.look_at_emulation()
    assert found.status == doctor.OK and "linux/arm64" in found.found and doctor.can_run([found])

    def refuse(board: Board, kernel: str = "") -> None:
        raise Unsupported(f"{board.program} is not installed", hint="a hint", finding="PATH")

    monkeypatch.setattr(engine, "_require_parts", refuse)
    found = doctor.look_at_emulation()
    assert (found.status, found.follows) == (doctor.MISSING, "a hint") and not doctor.can_run([found])
    assert engine.list_platforms() == []
