"""USB devices of this host for one machine alone, and why they cannot be had. QEMU is handed each as a descriptor."""

from __future__ import annotations

import os

from nagaya.errors import NotFound, Unsupported, UsageError
from nagaya.static import NamedTuple

USB_DEVICES, USB_NODES = "/sys/bus/usb/devices", "/dev/bus/usb"


class UsbDevice(NamedTuple):
    """`node` is its file below /dev."""

    vendor: str  # 4 hex digits, as `product`
    product: str
    bus: int
    device: int
    node: str


def list_usb() -> list[UsbDevice]:
    """All that are plugged into this host."""
    found = []
    try:
        names = sorted(os.listdir(USB_DEVICES))
    except FileNotFoundError:
        return []
    for name in names:
        try:
            vendor, product, bus, device = (
                _read(f"{USB_DEVICES}/{name}/{part}") for part in ("idVendor", "idProduct", "busnum", "devnum")
            )
        except OSError:
            continue  # an interface of one
        node = f"{USB_NODES}/{int(bus):03}/{int(device):03}"
        found.append(UsbDevice(vendor, product, int(bus), int(device), node))
    return found


def find_usb(text: str) -> UsbDevice:
    """By "VENDOR:PRODUCT" or "BUS.DEVICE". Raises `UsageError`, `Unsupported`, `NotFound`."""
    vendor, colon, product = text.lower().partition(":")
    bus, dot, device = text.partition(".")
    by_id = bool(colon) and all(len(part) == 4 and set(part) <= set("0123456789abcdef") for part in (vendor, product))
    if not by_id and not (dot and bus.isdecimal() and device.isdecimal()):
        raise UsageError(
            f"--usb: '{text}' is no device", hint="for example --usb 046d:c077 or --usb 1.4, as lsusb says"
        )
    here = list_usb()
    if not here:
        raise Unsupported(
            "this host has no USB devices that could be passed on", hint="leave --usb away", finding=USB_DEVICES
        )
    for each in here:
        if (each.vendor, each.product) == (vendor, product) or (
            not by_id and (each.bus, each.device) == (int(bus), int(device))
        ):
            return each
    raise NotFound(f"this host has no USB device {text}", hint="'lsusb' lists them")


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read().strip()
