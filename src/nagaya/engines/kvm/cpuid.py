"""What a guest is told about its CPUs: KVM's own answer, edited by a policy that is data.

The leaves are those of the Intel SDM, volume 2A, "CPUID", and of Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

import errno

from nagaya.kernel import kvm
from nagaya.static import NamedTuple

EAX, EBX, ECX, EDX = range(4)

LEAF_FEATURES = 0x1
LEAF_CACHE = 0x4
LEAF_EXTENDED_FEATURES = 0x7
LEAF_TOPOLOGY = 0xB
LEAF_XSAVE = 0xD
LEAF_TOPOLOGY_2 = 0x1F
LEAF_KVM_FEATURES = 0x4000_0001
LEAF_AMD_EXTENDED = 0x8000_0001
_BRAND = (0x8000_0002, 0x8000_0003, 0x8000_0004)
LEAF_AMD_ADDRESSES = 0x8000_0008
LEAF_AMD_TOPOLOGY = 0x8000_001E

HYPERVISOR = 1 << 31
"""Leaf 1, ECX: set on no real CPU. Without it a kernel looks for no kvm-clock."""
_HTT = 1 << 28
_X2APIC = 1 << 21
_TSC_DEADLINE = 1 << 24
_VMX = 1 << 5
_SVM = 1 << 2
_KVM_ASYNC_PF = 1 << 4 | 1 << 10 | 1 << 14
_KVM_POLL_CONTROL = 1 << 12


class Leaf(NamedTuple):
    """One answer: registers are (EAX, EBX, ECX, EDX). `flags` tells whether `subleaf` counts."""

    function: int
    subleaf: int
    flags: int
    registers: tuple[int, int, int, int]


class Mask(NamedTuple):
    """Bits to hide: `cleared` of one register of a leaf. `subleaf` -1 = every one."""

    function: int
    register: int
    cleared: int
    subleaf: int = -1


class Keep(NamedTuple):
    """The only bits to show of one register of a leaf."""

    function: int
    register: int
    kept: int
    subleaf: int = -1


ALL = 0xFFFF_FFFF

HOST: tuple[Mask | Keep, ...] = (
    # Nested virtualization: nothing that Nagaya runs needs it, and a snapshot would have to hold its state.
    Mask(LEAF_FEATURES, ECX, _VMX),
    Mask(LEAF_AMD_EXTENDED, ECX, _SVM),
    # Asynchronous page faults: state in the guest's memory that a snapshot cannot carry over.
    Mask(LEAF_KVM_FEATURES, EAX, _KVM_ASYNC_PF),
    # Guests that halt should halt, not poll.
    Mask(LEAF_KVM_FEATURES, EAX, _KVM_POLL_CONTROL),
)
"""The host's CPU with what a machine of ours cannot use taken away."""

# x86-64-v2 of the x86-64 psABI: what every server CPU since 2009 has, so that a snapshot moves between hosts.
_V2_ECX = 1 << 0 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23 | _X2APIC | _TSC_DEADLINE | HYPERVISOR
_V2_EDX = 0x078B_FBFF | _HTT
BASELINE: tuple[Mask | Keep, ...] = (
    *HOST,
    Keep(LEAF_FEATURES, ECX, _V2_ECX),
    Keep(LEAF_FEATURES, EDX, _V2_EDX),
    # Of subleaf 0, EAX is the number of the last subleaf: those after it have features in it too.
    *(Keep(LEAF_EXTENDED_FEATURES, register, 0) for register in (EAX, EBX, ECX, EDX)),
    *(Keep(LEAF_XSAVE, register, 0) for register in (EAX, EBX, ECX, EDX)),
    Keep(LEAF_AMD_EXTENDED, ECX, 1),  # lahf in 64-bit mode
    Keep(LEAF_AMD_EXTENDED, EDX, 1 << 11 | 1 << 20 | 1 << 29),  # syscall, no-execute, long mode
)
"""A portable CPU."""


def supported(kvm_fd: int) -> tuple[Leaf, ...]:
    """What this host's KVM can show. Raises `OSError`."""
    room = 100
    while True:
        head, entries = kvm.with_entries(kvm.kvm_cpuid2, kvm.kvm_cpuid_entry2, room)
        head.nent = room
        try:
            kvm.ioctl("KVM_GET_SUPPORTED_CPUID", kvm_fd, kvm.KVM_GET_SUPPORTED_CPUID, head)
        except OSError as error:
            if error.errno != errno.E2BIG:
                raise
            room *= 2
            continue
        return tuple(
            Leaf(entry.function, entry.index, entry.flags, (entry.eax, entry.ebx, entry.ecx, entry.edx))
            for entry in entries[: head.nent]
        )


def plan_leaves(
    leaves: tuple[Leaf, ...], policy: tuple[Mask | Keep, ...], *, index: int, count: int
) -> tuple[Leaf, ...]:
    """The leaves for vCPU `index` of `count`, under `policy`."""
    rules: dict[int, list[Mask | Keep]] = {}
    for rule in policy:
        rules.setdefault(rule.function, []).append(rule)
    planned = []
    for leaf in _with_topology(leaves):
        registers = list(leaf.registers)
        for rule in rules.get(leaf.function, ()):
            if rule.subleaf in (-1, leaf.subleaf):
                registers[rule.register] &= ~rule.cleared if isinstance(rule, Mask) else rule.kept
        _place(leaf, registers, index, count)
        eax, ebx, ecx, edx = registers
        planned.append(Leaf(leaf.function, leaf.subleaf, leaf.flags, (eax, ebx, ecx, edx)))
    return tuple(planned)


def _with_topology(leaves: tuple[Leaf, ...]) -> tuple[Leaf, ...]:
    """All levels of the topology leaves: KVM names the first alone (since Linux 6.3), as it is the VMM's to fill in."""
    found = {leaf.function for leaf in leaves} & {LEAF_TOPOLOGY, LEAF_TOPOLOGY_2}
    levels = (
        Leaf(function, subleaf, kvm.KVM_CPUID_FLAG_SIGNIFCANT_INDEX, (0, 0, 0, 0))
        for function in sorted(found)
        for subleaf in range(3)
    )
    return (*(leaf for leaf in leaves if leaf.function not in found), *levels)


def _place(leaf: Leaf, registers: list[int], index: int, count: int) -> None:
    """Say which CPU this is, of how many: one package, `count` cores of one thread, APIC id = index."""
    if leaf.function == LEAF_FEATURES:
        registers[EBX] = registers[EBX] & 0x0000_FFFF | min(count, 255) << 16 | (index & 0xFF) << 24
        registers[ECX] |= HYPERVISOR | _X2APIC
        registers[EDX] = registers[EDX] | _HTT if count > 1 else registers[EDX] & ~_HTT
    elif leaf.function == LEAF_CACHE:
        # Cores in the package, less one; 6 bits. What the host shares between its threads, our cores do not.
        registers[EAX] = registers[EAX] & 0x0000_3FFF | min(count - 1, 63) << 26 if registers[EAX] & 0x1F else 0
    elif leaf.function in (LEAF_TOPOLOGY, LEAF_TOPOLOGY_2):
        width = (count - 1).bit_length()
        if leaf.subleaf == 0:  # threads of a core: one
            registers[:] = [0, 1, 1 << 8, index]
        elif leaf.subleaf == 1:  # cores of the package
            registers[:] = [width, count, 2 << 8 | 1, index]
        else:
            registers[:] = [0, 0, leaf.subleaf, index]
    elif leaf.function == LEAF_AMD_ADDRESSES:
        width = (count - 1).bit_length()
        registers[ECX] = registers[ECX] & ~0xF0FF | width << 12 | min(count - 1, 255)
    elif leaf.function == LEAF_AMD_TOPOLOGY:
        registers[EAX], registers[EBX], registers[ECX] = index, index & 0xFF, 0


def brand(leaves: tuple[Leaf, ...]) -> str:
    """What the CPU calls itself."""
    parts = {leaf.function: leaf.registers for leaf in leaves if leaf.function in _BRAND}
    text = b"".join(register.to_bytes(4, "little") for function in _BRAND for register in parts.get(function, ()))
    return " ".join(text.partition(b"\0")[0].decode("ascii", "replace").split()) or "an unnamed CPU"


def set_leaves(vcpu_fd: int, leaves: tuple[Leaf, ...]) -> None:
    """Give them to a vCPU, before it first runs. Raises `OSError`."""
    head, entries = kvm.with_entries(kvm.kvm_cpuid2, kvm.kvm_cpuid_entry2, len(leaves))
    head.nent = len(leaves)
    for entry, leaf in zip(entries, leaves, strict=True):
        entry.function, entry.index, entry.flags = leaf.function, leaf.subleaf, leaf.flags
        entry.eax, entry.ebx, entry.ecx, entry.edx = leaf.registers
    kvm.ioctl("KVM_SET_CPUID2", vcpu_fd, kvm.KVM_SET_CPUID2, head)
