"""Which KVM there is, found out by running a guest of a few bytes: CPU flags do not tell what a nested host will do.

The guest is in user mode and executes `syscall`. A CPU with virtualization enters the guest's kernel at LSTAR. A
software KVM (PVM) jumps there in user mode, and the guest's kernel gets a page fault instead.
"""

from __future__ import annotations

from struct import Struct

from nagaya.engines.kvm import cpuid
from nagaya.engines.kvm.bus import Bus
from nagaya.engines.kvm.known import HARDWARE, PVM, Finding, make_finding
from nagaya.engines.kvm.pvm import MSR_LSTAR, MSR_SFMASK, MSR_STAR, set_user_segment
from nagaya.engines.kvm.vcpu import Vcpu
from nagaya.engines.kvm.vm import Vm
from nagaya.errors import HostError, Unsupported
from nagaya.memory import PAGE_BYTES, GuestMemory

# One page each, mapped one to one.
_TABLES, _GDT, _IDT, _TASK, _STACK, _KERNEL, _USER = (page * PAGE_BYTES for page in (1, 5, 6, 7, 8, 9, 10))
_MEMORY_BYTES = 16 * PAGE_BYTES
_PORT = 0x10
_ENTERED, _FAULTED, _OTHER = 1, 2, 3
_KINDS = {_ENTERED: HARDWARE, _FAULTED: PVM}

_PRESENT, _WRITABLE, _USER_BIT = 1, 2, 4
_KERNEL_CODE, _KERNEL_DATA, _USER_DATA, _USER_CODE, _TASK_SELECTOR = 0x08, 0x10, 0x20, 0x28, 0x30
_SEGMENTS = (0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF)
_GATE = Struct("<HHBBHII")
_U64 = Struct("<Q")
_INTERRUPT_GATE = 0x8E
_VECTORS = 32
_PAGE_FAULT = 14


class _Result:
    """Takes the one byte that the guest writes, and stops it."""

    def __init__(self) -> None:
        self.value = 0
        self.vcpu: Vcpu | None = None

    def read_port(self, port: int, size: int) -> int:
        return 0

    def write_port(self, port: int, size: int, value: int) -> None:
        self.value = value
        assert self.vcpu is not None
        self.vcpu.stop()


def probe_kvm() -> Finding:
    """Run the guest; takes about 2 ms. Raises `Unsupported` without a KVM that this user can use, or of no known kind."""
    memory = GuestMemory.allocate(_MEMORY_BYTES)
    vm: Vm | None = None
    vcpu: Vcpu | None = None
    try:
        vm = Vm(memory)
        _lay_out(memory)
        result, bus = _Result(), Bus()
        bus.add_ports(_PORT, 1, result)
        result.vcpu = vcpu = Vcpu(vm, 0)
        cpuid.set_leaves(vcpu.fd, cpuid.supported(vm.kvm_fd))
        _enter_user_mode(vcpu)
        ending = vcpu.loop(bus)
    except OSError as error:
        raise HostError.from_os(error, "cannot try out this host's KVM") from None
    finally:
        if vcpu is not None:
            vcpu.close()
        if vm is not None:
            vm.close()
        memory.close()
    if result.value in _KINDS:
        return make_finding(_KINDS[result.value])
    raise Unsupported(
        "this host's KVM runs no guest that makes a system call",
        hint="use --type emulated",
        finding=f"the probe's guest reported {result.value}; {ending.reason if ending else 'it did not fail'}",
    )


def _lay_out(memory: GuestMemory) -> None:
    """Page tables, descriptor tables and code."""
    for level in range(3):
        table = _TABLES + level * PAGE_BYTES
        memory.write(table, _U64.pack(table + PAGE_BYTES | _PRESENT | _WRITABLE | _USER_BIT))
    pages = [gpa | _PRESENT | _WRITABLE for gpa in range(0, _MEMORY_BYTES, PAGE_BYTES)]
    pages[_USER // PAGE_BYTES] |= _USER_BIT
    memory.write(_TABLES + 3 * PAGE_BYTES, b"".join(map(_U64.pack, pages)))
    task = 0x67 | (_TASK & 0xFFFFFF) << 16 | 0x89 << 40
    memory.write(_GDT, b"".join(map(_U64.pack, (*_SEGMENTS, task, 0))))
    memory.write(_TASK + 4, _U64.pack(_STACK + PAGE_BYTES))  # RSP0
    at = _KERNEL  # the first of these is the entry of system calls
    entries = {}
    for value in (_ENTERED, _FAULTED, _OTHER):
        text = bytes((0xB0, value, 0xE6, _PORT, 0xF4))  # mov $value, %al; out %al, $_PORT; hlt
        memory.write(at, text)
        entries[value] = at
        at += len(text)
    for vector in range(_VECTORS):
        target = entries[_FAULTED if vector == _PAGE_FAULT else _OTHER]
        gate = _GATE.pack(target & 0xFFFF, _KERNEL_CODE, 0, _INTERRUPT_GATE, target >> 16, 0, 0)
        memory.write(_IDT + vector * _GATE.size, gate)
    memory.write(_USER, b"\x0f\x05\xf4")  # syscall; hlt


def _enter_user_mode(vcpu: Vcpu) -> None:
    special = vcpu.sregs()
    set_user_segment(special.cs, _USER_CODE, code=True, wide=True)
    for name in ("ds", "es", "fs", "gs", "ss"):
        set_user_segment(getattr(special, name), _USER_DATA, code=False, wide=False)
    task = special.tr
    task.base, task.limit, task.selector, task.type, task.present, task.s, task.unusable = (
        _TASK,
        0x67,
        _TASK_SELECTOR,
        0xB,
        1,
        0,
        0,
    )
    special.gdt.base, special.gdt.limit = _GDT, len(_SEGMENTS) * 8 + 15
    special.idt.base, special.idt.limit = _IDT, _VECTORS * _GATE.size - 1
    special.cr0, special.cr3, special.cr4, special.efer = 0x8005_0033, _TABLES, 0x20, 0x501
    vcpu.set_sregs(special)
    vcpu.set_msr(MSR_STAR, (_KERNEL_CODE << 32) | (0x18 << 48))
    vcpu.set_msr(MSR_LSTAR, _KERNEL)
    vcpu.set_msr(MSR_SFMASK, 0)
    registers = vcpu.regs()
    registers.rip, registers.rsp, registers.rflags = _USER, _USER + PAGE_BYTES, 2
    vcpu.set_regs(registers)
