"""Tap devices (Documentation/networking/tuntap.rst): Ethernet frames through a descriptor. Numbers from linux/if_tun.h."""

from __future__ import annotations

import fcntl
import os
import struct

IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
IFF_MULTI_QUEUE = 0x0100

TUN_F_CSUM = 0x01
TUN_F_TSO4 = 0x02
TUN_F_TSO6 = 0x04
TUN_F_TSO_ECN = 0x08
TUN_F_UFO = 0x10

IFNAMSIZ = 16
_IFREQ = struct.Struct("16sH22x")  # struct ifreq: ifr_name, ifr_flags, the rest of its union
_INT = struct.Struct("i")
_WRITE, _READ = 1, 2


def _request(direction: int, number: int) -> int:
    """asm-generic/ioctl.h; the kernel declares all of these with an int, whatever they really take."""
    return direction << 30 | _INT.size << 16 | ord("T") << 8 | number


TUNSETIFF = _request(_WRITE, 202)
TUNSETOFFLOAD = _request(_WRITE, 208)
TUNGETIFF = _request(_READ, 210)
TUNSETVNETHDRSZ = _request(_WRITE, 216)
TUNSETVNETLE = _request(_WRITE, 220)


def _ioctl(call: str, fd: int, request: int, argument: int | bytes) -> bytes | int:
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise OSError(error.errno, f"{call}: {error.strerror}") from None


def open_tap(name: str = "", *, vnet_header: bool = True, multi_queue: bool = False) -> int:
    """A non-blocking descriptor of the tap device `name`, which is made if it does not exist and may not be in use.

    With an empty name the kernel picks one: see `interface_name`. A device made here goes when its descriptor does.
    With `vnet_header` every frame has a `struct virtio_net_hdr` before it. Raises `OSError`: EBUSY when another process
    has the device, EINVAL when it exists with other flags, EPERM without CAP_NET_ADMIN or ownership.
    """
    encoded = os.fsencode(name)
    if len(encoded) >= IFNAMSIZ:
        raise OSError(36, f"TUNSETIFF: the name may have {IFNAMSIZ - 1} bytes", name)  # ENAMETOOLONG
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    flags = IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if vnet_header else 0) | (IFF_MULTI_QUEUE if multi_queue else 0)
    try:
        _ioctl("TUNSETIFF", fd, TUNSETIFF, _IFREQ.pack(encoded, flags))
    except OSError as error:
        os.close(fd)
        raise OSError(error.errno, error.strerror, name or None) from None
    return fd


def open_macvtap(name: str, index: int) -> int:
    """The same of a macvtap link that is there already: its frames go through a device node that its index names.

    Raises `OSError`: ENODEV when the node is another link's, whose index in its network namespace is the same.
    """
    path = f"/dev/tap{index}"
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if interface_name(fd) != name:
            raise OSError(19, f"{path} belongs to a link of another network namespace", path)
        _ioctl("TUNSETIFF", fd, TUNSETIFF, _IFREQ.pack(os.fsencode(name), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    except BaseException:
        os.close(fd)
        raise
    return fd


def interface_name(fd: int) -> str:
    """The name of the tap device behind `fd`, as it is now: links can be renamed. Raises `OSError`."""
    answer = _ioctl("TUNGETIFF", fd, TUNGETIFF, bytes(_IFREQ.size))
    assert isinstance(answer, bytes)  # what it is for a bytes argument
    encoded, _ = _IFREQ.unpack(answer)
    return os.fsdecode(bytes(encoded).rstrip(b"\0"))


def set_vnet_header(fd: int, size_bytes: int) -> None:
    """Size of the header before each frame, 10 or 12 bytes, its fields little-endian from now on. Raises `OSError`."""
    _ioctl("TUNSETVNETHDRSZ", fd, TUNSETVNETHDRSZ, _INT.pack(size_bytes))
    _ioctl("TUNSETVNETLE", fd, TUNSETVNETLE, _INT.pack(1))


def set_offload(fd: int, flags: int) -> None:
    """What the reader of `fd` takes (TUN_F_*): unfinished checksums, and packets above the MTU. Raises `OSError`."""
    _ioctl("TUNSETOFFLOAD", fd, TUNSETOFFLOAD, flags)
