"""`nagaya generate systemd`: the unit's text, and what systemd itself says of it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from nagaya.cli.commands.generate import COMMON_UNIT, plan_common_unit, plan_unit, unit_name
from nagaya.model.spec import MachineSpec, Process


def spec(name: str) -> MachineSpec:
    return MachineSpec(
        "0" * 32, name, "container", "i", "sha256:0", "linux/amd64", Process(("true",)), "h", 1, stop_timeout_s=7
    )


@pytest.mark.parametrize("user", [False, True])
def test_systemd_verifies_it(tmp_path: Path, user: bool) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    names = []
    for name, after in (("web.1", ("db",)), ("db", ())):
        text = plan_unit(
            spec(name), program="/bin/true", root="/srv/a b/50%", run="/run/nagaya", after=after, delay_s=2.5, user=user
        )
        path = tmp_path / unit_name(name)
        path.write_text(text)
        names.append(str(path))
    common = tmp_path / COMMON_UNIT
    common.write_text(plan_common_unit(("/bin/true", "--root", "/srv/a b/50%"), stop_s=90, user=user))
    names.append(str(common))
    words = ["systemd-analyze", *(("--user",) if user else ()), "verify", "--man=no", *names]
    environment = {"XDG_RUNTIME_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
    ours = [line for line in done.stderr.splitlines() if "nagaya" in line]
    assert ours == [], done.stderr


def test_what_is_in_it() -> None:
    text = plan_unit(
        spec("web"), program="/usr/bin/nagaya", root="/var/lib/x y", run="/run/n", after=("db",), delay_s=0, user=False
    )
    lines = text.splitlines()
    assert 'ExecStart=/usr/bin/nagaya --root "/var/lib/x y" --run-dir /run/n start web' in lines
    assert (
        "After=network-online.target local-fs.target nagaya-db.service" in lines and "Wants=nagaya-db.service" in lines
    )
    assert "TimeoutStopSec=37" in lines and "ExecStartPre" not in text
    plain = plan_unit(spec("web"), program="nagaya", root="/r", run="/n", after=(), delay_s=3, user=True)
    assert "After=" not in plain and "WantedBy=default.target" in plain and "ExecStartPre=/bin/sleep 3" in plain
