"""prctl(2), execveat(2), memfd seals, and what a forked child is not to have: descriptors, ids, a life after its parent's."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os

from nagaya.kernel.libc import SYS_EXECVEAT, SYS_KEYCTL, fail, libc, syscall
from nagaya.static import Iterable

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
MFD_EXEC = 0x10
AT_EMPTY_PATH = 0x1000
KEYCTL_JOIN_SESSION_KEYRING = 1
_SIGKILL = 9  # of `signal`, which takes a millisecond to import


_prctl = libc.prctl  # declared once: a start makes a hundred calls for the bounding set
_prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)


def prctl(option: int, argument: int) -> int:
    result: int = _prctl(option, argument, 0, 0, 0)
    if result < 0:
        raise fail("prctl")
    return result


def die_with(parent: int, status: int = 1) -> None:
    """In a child: be killed when `parent`, its parent's pid, ends; exit with `status` when that has happened before we could ask.

    The kernel forgets it when the child takes other ids (prctl(2)): after `become`, then.
    """
    prctl(PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != parent:
        os._exit(status)


def become(id_: int, groups: Iterable[int] = ()) -> None:
    """Take the user and group `id_` for good, with `groups` and no others beside. Needs root."""
    os.setgroups(list(groups))
    os.setresgid(id_, id_, id_)
    os.setresuid(id_, id_, id_)


def close_all_but(keep: Iterable[int], *, first: int = 3) -> None:
    """Close every descriptor from `first` on that is not in `keep`: for a child that has everything of its parent's."""
    low = first
    for fd in sorted(fd for fd in keep if fd >= first):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, (1 << 31) - 1)


def execute_fd(fd: int, argv: list[str], environment: list[str]) -> None:
    """Replace this process by the program in `fd`. Returns only by raising."""
    arguments = (ctypes.c_char_p * (len(argv) + 1))(*[os.fsencode(text) for text in argv], None)
    variables = (ctypes.c_char_p * (len(environment) + 1))(*[os.fsencode(text) for text in environment], None)
    syscall("execveat", SYS_EXECVEAT, ctypes.c_int(fd), b"", arguments, variables, ctypes.c_int(AT_EMPTY_PATH))


def sealed_copy(path: str) -> int:
    """A memory file with the contents of `path` that nobody, root included, can change.

    A container's root that gets hold of /proc/1/exe could overwrite the program on the host's disk (CVE-2019-5736).
    """
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fd = _executable_memory_file("nagaya-agent")
        while os.sendfile(fd, source, None, 1 << 20):
            pass
    finally:
        os.close(source)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    return fd


def _executable_memory_file(name: str) -> int:
    """Where vm.memfd_noexec is set (Linux 6.3), a memory file is executable only when that was asked for."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | MFD_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(name, flags)  # an older kernel, which knows no other kind


def new_session_keyring() -> None:
    """Leave the session keyring of whoever started us. A kernel without keys needs nothing of it."""
    try:
        syscall("keyctl", SYS_KEYCTL, ctypes.c_int(KEYCTL_JOIN_SESSION_KEYRING), None)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise


def set_file_system_ids(uid: int, gid: int) -> None:
    """setfsuid(2) and setfsgid(2): who we are to file systems. Neither call reports errors; asking again does."""
    for name, number in (("setfsgid", gid), ("setfsuid", uid)):
        call = getattr(libc, name)
        call(ctypes.c_uint(number))
        if call(ctypes.c_uint(0xFFFFFFFF)) & 0xFFFFFFFF != number:  # -1 is no id: this only answers the present one
            raise OSError(errno.EPERM, f"{name}: {os.strerror(errno.EPERM)}")


def read_sharing(pids: Iterable[int]) -> dict[str, int]:
    """Private, shared and proportional resident bytes of processes, as fields of `Stats`: proc(5), smaps_rollup.

    Nothing where one of them cannot be read.
    """
    fields = {b"Private": "memory_private_bytes", b"Shared": "memory_shared_bytes", b"Pss": "memory_pss_bytes"}
    found = dict.fromkeys(fields.values(), 0)
    try:
        for pid in pids:
            with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
                for line in file:
                    name, _, rest = line.partition(b":")
                    kind, _, part = name.partition(b"_")
                    if kind in fields and (part in (b"Clean", b"Dirty") or name == b"Pss") and name != b"Pss_Dirty":
                        found[fields[kind]] += int(rest.split()[0]) << 10
    except (OSError, ValueError):
        return {}
    return found


def read_usage(pid: int) -> tuple[int, int]:
    """(CPU time in ns, resident bytes) of a process of ours: proc(5), stat and statm."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rsplit(b")", 1)[1].split()
    with open(f"/proc/{pid}/statm", "rb") as file:
        pages = int(file.read().split()[1])
    ticks = int(fields[11]) + int(fields[12])  # utime, stime
    return ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE")
