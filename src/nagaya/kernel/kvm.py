"""The KVM API (Documentation/virt/kvm/api.rst): structures as the kernel's headers have them, and the requests on them.

Request numbers are computed from the structures; an ABI test compares both with what the C compiler makes of the headers.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_char, c_int32, c_uint8, c_uint16, c_uint32, c_uint64, sizeof

from nagaya.kernel.libc import fail, libc

_NONE, _WRITE, _READ = 0, 1, 2
_KVMIO = 0xAE

# `fcntl.ioctl` takes its argument as a C int and overflows on KVM_SET_TSS_ADDR.
raw_ioctl = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, use_errno=True
)(("ioctl", libc))  # fmt: skip
"""(fd, request, argument) -> result, below 0 with errno set. Without the GIL: it may sleep, as KVM_RUN does."""


def _request(direction: int, number: int, size: int) -> int:
    """asm-generic/ioctl.h."""
    return direction << 30 | size << 16 | _KVMIO << 8 | number


def io(number: int) -> int:
    return _request(_NONE, number, 0)


def ior(number: int, kind: type[ctypes._CData]) -> int:
    return _request(_READ, number, sizeof(kind))


def iow(number: int, kind: type[ctypes._CData]) -> int:
    return _request(_WRITE, number, sizeof(kind))


def iowr(number: int, kind: type[ctypes._CData]) -> int:
    return _request(_READ | _WRITE, number, sizeof(kind))


class kvm_userspace_memory_region(Structure):
    _fields_ = [
        ("slot", c_uint32), ("flags", c_uint32), ("guest_phys_addr", c_uint64), ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    ]  # fmt: skip


class kvm_dirty_log(Structure):
    """`dirty_bitmap` is where the kernel writes a bit for each page of the slot."""

    _fields_ = [("slot", c_uint32), ("padding1", c_uint32), ("dirty_bitmap", c_uint64)]


class kvm_regs(Structure):
    _fields_ = [
        (name, c_uint64)
        for name in (
            "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
            "rip", "rflags",
        )
    ]  # fmt: skip


class kvm_segment(Structure):
    _fields_ = [
        ("base", c_uint64), ("limit", c_uint32), ("selector", c_uint16), ("type", c_uint8), ("present", c_uint8),
        ("dpl", c_uint8), ("db", c_uint8), ("s", c_uint8), ("l", c_uint8), ("g", c_uint8), ("avl", c_uint8),
        ("unusable", c_uint8), ("padding", c_uint8),
    ]  # fmt: skip


class kvm_dtable(Structure):
    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class kvm_sregs(Structure):
    _fields_ = [
        *((name, kvm_segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", kvm_dtable), ("idt", kvm_dtable),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", c_uint64 * 4),
    ]  # fmt: skip


class kvm_msr_entry(Structure):
    _fields_ = [("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64)]


class kvm_msrs(Structure):
    """The head; `nmsrs` entries follow it."""

    _fields_ = [("nmsrs", c_uint32), ("pad", c_uint32)]


class kvm_cpuid_entry2(Structure):
    _fields_ = [
        ("function", c_uint32), ("index", c_uint32), ("flags", c_uint32), ("eax", c_uint32), ("ebx", c_uint32),
        ("ecx", c_uint32), ("edx", c_uint32), ("padding", c_uint32 * 3),
    ]  # fmt: skip


class kvm_cpuid2(Structure):
    """The head; `nent` entries follow it."""

    _fields_ = [("nent", c_uint32), ("padding", c_uint32)]


class kvm_irq_level(Structure):
    _fields_ = [("irq", c_uint32), ("level", c_uint32)]


class kvm_irqchip(Structure):
    _fields_ = [("chip_id", c_uint32), ("pad", c_uint32), ("chip", c_char * 512)]


class kvm_irqfd(Structure):
    _fields_ = [
        ("fd", c_uint32), ("gsi", c_uint32), ("flags", c_uint32), ("resamplefd", c_uint32), ("pad", c_uint8 * 16),
    ]  # fmt: skip


class kvm_ioeventfd(Structure):
    _fields_ = [
        ("datamatch", c_uint64), ("addr", c_uint64), ("len", c_uint32), ("fd", c_int32), ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    ]  # fmt: skip


class kvm_pit_config(Structure):
    _fields_ = [("flags", c_uint32), ("pad", c_uint32 * 15)]


class kvm_translation(Structure):
    _fields_ = [
        ("linear_address", c_uint64), ("physical_address", c_uint64), ("valid", c_uint8), ("writeable", c_uint8),
        ("usermode", c_uint8), ("pad", c_uint8 * 5),
    ]  # fmt: skip


class kvm_enable_cap(Structure):
    _fields_ = [("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("pad", c_uint8 * 64)]


class kvm_msr_filter_range(Structure):
    _fields_ = [("flags", c_uint32), ("nmsrs", c_uint32), ("base", c_uint32), ("bitmap", ctypes.c_void_p)]


class kvm_msr_filter(Structure):
    _fields_ = [("flags", c_uint32), ("ranges", kvm_msr_filter_range * 16)]


class kvm_vcpu_events(Structure):
    """The header's nested structures, flat: `exception_nr` is its exception.nr."""

    _fields_ = [
        ("exception_injected", c_uint8), ("exception_nr", c_uint8), ("exception_has_error_code", c_uint8),
        ("exception_pending", c_uint8), ("exception_error_code", c_uint32),
        ("interrupt_injected", c_uint8), ("interrupt_nr", c_uint8), ("interrupt_soft", c_uint8),
        ("interrupt_shadow", c_uint8),
        ("nmi_injected", c_uint8), ("nmi_pending", c_uint8), ("nmi_masked", c_uint8), ("nmi_pad", c_uint8),
        ("sipi_vector", c_uint32), ("flags", c_uint32),
        ("smi_smm", c_uint8), ("smi_pending", c_uint8), ("smi_smm_inside_nmi", c_uint8), ("smi_latched_init", c_uint8),
        ("triple_fault_pending", c_uint8), ("reserved", c_uint8 * 26),
        ("exception_has_payload", c_uint8), ("exception_payload", c_uint64),
    ]  # fmt: skip


class kvm_run_io(Structure):
    _fields_ = [
        ("direction", c_uint8), ("size", c_uint8), ("port", c_uint16), ("count", c_uint32), ("data_offset", c_uint64),
    ]  # fmt: skip


class kvm_run_mmio(Structure):
    _fields_ = [("phys_addr", c_uint64), ("data", c_uint8 * 8), ("len", c_uint32), ("is_write", c_uint8)]


class kvm_run_internal(Structure):
    _fields_ = [("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class kvm_run_fail_entry(Structure):
    _fields_ = [("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32)]


class kvm_run_system_event(Structure):
    _fields_ = [("type", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class kvm_run_msr(Structure):
    _fields_ = [
        ("error", c_uint8), ("pad", c_uint8 * 7), ("reason", c_uint32), ("index", c_uint32), ("data", c_uint64),
    ]  # fmt: skip


class kvm_run_exit(ctypes.Union):
    _fields_ = [
        ("io", kvm_run_io), ("mmio", kvm_run_mmio), ("internal", kvm_run_internal), ("fail_entry", kvm_run_fail_entry),
        ("system_event", kvm_run_system_event), ("msr", kvm_run_msr), ("padding", c_char * 256),
    ]  # fmt: skip


class kvm_sync_regs(Structure):
    _fields_ = [("regs", kvm_regs), ("sregs", kvm_sregs), ("events", kvm_vcpu_events)]


class kvm_run(Structure):
    """The page that a vCPU and its VMM share. Of the union after the exit's, the header's `s`, x86 has `regs`."""

    _fields_ = [
        ("request_interrupt_window", c_uint8), ("immediate_exit", c_uint8), ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32), ("ready_for_interrupt_injection", c_uint8), ("if_flag", c_uint8), ("flags", c_uint16),
        ("cr8", c_uint64), ("apic_base", c_uint64), ("exit", kvm_run_exit),
        ("kvm_valid_regs", c_uint64), ("kvm_dirty_regs", c_uint64), ("s", kvm_sync_regs),
    ]  # fmt: skip


API_VERSION = 12

KVM_GET_API_VERSION = io(0x00)
KVM_CREATE_VM = io(0x01)
KVM_CHECK_EXTENSION = io(0x03)
KVM_GET_VCPU_MMAP_SIZE = io(0x04)
KVM_GET_SUPPORTED_CPUID = iowr(0x05, kvm_cpuid2)
KVM_CREATE_VCPU = io(0x41)
KVM_GET_DIRTY_LOG = iow(0x42, kvm_dirty_log)
KVM_SET_USER_MEMORY_REGION = iow(0x46, kvm_userspace_memory_region)
KVM_SET_TSS_ADDR = io(0x47)
KVM_SET_IDENTITY_MAP_ADDR = iow(0x48, c_uint64)
KVM_CREATE_IRQCHIP = io(0x60)
KVM_IRQ_LINE = iow(0x61, kvm_irq_level)
KVM_GET_IRQCHIP = iowr(0x62, kvm_irqchip)
KVM_SET_IRQCHIP = ior(0x63, kvm_irqchip)
"""The header says _IOR where data goes in: so the number has the read bit."""
KVM_IRQFD = iow(0x76, kvm_irqfd)
KVM_CREATE_PIT2 = iow(0x77, kvm_pit_config)
KVM_IOEVENTFD = iow(0x79, kvm_ioeventfd)
KVM_RUN = io(0x80)
KVM_GET_REGS = ior(0x81, kvm_regs)
KVM_SET_REGS = iow(0x82, kvm_regs)
KVM_GET_SREGS = ior(0x83, kvm_sregs)
KVM_SET_SREGS = iow(0x84, kvm_sregs)
KVM_TRANSLATE = iowr(0x85, kvm_translation)
KVM_GET_MSRS = iowr(0x88, kvm_msrs)
KVM_SET_MSRS = iow(0x89, kvm_msrs)
KVM_SET_CPUID2 = iow(0x90, kvm_cpuid2)
KVM_GET_VCPU_EVENTS = ior(0x9F, kvm_vcpu_events)
KVM_SET_VCPU_EVENTS = iow(0xA0, kvm_vcpu_events)
KVM_GET_TSC_KHZ = io(0xA3)
KVM_ENABLE_CAP = iow(0xA3, kvm_enable_cap)
KVM_X86_SET_MSR_FILTER = iow(0xC6, kvm_msr_filter)
KVM_KVMCLOCK_CTRL = io(0xAD)

KVM_MEM_LOG_DIRTY_PAGES = 1
KVM_CAP_NR_VCPUS = 9
KVM_CAP_MAX_VCPUS = 66
KVM_CAP_SYNC_REGS = 74
KVM_CAP_IMMEDIATE_EXIT = 136
KVM_CAP_X86_USER_SPACE_MSR = 188
KVM_CAP_EXIT_ON_EMULATION_FAILURE = 204

KVM_EXIT_UNKNOWN = 0
KVM_EXIT_IO = 2
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_SYSTEM_EVENT = 24
KVM_EXIT_X86_RDMSR = 29
KVM_EXIT_X86_WRMSR = 30
KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1
KVM_INTERNAL_ERROR_EMULATION = 1
KVM_SYSTEM_EVENT_SHUTDOWN = 1
KVM_SYSTEM_EVENT_RESET = 2
KVM_SYSTEM_EVENT_CRASH = 3

KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1
"""So spelled in the header."""
KVM_PIT_SPEAKER_DUMMY = 1
KVM_IRQFD_FLAG_DEASSIGN = 1
KVM_IOEVENTFD_FLAG_DATAMATCH = 1
KVM_IOEVENTFD_FLAG_DEASSIGN = 4
KVM_MSR_EXIT_REASON_FILTER = 4
KVM_MSR_FILTER_WRITE = 2
KVM_SYNC_X86_REGS = 1
KVM_SYNC_X86_SREGS = 2


def ioctl(call: str, fd: int, request: int, argument: int | Structure | ctypes.Array[c_char] | c_uint64 = 0) -> int:
    """One request; `call` names it in the `OSError`. A structure goes by reference, and may come back changed."""
    pointer = argument if isinstance(argument, int) else ctypes.addressof(argument)
    result: int = raw_ioctl(fd, request, pointer)
    if result < 0:
        raise fail(call)
    return result


def with_entries(
    head: type[Structure], entry: type[Structure], count: int
) -> tuple[Structure, ctypes.Array[Structure]]:
    """A `kvm_cpuid2` or `kvm_msrs` with room for `count` entries: the head, and the entries, both in one buffer."""
    buffer = ctypes.create_string_buffer(sizeof(head) + count * sizeof(entry))
    entries: ctypes.Array[Structure] = (entry * count).from_buffer(buffer, sizeof(head))
    return head.from_buffer(buffer), entries
