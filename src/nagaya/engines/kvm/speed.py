"""Whether machines run well on this host's KVM: always on a hardware one; on a software one it takes a kernel that helps."""

from __future__ import annotations

from nagaya.engines.kvm.known import HARDWARE, find_kvm


def can_leave_privileged_mode(kernel: str) -> bool:
    """Whether the kernel in the file `kernel` can run in user mode, where a software KVM emulates nothing: 2 ms."""
    from nagaya.engines.kvm.boot.symbols import find_functions  # lazy: a start from a template does not ask
    from nagaya.kernels.arguments import DEPRIVILEGED_START

    return bool(find_functions(kernel, (DEPRIVILEGED_START,)))


def has_quick_kernel(kernel: str = "") -> bool:
    """Whether `kernel` (a path; "" is the newest built one) can."""
    if not kernel:
        from nagaya.kernels.cache import find_kernel

        newest = find_kernel()
        kernel = newest.path if newest is not None else ""
    return bool(kernel) and can_leave_privileged_mode(kernel)


def runs_well(kernel: str = "") -> bool:
    """Whether machines do with that kernel on this host. Raises as `find_kvm`."""
    return find_kvm().kind == HARDWARE or has_quick_kernel(kernel)
