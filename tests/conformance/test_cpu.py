"""What programs can do with a CPU, and what not; and that the next program does not notice."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nagaya import Mount
from tests.conftest import require_program

HERE = os.path.dirname(__file__)
Run = Callable[..., tuple[int, bytes, bytes]]
SIGNALS = {"ud2": signal.SIGILL, "int3": signal.SIGTRAP, "step": signal.SIGTRAP, "flags": 0}

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="instructions of x86-64")


def compile_program(directory: Path, name: str) -> str:
    require_program("gcc")
    path = directory / name
    subprocess.run(["gcc", "-O1", "-static", "-o", path, f"{HERE}/{name}.c"], check=True)
    return str(path)


def test_what_only_a_kernel_may(run: Run, tmp_path: Path) -> None:
    breaches = compile_program(tmp_path, "breaches")
    status, out, err = run("/breaches", mounts=(Mount("bind", breaches, "/breaches", read_only=True),))
    assert (status, err) == (0, b"")
    found = {name: int(number) for name, number in (line.split() for line in out.decode().splitlines())}
    assert len(found) == 18
    assert found == {name: SIGNALS.get(name, signal.SIGSEGV) for name in found}


def test_registers_are_kept_apart(run: Run, tmp_path: Path) -> None:
    registers = compile_program(tmp_path, "registers")
    status, out, err = run("/registers", mounts=(Mount("bind", registers, "/registers", read_only=True),))
    assert (status, err) == (0, b"")
    assert out in (b"apart\n", b"none\n")
