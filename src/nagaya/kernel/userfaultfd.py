"""userfaultfd(2): another process brings the pages that this one finds missing. linux/userfaultfd.h has the structures."""

from __future__ import annotations

import ctypes
import os
from ctypes import Structure, addressof, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, sizeof

from nagaya.kernel.kvm import raw_ioctl
from nagaya.kernel.libc import fail, libc

UFFD_API = 0xAA
UFFD_EVENT_PAGEFAULT = 0x12
UFFDIO_REGISTER_MODE_MISSING = 1
_SYS_USERFAULTFD = 323  # x86-64
_EEXIST = 17


class uffdio_api(Structure):
    _fields_ = [("api", c_uint64), ("features", c_uint64), ("ioctls", c_uint64)]


class uffdio_range(Structure):
    _fields_ = [("start", c_uint64), ("len", c_uint64)]


class uffdio_register(Structure):
    _fields_ = [("range", uffdio_range), ("mode", c_uint64), ("ioctls", c_uint64)]


class uffdio_copy(Structure):
    _fields_ = [("dst", c_uint64), ("src", c_uint64), ("len", c_uint64), ("mode", c_uint64), ("copy", c_int64)]


class uffdio_zeropage(Structure):
    _fields_ = [("range", uffdio_range), ("mode", c_uint64), ("zeropage", c_int64)]


class uffd_msg(Structure):
    """With the fields of UFFD_EVENT_PAGEFAULT, which are the first of its union."""

    _fields_ = [
        ("event", c_uint8), ("reserved1", c_uint8), ("reserved2", c_uint16), ("reserved3", c_uint32),
        ("flags", c_uint64), ("address", c_uint64), ("ptid", c_uint64),
    ]  # fmt: skip


def _request(direction: int, number: int, size: int) -> int:
    """asm-generic/ioctl.h."""
    return direction << 30 | size << 16 | UFFD_API << 8 | number


UFFDIO_API = _request(3, 0x3F, sizeof(uffdio_api))
UFFDIO_REGISTER = _request(3, 0x00, sizeof(uffdio_register))
UFFDIO_UNREGISTER = _request(2, 0x01, sizeof(uffdio_range))
UFFDIO_COPY = _request(3, 0x03, sizeof(uffdio_copy))
UFFDIO_ZEROPAGE = _request(3, 0x04, sizeof(uffdio_zeropage))


def open_userfaultfd() -> int:
    """For faults of this process's, in the kernel too. Non-blocking. Raises `OSError`: EPERM where that is root's."""
    fd: int = libc.syscall(ctypes.c_long(_SYS_USERFAULTFD), ctypes.c_int(os.O_CLOEXEC | os.O_NONBLOCK))
    if fd < 0:
        raise fail("userfaultfd")
    try:
        _ioctl("UFFDIO_API", fd, UFFDIO_API, uffdio_api(api=UFFD_API))
    except OSError:
        os.close(fd)
        raise
    return fd


def register(fd: int, address: int, size_bytes: int) -> None:
    """From here on, whoever touches a page there that is missing waits until it is brought. Raises `OSError`."""
    request = uffdio_register(range=uffdio_range(address, size_bytes), mode=UFFDIO_REGISTER_MODE_MISSING)
    _ioctl("UFFDIO_REGISTER", fd, UFFDIO_REGISTER, request)


def unregister(fd: int, address: int, size_bytes: int) -> None:
    """Nobody waits any more. Raises `OSError`."""
    _ioctl("UFFDIO_UNREGISTER", fd, UFFDIO_UNREGISTER, uffdio_range(address, size_bytes))


def bring(fd: int, address: int, data: bytes) -> None:
    """Whole pages, for whoever waits for them; of one that is there by now, nothing. Raises `OSError`."""
    source = ctypes.create_string_buffer(data, len(data))
    _ioctl_or_there("UFFDIO_COPY", fd, UFFDIO_COPY, uffdio_copy(dst=address, src=addressof(source), len=len(data)))


def bring_zeros(fd: int, address: int, size_bytes: int) -> None:
    """The same of zeros."""
    _ioctl_or_there("UFFDIO_ZEROPAGE", fd, UFFDIO_ZEROPAGE, uffdio_zeropage(uffdio_range(address, size_bytes)))


def fault_address(fd: int) -> int:
    """Where somebody waits; -1 when nobody does. Raises `OSError`."""
    try:
        data = os.read(fd, sizeof(uffd_msg))
    except BlockingIOError:
        return -1
    message = uffd_msg.from_buffer_copy(data)
    return int(message.address) if message.event == UFFD_EVENT_PAGEFAULT else -1


def _ioctl(call: str, fd: int, request: int, argument: Structure) -> None:
    if raw_ioctl(fd, request, addressof(argument)) < 0:
        raise fail(call)


def _ioctl_or_there(call: str, fd: int, request: int, argument: Structure) -> None:
    if raw_ioctl(fd, request, addressof(argument)) < 0 and ctypes.get_errno() != _EEXIST:
        raise fail(call)
