"""The whole machines that QEMU makes for us, as data: what a system that is made for real hardware finds there."""

from __future__ import annotations

import os

from nagaya.errors import Unsupported
from nagaya.static import NamedTuple

BIOS, UEFI = "bios", "uefi"


class PcBoard(NamedTuple):
    """One kind of machine. `firmware` has the pairs (code, template of its variables) that make UEFI, the best first."""

    architecture: str
    platform: str
    program: str
    package: str
    machine: str  # -machine
    compat_machine: str  # the same for systems without drivers for today's; "" = there is none
    cpu: str  # -cpu where it is emulated
    default_firmware: str
    firmware: tuple[tuple[str, str], ...]
    firmware_package: str
    vga: bool  # has what every PC has: VGA, PS/2, IDE
    secure_firmware: tuple[tuple[str, str], ...] = ()  # the same with Microsoft's keys, that starts only what is signed
    tpm: str = ""  # the device that a TPM is; "" = there is none
    disk_queues: int = (
        0  # of a virtio disk; 0 = QEMU's choice, which is one for each CPU that there is at the beginning
    )
    hot_cpus: int = 0  # CPUs up to so many can come while it runs; 0 = none can (QEMU 7.2: PCs alone)
    loader: tuple[str, ...] = ()  # paths of what is booted in place of UEFI, where "bios" means that


X86_64 = PcBoard(
    architecture="x86_64",
    platform="linux/amd64",
    program="qemu-system-x86_64",
    package="qemu-system-x86",
    machine="q35,vmport=off,hpet=off",
    compat_machine="pc,vmport=off",
    cpu="max,la57=off",  # five-level paging is more than some loaders can bear
    default_firmware=BIOS,
    firmware=(
        ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
        ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
        ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
        ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ),
    firmware_package="ovmf",
    vga=True,
    secure_firmware=(
        ("/usr/share/OVMF/OVMF_CODE_4M.ms.fd", "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"),
        ("/usr/share/edk2/ovmf/OVMF_CODE.secboot.fd", "/usr/share/edk2/ovmf/OVMF_VARS.secboot.fd"),
    ),
    tpm="tpm-crb",
    disk_queues=4,
    hot_cpus=16,
)
AARCH64 = PcBoard(
    architecture="aarch64",
    platform="linux/arm64",
    program="qemu-system-aarch64",
    package="qemu-system-arm",
    machine="virt,gic-version=3",
    compat_machine="",
    cpu="neoverse-n1",
    default_firmware=UEFI,
    firmware=(
        ("/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.fd"),
        ("/usr/share/edk2/aarch64/QEMU_CODE.fd", "/usr/share/edk2/aarch64/QEMU_VARS.fd"),
    ),
    firmware_package="qemu-efi-aarch64",
    vga=False,
    tpm="tpm-tis-device",
)
RISCV64 = PcBoard(
    architecture="riscv64",
    platform="linux/riscv64",
    program="qemu-system-riscv64",
    package="qemu-system-misc",
    machine="virt",
    compat_machine="",
    cpu="rv64",
    default_firmware=BIOS,
    firmware=(("/usr/share/qemu-efi-riscv64/RISCV_VIRT_CODE.fd", "/usr/share/qemu-efi-riscv64/RISCV_VIRT_VARS.fd"),),
    firmware_package="qemu-efi-riscv64 (Debian 13), or u-boot-qemu for --firmware bios",
    vga=False,
    loader=("/usr/lib/u-boot/qemu-riscv64_smode/uboot.elf", "/usr/lib/u-boot/qemu-riscv64_smode/u-boot.bin"),
)
BOARDS = (X86_64, AARCH64, RISCV64)
ARCHITECTURES = tuple(board.architecture for board in BOARDS)


def most_cpus(board: PcBoard, cpus: int) -> int:
    """How many a machine has places for that starts with so many: the same for each number up to `hot_cpus`, for its memory,
    once saved, has tables of them all."""
    return max(cpus, board.hot_cpus)


def find_pc_board(platform: str) -> PcBoard:
    """The board of a machine's platform. Raises `Unsupported`."""
    for board in BOARDS:
        if board.platform == platform:
            return board
    raise Unsupported(f"there is no whole machine for {platform}", hint=f"for one of: {', '.join(ARCHITECTURES)}")


def find_firmware(board: PcBoard, *, secure: bool = False) -> tuple[str, str]:
    """UEFI for `board`: (code, template of its variables). Raises `Unsupported` where it is not installed."""
    known = board.secure_firmware if secure else board.firmware
    if not known:
        raise Unsupported(f"there is no secure boot for {board.architecture} machines", hint="leave --secure-boot away")
    for code, variables in known:
        if os.access(code, os.R_OK) and os.access(variables, os.R_OK):
            return code, variables
    raise Unsupported(
        f"UEFI {'with secure boot ' if secure else ''}for {board.architecture} is not installed",
        hint=f"as root: apt-get install {board.firmware_package}",
        finding=", ".join(code for code, _ in known),
    )


def find_loader(board: PcBoard) -> str:
    """What boots in place of UEFI; "" where QEMU brings a BIOS. Raises `Unsupported`."""
    if board.vga:
        return ""
    for path in board.loader:
        if os.access(path, os.R_OK):
            return path
    raise Unsupported(
        f"an {board.architecture} machine has no BIOS" if not board.loader else "U-Boot for riscv64 is not installed",
        hint="use --firmware uefi" if not board.loader else "as root: apt-get install u-boot-qemu",
    )
