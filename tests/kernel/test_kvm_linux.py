"""The guest kernel that `nagaya kernel build` made, on our own VMM and the host's real KVM, with a device of each kind."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NamedTuple

import pytest

from nagaya.engines.kvm.machine import Hardware, Machine
from nagaya.engines.kvm.vcpu import Ending
from nagaya.kernel.unix import listen
from nagaya.virtio.balloon import Balloon
from nagaya.virtio.blk import Blk
from nagaya.virtio.console import Console, Port
from nagaya.virtio.net import Net
from nagaya.virtio.net_link import Datagrams
from nagaya.virtio.rng import Rng
from nagaya.virtio.vsock import Vsock

BOOT_S = 240.0  # a software KVM takes 15 s for it on a machine with nothing else to do; hardware well under one
CPUS = 2


class Outcome(NamedTuple):
    text: str
    ending: Ending | None
    counters: dict[str, dict[str, int]]
    faults: dict[str, str]
    threads_ended: bool


@pytest.fixture(scope="module")
def outcome(vmlinux: str, initramfs: str, disk: str, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One boot, which all tests of this file look at: on a software KVM it is the slowest thing in the suite."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/kvm")
    return run(vmlinux, initramfs, disk, tmp_path_factory.mktemp("linux"))


def run(kernel: str, initramfs: str, disk: str, place: Path) -> Outcome:
    output = place / "console"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    port = Port("console", console=True, output_fd=os.open(output, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    # Their order is that of the disk and the balloon in the test under QEMU: the program looks for virtio4.
    devices = (
        Console("console0", (port,)),
        Rng("rng0"),
        Net("net0", Datagrams(theirs.detach()), mac=b"\x02\0\0\0\0\x01"),
        Blk("blk0", disk),
        Balloon("balloon0"),
        Vsock(
            "vsock0", guest_cid=3, listener_fd=listen(str(place), "vsock"), directory=str(place), socket_name="vsock"
        ),
    )
    hardware = Hardware(
        kernel=kernel, initrd=initramfs, command_line="console=hvc0 panic=-1", memory_bytes=128 << 20, cpus=CPUS
    )
    with ours, Machine(hardware, devices) as machine:
        machine.start()
        ending = machine.wait(BOOT_S)
        counters, faults = machine.counters(), machine.faults()
        machine.power_off()
        ended = not any(thread.is_alive() for thread in machine._threads)
    return Outcome(output.read_text().replace("\r", ""), ending, counters, faults, ended)


def test_the_guest_restarts_its_machine(outcome: Outcome) -> None:
    assert outcome.ending is not None, f"nothing but this in {BOOT_S} s:\n{outcome.text}"
    assert outcome.ending.kind == "reset", outcome
    assert outcome.threads_ended


def test_it_has_its_cpus(outcome: Outcome) -> None:
    assert f"--cpus\n0-{CPUS - 1}\n" in outcome.text, outcome.text


@pytest.mark.parametrize(
    "line",
    [
        "open-/dev/hvc0 0", "open-/dev/hwrng 0", "open-/dev/vsock 0", "open-/sys/class/net/eth0 0", "open-/dev/vda 0",
        "open-/sys/bus/virtio/drivers/virtio_balloon/virtio4 0", "mount-ext4 0", "open-/disk/made 0", "umount 0",
    ],
)  # fmt: skip
def test_it_has_its_devices(outcome: Outcome, line: str) -> None:
    assert f"{line}\n" in outcome.text, outcome.text


def test_no_device_met_a_fault(outcome: Outcome) -> None:
    assert outcome.faults == {}


def test_what_was_counted(outcome: Outcome) -> None:
    disk = outcome.counters["blk0"]
    assert disk["reads"] > 0
    assert disk["writes"] > 0
    assert disk["errors"] == 0
    assert outcome.counters["exits"]["mmio"] > 0
    assert outcome.counters["console0"]["output_bytes"] >= len(outcome.text)
