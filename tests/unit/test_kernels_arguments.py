"""What goes onto the guest kernel's command line."""

from __future__ import annotations

from nagaya.kernels.arguments import SOFTWARE_KVM, SOFTWARE_KVM_ONE_CPU, SOFTWARE_KVM_SKIP, plan_arguments


def test_hardware_needs_nothing() -> None:
    assert plan_arguments(quiet=False) == []
    assert plan_arguments(cpus=4) == ["quiet"]


def test_software_kvm() -> None:
    assert plan_arguments(software_kvm=True) == ["quiet", *SOFTWARE_KVM, *SOFTWARE_KVM_SKIP, *SOFTWARE_KVM_ONE_CPU]
    assert plan_arguments(software_kvm=True, cpus=2, quiet=False) == [*SOFTWARE_KVM, *SOFTWARE_KVM_SKIP]


def test_a_vmm_that_leaves_initcalls_out_does_not_have_them_looked_up() -> None:
    assert plan_arguments(software_kvm=True, cpus=2, quiet=False, skips=True) == list(SOFTWARE_KVM)
    assert plan_arguments(skips=True) == ["quiet"]


def test_each_is_one_word() -> None:
    words = plan_arguments(software_kvm=True)
    assert [word for word in words if not word or word.split() != [word]] == []
