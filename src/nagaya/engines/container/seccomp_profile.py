"""The system calls that a container's programs may make.

The default profile is an allow-list, grouped by what calls are for. Calls that reach beyond the container (modules,
raw I/O, mounts, keys, other processes' memory, clocks, tracing the kernel) are allowed only together with the
capability that makes them harmless or wanted. Known calls that stay closed fail with EPERM; calls newer than this
list fail with ENOSYS, so that programs fall back to older ones (a lesson of clone3 and faccessat2 under older
runtimes). Some calls are open because the kernel itself asks for the capability where it matters: adjtimex reads
clocks, and ptrace reaches only programs of the same machine and user, filtered again by this profile since Linux 4.8.
"""

from __future__ import annotations

import errno
import json
import os

from nagaya.errors import HostError, IntegrityError, NotFound, Unsupported, UsageError
from nagaya.kernel import capabilities, seccomp
from nagaya.kernel.seccomp import ACT_ALLOW, Comparison, Rule, errno_action
from nagaya.static import Any, NamedTuple

FILES = (
    "access", "cachestat", "chdir", "chmod", "chown", "chown32", "close", "close_range", "copy_file_range", "creat",
    "dup", "dup2", "dup3", "faccessat", "faccessat2", "fadvise64", "fadvise64_64", "fallocate", "fchdir", "fchmod",
    "fchmodat", "fchmodat2", "fchown", "fchown32", "fchownat", "fcntl", "fcntl64", "fdatasync", "fgetxattr",
    "flistxattr", "flock", "fremovexattr", "fsetxattr", "fstat", "fstat64", "fstatat64", "fstatfs", "fstatfs64",
    "fsync", "ftruncate", "ftruncate64", "futimesat", "getcwd", "getdents", "getdents64", "getxattr", "getxattrat",
    "inotify_add_watch", "inotify_init", "inotify_init1", "inotify_rm_watch", "ioctl", "lchown", "lchown32",
    "lgetxattr", "link", "linkat", "listxattr", "listxattrat", "llistxattr", "lremovexattr", "lseek", "_llseek",
    "lsetxattr", "lstat", "lstat64", "mkdir", "mkdirat", "mknod", "mknodat", "name_to_handle_at", "newfstatat", "open",
    "openat", "openat2", "pread64", "preadv", "preadv2", "pwrite64", "pwritev", "pwritev2", "read", "readahead", "readdir",
    "readlink", "readlinkat", "readv", "removexattr", "removexattrat", "rename", "renameat", "renameat2", "rmdir",
    "sendfile", "sendfile64", "setxattr", "setxattrat", "splice", "stat", "stat64", "statfs", "statfs64", "statx",
    "symlink", "symlinkat", "sync", "sync_file_range", "syncfs", "tee", "truncate", "truncate64", "umask", "unlink",
    "unlinkat", "utime", "utimensat", "utimensat_time64", "utimes", "vmsplice", "write", "writev",
)  # fmt: skip
MEMORY = (
    "brk", "get_mempolicy", "madvise", "map_shadow_stack", "membarrier", "memfd_create", "memfd_secret", "mincore",
    "mlock", "mlock2", "mlockall", "mmap", "mmap2", "mprotect", "mremap", "mseal", "msync", "munlock", "munlockall",
    "munmap", "pkey_alloc", "pkey_free", "pkey_mprotect", "process_mrelease", "remap_file_pages",
)  # fmt: skip
PROCESSES = (
    "alarm", "arch_prctl", "capget", "capset", "execve", "execveat", "exit", "exit_group", "fork", "futex",
    "futex_requeue", "futex_time64", "futex_wait", "futex_waitv", "futex_wake", "get_robust_list", "get_thread_area",
    "getcpu", "getegid", "getegid32", "geteuid", "geteuid32", "getgid", "getgid32", "getgroups", "getgroups32",
    "getpgid", "getpgrp", "getpid", "getppid", "getpriority", "getresgid", "getresgid32", "getresuid", "getresuid32",
    "getrlimit", "getrusage", "getsid", "gettid", "getuid", "getuid32", "ioprio_get", "ioprio_set", "kill",
    "landlock_add_rule", "landlock_create_ruleset", "landlock_restrict_self", "modify_ldt", "nice", "pause",
    "pidfd_open", "pidfd_send_signal", "prctl", "prlimit64", "process_vm_readv", "process_vm_writev",
    "ptrace", "restart_syscall", "rseq",
    "rt_sigaction", "rt_sigpending", "rt_sigprocmask", "rt_sigqueueinfo", "rt_sigreturn", "rt_sigsuspend",
    "rt_sigtimedwait", "rt_sigtimedwait_time64", "rt_tgsigqueueinfo", "sched_get_priority_max",
    "sched_get_priority_min", "sched_getaffinity", "sched_getattr", "sched_getparam", "sched_getscheduler",
    "sched_rr_get_interval", "sched_rr_get_interval_time64", "sched_setaffinity", "sched_setattr", "sched_setparam",
    "sched_setscheduler", "sched_yield", "seccomp", "set_robust_list", "set_thread_area", "set_tid_address",
    "setfsgid", "setfsgid32", "setfsuid", "setfsuid32", "setgid", "setgid32", "setgroups", "setgroups32", "setpgid",
    "setpriority", "setregid", "setregid32", "setresgid", "setresgid32", "setresuid", "setresuid32", "setreuid",
    "setreuid32", "setrlimit", "setsid", "setuid", "setuid32", "sigaction", "sigaltstack", "signal", "signalfd",
    "signalfd4", "sigpending", "sigprocmask", "sigreturn", "sigsuspend", "tgkill", "time", "times", "tkill",
    "ugetrlimit", "uname", "vfork", "wait4", "waitid", "waitpid",
)  # fmt: skip
EVENTS_AND_TIME = (
    "adjtimex", "clock_adjtime", "clock_adjtime64", "clock_getres", "clock_getres_time64", "clock_gettime", "clock_gettime64", "clock_nanosleep",
    "clock_nanosleep_time64", "epoll_create", "epoll_create1", "epoll_ctl", "epoll_ctl_old", "epoll_pwait",
    "epoll_pwait2", "epoll_wait", "epoll_wait_old", "eventfd", "eventfd2", "getitimer", "getrandom", "gettimeofday",
    "io_cancel", "io_destroy", "io_getevents", "io_pgetevents", "io_pgetevents_time64", "io_setup", "io_submit",
    "nanosleep", "poll", "ppoll", "ppoll_time64", "pselect6", "pselect6_time64", "select", "_newselect", "setitimer",
    "sysinfo", "timer_create", "timer_delete", "timer_getoverrun", "timer_gettime", "timer_gettime64", "timer_settime",
    "timer_settime64", "timerfd_create", "timerfd_gettime", "timerfd_gettime64", "timerfd_settime",
    "timerfd_settime64",
)  # fmt: skip
NETWORK_AND_IPC = (
    "accept", "accept4", "bind", "connect", "getpeername", "getsockname", "getsockopt", "ipc", "listen",
    "mq_getsetattr", "mq_notify", "mq_open", "mq_timedreceive", "mq_timedreceive_time64", "mq_timedsend",
    "mq_timedsend_time64", "mq_unlink", "msgctl", "msgget", "msgrcv", "msgsnd", "pipe", "pipe2", "recv", "recvfrom",
    "recvmmsg", "recvmmsg_time64", "recvmsg", "semctl", "semget", "semop", "semtimedop", "semtimedop_time64", "send",
    "sendmmsg", "sendmsg", "sendto", "setsockopt", "shmat", "shmctl", "shmdt", "shmget", "shutdown", "socketcall",
    "socketpair",
)  # fmt: skip

# Capability -> the calls that it opens.
WITH_CAPABILITY: dict[str, tuple[str, ...]] = {
    "DAC_READ_SEARCH": ("open_by_handle_at",),
    "SYS_ADMIN": (
        "bpf", "clone", "clone3", "fanotify_init", "fanotify_mark", "fsconfig", "fsmount", "fsopen", "fspick",
        "lookup_dcookie", "listmount", "mount", "mount_setattr", "move_mount", "open_tree", "perf_event_open",
        "quotactl", "quotactl_fd", "setdomainname", "sethostname", "setns", "statmount", "syslog", "umount", "umount2",
        "unshare", "userfaultfd",
    ),
    "SYS_BOOT": ("reboot",),
    "SYS_CHROOT": ("chroot",),
    "SYS_MODULE": ("delete_module", "finit_module", "init_module"),
    "SYS_PACCT": ("acct",),
    "SYS_PTRACE": ("kcmp", "pidfd_getfd", "process_madvise"),
    "SYS_RAWIO": ("ioperm", "iopl"),
    "SYS_TIME": ("clock_settime", "clock_settime64", "settimeofday", "stime"),
    "SYS_TTY_CONFIG": ("vhangup",),
    "SYS_NICE": ("get_mempolicy", "mbind", "set_mempolicy", "set_mempolicy_home_node"),
    "SYSLOG": ("syslog",),
    "BPF": ("bpf",),
    "PERFMON": ("perf_event_open",),
}  # fmt: skip

CLONE_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)  # Linux, 32 bit, uname26, both, "ask"
AF_VSOCK = 40
# Known and refused: EPERM. What no list here names is newer than this file, or unknown to libseccomp: ENOSYS.
DENIED = (
    "add_key", "get_kernel_syms", "io_uring_enter", "io_uring_register", "io_uring_setup", "kexec_file_load",
    "kexec_load", "keyctl", "migrate_pages", "move_pages", "nfsservctl", "pivot_root", "query_module", "request_key",
    "swapoff", "swapon", "_sysctl", "sysfs", "uselib", "ustat", "vm86", "vm86old",
)  # fmt: skip


class Profile(NamedTuple):
    """What to compile: the action for calls without a rule, the rules, and the machine's other calling conventions."""

    default: int
    rules: tuple[Rule, ...]
    architectures: tuple[str, ...]


def default_profile(capability_mask: int) -> Profile:
    """The default profile for programs that may have these capabilities."""
    have = set(capabilities.names_of(capability_mask))
    allowed = FILES + MEMORY + PROCESSES + EVENTS_AND_TIME + NETWORK_AND_IPC
    rules = [Rule(allowed, ACT_ALLOW)]
    denied = set(DENIED)
    for name, calls in WITH_CAPABILITY.items():
        if name in have:
            rules.append(Rule(calls, ACT_ALLOW))
        else:
            denied.update(calls)
    granted = {call for rule in rules for call in rule.names}
    if "SYS_ADMIN" not in have:
        rules.append(Rule(("clone",), ACT_ALLOW, (Comparison(0, "MASKED_EQ", CLONE_NAMESPACES, 0),)))
        # clone3 keeps its flags in memory, where no filter can look: ENOSYS makes C libraries use clone.
        rules.append(Rule(("clone3",), errno_action(errno.ENOSYS)))
        granted |= {"clone", "clone3"}
    # Every socket but vsock, which reaches the host of a virtual machine past all network rules.
    rules.append(Rule(("socket",), ACT_ALLOW, (Comparison(0, "NE", AF_VSOCK),)))
    rules += [Rule(("personality",), ACT_ALLOW, (Comparison(0, "EQ", value),)) for value in PERSONALITIES]
    granted |= {"socket", "personality"}
    rules.append(Rule(tuple(sorted(denied - granted)), errno_action(errno.EPERM)))
    return Profile(errno_action(errno.ENOSYS), tuple(rules), _SUB_ARCHITECTURES.get(os.uname().machine, ()))


_SUB_ARCHITECTURES = {"x86_64": ("x86", "x32"), "aarch64": ("arm",)}
_ACTIONS = {
    "SCMP_ACT_ALLOW": ACT_ALLOW,
    "SCMP_ACT_LOG": seccomp.ACT_LOG,
    "SCMP_ACT_KILL": seccomp.ACT_KILL_THREAD,
    "SCMP_ACT_KILL_THREAD": seccomp.ACT_KILL_THREAD,
    "SCMP_ACT_KILL_PROCESS": seccomp.ACT_KILL_PROCESS,
    "SCMP_ACT_TRAP": seccomp.ACT_TRAP,
}


def load_profile(path: str, capability_mask: int) -> Profile:
    """A profile in Docker's JSON format. Raises `NotFound`, `IntegrityError`, `Unsupported`, `HostError`."""
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except FileNotFoundError:
        raise NotFound(
            f"there is no seccomp profile '{path}'", hint="or use seccomp=default, seccomp=unconfined"
        ) from None
    except OSError as error:
        raise HostError.from_os(error, "cannot read the seccomp profile") from None
    except ValueError as error:
        raise IntegrityError(f"seccomp profile {path}: not valid JSON ({error})") from None
    have = set(capabilities.names_of(capability_mask))
    try:
        default = _action(data["defaultAction"], data.get("defaultErrnoRet"))
        rules = [rule for entry in data.get("syscalls") or () if _applies(entry, have) for rule in _rules(entry)]
        architectures = _architectures(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(
            f"seccomp profile {path}: malformed ({error!r})", hint="it must be in Docker's format"
        ) from None
    return Profile(default, tuple(rules), architectures)


def _architectures(data: dict[str, Any]) -> tuple[str, ...]:
    """The calling conventions beside the native one: those that a profile does not name are killed."""
    ours = os.uname().machine
    for entry in data.get("archMap") or ():
        if _architecture(entry["architecture"]) == ours:
            found = [_architecture(name) for name in entry.get("subArchitectures") or ()]
            break
    else:
        found = [_architecture(name) for name in data.get("architectures") or ()]
    return tuple(name for name in found if name in _SUB_ARCHITECTURES.get(ours, ()))


def _architecture(name: str) -> str:
    return str(name).removeprefix("SCMP_ARCH_").lower()


def _action(name: str, number: int | None) -> int:
    if name == "SCMP_ACT_ERRNO":
        return errno_action(errno.EPERM if number is None else int(number) & 0xFFFF)
    if name in ("SCMP_ACT_NOTIFY", "SCMP_ACT_TRACE"):
        raise Unsupported(
            f"seccomp profiles with {name} need a supervisor of their own for each call", hint="use SCMP_ACT_ERRNO"
        )
    return _ACTIONS[name]


def _rules(entry: dict[str, Any]) -> list[Rule]:
    """All comparisons must hold; but of several on one argument any may, which takes a rule for each (as runc does)."""
    names, action = _names(entry), _action(entry["action"], entry.get("errnoRet"))
    comparisons = _comparisons(entry)
    if len({comparison.argument for comparison in comparisons}) < len(comparisons):
        return [Rule(names, action, (comparison,)) for comparison in comparisons]
    return [Rule(names, action, comparisons)]


def _names(entry: dict[str, Any]) -> tuple[str, ...]:
    names = entry.get("names") or [entry["name"]]
    return tuple(str(name) for name in names)


def _comparisons(entry: dict[str, Any]) -> tuple[Comparison, ...]:
    return tuple(
        Comparison(
            int(part["index"]),
            str(part["op"]).removeprefix("SCMP_CMP_"),
            int(part["value"]),
            int(part.get("valueTwo", 0)),
        )
        for part in entry.get("args") or ()
    )


def _applies(entry: dict[str, Any], have: set[str]) -> bool:
    """Docker's "includes" and "excludes" by capability, architecture and the kernel's version."""
    includes, excludes = entry.get("includes") or {}, entry.get("excludes") or {}
    wanted = {str(name).removeprefix("CAP_") for name in includes.get("caps") or ()}
    unwanted = {str(name).removeprefix("CAP_") for name in excludes.get("caps") or ()}
    ours = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, "")
    arches, not_arches = includes.get("arches") or [ours], excludes.get("arches") or ()
    if any(
        _kernel_is(text) is not wants
        for text, wants in ((includes.get("minKernel"), True), (excludes.get("minKernel"), False))
        if text
    ):
        return False
    return wanted <= have and not (unwanted & have) and ours in arches and ours not in not_arches


def _kernel_is(at_least: str) -> bool:
    major, minor = at_least.split(".")[:2]
    release = os.uname().release.split(".")
    return (int(release[0]), int("".join(c for c in release[1] if c.isdigit()) or 0)) >= (int(major), int(minor))


def compile_profile(profile: str, capability_mask: int, cache: str) -> bytes:
    """The BPF program for a profile ("default", "unconfined" or a path), from the cache when it was made before.

    libseccomp takes milliseconds; the program depends on nothing but the rules and the library's version.
    """
    if profile == "unconfined":
        return b""
    if profile == "default":  # its table need not be made when its program is there
        path = f"{cache}/seccomp-default-{_revision()}-{capability_mask:x}.bpf"
        program = _cached(path)
        if program is not None:
            return program
        made = default_profile(capability_mask)
    else:
        made = load_profile(profile, capability_mask)
        path = f"{cache}/seccomp-{_digest(made)}.bpf"
        program = _cached(path)
    if program is None:
        program = _compile(made)
        _store(path, program)
    return program


def _revision() -> str:
    """Names this file's version and libseccomp's: neither a changed table nor another library must meet an old program."""
    from nagaya import __version__

    found = os.stat(__file__)
    return f"{__version__}-{found.st_mtime_ns:x}-{found.st_size:x}-{_library_version()}"


def _library_version() -> str:
    """By the name of the file: asking the library itself would mean loading it, at every start."""
    machine = os.uname().machine
    for directory in (f"/usr/lib/{machine}-linux-gnu", "/usr/lib64", "/usr/lib", "/lib64", "/lib"):
        try:
            return os.path.basename(os.readlink(f"{directory}/{seccomp.LIBRARY}"))
        except OSError:
            continue
    return seccomp.LIBRARY


def _digest(profile: Profile) -> str:
    import hashlib  # lazy: only machines with a profile of their own

    return hashlib.sha256(repr((_revision(), profile)).encode()).hexdigest()


def _compile(profile: Profile) -> bytes:
    try:
        return seccomp.compile_filter(profile.default, profile.rules, profile.architectures)
    except KeyError as error:
        raise UsageError(f"seccomp: unknown comparison {error}") from None
    except OSError as error:
        if error.errno is None:  # ctypes: the library itself is missing
            raise Unsupported(
                "libseccomp is not installed, and containers are filtered by default",
                hint="apt install libseccomp2, or use --security-opt seccomp=unconfined",
                finding=str(error),
            ) from None
        raise HostError.from_os(error, "cannot compile the system call filter") from None


def _cached(path: str) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        # Nobody but us may have had a say in what filters a container.
        if (
            found.st_uid != os.geteuid()
            or found.st_mode & 0o022
            or not 0 < found.st_size <= 4096 * 8
            or found.st_size % 8
        ):
            return None
        return os.read(fd, found.st_size)
    finally:
        os.close(fd)


def _store(path: str, program: bytes) -> None:
    from nagaya.storage.paths import make_directory
    from nagaya.storage.records import write_file

    try:
        make_directory(os.path.dirname(path), 0o700)
        write_file(path, program)
    except OSError:
        return  # a cache that cannot be written costs time, nothing else
