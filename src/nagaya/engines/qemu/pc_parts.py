"""What a whole machine is made of, opened and locked: firmware, drives, network cards. QEMU is born with all of it."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack

from nagaya.engines.base import BootRequest
from nagaya.engines.qemu import pc_arguments
from nagaya.engines.qemu.arguments import Card
from nagaya.engines.qemu.host_pci import PciDevice, find_pci, take
from nagaya.engines.qemu.host_usb import find_usb
from nagaya.engines.qemu.inherited import Inherited
from nagaya.engines.qemu.media import describe
from nagaya.engines.qemu.pc_arguments import PcDrive, PcFirmware, PcKernel
from nagaya.engines.qemu.pc_boards import UEFI, PcBoard, find_firmware, find_loader
from nagaya.engines.vm import child
from nagaya.errors import HostError, Unsupported
from nagaya.model.spec import Hardware
from nagaya.net import tap
from nagaya.net.plan import LinkPlan
from nagaya.storage.disk_images.chain import open_chain
from nagaya.storage.plan import HardwarePlan

KVM = "/dev/kvm"


def require_program(board: PcBoard) -> None:
    """Raise `Unsupported` without QEMU for `board`."""
    places = child.ENVIRONMENT["PATH"].split(":")
    if not any(os.access(f"{place}/{board.program}", os.X_OK) for place in places):
        raise Unsupported(
            f"{board.program} is not installed, and it runs {board.architecture} machines",
            hint=f"as root: apt-get install {board.package}",
            finding="it was looked for in PATH",
        )


def kvm_groups() -> tuple[int, ...]:
    """The group that may open /dev/kvm, where not everybody may."""
    node = os.stat(KVM)
    return () if node.st_mode & stat.S_IWOTH else (node.st_gid,)


def open_firmware(board: PcBoard, hardware: Hardware, plan: HardwarePlan, inherited: Inherited) -> PcFirmware:
    if hardware.firmware != UEFI:
        loader = find_loader(board) if plan.install is None else ""
        return PcFirmware(loader=inherited.add(os.open(loader, os.O_RDONLY | os.O_CLOEXEC))) if loader else PcFirmware()
    code, _ = find_firmware(board, secure=hardware.secure_boot)
    return PcFirmware(
        code=inherited.add(os.open(code, os.O_RDONLY | os.O_CLOEXEC)),
        variables=inherited.add(os.open(plan.firmware_state, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)),
    )


def open_kernel(plan: HardwarePlan, inherited: Inherited) -> PcKernel | None:
    """That of an installer, if the machine is to start one."""
    if plan.install is None:
        return None
    kernel, initramfs, words = plan.install
    first, second = (
        inherited.add(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)) for path in (kernel, initramfs)
    )
    return PcKernel(first, second, words)


def open_usb(hardware: Hardware, inherited: Inherited) -> tuple[int, ...]:
    """Descriptors of the host's devices. Raises as `find_usb`, and `HostError` for one that cannot be had."""
    found = []
    for text in hardware.usb:
        device = find_usb(text)
        try:
            found.append(inherited.add(os.open(device.node, os.O_RDWR | os.O_CLOEXEC)))
        except OSError as error:
            raise HostError.from_os(error, f"cannot take USB device {text}") from None
    return tuple(found)


def take_pci(hardware: Hardware) -> tuple[PciDevice, ...]:
    """What QEMU is to open of the host's. Raises as `find_pci` and `take`: much may have changed since it was asked for."""
    devices = find_pci(hardware.pci)
    take(devices)
    return devices


def open_drives(hardware: Hardware, plan: HardwarePlan, inherited: Inherited, local: ExitStack) -> tuple[PcDrive, ...]:
    """Each image with what lies under it. The locks go when QEMU does, for it has copies of the descriptors."""
    found: list[PcDrive] = []
    group = pc_arguments.FIRST_SET
    order = sorted(range(len(hardware.drives)), key=lambda at: hardware.drives[at].cdrom != hardware.boot_cdrom)
    for number, (drive, path) in enumerate(zip(hardware.drives, plan.paths, strict=True)):
        node, descriptors = None, list[tuple[int, int]]()
        if path:
            chain = open_chain(
                path, local, format=drive.format, writable=not drive.read_only, allowed=plan.backing_places,
                allow_backing=drive.allow_backing,
            )  # fmt: skip
            sets = range(group, group + len(chain.layers))
            group += len(chain.layers)
            descriptors = list(zip(map(inherited.lend, chain.descriptors), sets, strict=True))
            node = describe(chain, tuple(f"/dev/fdset/{number}" for number in sets))
        name, boot_index = pc_arguments.drive_name(drive, number), 1 + order.index(number)
        found.append(PcDrive(name, node, tuple(descriptors), drive.cdrom, boot_index, drive.slot))
    return tuple(found)


def plug_in(link: LinkPlan, request: BootRequest, inherited: Inherited) -> Card:
    if link.driver == "user":
        return Card(link.mac, ports=request.network.forwards)
    return Card(link.mac, inherited.add(tap.open_link(link)))
