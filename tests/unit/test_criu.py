"""What the doctor says of CRIU, by a program that stands for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nagaya.manager.criu import look_at_criu
from nagaya.manager.finding import LIMITED, OK


def program(place: Path, check: str) -> str:
    path = place / "criu"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && {{ echo "Version: 3.17"; echo more; exit; }}\n{check}\n')
    path.chmod(0o755)
    return str(path)


def test_one_that_is_not_there() -> None:
    assert look_at_criu("").found == "not installed"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root asks it")
@pytest.mark.parametrize(
    ("check", "status", "found"),
    [
        ("echo Looks good.", OK, "3.17 works on this kernel"),
        (
            "echo trying >&2; echo 'Error: no kerndat' >&2; exit 1",
            LIMITED,
            "3.17 does not work on this kernel: Error: no kerndat",
        ),
        ("exit 1", LIMITED, "3.17 does not work on this kernel: it fails"),
    ],
)
def test_its_own_word(tmp_path: Path, check: str, status: str, found: str) -> None:
    finding = look_at_criu(program(tmp_path, check))
    assert (finding.status, finding.found) == (status, found)
    assert ("not its memory" in finding.follows) == (status == LIMITED)


def test_one_that_is_no_program(tmp_path: Path) -> None:
    (tmp_path / "criu").write_text("")
    assert look_at_criu(str(tmp_path / "criu")).status == LIMITED
