"""seccomp(2) filters, compiled by libseccomp (seccomp_rule_add(3)) and taken out as BPF."""

from __future__ import annotations

import ctypes
import os

from nagaya.kernel.libc import SYS_SECCOMP, syscall
from nagaya.static import NamedTuple

ACT_KILL_PROCESS = 0x80000000
ACT_KILL_THREAD = 0x00000000
ACT_TRAP = 0x00030000
ACT_LOG = 0x7FFC0000
ACT_ALLOW = 0x7FFF0000
SET_MODE_FILTER = 1
INSTRUCTION_BYTES = 8

ARCHITECTURES = {"x86_64": 0xC000003E, "x86": 0x40000003, "x32": 0x4000003E, "aarch64": 0xC00000B7, "arm": 0x40000028}
OPERATORS = {"NE": 1, "LT": 2, "LE": 3, "EQ": 4, "GE": 5, "GT": 6, "MASKED_EQ": 7}


def errno_action(number: int) -> int:
    """The action that makes a call fail with errno `number`."""
    return 0x00050000 | number


class Comparison(NamedTuple):
    """One condition on one argument; `datum_b` is for MASKED_EQ (datum_a: mask, datum_b: value)."""

    argument: int
    operator: str
    datum_a: int
    datum_b: int = 0


class Rule(NamedTuple):
    """System calls by name, for which `action` holds when all comparisons do."""

    names: tuple[str, ...]
    action: int
    comparisons: tuple[Comparison, ...] = ()


class _ArgCmp(ctypes.Structure):
    """struct scmp_arg_cmp, <seccomp.h>."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


class _SockFprog(ctypes.Structure):
    """struct sock_fprog, <linux/filter.h>."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


LIBRARY = "libseccomp.so.2"


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(LIBRARY, use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    return library


def version() -> str:
    """libseccomp's version. Raises `OSError` when the library is missing."""

    class Version(ctypes.Structure):
        _fields_ = (("major", ctypes.c_uint), ("minor", ctypes.c_uint), ("micro", ctypes.c_uint))

    library = _library()
    library.seccomp_version.restype = ctypes.POINTER(Version)
    found = library.seccomp_version().contents
    return f"{found.major}.{found.minor}.{found.micro}"


def compile_filter(default: int, rules: tuple[Rule, ...], architectures: tuple[str, ...] = ()) -> bytes:
    """The BPF program of a profile: an array of struct sock_filter.

    System calls that libseccomp does not know are left out: they get the default action. Raises `OSError`.
    """
    library = _library()
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(default)))
    if not context:
        raise OSError(22, "seccomp_init: invalid default action")
    try:
        for name in architectures:
            result = library.seccomp_arch_add(context, ctypes.c_uint32(ARCHITECTURES[name]))
            if result not in (0, -17):  # EEXIST: the native one is there from the start
                raise OSError(-result, f"seccomp_arch_add {name}: {os.strerror(-result)}")
        for rule in rules:
            if rule.action != default:
                _add_rule(library, context, rule)
        return _export(library, context)
    finally:
        library.seccomp_release(context)


def _add_rule(library: ctypes.CDLL, context: ctypes.c_void_p, rule: Rule) -> None:
    compared = (_ArgCmp * max(1, len(rule.comparisons)))()
    for at, comparison in enumerate(rule.comparisons):
        compared[at] = _ArgCmp(
            comparison.argument, OPERATORS[comparison.operator], comparison.datum_a, comparison.datum_b
        )
    for name in rule.names:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == -1:
            continue
        result = library.seccomp_rule_add_array(
            context, ctypes.c_uint32(rule.action), ctypes.c_int(number), ctypes.c_uint(len(rule.comparisons)), compared
        )
        # EEXIST: an equal rule; EDOM/EFAULT: this call does not exist on one of the architectures.
        if result not in (0, -17, -33, -14):
            raise OSError(-result, f"seccomp_rule_add {name}: {os.strerror(-result)}")


def _export(library: ctypes.CDLL, context: ctypes.c_void_p) -> bytes:
    fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
    try:
        result = library.seccomp_export_bpf(context, ctypes.c_int(fd))
        if result:
            raise OSError(-result, f"seccomp_export_bpf: {os.strerror(-result)}")
        size = os.lseek(fd, 0, os.SEEK_END)
        return os.pread(fd, size, 0)
    finally:
        os.close(fd)


def install(program: bytes) -> None:
    """Put a filter on this process; needs CAP_SYS_ADMIN, or no_new_privs set before."""
    code = ctypes.create_string_buffer(program, len(program))
    fprog = _SockFprog(len(program) // INSTRUCTION_BYTES, ctypes.addressof(code))
    syscall("seccomp", SYS_SECCOMP, ctypes.c_uint(SET_MODE_FILTER), ctypes.c_uint(0), ctypes.byref(fprog))
