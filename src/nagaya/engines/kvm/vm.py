"""One virtual machine's descriptor: memory slots, the interrupt controllers that live in KVM, and what is wired to them."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

from nagaya.errors import HostError, Unsupported
from nagaya.kernel import kvm
from nagaya.memory import PAGE_BYTES, GuestMemory

DEVICE = "/dev/kvm"
# KVM on Intel keeps four pages of its own in the guest's physical memory: here, just below the firmware's place, as in QEMU.
_IDENTITY_MAP_GPA = 0xFFFB_C000
_TSS_GPA = 0xFFFB_D000
_ALL_BITS = (1 << 64) - 1
_PIC_MASK = 2  # struct kvm_pic_state: last_irr, irr, imr


def open_kvm() -> int:
    """/dev/kvm, open. Raises `Unsupported`, saying why this user on this host has no KVM."""
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _explain(error) from None
    try:
        version = kvm.ioctl("KVM_GET_API_VERSION", fd, kvm.KVM_GET_API_VERSION)
    except OSError as error:
        os.close(fd)
        raise Unsupported(
            f"{DEVICE} is not KVM's device", hint="use --type emulated",
            finding=f"KVM_GET_API_VERSION: {os.strerror(error.errno or 0)}",
        ) from None  # fmt: skip
    if version != kvm.API_VERSION:
        os.close(fd)
        raise Unsupported(
            f"{DEVICE} speaks version {version} of the KVM API", hint="Linux has had version 12 since 2.6.22",
            finding="KVM_GET_API_VERSION",
        )  # fmt: skip
    return fd


def _explain(error: OSError) -> Unsupported:
    finding = f"opening {DEVICE}: {error.strerror}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return Unsupported(f"this user may not use {DEVICE}", hint=_explain_rights(), finding=finding)
    if error.errno == errno.ENOENT:
        return Unsupported(
            "this host has no KVM", finding=finding,
            hint="load kvm_intel or kvm_amd, turn on virtualization in the firmware, or use --type emulated",
        )  # fmt: skip
    return Unsupported(f"this host's KVM cannot be used: {error.strerror}", hint="use --type emulated", finding=finding)


def _explain_rights() -> str:
    """Some hosts give the device to root alone, and no group would help."""
    import grp  # lazy: only who is refused wants to know
    import stat

    try:
        status = os.stat(DEVICE)
        group = grp.getgrgid(status.st_gid).gr_name
    except (OSError, KeyError):
        return "run it as root, or use --type emulated"
    if status.st_gid and status.st_mode & stat.S_IRGRP and status.st_mode & stat.S_IWGRP:
        return f"join its group: usermod -aG {group} USER, then log in anew"
    return f"let a group use it, as root: groupadd -rf kvm; chgrp kvm {DEVICE}; chmod 660 {DEVICE}; then join it, or use --type emulated"


class Vm:
    """A KVM virtual machine without vCPUs yet. Raises `Unsupported`, `HostError`; `close` it."""

    def __init__(self, memory: GuestMemory, *, kvm_fd: int = -1) -> None:
        """`kvm_fd` is /dev/kvm, open, of a process that may not open it any more; it stays the caller's."""
        self.memory = memory
        self.kvm_fd = open_kvm() if kvm_fd < 0 else os.dup(kvm_fd)
        self.fd = -1
        try:
            self.fd = kvm.ioctl("KVM_CREATE_VM", self.kvm_fd, kvm.KVM_CREATE_VM)
            self.most_vcpus = self.extension(kvm.KVM_CAP_MAX_VCPUS) or 1
            self.run_bytes = kvm.ioctl("KVM_GET_VCPU_MMAP_SIZE", self.kvm_fd, kvm.KVM_GET_VCPU_MMAP_SIZE)
            for slot, region in enumerate(memory.regions):
                self._set_slot(slot, region.gpa, region.size_bytes, region.hva)
            kvm.ioctl("KVM_SET_TSS_ADDR", self.fd, kvm.KVM_SET_TSS_ADDR, _TSS_GPA)
            address = ctypes.c_uint64(_IDENTITY_MAP_GPA)
            kvm.ioctl("KVM_SET_IDENTITY_MAP_ADDR", self.fd, kvm.KVM_SET_IDENTITY_MAP_ADDR, address)
        except OSError as error:
            self.close()
            raise HostError.from_os(error, "cannot create a virtual machine") from None

    def add_memory(self, gpa: int, memory: mmap.mmap) -> None:
        """Memory that is no RAM of the guest's, and stays the caller's. Once. Raises `OSError`."""
        anchor = ctypes.c_char.from_buffer(memory)
        self._set_slot(len(self.memory.regions), gpa, len(memory), ctypes.addressof(anchor))

    def log_writes(self, on: bool) -> None:
        """Have KVM log which pages of its RAM the guest, and KVM itself, write; or not any more. Raises `OSError`."""
        for slot, region in enumerate(self.memory.regions):
            self._set_slot(
                slot, region.gpa, region.size_bytes, region.hva, flags=kvm.KVM_MEM_LOG_DIRTY_PAGES if on else 0
            )

    def take_written(self) -> list[tuple[int, int]]:
        """(offset into the memory's file, bytes) of what was written since the last time. Raises `OSError`."""
        runs: list[tuple[int, int]] = []
        for slot, region in enumerate(self.memory.regions):
            pages = region.size_bytes // PAGE_BYTES
            bitmap = ctypes.create_string_buffer(-(-pages // 64) * 8)
            request = kvm.kvm_dirty_log(slot=slot, dirty_bitmap=ctypes.addressof(bitmap))
            kvm.ioctl("KVM_GET_DIRTY_LOG", self.fd, kvm.KVM_GET_DIRTY_LOG, request)
            runs += [
                (region.file_offset + first * PAGE_BYTES, count * PAGE_BYTES) for first, count in find_runs(bitmap.raw)
            ]
        return runs

    def extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION: 0 = not there; else 1, or what the capability counts."""
        return kvm.ioctl("KVM_CHECK_EXTENSION", self.fd, kvm.KVM_CHECK_EXTENSION, capability)

    def enable(self, capability: int, argument: int) -> None:
        """KVM_ENABLE_CAP. Raises `OSError`."""
        request = kvm.kvm_enable_cap(cap=capability)
        request.args[0] = argument
        kvm.ioctl("KVM_ENABLE_CAP", self.fd, kvm.KVM_ENABLE_CAP, request)

    def create_interrupt_controllers(self, *, timer: bool) -> None:
        """Local APICs, an I/O APIC and the old PICs, in KVM; `timer`: the PIT too, which a kernel without ACPI calibrates by.

        Before the first vCPU.
        """
        kvm.ioctl("KVM_CREATE_IRQCHIP", self.fd, kvm.KVM_CREATE_IRQCHIP)
        # The PICs start unmasked, with vectors from 0 on: an early edge of a device would reach the kernel as an exception.
        for chip_id in (0, 1):
            chip = kvm.kvm_irqchip(chip_id=chip_id)
            kvm.ioctl("KVM_GET_IRQCHIP", self.fd, kvm.KVM_GET_IRQCHIP, chip)
            ctypes.memset(ctypes.addressof(chip) + kvm.kvm_irqchip.chip.offset + _PIC_MASK, 0xFF, 1)
            kvm.ioctl("KVM_SET_IRQCHIP", self.fd, kvm.KVM_SET_IRQCHIP, chip)
        if timer:
            # With the dummy speaker port 0x61 too: kernels wait on its bit 5 when they measure the TSC.
            config = kvm.kvm_pit_config(flags=kvm.KVM_PIT_SPEAKER_DUMMY)
            kvm.ioctl("KVM_CREATE_PIT2", self.fd, kvm.KVM_CREATE_PIT2, config)

    def set_line(self, gsi: int, level: int) -> None:
        """Raise or lower an interrupt line."""
        kvm.ioctl("KVM_IRQ_LINE", self.fd, kvm.KVM_IRQ_LINE, kvm.kvm_irq_level(irq=gsi, level=level))

    def create_interrupt(self, gsi: int) -> int:
        """An eventfd: each write to it is an edge on `gsi`, raised by the kernel alone. It belongs to the caller."""
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            kvm.ioctl("KVM_IRQFD", self.fd, kvm.KVM_IRQFD, kvm.kvm_irqfd(fd=fd, gsi=gsi))
        except OSError:
            os.close(fd)
            raise
        return fd

    def bind_kick(self, fd: int, gpa: int, value: int) -> None:
        """A 32-bit guest write of `value` to `gpa` signals the eventfd `fd`, without an exit to this process."""
        request = kvm.kvm_ioeventfd(datamatch=value, addr=gpa, len=4, fd=fd, flags=kvm.KVM_IOEVENTFD_FLAG_DATAMATCH)
        kvm.ioctl("KVM_IOEVENTFD", self.fd, kvm.KVM_IOEVENTFD, request)

    def create_vcpu(self, index: int) -> int:
        """The descriptor of a new vCPU, whose local APIC's id is `index`."""
        return kvm.ioctl("KVM_CREATE_VCPU", self.fd, kvm.KVM_CREATE_VCPU, index)

    def close(self) -> None:
        """Close both descriptors. The machine is gone when its vCPUs' are closed too."""
        for fd in (self.fd, self.kvm_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.kvm_fd = -1

    def _set_slot(self, slot: int, gpa: int, size_bytes: int, hva: int, *, flags: int = 0) -> None:
        region = kvm.kvm_userspace_memory_region(
            slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=size_bytes, userspace_addr=hva
        )
        kvm.ioctl("KVM_SET_USER_MEMORY_REGION", self.fd, kvm.KVM_SET_USER_MEMORY_REGION, region)


def find_runs(bitmap: bytes) -> list[tuple[int, int]]:
    """(first, count) of each run of bits that are set; the lowest bit of each byte is the first."""
    runs: list[tuple[int, int]] = []
    start = count = 0
    for word, value in enumerate(memoryview(bitmap).cast("Q")):
        if not value:
            continue
        if value == _ALL_BITS and count and start + count == 64 * word:
            count += 64
            continue
        for bit in range(64):
            if value >> bit & 1:
                number = 64 * word + bit
                if count and start + count == number:
                    count += 1
                    continue
                if count:
                    runs.append((start, count))
                start, count = number, 1
    return [*runs, (start, count)] if count else runs
