"""vhost (drivers/vhost, linux/vhost.h): the kernel works on a guest's rings by itself. Structures and requests as the header has them."""

from __future__ import annotations

import ctypes
from ctypes import Structure, addressof, c_int32, c_uint32, c_uint64, sizeof

from nagaya.kernel.kvm import raw_ioctl
from nagaya.kernel.libc import fail

_NONE, _WRITE, _READ = 0, 1, 2
_VIRTIO = 0xAF

VHOST_NET_F_VIRTIO_NET_HDR = 27
"""A feature bit that guests never see: the kernel makes the virtio headers, for a tap device that has none."""
VHOST_F_LOG_ALL = 26
"""Another one: the kernel logs the pages that it writes frames to. Not the rings: that would be asked for with each of them."""
VHOST_FILE_UNBIND = -1


class vhost_vring_state(Structure):
    _fields_ = [("index", c_uint32), ("num", c_uint32)]


class vhost_vring_file(Structure):
    _fields_ = [("index", c_uint32), ("fd", c_int32)]


class vhost_vring_addr(Structure):
    _fields_ = [
        ("index", c_uint32), ("flags", c_uint32), ("desc_user_addr", c_uint64), ("used_user_addr", c_uint64),
        ("avail_user_addr", c_uint64), ("log_guest_addr", c_uint64),
    ]  # fmt: skip


class vhost_memory_region(Structure):
    _fields_ = [
        ("guest_phys_addr", c_uint64), ("memory_size", c_uint64), ("userspace_addr", c_uint64),
        ("flags_padding", c_uint64),
    ]  # fmt: skip


class vhost_memory(Structure):
    """`nregions` of `vhost_memory_region` follow."""

    _fields_ = [("nregions", c_uint32), ("padding", c_uint32)]


def _request(direction: int, number: int, size: int) -> int:
    """asm-generic/ioctl.h."""
    return direction << 30 | size << 16 | _VIRTIO << 8 | number


VHOST_GET_FEATURES = _request(_READ, 0x00, sizeof(c_uint64))
VHOST_SET_FEATURES = _request(_WRITE, 0x00, sizeof(c_uint64))
VHOST_SET_OWNER = _request(_NONE, 0x01, 0)
VHOST_SET_MEM_TABLE = _request(_WRITE, 0x03, sizeof(vhost_memory))
VHOST_SET_LOG_BASE = _request(_WRITE, 0x04, sizeof(c_uint64))
VHOST_SET_VRING_NUM = _request(_WRITE, 0x10, sizeof(vhost_vring_state))
VHOST_SET_VRING_ADDR = _request(_WRITE, 0x11, sizeof(vhost_vring_addr))
VHOST_SET_VRING_BASE = _request(_WRITE, 0x12, sizeof(vhost_vring_state))
VHOST_GET_VRING_BASE = _request(_READ | _WRITE, 0x12, sizeof(vhost_vring_state))
VHOST_SET_VRING_KICK = _request(_WRITE, 0x20, sizeof(vhost_vring_file))
VHOST_SET_VRING_CALL = _request(_WRITE, 0x21, sizeof(vhost_vring_file))
VHOST_NET_SET_BACKEND = _request(_WRITE, 0x30, sizeof(vhost_vring_file))


def _ioctl(call: str, fd: int, request: int, argument: ctypes._CData | None = None) -> None:
    if raw_ioctl(fd, request, addressof(argument) if argument is not None else 0) < 0:
        raise fail(call)


def set_owner(fd: int) -> None:
    """From here on the rings' addresses are this process's. EBUSY: somebody owns it already. Raises `OSError`."""
    _ioctl("VHOST_SET_OWNER", fd, VHOST_SET_OWNER)


def features(fd: int) -> int:
    """What the kernel's back end can do. Raises `OSError`."""
    value = c_uint64()
    _ioctl("VHOST_GET_FEATURES", fd, VHOST_GET_FEATURES, value)
    return value.value


def set_features(fd: int, wanted: int) -> None:
    """What it shall do. Raises `OSError`."""
    _ioctl("VHOST_SET_FEATURES", fd, VHOST_SET_FEATURES, c_uint64(wanted))


def set_memory(fd: int, regions: list[tuple[int, int, int]]) -> None:
    """The guest's memory, as (gpa, bytes, hva). Raises `OSError`."""

    class table(Structure):
        _fields_ = [("head", vhost_memory), ("regions", vhost_memory_region * len(regions))]

    entries = [
        vhost_memory_region(guest_phys_addr=gpa, memory_size=size, userspace_addr=hva) for gpa, size, hva in regions
    ]
    content = table(vhost_memory(nregions=len(regions)), (vhost_memory_region * len(regions))(*entries))
    _ioctl("VHOST_SET_MEM_TABLE", fd, VHOST_SET_MEM_TABLE, content)


def set_log(fd: int, address: int) -> None:
    """Where the log is from now on: a bit for each page of the guest's addresses. When it returns, the one before is not
    written any more. Raises `OSError`.
    """
    _ioctl("VHOST_SET_LOG_BASE", fd, VHOST_SET_LOG_BASE, c_uint64(address))


def set_ring(
    fd: int, index: int, *, size: int, descriptors: int, available: int, used: int, next_available: int, kick_fd: int,
    call_fd: int,
) -> None:  # fmt: skip
    """One queue, by addresses of this process. Raises `OSError`."""
    _ioctl("VHOST_SET_VRING_NUM", fd, VHOST_SET_VRING_NUM, vhost_vring_state(index, size))
    _ioctl("VHOST_SET_VRING_BASE", fd, VHOST_SET_VRING_BASE, vhost_vring_state(index, next_available))
    addresses = vhost_vring_addr(
        index=index, desc_user_addr=descriptors, used_user_addr=used, avail_user_addr=available
    )
    _ioctl("VHOST_SET_VRING_ADDR", fd, VHOST_SET_VRING_ADDR, addresses)
    _ioctl("VHOST_SET_VRING_CALL", fd, VHOST_SET_VRING_CALL, vhost_vring_file(index, call_fd))
    _ioctl("VHOST_SET_VRING_KICK", fd, VHOST_SET_VRING_KICK, vhost_vring_file(index, kick_fd))


def ring_position(fd: int, index: int) -> int:
    """The next available entry that it would take of a queue that has no back end. Raises `OSError`."""
    state = vhost_vring_state(index=index)
    _ioctl("VHOST_GET_VRING_BASE", fd, VHOST_GET_VRING_BASE, state)
    return int(state.num)


def set_backend(fd: int, index: int, backend: int) -> None:
    """Let a queue of vhost-net's move frames to and from the tap device `backend`; VHOST_FILE_UNBIND = stop.

    When it returns from stopping, the kernel touches the ring no more. Raises `OSError`.
    """
    _ioctl("VHOST_NET_SET_BACKEND", fd, VHOST_NET_SET_BACKEND, vhost_vring_file(index, backend))
