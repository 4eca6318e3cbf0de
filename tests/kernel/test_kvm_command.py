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
        (("/missing/vmlinux", "--memory", "99999999"), 2, "hint: from 4096 bytes to 65536 GiB"),
        (("/missing/vmlinux", "--timeout", "0"), 2, "cannot run for 0 s"),
        (("/missing/vmlinux", "--vsock", "/missing/directory"), 1, "cannot listen for the guest's vsock connections"),
        (("/missing/vmlinux", "--net", "a-name-of-too-many-bytes"), 1, "cannot open the tap device"),
        (("/dev/null",), 2, "/dev/null is not a file"),
        (("/bin/true", "--cpus", "256"), 2, "hint: from 1 to 255"),
    ],
)
def test_what_cannot_be_is_one_sentence(words: tuple[str, ...], status: int, said: str) -> None:
    ran = run_words(*words)
    assert ran.returncode == status
    assert ran.stderr.startswith("nagaya.engines.kvm: ") and said in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (b"hello\n", 2, "it is not a kernel\nhint: name a vmlinux or bzImage file"),
        (b"", 2, "is empty\nhint: name the file of the kernel"),
        (b"#!/bin/sh\n", 2, "it is a script and not a kernel\nhint: "),
        (b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + b"\x02\0\xb7\0" + bytes(108), 1, "for another CPU: aarch64\nhint: "),
    ],
)
def test_what_is_no_kernel(tmp_path: Path, content: bytes, status: int, said: str) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(content)
    ran = run_words(str(kernel), "--memory", "32")
    assert (ran.returncode, said in ran.stderr) == (status, True), ran.stderr
    assert ran.stderr.startswith(f"nagaya.engines.kvm: cannot start {kernel}: ")


@pytest.mark.parametrize("what", ["kernel", "disk"])
def test_what_is_missing_comes_with_a_hint(tmp_path: Path, what: str) -> None:
    words = ("/missing/vmlinux", *(("--disk", "/missing/disk") if what == "disk" else ()))
    ran = run_words(*words)
    assert ran.returncode == 1 and f"there is no {what} /missing/" in ran.stderr and "\nhint: " in ran.stderr


def test_a_kernel_that_does_not_fit(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(make_elf([Load(POWER_OFF, 64 << 20)], entry=64 << 20))
    ran = run_words(str(kernel), "--memory", "32")
    assert ran.returncode == 2
    assert (
        "the kernel needs memory from 0x4000000 " in ran.stderr and "hint: give the machine more memory" in ran.stderr
    )


# What a host without a usable KVM has in /dev; this process has a mount namespace of its own for it.
WITHOUT_KVM = {
    "absent": ("", 1, "this host has no KVM\nhint: load kvm_intel or kvm_amd"),
    "no driver": ("mknod /dev/kvm c 10 251", 1, "this host's KVM cannot be used: No such device"),
    "another device": ("mknod /dev/kvm c 1 3", 1, "/dev/kvm is not KVM's device\nhint: use --type emulated"),
    "root's": ("mknod -m 600 /dev/kvm c 10 232", 1, "this user may not use /dev/kvm\nhint: let a group use it"),
    "a group's": (
        "mknod -m 660 /dev/kvm c 10 232; chgrp tty /dev/kvm",
        1,
        "may not use /dev/kvm\nhint: join its group: usermod -aG tty",
    ),
}


@pytest.mark.parametrize("case", WITHOUT_KVM)
def test_hosts_without_a_usable_kvm(tmp_path: Path, case: str) -> None:
    make, status, said = WITHOUT_KVM[case]
    if os.geteuid():
        pytest.skip("needs root")
    run(tmp_path, POWER_OFF)
    tmp_path.chmod(0o755)
    script = (
        f"mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9; {make or ':'}\n"
    )
    who = ("setpriv", "--reuid", "4242", "--regid", "4242", "--clear-groups") if "'s" in case else ()
    inner = (*who, sys.executable, "-m", "nagaya.engines.kvm", "kernel", "--memory", "32")
    ran = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-ec", script + 'exec "$@"', "sh", *inner],
        check=False, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL, cwd=tmp_path,
        env={**os.environ, "HOME": "/nonexistent"},
    )  # fmt: skip
    assert (ran.returncode, said in ran.stderr) == (status, True), ran.stderr
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
