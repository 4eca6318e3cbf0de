"""What every virtual machine gets, whatever runs it: its disk, locked; its initramfs, as a file; a user of its own."""

from __future__ import annotations

import fcntl
import os
import time

from nagaya.engines.vm.agent import agent_path
from nagaya.errors import Conflict
from nagaya.storage.blank_disks import fill_blank
from nagaya.storage.disks import is_blank
from nagaya.storage.plan import DiskPlan

# Above all ranges of user namespaces (engines/container/userns.py) and below 2**31, one id for each machine: a VMM that
# was taken over by its guest can neither trace nor signal another machine's.
FIRST_ID = 0x6E000000
_DISK_FREE_WITHIN_S = 5.0
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def user_id(machine_id: str) -> int:
    """The user that a machine's VMM runs as, where root starts it."""
    return FIRST_ID + int(machine_id[:6], 16)


def open_data(disks: DiskPlan, *, form: bool = True) -> int:
    """The machine's disk, locked until the last copy of the descriptor is closed: a VMM that is being killed has one.

    With `form`, a disk that was only reserved so far gets its file system. Raises `OSError`, `Conflict`, and what
    `fill_blank` raises.
    """
    fd = os.open(disks.data, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    deadline_s = time.monotonic() + _DISK_FREE_WITHIN_S
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise Conflict("the machine's disk is in use", hint="another VMM has it open") from None
                time.sleep(0.01)  # nobody tells when a lock is free but flock itself, which has no time-out
        if form and is_blank(fd):
            fill_blank(fd, disks.blanks)
        return fd
    except BaseException:
        os.close(fd)
        raise


def open_initramfs(architecture: str = "") -> int:
    """A sealed memory file: a VMM opens it anew as another user, which such a file lets everybody do."""
    from nagaya.engines.vm.initramfs import make_initramfs  # lazy: who begins from a template has none

    fd = os.memfd_create("initramfs", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        data = memoryview(make_initramfs(agent_path(architecture)))
        while data:
            data = data[os.write(fd, data) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd
