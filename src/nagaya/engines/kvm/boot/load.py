"""A kernel's file, whatever it is, to a `BootImage`."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Literal

from nagaya.engines.kvm.boot.elf import MAGIC, parse_elf
from nagaya.engines.kvm.boot.image import BootImage, Handover
from nagaya.engines.kvm.boot.linux import plan_linux
from nagaya.errors import HostError, NagayaError, NotFound, UsageError
from nagaya.memory import Region

Protocol = Literal["auto", "linux", "pvh"]


def load_kernel(
    path: str,
    *,
    memory: Sequence[Region],
    command_line: str,
    initrd: str | None = None,
    protocol: Protocol = "auto",
    rsdp_gpa: int = 0,
    rng_seed: bytes = b"",
) -> BootImage:
    """What makes a machine with `memory` start the kernel at `path`: a vmlinux, or a bzImage.

    `auto` is Linux's protocol for a Linux, PVH for anything else that has its entry. The image holds views of the mapped
    files; write it and let go of it. Raises `UsageError`, `Unsupported`, `NotFound`, `IntegrityError`, `HostError`.
    """
    content = map_file(path, "kernel")
    disk = map_file(initrd, "initial RAM disk") if initrd is not None else b""
    handover = Handover(memory, command_line, disk, rsdp_gpa, rng_seed)
    try:
        return _plan(content, handover, protocol)
    except NagayaError as error:
        error.message = f"cannot start {path}: {error.message}"
        error.args = (error.message,)
        raise


def _plan(content: memoryview, handover: Handover, protocol: Protocol) -> BootImage:
    if content[:4] != MAGIC:
        raise UsageError("it is not a kernel", hint="name a vmlinux or bzImage file")
    return plan_linux(parse_elf(content), content, handover)


def map_file(path: str, what: str) -> memoryview:
    """All of a file, without reading it yet. Raises `NotFound`, `HostError`, `UsageError`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # not to wait for a named pipe's other end
        try:
            if not os.fstat(fd).st_size:
                raise UsageError(f"{path} is empty", hint=f"name a {what}'s file")
            return memoryview(mmap.mmap(fd, 0, access=mmap.ACCESS_READ))
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise NotFound(f"there is no {what} {path}") from None
    except OSError as error:
        raise HostError.from_os(error, f"cannot read the {what} {path}") from None
    except ValueError:
        raise UsageError(f"{path} is not a {what}'s file") from None
