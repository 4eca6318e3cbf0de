"""capabilities(7): names, masks, and the sets of this process."""

from __future__ import annotations

import ctypes
import errno

from nagaya.kernel.libc import SYS_CAPGET, SYS_CAPSET, syscall
from nagaya.kernel.process import (
    PR_CAP_AMBIENT,
    PR_CAP_AMBIENT_CLEAR_ALL,
    PR_CAPBSET_DROP,
    PR_CAPBSET_READ,
    prctl,
)
from nagaya.static import NamedTuple

VERSION_3 = 0x20080522  # _LINUX_CAPABILITY_VERSION_3: 64 bits, in two halves

NAMES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)  # fmt: skip
NUMBERS = {name: number for number, name in enumerate(NAMES)}


def mask(names: tuple[str, ...]) -> int:
    """The bit mask of capabilities given by name, without CAP_."""
    made = 0
    for name in names:
        made |= 1 << NUMBERS[name]
    return made


def names_of(bits: int) -> tuple[str, ...]:
    return tuple(name for number, name in enumerate(NAMES) if bits >> number & 1)


class CapHeader(ctypes.Structure):
    """struct __user_cap_header_struct, <linux/capability.h>."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class CapData(ctypes.Structure):
    """struct __user_cap_data_struct: the call takes two, low half first."""

    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


class Sets(NamedTuple):
    """A thread's capability sets as bit masks."""

    effective: int
    permitted: int
    inheritable: int


def get_sets() -> Sets:
    """capget(2) of the calling thread."""
    header, data = CapHeader(VERSION_3, 0), (CapData * 2)()
    syscall("capget", SYS_CAPGET, ctypes.byref(header), data)
    low, high = data
    return Sets(
        low.effective | high.effective << 32,
        low.permitted | high.permitted << 32,
        low.inheritable | high.inheritable << 32,
    )


def set_sets(sets: Sets) -> None:
    """capset(2) of the calling thread."""
    header = CapHeader(VERSION_3, 0)
    data = (CapData * 2)(
        *(CapData(*(bits >> shift & 0xFFFFFFFF for bits in sets)) for shift in (0, 32)),
    )
    syscall("capset", SYS_CAPSET, ctypes.byref(header), data)


def raise_effective() -> None:
    """Make all permitted capabilities effective."""
    sets = get_sets()
    set_sets(sets._replace(effective=sets.permitted))


def limit_bounding_set(keep: int) -> None:
    """Drop all capabilities but `keep` from what this process can ever gain by executing a program."""
    held = bounding_set()
    for number in range(held.bit_length()):
        if held >> number & 1 and not keep >> number & 1:
            prctl(PR_CAPBSET_DROP, number)


def drop_inheritable() -> None:
    """Empty the inheritable and ambient sets: what whoever started us had there is no business of the machine's.

    A program with inheritable file capabilities would gain from it, as in CVE-2022-24769.
    """
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    sets = get_sets()
    if sets.inheritable:
        set_sets(sets._replace(inheritable=0))


def bounding_set() -> int:
    """What this process could hold at most. The kernel's last capability is followed by EINVAL."""
    made = 0
    for number in range(64):
        try:
            made |= prctl(PR_CAPBSET_READ, number) << number
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break
    return made
