"""Arguments for the guest kernel's command line, as data: each with what it is good for.

Few are needed, and each costs: the kernel compares every one with some 400 names, 30 ms where its code is emulated.
"""

from __future__ import annotations

# For every VMM. `panic=` is built in (CONFIG_PANIC_TIMEOUT).
QUIET = (
    "quiet",
)  # messages stay in dmesg; 0.1 s of console output under TCG, and a second where a serial port is emulated

# Where KVM emulates the guest's kernel instruction by instruction (PVM). Measured on such a host with the shipped kernel,
# one CPU and 128 MiB, from the VMM's start to the guest's restart by /init: 20.6 s without these, 10.0 s with all of
# them. Behind each is what leaving it out alone costs.
SOFTWARE_KVM = (
    "noxsave",  # XSAVE and XRSTOR are not emulated; CPUID cannot hide them
    # String operations by 8 bytes instead of by one, and no instructions that a trip to user space must complete: 0.4 s
    "clearcpuid=erms,fsrm,smap,popcnt",
    "rodata=off",  # no splitting of the kernel's large pages to write-protect its text: 1.8 s
    # /sys/kernel/slab, /sys/module/*/parameters, /sys/kernel/irq: 5.5 s for files that no program needs.
    "initcall_blacklist=slab_sysfs_init,param_sysfs_init,irq_sysfs_init",
)
DEPRIVILEGED_START = "depriv_start"
"""The function that a kernel has which can run in user mode there, and does when it is told."""
DEPRIVILEGED = ("depriv", "rodata=off")
# A software KVM's guest has the host's TSC, whatever KVM is told of it: the clock of a machine that goes on from where it was saved
# would leap by all the time between, and stand still on a host that has been up for less time. kvm-clock is set back.
SOFTWARE_KVM_CLOCK = ("clocksource=kvm-clock",)
# LOCK prefixes stay, instead of being patched away one by one: 2.8 s, and 0.3 s where the kernel runs in user mode.
SOFTWARE_KVM_ONE_CPU = ("noreplace-smp",)


def plan_arguments(
    *, software_kvm: bool = False, cpus: int = 1, quiet: bool = True, deprivileged: bool = False
) -> list[str]:
    """What to put before the user's own arguments, which win where the kernel takes the last.

    `deprivileged`: the kernel can run in user mode.
    """
    arguments = [*(QUIET if quiet else ())]
    if deprivileged:
        arguments += DEPRIVILEGED
    elif software_kvm:
        arguments += SOFTWARE_KVM
    if deprivileged or software_kvm:
        arguments += SOFTWARE_KVM_CLOCK
        if cpus == 1:
            arguments += SOFTWARE_KVM_ONE_CPU
    return arguments
