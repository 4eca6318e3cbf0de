"""`python -m nagaya.engines.kvm` on kernels of a few bytes: exit statuses, and what it says."""

from __future__ import annotations

import fcntl
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from nagaya.engines.kvm import power, vm
from nagaya.engines.kvm.serial import COM1_PORT
from nagaya.errors import Unsupported
from tests.kernel.test_kvm_machine import HLT, TEXT_GPA, UD2, forever, out
from tests.kernel_images import Load, make_elf

POWER_OFF = out(power.SLEEP_CONTROL_PORT, 0x34) + forever(HLT)


@pytest.fixture(autouse=True)
def _kvm() -> None:
    try:
        os.close(vm.open_kvm())
    except Unsupported as error:
        pytest.skip(f"needs kvm: {error}")


def run(directory: Path, text: bytes, *options: str) -> subprocess.CompletedProcess[str]:
    kernel = directory / "kernel"
    kernel.write_bytes(make_elf([Load(text, TEXT_GPA)], entry=TEXT_GPA))
    return run_words(str(kernel), "--memory", "32", *options)


def run_words(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nagaya.engines.kvm", *words]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)


def test_power_off_is_success(tmp_path: Path) -> None:
    ran = run(tmp_path, POWER_OFF)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_exit_port_gives_the_exit_status_and_the_serial_port_says_why(tmp_path: Path) -> None:
    text = b"".join(out(COM1_PORT, byte) for byte in b"hello\n") + out(power.EXIT_PORT, 0x107) + forever(HLT)
    ran = run(tmp_path, text, "--serial", "--cpus", "2")
    assert (ran.returncode, ran.stderr) == (7, "hello\n")


def test_any_other_end_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    ran = run(tmp_path, UD2)
    assert ran.returncode == 1
    assert "(triple-fault)" in ran.stderr and "Traceback" not in ran.stderr


def test_time_limit(tmp_path: Path) -> None:
    ran = run(tmp_path, forever(HLT), "--timeout", "0.2")
    assert (ran.returncode, ran.stderr) == (1, "nagaya.engines.kvm: the machine ran for 0.2 s (timeout)\n")


def test_trace_counts_exits_and_requests(tmp_path: Path) -> None:
    ran = run(tmp_path, out(0x1234, 0) * 3 + POWER_OFF, "--trace")
    assert ran.returncode == 0
    assert "exits: io=4" in ran.stderr


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("/missing/vmlinux",), 1, "there is no kernel /missing/vmlinux"),
        (("/missing/vmlinux", "--cpus", "0"), 2, "0 CPUs"),
        (("/missing/vmlinux", "--memory", "0"), 2, "too few"),
        (("/missing/vmlinux", "--disk", "/missing/disk"), 1, "/missing/disk"),
        (("/missing/vmlinux", "--disk", "/missing/disk,wild"), 2, "'wild' is no mode"),
        (("/dev/null",), 2, "/dev/null is not a file"),
    ],
)
def test_what_cannot_be_is_one_sentence(words: tuple[str, ...], status: int, said: str) -> None:
    ran = run_words(*words)
    assert ran.returncode == status
    assert ran.stderr.startswith("nagaya.engines.kvm: ") and said in ran.stderr
    assert "Traceback" not in ran.stderr


def test_ctrl_bracket_ends_the_machine_and_puts_the_terminal_right(tmp_path: Path) -> None:
    """Ctrl-C and Ctrl-Z are keys like any other; the guest, which never looks, leaves them unread."""
    kernel = tmp_path / "kernel"
    text = b"".join(out(COM1_PORT, byte) for byte in b"up") + forever(HLT)
    kernel.write_bytes(make_elf([Load(text, TEXT_GPA)], entry=TEXT_GPA))
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    command = [sys.executable, "-m", "nagaya.engines.kvm", str(kernel), "--memory", "32", "--serial"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    try:
        assert process.stderr is not None
        assert process.stderr.read(2) == "up"
        os.write(ours, b"\x03\x1a\x1c")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        os.write(ours, b"\x1d")
        assert process.wait(10) == 1
        assert process.stderr.read().endswith("interrupted (stopped)\n")
        assert termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        process.communicate()
        os.close(ours)
        os.close(theirs)
