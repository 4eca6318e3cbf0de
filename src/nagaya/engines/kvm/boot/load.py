"""A kernel's file, whatever it is, to a `BootImage`."""

from __future__ import annotations

import mmap
import os
import stat

from nagaya.engines.kvm.boot.elf import MAGIC, parse_elf
from nagaya.engines.kvm.boot.image import BootImage, Handover
from nagaya.engines.kvm.boot.linux import plan_linux
from nagaya.errors import HostError, NagayaError, NotFound, Unsupported, UsageError
from nagaya.memory import Region
from nagaya.static import Literal, Sequence

Protocol = Literal["auto", "linux", "pvh", "multiboot"]

_MULTIBOOT_MAGIC = b"\x02\xb0\xad\x1b"
_START_BYTES = 0x8100  # what the table below looks at
_MOST_BZIMAGE_BYTES = 512 << 20

# Kernels in other CPUs' own formats, and what people name by mistake: where, what, and who.
_IMAGES = (
    (0x38, b"ARM\x64", "aarch64"),
    (0x38, b"RSC\x05", "riscv"),
    (0x24, b"\x18\x28\x6f\x01", "arm"),
)
_STRANGERS = (
    (0, b"\x1f\x8b", "compressed with gzip"),
    (0, b"\xfd7zXZ\0", "compressed with xz"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (0, b"\x02\x21\x4c\x18", "compressed with lz4"),
    (0, b"070701", "an initial RAM disk"),
    (4, b"zimg", "an EFI program that decompresses a kernel"),
    (0x8001, b"CD001", "a CD image"),
    (0, b"QFI\xfb", "a qcow2 disk"),
    (0x1FE, b"\x55\xaa", "a disk"),
    (0, b"#!", "a script"),
)

_MISSING_HINTS = {
    "kernel": "name a vmlinux or bzImage file; 'nagaya kernel build' makes one, and 'nagaya kernel path' shows where",
    "initial RAM disk": "check its path",
}


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

    `auto` is Linux's protocol for a Linux, PVH or Multiboot for anything else that has its entry or header. The image holds views of the mapped
    files; write it and let go of it. Raises `UsageError`, `Unsupported`, `NotFound`, `IntegrityError`, `HostError`.
    """
    with _About(path):
        content = _read_kernel(path)
    disk = _map_initrd(initrd) if initrd is not None else b""
    with _About(path):
        return _plan(content, Handover(memory, command_line, disk, rsdp_gpa, rng_seed), protocol)


def extract_vmlinux(path: str) -> memoryview:
    """The ELF kernel in a bzImage, or all of a vmlinux: for a cache of what takes time to decompress.

    Raises as `load_kernel`; `Unsupported` too for what only the kernel itself can decompress.
    """
    with _About(path):
        return _extract(_read_kernel(path))


def _plan(content: memoryview, handover: Handover, protocol: Protocol) -> BootImage:
    try:
        elf = _extract(content)
    except Unsupported:
        if protocol in ("pvh", "multiboot"):
            raise
        from nagaya.engines.kvm.boot import bzimage

        # Slower, but it has what it needs with it.
        return bzimage.plan_bzimage(bzimage.parse_bzimage(content), content, handover)
    kernel = parse_elf(elf)
    if protocol == "linux" or (protocol == "auto" and kernel.is_linux):
        return plan_linux(kernel, elf, handover)
    # Lazy: Linux is what nearly everybody starts.
    if protocol == "pvh" or (protocol == "auto" and kernel.pvh_entry is not None):
        from nagaya.engines.kvm.boot.pvh import plan_pvh

        return plan_pvh(kernel, elf, handover)
    if protocol == "multiboot" or _MULTIBOOT_MAGIC in bytes(elf[:_START_BYTES]):
        from nagaya.engines.kvm.boot.multiboot import find_header, plan_multiboot

        if protocol == "multiboot" or find_header(elf) is not None:
            return plan_multiboot(kernel, elf, handover)
    return plan_linux(kernel, elf, handover)


def _extract(content: memoryview) -> memoryview:
    """The ELF kernel in what `_read_kernel` gave."""
    if content[:4] == MAGIC:
        return content
    from nagaya.engines.kvm.boot import bzimage

    kernel = bzimage.extract_payload(bzimage.parse_bzimage(content), content)
    if kernel[:4] != MAGIC:
        raise Unsupported("the kernel in it is not an ELF file", hint="name a vmlinux file")
    return kernel


def _read_kernel(path: str) -> memoryview:
    """All of a vmlinux, mapped and not read yet, or of a bzImage."""
    with _Opened(path, "kernel") as (fd, size_bytes):
        start = os.pread(fd, _START_BYTES, 0)
        if start[:4] == MAGIC:
            return memoryview(mmap.mmap(fd, 0, access=mmap.ACCESS_READ))
        from nagaya.engines.kvm.boot import bzimage  # lazy: a vmlinux needs none of it

        if not bzimage.is_bzimage(start):
            raise _name_stranger(start)
        if size_bytes > _MOST_BZIMAGE_BYTES:
            raise UsageError(f"a bzImage of {size_bytes >> 20} MiB cannot be")
        # A copy: decompressing takes a while, and who shortens a mapped file meanwhile ends its reader (SIGBUS).
        return memoryview(b"".join(iter(lambda: os.read(fd, size_bytes), b"")))


def _map_initrd(path: str) -> memoryview:
    with _Opened(path, "initial RAM disk") as (fd, _):
        return memoryview(mmap.mmap(fd, 0, access=mmap.ACCESS_READ))


def _name_stranger(start: bytes) -> NagayaError:
    """What to say of a file that is no kernel for this machine."""
    for at, magic, cpu in _IMAGES:
        if start[at : at + len(magic)] == magic:
            return Unsupported(
                f"the kernel is for another CPU: {cpu}", hint="a machine of this type runs x86-64 kernels only"
            )
    for at, magic, what in _STRANGERS:
        if start[at : at + len(magic)] == magic:
            return UsageError(f"it is {what} and not a kernel", hint="name a vmlinux or bzImage file")
    return UsageError("it is not a kernel", hint="name a vmlinux or bzImage file")


class _About:  # contextlib would be half a millisecond of a start of ten
    """Name the file in errors of those who only see what is in it."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, NagayaError):
            error.message = f"cannot start {self._path}: {error.message}"
            error.args = (error.message,)


class _Opened:
    """The descriptor and size of a file that is not empty, for as long as the block lasts."""

    def __init__(self, path: str, what: str) -> None:
        self._path, self._what = path, what
        self._fd = -1

    def __enter__(self) -> tuple[int, int]:
        try:
            # O_NONBLOCK: not to wait for a named pipe's other end
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            status = os.fstat(self._fd)
        except OSError as error:
            self._close()
            raise self._failure(error) from None
        regular = stat.S_ISREG(status.st_mode)
        if not regular or not status.st_size:
            self._close()
            raise UsageError(
                f"{self._path} is {'empty' if regular else 'not a file'}", hint=f"name the file of the {self._what}"
            )
        return self._fd, status.st_size

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._close()
        if isinstance(error, OSError):
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> NagayaError:
        if isinstance(error, FileNotFoundError):
            return NotFound(f"there is no {self._what} {self._path}", hint=_MISSING_HINTS[self._what])
        return HostError.from_os(error, f"cannot read the {self._what} {self._path}")

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
