"""What can be asked of a virtual machine on this host, and how it differs from a container in that."""

from __future__ import annotations

import os
import stat

from nagaya.engines.mount_rules import check_options, check_target
from nagaya.engines.program_rules import rlimits, wanted_capabilities
from nagaya.engines.vm.copies import warn_of_copies
from nagaya.engines.vm.shares import why_not
from nagaya.errors import Unsupported, UsageError
from nagaya.model.policy import ProcessPolicy
from nagaya.model.spec import MachineSpec

DEFAULT_MEMORY_BYTES = 512 << 20
LEAST_MEMORY_BYTES = 64 << 20  # kernel, agent and a shell; with less the guest kernel kills the agent
_MEMORY_STEP = 2 << 20
# See `engines.base.FEATURES`: what no virtual machine has.
MISSING = {
    "limits": "a virtual machine's memory and CPUs are those that it was started with",
    "devices": "--device shows a device of the virtual machine's own kernel, and none of this host's",
    "host-network": "a virtual machine has a network of its own",
    "network-connect": "a virtual machine's network cards are those that it was started with",
    "userns": "a virtual machine's root is nobody on this host in any case",
    "seccomp-profile": "a virtual machine's programs speak to its own kernel, not to this host's",
}
APPEND_MAX = 1024  # x86's whole command line is 2048 bytes (COMMAND_LINE_SIZE), and ours is in it too
HOSTNAME_MAX = 64  # sethostname(2)


def check_spec(spec: MachineSpec) -> list[str]:
    """Raise `UsageError` or `Unsupported` for what no virtual machine could be; answers warnings."""
    if len(spec.hostname.encode()) > HOSTNAME_MAX:
        raise UsageError(f"the host name '{spec.hostname}' is longer than {HOSTNAME_MAX} bytes")
    _check_walls(spec)
    _check_kernel(spec)
    plan_policy(spec)
    for mount in spec.mounts:
        check_target(mount.target)
        check_options(mount.options)
        if mount.propagation.removeprefix("r") == "shared":
            raise Unsupported(
                f"mount '{mount.target}': what a virtual machine mounts cannot appear on the host",
                hint="leave propagation=shared away, or use --type container",
            )
    limits = spec.limits
    if 0 < limits.memory_bytes < LEAST_MEMORY_BYTES:
        raise UsageError(
            f"--memory: a virtual machine needs {LEAST_MEMORY_BYTES >> 20} MiB or more, for its own kernel is in it",
            hint="give it more, or use --type container",
        )
    return [*warn_of_limits(spec), *warn_of_copies(spec, why_not())]


def warn_of_limits(spec: MachineSpec) -> list[str]:
    """What a plain user's machine does without: control groups are root's."""
    if not os.geteuid():
        return []
    limits, warnings = spec.limits, []
    if limits.cpus_milli % 1000:
        warnings.append(
            f"a plain user's virtual machine has whole CPUs: --cpus {limits.cpus_milli / 1000:g} gives it {cpus(spec)}"
        )
    for option, value in (("--cpuset-cpus", limits.cpuset_cpus), ("--blkio-weight", limits.blkio_weight)):
        if value:
            warnings.append(f"{option} is not applied to a plain user's virtual machines: it takes a control group")
    return warnings


def is_errand(spec: MachineSpec) -> bool:
    """Whether it is booted for work on the disks of a machine that does not run (`offline.py`), and not a machine itself."""
    return not spec.image_id and spec.hardware is None


def _check_walls(spec: MachineSpec) -> None:
    if spec.network == "host":
        raise Unsupported(
            "a virtual machine has a network of its own and cannot use the host's",
            hint="use --network bridge or --network none, or --type container",
        )
    if spec.userns:
        raise Unsupported(
            "user namespaces are for containers: a virtual machine's root is nobody on the host in any case",
            hint="leave --userns away",
        )
    if spec.security.seccomp not in ("default", "unconfined"):
        raise Unsupported(
            "a seccomp profile is for containers: a virtual machine's programs speak to its own kernel, not to the host's",
            hint="leave --security-opt seccomp=PROFILE away",
        )


def _check_kernel(spec: MachineSpec) -> None:
    if spec.kernel:
        try:
            kernel = os.open(spec.kernel, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise UsageError(f"--kernel: cannot read {spec.kernel}: {error.strerror}") from None
        regular = stat.S_ISREG(os.fstat(kernel).st_mode)
        os.close(kernel)
        if not regular:
            raise UsageError(
                f"--kernel: {spec.kernel} is no file", hint="for example the vmlinux that 'nagaya kernel path' names"
            )
    check_append(spec)


def check_append(spec: MachineSpec) -> None:
    """Raise `UsageError` for words that no command line of a kernel could have."""
    if len(spec.append.encode()) > APPEND_MAX or not spec.append.isprintable():
        raise UsageError(f"--append: the words have to be one printable line of at most {APPEND_MAX} bytes")


def plan_policy(spec: MachineSpec) -> ProcessPolicy:
    """What binds the machine's programs. No system call filter: the kernel behind the calls is their own.

    Raises `UsageError` for an unknown capability or limit.
    """
    return ProcessPolicy(
        capabilities=wanted_capabilities(spec.security),
        no_new_privileges=spec.security.no_new_privileges,
        rlimits=rlimits(spec.ulimits),
    )


def memory_bytes(spec: MachineSpec) -> int:
    """The machine's memory, in whole pages of 2 MiB."""
    wanted = spec.limits.memory_bytes or DEFAULT_MEMORY_BYTES
    return -(-wanted // _MEMORY_STEP) * _MEMORY_STEP


def cpus(spec: MachineSpec) -> int:
    """The machine's CPUs: 1 unless limited to more, whole ones."""
    return max(1, -(-spec.limits.cpus_milli // 1000))
