"""What is put on a guest kernel's command line, by what runs it."""

from __future__ import annotations

from nagaya.kernels.arguments import (
    DEPRIVILEGED,
    SOFTWARE_KVM,
    SOFTWARE_KVM_CLOCK,
    SOFTWARE_KVM_ONE_CPU,
    plan_arguments,
)


def test_hardware_gets_nothing_but_quiet() -> None:
    assert plan_arguments() == ["quiet"]
    assert plan_arguments(quiet=False) == []


def test_a_software_kvm_gets_what_spares_its_emulator() -> None:
    clock = SOFTWARE_KVM_CLOCK
    assert plan_arguments(software_kvm=True) == ["quiet", *SOFTWARE_KVM, *clock, *SOFTWARE_KVM_ONE_CPU]
    assert plan_arguments(software_kvm=True, cpus=2, quiet=False) == [*SOFTWARE_KVM, *clock]


def test_a_kernel_in_user_mode_has_no_emulator_to_spare() -> None:
    several = ["quiet", *DEPRIVILEGED, *SOFTWARE_KVM_CLOCK]
    assert plan_arguments(software_kvm=True, deprivileged=True, cpus=2) == several
    assert plan_arguments(software_kvm=True, deprivileged=True) == [*several, *SOFTWARE_KVM_ONE_CPU]


def test_each_is_one_word() -> None:
    words = plan_arguments(software_kvm=True) + plan_arguments(deprivileged=True)
    assert [word for word in words if not word or word.split() != [word]] == []
