"""From a whole machine to QEMU's command line. Pure: what QEMU opens are descriptors that it was born with.

The exceptions are QEMU's own files below /usr/share: the BIOS, and the option ROMs of cards.
"""

from __future__ import annotations

import json

from nagaya.engines.qemu.arguments import SANDBOX, USER_NETWORK, Card, forwards
from nagaya.engines.qemu.guest_agent import CHANNEL, CHARDEV
from nagaya.engines.qemu.pc_boards import PcBoard, most_cpus
from nagaya.model.spec import Drive
from nagaya.static import Any, NamedTuple

MOST_DRIVES = 16  # of virtio
MOST_IDE_DRIVES = 4  # two buses with two places each; of AHCI it is 6
MOST_CDS = 4
SLOTS = 8  # for disks that come and go
CARD_PORTS = 8
_SLOTS_AT, _CARD_PORTS_AT = 0x10, 0x11  # places on the first bus, of eight functions each


class PcDrive(NamedTuple):
    """`node` is the image as QEMU's block options, whose files are /dev/fdset/N; None = no disc is in."""

    name: str
    node: dict[str, Any] | None
    descriptors: tuple[tuple[int, int], ...]  # (number of the descriptor in QEMU, N)
    cdrom: bool
    boot_index: int
    slot: int = 0


class PcFirmware(NamedTuple):
    """Numbers of descriptors: UEFI's code and the machine's own variables, or what is booted in their place; -1 = none."""

    code: int = -1
    variables: int = -1
    loader: int = -1


class PcKernel(NamedTuple):
    """What is started instead of what is on the disks. Numbers of descriptors, and the kernel's command line."""

    kernel: int
    initramfs: int
    command_line: str


class PcMachine(NamedTuple):
    """All that the command line says. Descriptors are numbers in QEMU's process."""

    board: PcBoard
    id: str  # 32 hex digits
    kvm: bool
    cpus: int
    memory_bytes: int
    compat: bool
    firmware: PcFirmware
    drives: tuple[PcDrive, ...]
    monitor: int
    console: int
    cards: tuple[Card, ...] = ()
    guest: int = -1  # where QEMU's guest agent is heard; -1 = nowhere
    secure_boot: bool = False
    tpm: int = -1  # the connection to one; -1 = there is none
    usb: tuple[int, ...] = ()  # devices of the host
    pci: tuple[str, ...] = ()  # the same: their addresses there
    incoming: bool = False  # waits to be told what to go on from
    kernel: PcKernel | None = None
    forward_ssh: bool = False  # of a user-mode network: a port of the host's loopback, of the kernel's choice


def drive_name(drive: Drive, number: int) -> str:
    """Of the node and, with `device_name`, the device of the drive with that number in the record."""
    return f"plug{drive.slot}" if drive.slot else f"{'cd' if drive.cdrom else 'disk'}{number}"


def device_name(drive: str) -> str:
    return f"{drive}-device"


def card_port(number: int) -> str:
    return f"cards{number}"


def plan_pc(machine: PcMachine) -> list[str]:
    """QEMU's argv."""
    board = machine.board
    uuid = "-".join(machine.id[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
    command = [
        board.program, "-no-user-config", "-nodefaults", "-display", "none", "-vnc", "none",
        "-sandbox", SANDBOX,
        "-name", f"guest={machine.id}",
        "-uuid", uuid,
        "-machine", _machine(machine),
        *(("-accel", "kvm", "-cpu", "host") if machine.kvm else ("-accel", "tcg,thread=multi", "-cpu", board.cpu)),
        "-smp", f"cpus={machine.cpus},maxcpus={most_cpus(board, machine.cpus)}",
        "-m", f"{machine.memory_bytes >> 10}k",
        "-rtc", "base=utc,driftfix=slew" if board.vga else "base=utc",
        "-boot", "menu=off,strict=off",
        "-chardev", f"socket,id=monitor,fd={machine.monitor}", "-mon", "chardev=monitor,mode=control",
        "-chardev", f"socket,id=console,fd={machine.console}", "-serial", "chardev:console",
    ]  # fmt: skip
    command += _firmware(machine.firmware)
    if machine.kernel is not None:
        kernel, initramfs, words = machine.kernel
        command += ["-kernel", f"/proc/self/fd/{kernel}", "-initrd", f"/proc/self/fd/{initramfs}", "-append", words]
        command.append("-no-reboot")  # that ends it: the next thing to boot is another one
    if machine.secure_boot:
        command += ["-global", "driver=cfi.pflash01,property=secure,value=on", "-global", "ICH9-LPC.disable_s3=1"]
    if machine.tpm >= 0:
        command += ["-chardev", f"socket,id=tpm,fd={machine.tpm}", "-tpmdev", "emulator,id=tpm0,chardev=tpm"]
        command += ["-device", f"{board.tpm},tpmdev=tpm0"]
    command += _screen(machine)
    for number, descriptor in enumerate(machine.usb):
        group = _USB_SETS + number
        command += ["-add-fd", f"fd={descriptor},set={group}"]
        command += ["-device", f"usb-host,bus=usb.0,hostdevice=/dev/fdset/{group}"]
    command += _ports(machine)
    command += _passed_on(machine)
    command += _drives(machine)
    command += _network(machine)
    if machine.incoming:
        command += ["-incoming", "defer"]
    if machine.guest >= 0:
        command += ["-device", "virtio-serial-pci,id=serial", "-chardev", f"socket,id={CHARDEV},fd={machine.guest}"]
        command += ["-device", f"virtserialport,bus=serial.0,chardev={CHARDEV},name={CHANNEL}"]
    if not machine.compat:
        command += ["-device", "virtio-rng-pci"]
        command += ["-device", "virtio-balloon-pci,id=balloon,free-page-reporting=on,deflate-on-oom=on"]
    return command


def _machine(machine: PcMachine) -> str:
    board = machine.board
    text = board.compat_machine if machine.compat and board.compat_machine else board.machine
    if machine.firmware.code >= 0:
        text += ",pflash0=firmware,pflash1=variables"
    if machine.secure_boot:
        text += ",smm=on"  # without which a system could write to the variables behind the firmware's back
    return text


def _firmware(firmware: PcFirmware) -> list[str]:
    if firmware.loader >= 0:
        return ["-kernel", f"/proc/self/fd/{firmware.loader}"]
    if firmware.code < 0:
        return []
    command = []
    for group, (name, number) in enumerate((("firmware", firmware.code), ("variables", firmware.variables)), start=1):
        read_only = name == "firmware"
        file = {"driver": "file", "filename": f"/dev/fdset/{group}", "read-only": read_only, "locking": "off"}
        node = {"driver": "raw", "node-name": name, "read-only": read_only, "file": file}
        command += ["-add-fd", f"fd={number},set={group}", "-blockdev", json.dumps(node)]
    return command


FIRST_SET = 3  # of the drives: two are the firmware's
_USB_SETS = 4096
_FIRST_PASSED_CHASSIS = 1 + SLOTS + CARD_PORTS


def _screen(machine: PcMachine) -> list[str]:
    """A screen, and a pointer that says where it is rather than how it moved: what VNC has."""
    if machine.board.vga:
        command = ["-device", "VGA,id=screen" if machine.compat else "VGA,id=screen,edid=on,xres=1024,yres=768"]
        usb = "piix3-usb-uhci,id=usb" if machine.compat else "qemu-xhci,id=usb"
        return [*command, "-device", usb, "-device", "usb-tablet,bus=usb.0"]
    return [
        "-device", "virtio-gpu-pci,id=screen", "-device", "qemu-xhci,id=usb",
        "-device", "usb-kbd,bus=usb.0", "-device", "usb-tablet,bus=usb.0",
    ]  # fmt: skip


def _ports(machine: PcMachine) -> list[str]:
    """Empty ones, for what comes later: nothing can be plugged into the first bus of a PCI Express machine that runs."""
    if machine.compat:
        return []
    command: list[str] = []
    places = [(f"slot{number + 1}", _SLOTS_AT, number) for number in range(SLOTS)]
    places += [(card_port(number), _CARD_PORTS_AT, number) for number in range(CARD_PORTS)]
    for chassis, (name, place, function) in enumerate(places, start=1):
        address = f"addr={place:x}.{function},multifunction=on,chassis={chassis}"
        command += ["-device", f"pcie-root-port,id={name},bus=pcie.0,{address}"]
    return command


def _passed_on(machine: PcMachine) -> list[str]:
    """PCI devices of the host's, each below a port of its own: many a driver expects one above its PCI Express device."""
    command: list[str] = []
    for number, address in enumerate(machine.pci):
        bus = "pci.0"
        if not machine.compat:
            bus, chassis = f"passed{number}", _FIRST_PASSED_CHASSIS + number
            command += ["-device", f"pcie-root-port,id={bus},bus=pcie.0,chassis={chassis}"]
        command += ["-device", f"vfio-pci,host={address},id=pci{number},bus={bus}"]
    return command


def _drives(machine: PcMachine) -> list[str]:
    command: list[str] = []
    if not machine.board.vga and any(drive.cdrom for drive in machine.drives):
        command += ["-device", "virtio-scsi-pci,id=cds"]
    for number, drive in enumerate(machine.drives):
        for descriptor, group in drive.descriptors:
            command += ["-add-fd", f"fd={descriptor},set={group},opaque={drive.name}"]
        if drive.node is not None:
            command += ["-blockdev", json.dumps({**drive.node, "node-name": drive.name})]
        command += ["-device", _drive_device(machine, drive, number)]
    return command


def _drive_device(machine: PcMachine, drive: PcDrive, number: int) -> str:
    kind = "virtio-blk-pci"
    if drive.cdrom:
        kind = "ide-cd" if machine.board.vga else "scsi-cd,bus=cds.0"
    elif machine.compat:
        kind = "ide-hd"
    text = f"{kind},id={device_name(drive.name)},bootindex={drive.boot_index}"
    if kind == "virtio-blk-pci" and machine.board.disk_queues:
        text += f",num-queues={machine.board.disk_queues}"
    if drive.slot and not machine.compat:
        text += f",bus=slot{drive.slot}"
    if drive.node is not None:
        text += f",drive={drive.name}"
    if not drive.cdrom:
        text += f",serial={drive.name}"
    if machine.compat and machine.board.vga:  # two buses with two places each
        text += f",bus=ide.{number // 2},unit={number % 2}"
    return text


def _network(machine: PcMachine) -> list[str]:
    command: list[str] = []
    for number, card in enumerate(machine.cards):
        tap = f"tap,id=net{number},fd={card.tap},vhost=off"
        user = f"user,id=net{number},net={USER_NETWORK},ipv6=off{forwards(card)}"
        if machine.forward_ssh:
            user += ",hostfwd=tcp:127.0.0.1:0-:22"
        kind = "e1000" if machine.compat else "virtio-net-pci"
        command += ["-netdev", tap if card.tap >= 0 else user]
        text = f"{kind},id=card{number},netdev=net{number},mac={card.mac}"
        command += ["-device", text if machine.compat or number >= CARD_PORTS else f"{text},bus={card_port(number)}"]
    return command
