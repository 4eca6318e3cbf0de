"""bpf(2), as far as a device filter for cgroup v2 needs it (BPF_PROG_TYPE_CGROUP_DEVICE)."""

from __future__ import annotations

import ctypes
import os
from struct import Struct

from nagaya.kernel.libc import SYS_BPF, syscall

BPF_PROG_LOAD = 5
BPF_PROG_ATTACH = 8
PROG_TYPE_CGROUP_DEVICE = 15
ATTACH_CGROUP_DEVICE = 6
ALLOW_MULTI = 2

_INSN = Struct("<BBhi")
_DEVICE_BLOCK, _DEVICE_CHAR = 1, 2
_ACCESS = {"m": 1, "r": 2, "w": 4}
ANY = -1


class ProgLoad(ctypes.Structure):
    """union bpf_attr, the part of BPF_PROG_LOAD (<linux/bpf.h>)."""

    _fields_ = (
        ("prog_type", ctypes.c_uint32),
        ("insn_cnt", ctypes.c_uint32),
        ("insns", ctypes.c_uint64),
        ("license", ctypes.c_uint64),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_uint64),
        ("kern_version", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
    )


class ProgAttach(ctypes.Structure):
    """union bpf_attr, the part of BPF_PROG_ATTACH."""

    _fields_ = (
        ("target_fd", ctypes.c_uint32),
        ("attach_bpf_fd", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("attach_flags", ctypes.c_uint32),
    )


def _insn(code: int, dst: int = 0, src: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    return _INSN.pack(code, src << 4 | dst, offset, immediate)


def device_program(rules: list[tuple[str, int, int, str]]) -> bytes:
    """A filter that allows what any rule (type "b"/"c", major, minor, access) allows, and nothing else.

    The context is struct bpf_cgroup_dev_ctx: u32 access << 16 | type, u32 major, u32 minor.
    """
    load, move, and_, shift = 0x61, 0xBF, 0x54, 0x74  # LDX W, MOV64 X, AND32 K, RSH32 K
    jump_not_equal, jump_set = 0x55, 0x45  # JNE K, JSET K
    code = [
        _insn(load, 2, 1, 0),
        _insn(move, 3, 2),
        _insn(and_, 2, immediate=0xFFFF),
        _insn(shift, 3, immediate=16),
        _insn(load, 4, 1, 4),
        _insn(load, 5, 1, 8),
    ]
    for type_, major, minor, access in rules:
        denied = 7 & ~sum(_ACCESS[letter] for letter in set(access))
        tests = [(jump_not_equal, 2, _DEVICE_BLOCK if type_ == "b" else _DEVICE_CHAR)]
        if denied:
            tests.append((jump_set, 3, denied))
        if major != ANY:
            tests.append((jump_not_equal, 4, major))
        if minor != ANY:
            tests.append((jump_not_equal, 5, minor))
        for at, (operation, register, value) in enumerate(tests):
            code.append(_insn(operation, register, 0, len(tests) - at + 1, value))  # to the next rule
        code += [_insn(0xB7, 0, immediate=1), _insn(0x95)]  # r0 = 1; exit
    code += [_insn(0xB7, 0, immediate=0), _insn(0x95)]
    return b"".join(code)


def load_device_program(program: bytes) -> int:
    """Let the kernel verify and take the program; a descriptor of it."""
    code = ctypes.create_string_buffer(program, len(program))
    license_ = ctypes.create_string_buffer(b"Apache-2.0")
    attributes = ProgLoad(
        prog_type=PROG_TYPE_CGROUP_DEVICE,
        insn_cnt=len(program) // _INSN.size,
        insns=ctypes.addressof(code),
        license=ctypes.addressof(license_),
    )
    fd = syscall(
        "bpf load",
        SYS_BPF,
        ctypes.c_int(BPF_PROG_LOAD),
        ctypes.byref(attributes),
        ctypes.c_uint(ctypes.sizeof(attributes)),
    )
    os.set_inheritable(fd, False)
    return fd


def attach_device_program(program_fd: int, cgroup_fd: int) -> None:
    """Attach it to a group; it lives as long as the group."""
    attributes = ProgAttach(cgroup_fd, program_fd, ATTACH_CGROUP_DEVICE, ALLOW_MULTI)
    syscall(
        "bpf attach", SYS_BPF, ctypes.c_int(BPF_PROG_ATTACH), ctypes.byref(attributes),
        ctypes.c_uint(ctypes.sizeof(attributes)),
    )  # fmt: skip
