"""What goes onto the guest kernel's command line."""

from __future__ import annotations

from nagaya.kernels.arguments import SOFTWARE_KVM, SOFTWARE_KVM_ONE_CPU, plan_arguments


def test_hardware_needs_nothing() -> None:
    assert plan_arguments(quiet=False) == []
    assert plan_arguments(cpus=4) == ["quiet"]


def test_software_kvm() -> None:
    assert plan_arguments(software_kvm=True) == ["quiet", *SOFTWARE_KVM, *SOFTWARE_KVM_ONE_CPU]
    assert plan_arguments(software_kvm=True, cpus=2, quiet=False) == list(SOFTWARE_KVM)


def test_each_is_one_word() -> None:
    words = plan_arguments(software_kvm=True)
    assert [word for word in words if not word or word.split() != [word]] == []
