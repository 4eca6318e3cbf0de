"""What guests are told of their CPUs: policies, and which CPU of how many."""

from __future__ import annotations

import pytest

from nagaya.engines.kvm.cpuid import (
    BASELINE,
    EAX,
    EBX,
    ECX,
    EDX,
    HOST,
    HYPERVISOR,
    LEAF_AMD_ADDRESSES,
    LEAF_AMD_EXTENDED,
    LEAF_AMD_TOPOLOGY,
    LEAF_CACHE,
    LEAF_EXTENDED_FEATURES,
    LEAF_FEATURES,
    LEAF_KVM_FEATURES,
    LEAF_TOPOLOGY,
    LEAF_TOPOLOGY_2,
    LEAF_XSAVE,
    Keep,
    Leaf,
    Mask,
    plan_leaves,
)
from nagaya.engines.kvm.pvm import POLICY

ONES = (0xFFFF_FFFF,) * 4
COUNTS = (1, 2, 4, 16, 64)
X2APIC, HTT, VMX, SVM = 1 << 21, 1 << 28, 1 << 5, 1 << 2
INDEXED = 1
# A host that has everything, as its KVM reports it: of the topology leaves the first level alone.
EVERYTHING = (
    Leaf(0, 0, 0, (0x20, 1, 2, 3)),
    Leaf(LEAF_FEATURES, 0, 0, ONES),
    *(Leaf(LEAF_CACHE, subleaf, INDEXED, (0xFFFF_C000 | kind, 5, 6, 7)) for subleaf, kind in enumerate((0x21, 0x22, 0x43, 0))),
    Leaf(LEAF_EXTENDED_FEATURES, 0, INDEXED, (2, *ONES[1:])),
    Leaf(LEAF_EXTENDED_FEATURES, 1, INDEXED, ONES),
    Leaf(LEAF_EXTENDED_FEATURES, 2, INDEXED, ONES),
    Leaf(LEAF_TOPOLOGY, 0, INDEXED, (0, 0, 0, 17)),
    Leaf(LEAF_XSAVE, 0, INDEXED, ONES),
    Leaf(LEAF_XSAVE, 1, INDEXED, ONES),
    Leaf(LEAF_TOPOLOGY_2, 0, INDEXED, (0, 0, 0, 17)),
    Leaf(LEAF_KVM_FEATURES, 0, 0, ONES),
    Leaf(LEAF_AMD_EXTENDED, 0, 0, ONES),
    Leaf(LEAF_AMD_ADDRESSES, 0, 0, ONES),
    Leaf(LEAF_AMD_TOPOLOGY, 0, 0, ONES),
)  # fmt: skip
Policy = tuple[Mask | Keep, ...]


def plan(policy: Policy = (), *, index: int = 0, count: int = 1) -> dict[tuple[int, int], tuple[int, int, int, int]]:
    leaves = plan_leaves(EVERYTHING, policy, index=index, count=count)
    found = {(leaf.function, leaf.subleaf): leaf.registers for leaf in leaves}
    assert len(found) == len(leaves)  # KVM would take the first of two
    assert all(0 <= value <= 0xFFFF_FFFF for registers in found.values() for value in registers)
    return found


def test_leaves_without_a_rule_stay() -> None:
    assert plan(HOST)[0, 0] == (0x20, 1, 2, 3)
    assert plan(BASELINE, count=4)[0, 0] == (0x20, 1, 2, 3)


def test_mask_and_keep_touch_one_register_of_one_subleaf() -> None:
    policy = (Mask(LEAF_EXTENDED_FEATURES, EBX, 0xF0, subleaf=0), Keep(LEAF_EXTENDED_FEATURES, ECX, 0xF, subleaf=1))
    found = plan(policy)
    assert found[LEAF_EXTENDED_FEATURES, 0] == (2, 0xFFFF_FF0F, 0xFFFF_FFFF, 0xFFFF_FFFF)
    assert found[LEAF_EXTENDED_FEATURES, 1] == (0xFFFF_FFFF, 0xFFFF_FFFF, 0xF, 0xFFFF_FFFF)
    assert found[LEAF_EXTENDED_FEATURES, 2] == ONES


def test_host_hides_only_what_a_machine_cannot_use() -> None:
    found = plan(HOST, count=2)
    assert found[LEAF_FEATURES, 0][ECX] == 0xFFFF_FFFF & ~VMX
    assert found[LEAF_FEATURES, 0][EDX] == 0xFFFF_FFFF
    assert found[LEAF_AMD_EXTENDED, 0] == (*ONES[:2], 0xFFFF_FFFF & ~SVM, ONES[3])
    # Asynchronous page faults (4, 10, 14) and poll control (12); kvm-clock (3) and its stability (24) stay.
    assert found[LEAF_KVM_FEATURES, 0] == (0xFFFF_FFFF & ~(1 << 4 | 1 << 10 | 1 << 12 | 1 << 14), *ONES[1:])
    assert found[LEAF_EXTENDED_FEATURES, 0] == (2, *ONES[1:])


def test_baseline_is_the_same_on_every_host() -> None:
    """A host with everything shows what the smallest one does: no feature bit but those of x86-64-v2."""
    found = plan(BASELINE, count=2)
    v2 = {"sse3": 0, "ssse3": 9, "cx16": 13, "sse4.1": 19, "sse4.2": 20, "popcnt": 23}
    for name, bit in v2.items():
        assert found[LEAF_FEATURES, 0][ECX] >> bit & 1, name
    absent = {
        "pclmul": 1,
        "vmx": 5,
        "fma": 12,
        "movbe": 22,
        "aes": 25,
        "xsave": 26,
        "osxsave": 27,
        "avx": 28,
        "rdrand": 30,
    }
    for name, bit in absent.items():
        assert not found[LEAF_FEATURES, 0][ECX] >> bit & 1, name
    for name, bit in {
        "fpu": 0,
        "tsc": 4,
        "msr": 5,
        "pae": 6,
        "cx8": 8,
        "apic": 9,
        "cmov": 15,
        "sse": 25,
        "sse2": 26,
    }.items():
        assert found[LEAF_FEATURES, 0][EDX] >> bit & 1, name
    for subleaf in range(3):  # of subleaf 1 EAX has features too: AVX-VNNI, AVX512-BF16
        assert found[LEAF_EXTENDED_FEATURES, subleaf] == (0, 0, 0, 0)
    assert found[LEAF_XSAVE, 0] == found[LEAF_XSAVE, 1] == (0, 0, 0, 0)
    assert found[LEAF_AMD_EXTENDED, 0][ECX:] == (1, 1 << 11 | 1 << 20 | 1 << 29)


def test_software_kvm_hides_what_its_emulator_lacks() -> None:
    found = plan((*HOST, *POLICY))
    for bit in (12, 13, 22, 23, 26, 27, 28, 29, 30):
        assert not found[LEAF_FEATURES, 0][ECX] >> bit & 1
    assert found[LEAF_EXTENDED_FEATURES, 0][EBX:] == (0, 0, 0)
    assert found[LEAF_XSAVE, 0] == (0, 0, 0, 0)


@pytest.mark.parametrize("policy", [(), HOST, BASELINE, (*HOST, *POLICY), (*BASELINE, *POLICY)])
def test_every_guest_knows_that_it_is_one(policy: Policy) -> None:
    ecx = plan(policy)[LEAF_FEATURES, 0][ECX]
    assert ecx & HYPERVISOR and ecx & X2APIC


@pytest.mark.parametrize("count", COUNTS)
def test_topology_is_one_package_of_cores_of_one_thread(count: int) -> None:
    width = {1: 0, 2: 1, 4: 2, 16: 4, 64: 6}[count]
    for index in {0, count // 2, count - 1}:
        found = plan(HOST, index=index, count=count)
        _, ebx, _, edx = found[LEAF_FEATURES, 0]
        assert (ebx >> 24, ebx >> 16 & 0xFF, ebx & 0xFFFF) == (index, count, 0xFFFF)
        assert bool(edx & HTT) == (count > 1)
        for function in (LEAF_TOPOLOGY, LEAF_TOPOLOGY_2):
            # (bits to shift off, logical CPUs, type << 8 | level, x2APIC id): SDM volume 2A, table 3-8.
            assert found[function, 0] == (0, 1, 1 << 8, index)
            assert found[function, 1] == (width, count, 2 << 8 | 1, index)
            assert found[function, 2] == (0, 0, 2, index)
        assert found[LEAF_AMD_ADDRESSES, 0][ECX] == 0xFFFF_0F00 | width << 12 | (count - 1)
        assert found[LEAF_AMD_TOPOLOGY, 0] == (index, index, 0, 0xFFFF_FFFF)


@pytest.mark.parametrize("count", [1, 3, 4, 16, 64, 255])
def test_caches_are_shared_with_no_other_core(count: int) -> None:
    found = plan(HOST, count=count)
    for subleaf, kind in enumerate((0x21, 0x22, 0x43)):
        eax, *others = found[LEAF_CACHE, subleaf]
        assert (eax >> 26, eax >> 14 & 0xFFF, eax & 0x3FFF) == (min(count - 1, 63), 0, kind)
        assert others == [5, 6, 7]
    assert found[LEAF_CACHE, 3][0] == 0  # there is no more of them


@pytest.mark.parametrize("count", [3, 5, 200, 255])
def test_counts_that_are_no_power_of_two_round_up(count: int) -> None:
    found = plan(HOST, index=count - 1, count=count)
    width = found[LEAF_TOPOLOGY, 1][EAX]
    assert 1 << (width - 1) < count <= 1 << width
    assert len({plan(HOST, index=index, count=count)[LEAF_TOPOLOGY, 0][EDX] for index in range(0, count, 7)}) == len(
        range(0, count, 7)
    )


def test_topology_leaves_are_not_made_up() -> None:
    leaves = plan_leaves((Leaf(0, 0, 0, (1, 2, 3, 4)),), HOST, index=1, count=4)
    assert leaves == (Leaf(0, 0, 0, (1, 2, 3, 4)),)


def test_topology_leaves_that_the_kernel_names_in_full_are_not_doubled() -> None:
    given = tuple(Leaf(LEAF_TOPOLOGY, subleaf, INDEXED, (1, 2, 3, 4)) for subleaf in range(3))
    leaves = plan_leaves(given, (), index=1, count=2)
    assert [leaf[:3] for leaf in leaves] == [(LEAF_TOPOLOGY, subleaf, INDEXED) for subleaf in range(3)]
