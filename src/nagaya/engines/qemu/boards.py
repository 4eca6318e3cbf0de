"""The boards that QEMU emulates for us, as data: one for each CPU. What a guest finds on all of them is virtio-mmio."""

from __future__ import annotations

from nagaya.errors import Unsupported
from nagaya.static import NamedTuple


class Board(NamedTuple):
    """One kind of machine. `architecture` is what uname(2) calls its CPU."""

    platform: str
    architecture: str
    program: str
    package: str  # Debian's, for who lacks the program
    machine: str  # -machine
    cpu: str  # -cpu
    most_cpus: int
    transports: int  # virtio devices that fit
    power_off: str  # how the guest ends it: see `GuestSetup`
    arguments: tuple[str, ...]  # the kernel's
    one_cpu_arguments: tuple[str, ...] = ()  # and those that are right for one CPU only


X86_64 = Board(
    platform="linux/amd64",
    architecture="x86_64",
    program="qemu-system-x86_64",
    package="qemu-system-x86",
    # With ACPI 21 of 144 boots hung ("tsc: Marking TSC unstable"), without it none of 24. Without the clock chip (rtc)
    # the kernel waits a second for one that answers; without the timer (pit) it cannot find out the TSC's frequency.
    machine="microvm,acpi=off,pit=on,pic=on,rtc=on,isa-serial=off",
    cpu="max",
    most_cpus=64,  # CONFIG_NR_CPUS
    transports=8,
    power_off="reboot",
    # A triple fault ends the machine at once; the keyboard controller's way takes another 3 s.
    # And no test whether the timer's interrupts arrive: 50 ms.
    arguments=("console=hvc0", "reboot=t", "no_timer_check"),
    # One CPU: LOCK prefixes stay instead of being patched away one by one (50 ms), and the timer of the board is enough,
    # which needs no calibrating (200 ms). In idleness the kernel uses that one in any case, for the sake of an old AMD's
    # fault (E400) that this CPU's family has.
    one_cpu_arguments=("noreplace-smp", "nolapic_timer"),
)

AARCH64 = Board(
    platform="linux/arm64",
    architecture="aarch64",
    program="qemu-system-aarch64",
    package="qemu-system-arm",
    machine="virt,acpi=off,gic-version=3,usb=off",
    # Atomic instructions of their own (LSE), and neither pointer signatures nor SVE, which cost where they are emulated.
    cpu="neoverse-n1",
    most_cpus=64,
    transports=32,
    power_off="acpi",  # whose firmware is QEMU itself (PSCI)
    arguments=("console=hvc0", "swiotlb=noforce"),
)
RISCV64 = Board(
    platform="linux/riscv64",
    architecture="riscv64",
    program="qemu-system-riscv64",
    package="qemu-system-misc",
    machine="virt,usb=off",
    cpu="rv64",
    most_cpus=8,
    transports=8,
    power_off="acpi",  # by the firmware that QEMU brings (OpenSBI)
    arguments=("console=hvc0", "swiotlb=noforce"),
)

BOARDS = (X86_64, AARCH64, RISCV64)


def find_board(platform: str) -> Board:
    """The board for an image's platform. Raises `Unsupported`."""
    for board in BOARDS:
        if platform == board.platform or platform.startswith(f"{board.platform}/"):
            return board
    known = ", ".join(board.platform for board in BOARDS)
    raise Unsupported(f"no machine for platform {platform} can be emulated", hint=f"there are boards for {known}")
