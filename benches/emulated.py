"""`run --type emulated busybox echo` against QEMU started by hand: the same kernel, to its first program's first output.

And against virtme-ng where it is installed: `vng --disable-kvm -r RELEASE -- echo hello`, which boots a distribution's kernel on
the host's own files. NAGAYA_BENCH_VIRTME names the release, else it is the running kernel's; its image and modules have to be
in /boot and /lib/modules. It tells no first output without a terminal, so its time is that of the whole command.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from benches.measure import Check, command, report, take_turns
from benches.stores import Stores, open_stores
from nagaya.kernels.cache import find_kernel
from tests.kernel.guest_init import compile_init, pack_initramfs

OUTPUT = b"INIT"  # the first that kernel_init.c writes
VIRTME_ROUNDS = 3  # of ten seconds and more


def _by_hand(kernel: str, initramfs: str) -> float:
    """Milliseconds from QEMU's start to the first program's first output on the console."""
    ours, theirs = socket.socketpair()
    command = [
        "qemu-system-x86_64", "-M", "microvm,acpi=off,isa-serial=off", "-accel", "tcg", "-cpu", "max", "-m", "512",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-kernel", kernel, "-initrd", initramfs,
        "-append", "console=hvc0 quiet reboot=t", "-device", "virtio-serial-device",
        "-chardev", f"socket,id=console,fd={theirs.fileno()}", "-device", "virtconsole,chardev=console",
    ]  # fmt: skip
    began = time.perf_counter()
    with subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL) as process:
        theirs.close()
        seen = b""
        while OUTPUT not in seen:
            data = ours.recv(4096)
            if not data:
                raise RuntimeError(f"QEMU ended without any output: {process.wait()}")
            seen += data
        took = (time.perf_counter() - began) * 1e3
        process.kill()
    ours.close()
    return took


def _by_nagaya(stores: Stores) -> float:
    """Milliseconds from the command's start to its program's first output."""
    argv = [*stores.nagaya, "run", "--rm", "--type", "emulated", "--network", "none", "busybox", "echo", "hello"]
    began = time.perf_counter()
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        took = (time.perf_counter() - began) * 1e3
        process.stdout.read()
    if not first or process.returncode:
        raise RuntimeError(f"{' '.join(argv)}: status {process.returncode}")
    return took


def _virtme_command() -> list[str]:
    """virtme-ng's; empty where it, or a kernel for it, is missing."""
    release = os.environ.get("NAGAYA_BENCH_VIRTME", os.uname().release)
    if shutil.which("vng") is None or not os.path.exists(f"/boot/vmlinuz-{release}"):
        return []
    return ["vng", "--disable-kvm", "-r", release, "--", "echo", "hello"]


def _against_virtme(stores: Stores, rounds: int) -> bool:
    if not (argv := _virtme_command()):
        print("\nemulated: not compared with virtme-ng, which is not installed, or has no kernel in /boot")
        return True
    samples = take_turns(
        {
            " ".join(argv): command(argv),
            "nagaya run --type emulated, to its output": lambda: _by_nagaya(stores),
        },
        rounds=min(rounds, VIRTME_ROUNDS),
        warm_up=0,
    )
    ratio = samples[1].median / samples[0].median
    return report("emulated, beside virtme-ng", samples, [Check("run, of virtme-ng", ratio, 0.25)])


def main(rounds: int) -> bool:
    kernel = find_kernel("x86_64")
    if kernel is None:
        print("\nemulated: left out, no guest kernel is built (nagaya kernel build)")
        return True
    with open_stores() as stores:
        init = compile_init(Path(stores.directory, "init"))
        initramfs = pack_initramfs(Path(stores.directory, "initramfs"), init)
        _by_nagaya(stores)  # makes the root image, once
        samples = take_turns(
            {
                "QEMU by hand, to its first program": lambda: _by_hand(kernel.path, str(initramfs)),
                "nagaya run --type emulated, to its output": lambda: _by_nagaya(stores),
            },
            rounds=rounds,
        )
        ratio = samples[1].median / samples[0].median
        kept = report("emulated: start to first output", samples, [Check("run, of QEMU by hand", ratio, 1.15)])
        return _against_virtme(stores, rounds) and kept
