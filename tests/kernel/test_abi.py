"""Our constants and structures against the kernel's headers: a C program prints what the compiler makes of them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from nagaya.engines.container import policy
from nagaya.kernel import (
    bpf,
    capabilities,
    files,
    inotify,
    kvm,
    kvm_state,
    libc,
    mount,
    namespaces,
    process,
    seccomp,
    threads,
    tun,
    userfaultfd,
    vhost,
)

HEADERS = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <linux/audit.h>
#include <linux/bpf.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/fs.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/keyctl.h>
#include <linux/kvm.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <linux/vhost.h>
"""

# Python constant -> C expression, where the names differ or are ours.
RENAMED: dict[ModuleType, dict[str, str]] = {
    libc: {},
    mount: {},
    namespaces: {},
    process: {"MFD_EXEC": ""},  # Linux 6.3: newer than Debian 12's headers
    capabilities: {"VERSION_3": "_LINUX_CAPABILITY_VERSION_3"},
    seccomp: {
        "ACT_KILL_PROCESS": "SECCOMP_RET_KILL_PROCESS",
        "ACT_KILL_THREAD": "SECCOMP_RET_KILL_THREAD",
        "ACT_TRAP": "SECCOMP_RET_TRAP",
        "ACT_LOG": "SECCOMP_RET_LOG",
        "ACT_ALLOW": "SECCOMP_RET_ALLOW",
        "SET_MODE_FILTER": "SECCOMP_SET_MODE_FILTER",
        "INSTRUCTION_BYTES": "sizeof(struct sock_filter)",
    },
    bpf: {
        "PROG_TYPE_CGROUP_DEVICE": "BPF_PROG_TYPE_CGROUP_DEVICE",
        "ATTACH_CGROUP_DEVICE": "BPF_CGROUP_DEVICE",
        "ALLOW_MULTI": "BPF_F_ALLOW_MULTI",
        "ANY": "",
    },
    inotify: {},
    tun: {},
    kvm: {"API_VERSION": "KVM_API_VERSION"},
    kvm_state: {},
    threads: {"INTERRUPT": "SIGRTMIN + 4"},
    files: {},
    userfaultfd: {},
    vhost: {},
}
# umount2(2)'s flags are in the C library's header, which cannot be included together with the kernel's.
OTHER_HEADERS = "#include <stdio.h>\n#include <sys/mount.h>\n"
OF_OTHER_HEADERS = ("MNT_DETACH", "UMOUNT_NOFOLLOW")
STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "struct mount_attr": mount.MountAttr,
    "struct open_how": mount.OpenHow,
    "struct __user_cap_header_struct": capabilities.CapHeader,
    "struct __user_cap_data_struct": capabilities.CapData,
    "struct sock_fprog": seccomp._SockFprog,
    **{f"struct {name}": getattr(vhost, name) for name in vars(vhost) if name.startswith("vhost_")},
    **{f"struct {name}": getattr(userfaultfd, name) for name in vars(userfaultfd) if name.startswith("uffdio_")},
}
# Of the kernel's nested and anonymous members, ours are flat or have a name: our field -> the header's.
_RUN_MEMBERS = {
    kvm.kvm_run_io: "io",
    kvm.kvm_run_mmio: "mmio",
    kvm.kvm_run_internal: "internal",
    kvm.kvm_run_fail_entry: "fail_entry",
    kvm.kvm_run_system_event: "system_event",
    kvm.kvm_run_msr: "msr",
}
_EVENT_GROUPS = ("exception", "interrupt", "nmi", "smi", "triple_fault")
ARCHITECTURES = {
    "x86_64": "AUDIT_ARCH_X86_64",
    "x86": "AUDIT_ARCH_I386",
    "aarch64": "AUDIT_ARCH_AARCH64",
    "arm": "AUDIT_ARCH_ARM",
}


def ours() -> dict[str, int]:
    """C expression -> our value."""
    found: dict[str, int] = {}
    for module, renamed in RENAMED.items():
        for name, value in vars(module).items():
            if not name.isupper() or name.startswith("_") or not isinstance(value, int):
                continue
            expression = renamed.get(name, f"__NR_{name[4:].lower()}" if name.startswith("SYS_") else name)
            if expression:
                found[expression] = value
    for c_name, structure in STRUCTURES.items():
        found[f"sizeof({c_name})"] = ctypes.sizeof(structure)
        for field in structure._fields_:
            found[f"offsetof({c_name}, {field[0]})"] = getattr(structure, field[0]).offset
    for attribute in (
        "prog_type",
        "insn_cnt",
        "insns",
        "license",
        "log_level",
        "log_size",
        "log_buf",
        "kern_version",
        "prog_flags",
    ):
        found[f"offsetof(union bpf_attr, {attribute})"] = getattr(bpf.ProgLoad, attribute).offset
    for attribute in ("target_fd", "attach_bpf_fd", "attach_type", "attach_flags"):
        found[f"offsetof(union bpf_attr, {attribute})"] = getattr(bpf.ProgAttach, attribute).offset
    for name, number in capabilities.NUMBERS.items():
        found[f"CAP_{name}"] = number
    for name, number in policy.RLIMITS.items():
        found[f"RLIMIT_{name.upper()}"] = number
    for architecture, c_name in ARCHITECTURES.items():
        found[c_name] = seccomp.ARCHITECTURES[architecture]
    found |= kvm_layouts()
    found["SECCOMP_RET_ERRNO | 38"] = seccomp.errno_action(38)
    return found


def kvm_layouts() -> dict[str, int]:
    """C expression -> our value, for every structure of `nagaya.kernel.kvm` and `kvm_state`."""
    found: dict[str, int] = {}
    for name, structure in (vars(kvm) | vars(kvm_state)).items():
        if (
            not name.startswith("kvm_")
            or not isinstance(structure, type)
            or not issubclass(structure, ctypes.Structure)
            or structure in _RUN_MEMBERS
        ):
            continue
        # `kvm_run` is cut off after what x86 has in its last union.
        if structure is not kvm.kvm_run:
            found[f"sizeof(struct {name})"] = ctypes.sizeof(structure)
        for field in structure._fields_:
            for member in theirs_of(name, field[0]):
                descriptor = getattr(structure, field[0])
                found[f"offsetof(struct {name}, {member})"] = descriptor.offset
                if member != "s":  # a union of all architectures: ours is what x86 has in it
                    found[f"sizeof(((struct {name} *)0)->{member})"] = descriptor.size
    for field in kvm.kvm_sync_regs._fields_:
        offset = kvm.kvm_run.s.offset + getattr(kvm.kvm_sync_regs, field[0]).offset
        found[f"offsetof(struct kvm_run, s.regs.{field[0]})"] = offset
    for structure, member in _RUN_MEMBERS.items():
        for field in structure._fields_:
            name = f"{member}.{field[0]}"
            descriptor = getattr(structure, field[0])
            found[f"offsetof(struct kvm_run, {name})"] = kvm.kvm_run.exit.offset + descriptor.offset
            found[f"sizeof(((struct kvm_run *)0)->{name})"] = descriptor.size
    return found


def theirs_of(structure: str, field: str) -> list[str]:
    """The header's names of a field of ours; several where it is the start of a union."""
    if structure == "kvm_run" and field == "exit":
        return []  # anonymous in the header: compared by its members
    if structure != "kvm_vcpu_events" or field in ("sipi_vector", "flags", "reserved"):
        return [field]
    if field in ("exception_has_payload", "exception_payload"):
        return [field]
    group = next(group for group in _EVENT_GROUPS if field.startswith(group))
    return [f"{group}.{field[len(group) + 1 :]}"]


def values(compiler: str, directory: Path, headers: str, expressions: list[str]) -> dict[str, int]:
    """What a C program with these headers prints for each expression."""
    lines = [f'printf("%llu\\n", (unsigned long long)({expression}));' for expression in expressions]
    (directory / "abi.c").write_text(headers + "int main(void){\n" + "\n".join(lines) + "\nreturn 0;}\n")
    subprocess.run([compiler, "-o", str(directory / "abi"), str(directory / "abi.c")], check=True, timeout=30)
    printed = subprocess.run([str(directory / "abi")], check=True, capture_output=True, text=True, timeout=10).stdout
    return dict(zip(expressions, (int(line) for line in printed.split()), strict=True))


def test_constants_and_structures_are_the_kernels(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None or not Path("/usr/include/linux/mount.h").exists():
        pytest.skip("no C compiler, or no kernel headers")
    expected = ours()
    others = {name: expected[name] for name in OF_OTHER_HEADERS}
    theirs = values(compiler, tmp_path, HEADERS, [name for name in expected if name not in others])
    theirs |= values(compiler, tmp_path, OTHER_HEADERS, list(others))
    mask = (1 << 64) - 1
    assert {name: value & mask for name, value in expected.items()} == theirs
    assert len(theirs) > 500  # the list is made from the modules: it must not silently become empty


def test_libseccomps_structure_and_operators(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None or not Path("/usr/include/seccomp.h").exists():
        pytest.skip("libseccomp's headers are not installed (libseccomp-dev)")
    operators = list(seccomp.OPERATORS)
    source = tmp_path / "seccomp.c"
    source.write_text(
        "#include <seccomp.h>\n#include <stdio.h>\n#include <stddef.h>\nint main(void){"
        'printf("%zu %zu %zu\\n", sizeof(struct scmp_arg_cmp), offsetof(struct scmp_arg_cmp, datum_a), offsetof(struct scmp_arg_cmp, datum_b));'
        + "".join(f'printf("%d\\n", SCMP_CMP_{name});' for name in operators)
        + 'printf("%u\\n", SCMP_ARCH_X32);return 0;}\n'
    )
    subprocess.run([compiler, "-o", str(tmp_path / "seccomp"), str(source)], check=True, timeout=30)
    printed = subprocess.run([str(tmp_path / "seccomp")], check=True, capture_output=True, text=True, timeout=10).stdout
    numbers = [int(text) for text in printed.split()]
    compared = seccomp._ArgCmp
    assert numbers[:3] == [ctypes.sizeof(compared), compared.datum_a.offset, compared.datum_b.offset]
    assert numbers[3:-1] == [seccomp.OPERATORS[name] for name in operators]
    assert numbers[-1] == seccomp.ARCHITECTURES["x32"]


def test_memory_file_flag_of_newer_kernels() -> None:
    """MFD_EXEC is missing from older headers: its effect is what is tested, where the kernel has it."""
    fd = process._executable_memory_file("test")
    try:
        assert Path(f"/proc/self/fd/{fd}").stat().st_mode & 0o111
    finally:
        os.close(fd)
