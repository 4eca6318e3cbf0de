"""A real kernel started from our plans and tables, by QEMU's processor: what the VMM does on /dev/kvm, without it.

The console is a virtio device, so there is no output at all unless the kernel finds it where the tables say.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nagaya.engines.kvm import acpi, layout, mptable
from nagaya.engines.kvm.boot.load import load_kernel
from tests.carrier import make_carrier
from tests.conftest import require_program
from tests.kernel_images import make_bzimage, make_payload, ram

MEMORY_BYTES = 256 << 20
CPUS = 2
# hw/i386/microvm.c: eight transports of 512 bytes; QEMU gives devices the last ones.
DEVICES = [layout.MmioDevice(0xFEB0_0000 + i * 512, 512, 5 + i) for i in range(8)]
PORTS = acpi.Ports(sleep_control=0x600, sleep_status=0x601, reset=0x602, reset_value=1)
BY_COMMAND_LINE = " ".join(f"virtio_mmio.device={d.size_bytes}@{d.gpa:#x}:{d.gsi}" for d in DEVICES)


@pytest.fixture(scope="module", autouse=True)
def _qemu() -> None:
    require_program("qemu-system-x86_64")


def tsc_khz() -> int:
    """QEMU's guest counts as the host does; with no other clock described, the kernel has to be told how fast."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("cpu MHz"):
            return int(float(line.split(":")[1]) * 1000)
    pytest.skip("/proc/cpuinfo does not say the CPU's frequency")


def boot(kernel: str, initramfs: str, place: Path, *, protocol: str, with_acpi: bool, append: str = "") -> str:
    """Everything that the guest wrote on its console until it restarted."""
    tables = list(mptable.plan_mp_table(CPUS))
    described = acpi.plan_tables(acpi.Machine(CPUS, PORTS, DEVICES, cpu_objects=True))
    if with_acpi:
        tables.append((described.rsdp_gpa, described.content))
    image = load_kernel(
        kernel,
        memory=ram(MEMORY_BYTES),
        command_line=f"console=hvc0 quiet reboot=t panic=-1 tsc_early_khz={tsc_khz()} {append}",
        initrd=initramfs,
        protocol=protocol,  # type: ignore[arg-type]
        rsdp_gpa=described.rsdp_gpa if with_acpi else 0,
        rng_seed=b"\x5a" * 32,
    )
    carrier = place / "carrier"
    carrier.write_bytes(make_carrier(image, tables))
    command = [
        "qemu-system-x86_64", "-M", "microvm,acpi=off,isa-serial=off,rtc=off,auto-kernel-cmdline=off", "-accel", "tcg",
        "-cpu", "max", "-smp", str(CPUS), "-m", str(MEMORY_BYTES >> 20), "-nodefaults", "-no-user-config",
        "-display", "none", "-no-reboot", "-kernel", str(carrier), "-device", "virtio-rng-device",
        "-device", "virtio-serial-device", "-chardev", "stdio,id=console", "-device", "virtconsole,chardev=console",
    ]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace("\r", "")


def check_guest(text: str) -> None:
    assert "INIT\n" in text and "--end\n" in text, text
    assert "open-/dev/hvc0 0\n" in text and "open-/dev/hwrng 0\n" in text
    assert "--cpus\n0-1\n" in text


@pytest.mark.parametrize("protocol", ["linux", "pvh"])
def test_a_kernel_finds_cpus_and_devices_by_acpi(vmlinux: str, initramfs: str, tmp_path: Path, protocol: str) -> None:
    check_guest(boot(vmlinux, initramfs, tmp_path, protocol=protocol, with_acpi=True))


def test_a_kernel_finds_cpus_by_the_mp_table(vmlinux: str, initramfs: str, tmp_path: Path) -> None:
    append = f"acpi=off {BY_COMMAND_LINE}"
    check_guest(boot(vmlinux, initramfs, tmp_path, protocol="auto", with_acpi=False, append=append))


def test_a_kernel_taken_out_of_a_bzimage_starts(vmlinux: str, initramfs: str, tmp_path: Path) -> None:
    packed = tmp_path / "vmlinuz"
    packed.write_bytes(make_bzimage(make_payload(Path(vmlinux).read_bytes(), "lz4")))
    check_guest(boot(str(packed), initramfs, tmp_path, protocol="auto", with_acpi=True))
