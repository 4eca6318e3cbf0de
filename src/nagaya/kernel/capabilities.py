"""capabilities(7): names, masks, the bounding set."""

from __future__ import annotations

from nagaya.kernel.process import PR_CAPBSET_DROP, PR_CAPBSET_READ, prctl

NAMES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)  # fmt: skip
NUMBERS = {name: number for number, name in enumerate(NAMES)}


def mask(names: tuple[str, ...]) -> int:
    """The bit mask of capabilities given by name, without CAP_."""
    made = 0
    for name in names:
        made |= 1 << NUMBERS[name]
    return made


def names_of(bits: int) -> tuple[str, ...]:
    return tuple(name for number, name in enumerate(NAMES) if bits >> number & 1)


def limit_bounding_set(keep: int) -> None:
    """Drop all capabilities but `keep` from what this process can ever have again."""
    for number in range(64):
        try:
            if prctl(PR_CAPBSET_READ, number) and not keep >> number & 1:
                prctl(PR_CAPBSET_DROP, number)
        except OSError:
            if (
                number < len(NAMES) and number < 38
            ):  # 38: the first that Linux 5.8 added; beyond this kernel's last, EINVAL
                raise
            return


def bounding_set() -> int:
    """What this process could hold at most."""
    made = 0
    for number in range(64):
        try:
            made |= prctl(PR_CAPBSET_READ, number) << number
        except OSError:
            break
    return made
