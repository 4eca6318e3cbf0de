"""PCI devices of this host for one machine alone, by VFIO (Documentation/driver-api/vfio.rst), and why they cannot be had.

The IOMMU keeps such a device to its machine's memory. It tells devices apart by groups, so all of a group have to be out of
this host's hands. QEMU opens VFIO's nodes by name; as the user that it runs as it may not, so it is shown nodes of its own.
"""

from __future__ import annotations

import errno
import os
import resource

from nagaya.errors import Conflict, HostError, NotFound, Unsupported, UsageError
from nagaya.kernel import mount, namespaces
from nagaya.kernel.capabilities import get_sets, mask
from nagaya.static import NamedTuple

DEVICES, GROUPS, NODES = "/sys/bus/pci/devices", "/sys/kernel/iommu_groups", "/dev/vfio"
DRIVER = "vfio-pci"
CONTAINER = "vfio"  # the node by which groups become one machine's
MOST = 8
# With these, or without any, a device is in nobody's hands (drivers/vfio/group.c, vfio_main.c: a group is "viable" then).
_IDLE_DRIVERS = ("", DRIVER, "pci-stub", "pcieport")
_LENGTH = len("0000:00:00.0")
# All of the guest's memory is pinned, and what else of QEMU the device could reach: what libvirt allows, too.
PINNED_BESIDE_BYTES = 1 << 30


class PciDevice(NamedTuple):
    """`group` is the number of its IOMMU group, and the name of VFIO's node for that."""

    address: str  # as "0000:01:00.0"
    group: str


def parse_address(text: str) -> str:
    """With the domain. Raises `UsageError`."""
    address = text.lower() if text.count(":") == 2 else f"0000:{text.lower()}"
    digits = address.replace(":", "").replace(".", "")
    if len(address) != _LENGTH or len(digits) != _LENGTH - 3 or not set(digits) <= set("0123456789abcdef"):
        raise UsageError(f"--pci: '{text}' is no PCI address", hint="for example --pci 01:00.0, as lspci says")
    return address


def find_pci(texts: tuple[str, ...]) -> tuple[PciDevice, ...]:
    """Those that can be handed over as they are. Raises `UsageError`, `NotFound`, `Unsupported`, `Conflict`."""
    addresses = [parse_address(text) for text in texts]
    if len(set(addresses)) < len(addresses):
        raise UsageError("--pci: a device was named twice")
    if len(addresses) > MOST:
        raise UsageError(f"--pci: a machine has at most {MOST} PCI devices of this host")
    return tuple(_find(address) for address in addresses)


def _find(address: str) -> PciDevice:
    if not _names(GROUPS):
        raise Unsupported(
            "a PCI device cannot be passed on here: this host has no IOMMU that is switched on, so that the machine "
            "could write to all of the host's memory",
            hint="it needs VT-d or AMD-Vi in the firmware's set-up, and intel_iommu=on or amd_iommu=on for its kernel",
            finding=f"{GROUPS} is empty",
        )
    if not os.path.isdir(f"{DEVICES}/{address}"):
        raise NotFound(f"this host has no PCI device {address}", hint="'lspci -D' lists them")
    group = _link(f"{DEVICES}/{address}/iommu_group")
    if not group:
        raise Unsupported(
            f"PCI device {address} cannot be passed on: it is behind no IOMMU",
            hint="choose a device that has an iommu_group in sysfs", finding=f"{DEVICES}/{address}/iommu_group is missing",
        )  # fmt: skip
    driver = _link(f"{DEVICES}/{address}/driver")
    if driver != DRIVER:
        whose = f"this host's driver '{driver}' has it" if driver else f"it is not bound to {DRIVER}"
        raise Conflict(
            f"PCI device {address} cannot be passed on: {whose}", hint=_how_to_bind(address, driver), state=driver
        )
    for other in _names(f"{GROUPS}/{group}/devices"):
        driver = _link(f"{DEVICES}/{other}/driver")
        if driver not in _IDLE_DRIVERS:
            raise Conflict(
                f"PCI device {address} cannot be passed on: it shares IOMMU group {group} with {other}, which this "
                f"host's driver '{driver}' has",
                hint=f"all of a group go together; {_how_to_bind(other, driver)}", state=driver,
            )  # fmt: skip
    _check_nodes(address, group)
    return PciDevice(address, group)


def _check_nodes(address: str, group: str) -> None:
    for name in (CONTAINER, group):
        node = f"{NODES}/{name}"
        if not os.path.exists(node):
            raise Unsupported(
                f"PCI device {address} cannot be passed on: this host's kernel has no {node}",
                hint="modprobe vfio-pci; group nodes with 'noiommu' in their names are not used, for they isolate nothing",
            )
        if not os.access(node, os.R_OK | os.W_OK):
            raise Unsupported(
                f"PCI device {address} cannot be passed on: you may not open {node}",
                hint=f"as root: chown {os.geteuid()} {node}", finding="it takes reading and writing",
            )  # fmt: skip


def check_pinning(memory_bytes: int) -> None:
    """Raise `Unsupported` where a machine's memory could not be pinned: limits are raised by who has CAP_SYS_RESOURCE."""
    most = _most_pinned()
    if most < memory_bytes + PINNED_BESIDE_BYTES and not get_sets().effective & mask(("SYS_RESOURCE",)):
        raise Unsupported(
            "a machine with a PCI device has all its memory pinned, and you may not pin so much",
            hint="raise 'memlock' in /etc/security/limits.conf, or give it less --memory",
            finding=f"ulimit -Hl is {most >> 10} KiB",
        )


def _most_pinned() -> int:
    most = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    return most if most != resource.RLIM_INFINITY else 1 << 62


def take(devices: tuple[PciDevice, ...]) -> None:
    """Raise `Conflict` when another machine has one of them, `HostError`. VFIO lets a group be opened once."""
    for group in {device.group for device in devices}:
        try:
            os.close(os.open(f"{NODES}/{group}", os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise Conflict(
                    f"a PCI device of IOMMU group {group} is in use", hint="another machine has it: stop that first"
                ) from None
            raise HostError.from_os(error, "cannot take the PCI device") from None


def show_nodes(devices: tuple[PciDevice, ...], user: int, *, memory_bytes: int) -> None:
    """In QEMU's process, as root: its own nodes, in a /dev/vfio that is nobody else's, and the right to pin its memory.

    Raises `OSError`.
    """
    names = [CONTAINER, *sorted({device.group for device in devices})]
    numbers = [os.stat(f"{NODES}/{name}").st_rdev for name in names]
    namespaces.unshare(namespaces.CLONE_NEWNS)
    mount.mount("", "/", "", mount.MS_SLAVE | mount.MS_REC)
    mount.mount("vfio", NODES, "tmpfs", mount.MS_NOSUID | mount.MS_NOEXEC, "mode=755,size=4k")
    for name, number in zip(names, numbers, strict=True):
        os.mknod(f"{NODES}/{name}", 0o20600, number)
        os.chown(f"{NODES}/{name}", user, user)
    most = memory_bytes + PINNED_BESIDE_BYTES
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))


def _how_to_bind(address: str, driver: str) -> str:
    away = f"echo {address} > {DEVICES}/{address}/driver/unbind; " if driver else ""
    return (
        f"as root: modprobe {DRIVER}; echo {DRIVER} > {DEVICES}/{address}/driver_override; {away}"
        f"echo {address} > /sys/bus/pci/drivers_probe"
    )


def _names(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []


def _link(path: str) -> str:
    """The last part of where a link of sysfs leads; "" without one."""
    try:
        return os.path.basename(os.readlink(path))
    except OSError:
        return ""
