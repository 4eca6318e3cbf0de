"""What runs a whole machine's CPUs, by what is asked for and by the KVM that the host has."""

from __future__ import annotations

import os

import pytest

from nagaya.engines.kvm.known import HARDWARE, PVM, Finding
from nagaya.errors import NagayaError, Unsupported, UsageError
from nagaya.manager import hardware
from nagaya.manager.hardware import choose_runner

HERE = os.uname().machine
OTHER = "aarch64" if HERE == "x86_64" else "x86_64"


@pytest.fixture(params=[HARDWARE, PVM, ""])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    kind = str(request.param)

    def find() -> Finding:
        if not kind:
            raise Unsupported("this host has no KVM")
        return Finding(kind, "")

    monkeypatch.setattr(hardware, "find_kvm", find)
    monkeypatch.delenv("NAGAYA_TYPE", raising=False)
    return kind


def chosen(*words: str) -> str:
    """ "kvm bios", or the kind of problem that there is."""
    try:
        runner = choose_runner(*words)
    except NagayaError as problem:
        return type(problem).__name__
    return f"{runner.type} {runner.firmware}"


# Asked for: (type, firmware); with a hardware KVM, a software one, none.
CASES = {
    ("", ""): ("kvm bios", "emulated bios", "emulated bios"),
    ("auto", "uefi"): ("kvm uefi", "emulated uefi", "emulated uefi"),
    ("kvm", ""): ("kvm bios", "kvm direct", "Unsupported"),
    ("kvm", "bios"): ("kvm bios", "Unsupported", "Unsupported"),
    ("kvm", "direct"): ("kvm direct", "kvm direct", "Unsupported"),
    ("", "direct"): ("kvm direct", "kvm direct", "Unsupported"),
    ("emulated", ""): ("emulated bios",) * 3,
    ("emulated", "direct"): ("UsageError",) * 3,
    ("container", ""): ("UsageError",) * 3,
    ("kvm", "coreboot"): ("UsageError",) * 3,
}


@pytest.mark.skipif(HERE != "x86_64", reason="for x86_64 hosts")
@pytest.mark.parametrize("asked", CASES)
def test_what_is_chosen(kind: str, asked: tuple[str, str]) -> None:
    type_, firmware = asked
    assert chosen(type_, HERE, firmware) == CASES[asked][(HARDWARE, PVM, "").index(kind)]


def test_what_is_slow_is_said(kind: str) -> None:
    assert ("many minutes" in choose_runner("", HERE, "direct").note) == (kind == PVM) if kind else True
    assert bool(choose_runner("", HERE).note) == (kind != HARDWARE)


def test_another_cpu(kind: str) -> None:
    assert choose_runner("", OTHER).type == "emulated"
    for firmware in ("", "direct"):
        with pytest.raises(Unsupported, match="CPU runs no"):
            choose_runner("kvm", OTHER, firmware)
    with pytest.raises(UsageError):
        choose_runner("emulated", OTHER, "direct")
