"""System call filters: the compiled programs are run here, by a small interpreter of classic BPF (no kernel needed)."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import struct
from pathlib import Path

import pytest

from nagaya.engines.container import seccomp_profile
from nagaya.engines.container.policy import DEFAULT_CAPABILITIES
from nagaya.errors import IntegrityError, NotFound, Unsupported
from nagaya.kernel import capabilities, seccomp
from nagaya.kernel.seccomp import ACT_ALLOW, ACT_KILL_PROCESS, ACT_KILL_THREAD, errno_action

DEFAULT = capabilities.mask(DEFAULT_CAPABILITIES)
EVERYTHING = capabilities.mask(capabilities.NAMES)
EPERM, ENOSYS = errno_action(errno.EPERM), errno_action(errno.ENOSYS)
X86_64, X86 = seccomp.ARCHITECTURES["x86_64"], seccomp.ARCHITECTURES["x86"]
X32_BIT = 0x40000000
CLONE_NEWUSER, CLONE_NEWNS, CLONE_THREAD = 0x10000000, 0x20000, 0x10000

try:
    LIBRARY = ctypes.CDLL(seccomp.LIBRARY)
except OSError:
    pytest.skip("libseccomp is not installed", allow_module_level=True)
if os.uname().machine != "x86_64":
    pytest.skip("the expected numbers are x86-64's", allow_module_level=True)


def number(name: str) -> int:
    found: int = LIBRARY.seccomp_syscall_resolve_name(name.encode())
    assert found >= 0, name
    return found


def run(program: bytes, call: int, *arguments: int, architecture: int = X86_64) -> int:
    """The action that a filter takes for one call (<linux/filter.h>, seccomp(2): struct seccomp_data)."""
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("<IIQ6Q", call, architecture, 0, *(value & (1 << 64) - 1 for value in padded))
    code = list(struct.iter_unpack("<HBBI", program))
    accumulator, at = 0, 0
    while True:
        operation, true, false, k = code[at]
        at += 1
        if operation == 0x20:  # LD W ABS
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif operation == 0x54:  # AND K
            accumulator &= k
        elif operation == 0x05:  # JA
            at += k
        elif operation in (0x15, 0x25, 0x35, 0x45):  # JEQ, JGT, JGE, JSET
            tests = {0x15: accumulator == k, 0x25: accumulator > k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}
            at += true if tests[operation] else false
        elif operation == 0x06:  # RET K
            return int(k)
        else:
            raise AssertionError(f"instruction {operation:#x}")


def compiled(mask: int) -> bytes:
    profile = seccomp_profile.default_profile(mask)
    return seccomp.compile_filter(profile.default, profile.rules, profile.architectures)


@pytest.fixture(scope="module")
def default() -> bytes:
    return compiled(DEFAULT)


@pytest.mark.parametrize(
    "name", ["read", "openat", "execve", "futex", "chroot", "ptrace", "clock_gettime", "mknod", "statx"]
)
def test_everyday_calls_are_allowed(default: bytes, name: str) -> None:
    assert run(default, number(name)) == ACT_ALLOW


@pytest.mark.parametrize(
    "name",
    [
        "mount", "umount2", "pivot_root", "move_mount", "open_tree", "fsopen", "mount_setattr", "setns", "unshare",
        "init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "bpf", "keyctl",
        "add_key", "request_key", "open_by_handle_at", "perf_event_open", "userfaultfd", "iopl", "ioperm", "swapon",
        "io_uring_setup", "io_uring_enter", "settimeofday", "clock_settime", "acct", "quotactl", "syslog", "vhangup",
        "pidfd_getfd", "kcmp", "lookup_dcookie", "fanotify_init", "sethostname",
    ],
)  # fmt: skip
def test_dangerous_calls_fail_with_eperm(default: bytes, name: str) -> None:
    assert run(default, number(name)) == EPERM


def test_calls_of_the_future_do_not_exist(default: bytes) -> None:
    for call in (999, 5000, 0x3FFFFFFF):
        assert run(default, call) == ENOSYS


def test_clone_makes_no_namespaces(default: bytes) -> None:
    assert run(default, number("clone"), 17) == ACT_ALLOW
    assert run(default, number("clone"), CLONE_THREAD | 0x100) == ACT_ALLOW
    for flag in (CLONE_NEWUSER, CLONE_NEWNS, 0x02000000, 0x04000000, 0x08000000, 0x20000000, 0x40000000):
        assert run(default, number("clone"), flag | 17) != ACT_ALLOW
    assert run(default, number("clone3")) == ENOSYS  # its flags are in memory: C libraries fall back to clone


def test_every_socket_but_vsock(default: bytes) -> None:
    for family in (1, 2, 10, 16, 17):
        assert run(default, number("socket"), family) == ACT_ALLOW
    assert run(default, number("socket"), 40) != ACT_ALLOW


def test_personalities(default: bytes) -> None:
    for allowed in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF):
        assert run(default, number("personality"), allowed) == ACT_ALLOW
    assert run(default, number("personality"), 0x0040000) != ACT_ALLOW  # ADDR_NO_RANDOMIZE


def test_other_calling_conventions_are_no_way_round(default: bytes) -> None:
    assert run(default, 4, architecture=X86) == ACT_ALLOW  # i386 write
    assert run(default, 21, architecture=X86) != ACT_ALLOW  # i386 mount
    assert run(default, 165, architecture=X86) == ACT_ALLOW  # i386 getresuid, which is x86-64's mount
    assert run(default, X32_BIT | 1) == ACT_ALLOW  # x32 write
    assert run(default, X32_BIT | 165) != ACT_ALLOW  # x32 mount
    assert run(default, 1, architecture=0xC00000B7) in (ACT_KILL_THREAD, ACT_KILL_PROCESS)


@pytest.mark.parametrize(
    ("capability", "calls"),
    [
        ("SYS_ADMIN", ("mount", "setns", "unshare", "clone3", "bpf", "sethostname")),
        ("SYS_PTRACE", ("pidfd_getfd", "kcmp")),
        ("SYS_MODULE", ("init_module", "finit_module")),
        ("SYS_TIME", ("settimeofday", "clock_settime")),
        ("SYS_BOOT", ("reboot",)),
        ("DAC_READ_SEARCH", ("open_by_handle_at",)),
        ("BPF", ("bpf",)),
        ("PERFMON", ("perf_event_open",)),
        ("SYSLOG", ("syslog",)),
    ],
)
def test_a_capability_opens_its_calls_and_no_others(default: bytes, capability: str, calls: tuple[str, ...]) -> None:
    program = compiled(DEFAULT | capabilities.mask((capability,)))
    for name in calls:
        assert run(default, number(name)) != ACT_ALLOW
        assert run(program, number(name)) == ACT_ALLOW
    others = {"mount", "init_module", "reboot", "settimeofday", "open_by_handle_at", "kexec_load"} - set(calls)
    for name in others:
        assert run(program, number(name)) != ACT_ALLOW


def test_dropping_a_capability_closes_its_calls() -> None:
    program = compiled(DEFAULT & ~capabilities.mask(("SYS_CHROOT",)))
    assert run(program, number("chroot")) == EPERM


def test_all_capabilities_still_leave_kexec_keys_and_uring_closed() -> None:
    program = compiled(EVERYTHING)
    assert run(program, number("clone"), CLONE_NEWUSER) == ACT_ALLOW
    for name in ("kexec_load", "kexec_file_load", "keyctl", "add_key", "io_uring_setup", "swapon"):
        assert run(program, number(name)) == EPERM


def test_the_table_names_real_calls_once() -> None:
    groups = (
        seccomp_profile.FILES, seccomp_profile.MEMORY, seccomp_profile.PROCESSES, seccomp_profile.EVENTS_AND_TIME,
        seccomp_profile.NETWORK_AND_IPC,
    )  # fmt: skip
    names = [name for group in groups for name in group]
    assert len(names) == len(set(names))
    assert not set(names) & set(seccomp_profile.DENIED)


# -- profiles of the user's own


def write(directory: Path, profile: object) -> str:
    path = directory / "profile.json"
    path.write_text(profile if isinstance(profile, str) else json.dumps(profile))
    return str(path)


def compile_file(path: str, mask: int = DEFAULT) -> bytes:
    profile = seccomp_profile.load_profile(path, mask)
    return seccomp.compile_filter(profile.default, profile.rules, profile.architectures)


def test_a_profile_in_dockers_format(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 38,
            "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
            "syscalls": [
                {"names": ["read", "write", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
                {"name": "getpid", "action": "SCMP_ACT_ERRNO", "errnoRet": 5},
                {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
                {"names": ["chroot"], "action": "SCMP_ACT_ALLOW", "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
                {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
                {"names": ["kcmp"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "99.0"}},
                {"names": ["setns"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["s390x"]}},
                {
                    "names": ["personality"],
                    "action": "SCMP_ACT_ALLOW",
                    "args": [
                        {"index": 0, "value": 0, "op": "SCMP_CMP_EQ"},
                        {"index": 0, "value": 8, "op": "SCMP_CMP_EQ"},
                    ],
                },
                {
                    "names": ["socket"],
                    "action": "SCMP_ACT_ALLOW",
                    "args": [
                        {"index": 0, "value": 2, "op": "SCMP_CMP_EQ"},
                        {"index": 1, "value": 1, "op": "SCMP_CMP_EQ"},
                    ],
                },
                {
                    "names": ["clone"],
                    "action": "SCMP_ACT_ALLOW",
                    "args": [{"index": 0, "value": 0x7E020000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}],
                },
            ],
        },
    )
    program = compile_file(path)
    assert run(program, number("read")) == ACT_ALLOW
    assert run(program, number("openat")) == ENOSYS
    assert run(program, number("getpid")) == errno_action(5)
    assert run(program, number("mount")) == ENOSYS
    assert run(program, number("chroot")) == ACT_ALLOW
    assert run(program, number("ptrace")) == ACT_ALLOW
    assert run(program, number("kcmp")) == ENOSYS
    assert run(program, number("setns")) == ENOSYS
    assert [run(program, number("personality"), value) == ACT_ALLOW for value in (0, 8, 9)] == [True, True, False]
    assert [run(program, number("socket"), *pair) == ACT_ALLOW for pair in ((2, 1), (2, 2), (1, 1))] == [
        True,
        False,
        False,
    ]
    assert run(program, number("clone"), CLONE_NEWUSER) == ENOSYS
    assert run(program, 3, architecture=X86) == ACT_ALLOW
    assert run(program, X32_BIT) in (ACT_KILL_THREAD, ACT_KILL_PROCESS)  # x32 is not among its architectures
    admin = compile_file(path, DEFAULT | capabilities.mask(("SYS_ADMIN",)))
    assert run(admin, number("mount")) == ACT_ALLOW
    assert run(admin, number("chroot")) == ENOSYS


def test_podmans_default_profile_is_read(tmp_path: Path) -> None:
    path = "/usr/share/containers/seccomp.json"
    if not os.path.exists(path):
        pytest.skip("containers-common is not installed")
    program = compile_file(path)
    assert run(program, number("read")) == ACT_ALLOW
    assert run(program, number("kexec_load")) == EPERM
    assert run(program, number("open_by_handle_at")) == EPERM


def test_what_is_no_profile(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no seccomp profile"):
        seccomp_profile.load_profile(str(tmp_path / "none.json"), DEFAULT)
    malformed: list[object] = [
        "{", "[]", {}, {"defaultAction": "ALLOW"}, {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"]}]},
        {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [3]},
        {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [{"index": "x"}]}]},
    ]  # fmt: skip
    for bad in malformed:
        with pytest.raises(IntegrityError):
            seccomp_profile.load_profile(write(tmp_path, bad), DEFAULT)
    traced = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_NOTIFY"}]}
    with pytest.raises(Unsupported, match="SCMP_ACT_NOTIFY"):
        seccomp_profile.load_profile(write(tmp_path, traced), DEFAULT)


# -- the cache


def test_the_cache_answers_and_is_not_trusted_blindly(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    fresh = seccomp_profile.compile_profile("default", DEFAULT, str(cache))
    (stored,) = cache.iterdir()
    assert stored.read_bytes() == fresh
    assert stored.stat().st_mode & 0o077 == 0
    other = struct.pack("<HBBI", 6, 0, 0, ACT_KILL_PROCESS)
    stored.write_bytes(other)
    assert seccomp_profile.compile_profile("default", DEFAULT, str(cache)) == other  # so it is read
    stored.chmod(0o666)
    assert seccomp_profile.compile_profile("default", DEFAULT, str(cache)) == fresh
    stored.write_bytes(fresh[:-3])
    assert seccomp_profile.compile_profile("default", DEFAULT, str(cache)) == fresh
    stored.unlink()
    (tmp_path / "elsewhere").write_bytes(other)
    stored.symlink_to(tmp_path / "elsewhere")
    assert seccomp_profile.compile_profile("default", DEFAULT, str(cache)) == fresh


def test_capabilities_and_profiles_have_programs_of_their_own(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    own = write(tmp_path, {"defaultAction": "SCMP_ACT_ALLOW"})
    programs = [
        seccomp_profile.compile_profile("default", DEFAULT, cache),
        seccomp_profile.compile_profile("default", EVERYTHING, cache),
        seccomp_profile.compile_profile(own, DEFAULT, cache),
    ]
    assert len(set(programs)) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert seccomp_profile.compile_profile("unconfined", DEFAULT, cache) == b""


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert seccomp_profile.compile_profile("default", DEFAULT, str(tmp_path / "file" / "cache"))


def test_a_missing_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "LIBRARY", "libseccomp-that-is-not-there.so.2")
    with pytest.raises(Unsupported) as caught:
        seccomp_profile.compile_profile("default", DEFAULT, str(tmp_path))
    assert "apt install libseccomp2" in caught.value.hint
