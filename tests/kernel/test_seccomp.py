"""The compiled default profile, put on a process of this kernel."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest

from nagaya.engines.container import seccomp_profile
from nagaya.engines.container.policy import DEFAULT_CAPABILITIES
from nagaya.kernel import capabilities, process, seccomp
from nagaya.kernel.libc import libc
from tests.kernel.forked import in_child

try:
    PROGRAM = seccomp_profile._compile(seccomp_profile.default_profile(capabilities.mask(DEFAULT_CAPABILITIES)))
except Exception as error:
    pytest.skip(f"no filter can be compiled here: {error}", allow_module_level=True)


def confine() -> None:
    process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)
    seccomp.install(PROGRAM)


def call(number: int, *arguments: int) -> int:
    """errno of a raw system call, 0 for success."""
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(value) for value in (*arguments, *[0] * 6)[:6]))
    return ctypes.get_errno() if result < 0 else 0


def test_a_confined_process_says_so() -> None:
    def status() -> str:
        confine()
        return Path("/proc/self/status").read_text()

    shown = in_child(status)
    assert "Seccomp:\t2" in shown and "NoNewPrivs:\t1" in shown


def test_what_it_may_and_may_not_call() -> None:
    def errors() -> dict[str, int]:
        confine()
        return {
            "getpid": call(39),
            "mount": call(165),
            "unshare": call(272, 0x10000000),
            "setns": call(308),
            "kexec_load": call(246),
            "keyctl": call(250),
            "bpf": call(321),
            "clone user": call(56, 0x10000000 | 17),
            "clone3": call(435),
            "vsock": call(41, 40, 1),
            "future": call(1000),
        }

    assert in_child(errors) == {
        "getpid": 0, "mount": errno.EPERM, "unshare": errno.EPERM, "setns": errno.EPERM, "kexec_load": errno.EPERM,
        "keyctl": errno.EPERM, "bpf": errno.EPERM, "clone user": errno.ENOSYS, "clone3": errno.ENOSYS,
        "vsock": errno.ENOSYS, "future": errno.ENOSYS,
    }  # fmt: skip


def test_python_itself_goes_on_below_the_filter(tmp_path: Path) -> None:
    def work() -> str:
        confine()
        (tmp_path / "file").write_text("x" * 1000)
        pid = os.fork()
        if pid == 0:
            os.execv("/bin/cat", ["cat", str(tmp_path / "file")]) if os.dup2(os.open("/dev/null", 2), 1) else os._exit(
                1
            )
        return str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    assert in_child(work) == "0"


def test_a_filter_that_is_none_is_refused() -> None:
    def install() -> None:
        process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)
        seccomp.install(b"\0" * 16)

    with pytest.raises(OSError) as caught:
        in_child(install)
    assert caught.value.errno == errno.EINVAL
