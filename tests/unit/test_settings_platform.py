"""A machine for another CPU is emulated, unless somebody has settled another type: that is then refused, not changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nagaya.manager import settings

FOREIGN = "linux/arm64" if os.uname().machine != "aarch64" else "linux/amd64"


@pytest.fixture(autouse=True)
def _nothing_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NAGAYA_TYPE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(settings, "SYSTEM_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(settings, "_find_best", lambda kernel: settings.Choice("kvm"))


@pytest.mark.parametrize(
    ("wanted", "settled", "platform", "type_"),
    [
        ("", "", "", "kvm"),
        ("", "", FOREIGN, "emulated"),
        ("", "", f"linux/{os.uname().machine}", "kvm"),
        ("", "auto", FOREIGN, "emulated"),
        ("auto", "", FOREIGN, "emulated"),
        ("auto", "", "", "kvm"),
        ("", "kvm", FOREIGN, "kvm"),
        ("container", "", FOREIGN, "container"),
    ],
)
def test_who_chooses(wanted: str, settled: str, platform: str, type_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if settled:
        monkeypatch.setenv("NAGAYA_TYPE", settled)
    assert settings.choose_type(wanted, platform=platform).type == type_
