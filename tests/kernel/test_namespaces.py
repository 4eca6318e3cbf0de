"""The bindings of unshare, setns, prctl, capset and execveat, each in a child of its own."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from nagaya.kernel import capabilities, namespaces, process
from nagaya.kernel.libc import SYS_KEYCTL, libc
from tests.kernel.forked import in_child

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and capabilities take root")


def namespace(kind: str) -> str:
    return os.readlink(f"/proc/self/ns/{kind}")


@pytest.mark.parametrize(
    ("flag", "kind"),
    [
        (namespaces.CLONE_NEWNS, "mnt"), (namespaces.CLONE_NEWUTS, "uts"), (namespaces.CLONE_NEWIPC, "ipc"),
        (namespaces.CLONE_NEWNET, "net"), (namespaces.CLONE_NEWCGROUP, "cgroup"), (namespaces.CLONE_NEWUSER, "user"),
        (namespaces.CLONE_NEWPID, "pid_for_children"),
    ],
)  # fmt: skip
def test_unshare_and_the_way_back(flag: int, kind: str) -> None:
    before = namespace(kind)

    def there_and_back() -> tuple[str, str]:
        ours = os.open(f"/proc/self/ns/{kind.removesuffix('_for_children')}", os.O_RDONLY)
        namespaces.unshare(flag)
        # A PID namespace shows only when it has its first process.
        other = namespace(kind) if flag != namespaces.CLONE_NEWPID else in_child(lambda: str(os.getpid()))
        if flag != namespaces.CLONE_NEWUSER:  # out of a user namespace there is no way
            namespaces.setns(ours, flag)
        return other, namespace(kind)

    other, after = in_child(there_and_back)
    assert other not in ("", before)
    if flag == namespaces.CLONE_NEWPID:
        assert other == "1"
    if flag != namespaces.CLONE_NEWUSER:
        assert after == before
    assert namespace(kind) == before


def test_a_refusal_names_the_call() -> None:
    with pytest.raises(OSError, match="unshare: Invalid argument") as caught:
        namespaces.unshare(0x1)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="setns: Bad file descriptor"):
        namespaces.setns(-1, 0)


def test_the_host_name_stays_in_its_namespace() -> None:
    before = os.uname().nodename

    def rename() -> str:
        namespaces.unshare(namespaces.CLONE_NEWUTS)
        namespaces.sethostname("somewhere-else")
        return os.uname().nodename

    assert in_child(rename) == "somewhere-else"
    assert os.uname().nodename == before


def test_capability_sets_are_what_proc_shows() -> None:
    shown = dict(
        line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Cap")
    )
    sets = capabilities.get_sets()
    assert [sets.effective, sets.permitted, sets.inheritable] == [
        int(shown[name], 16) for name in ("CapEff", "CapPrm", "CapInh")
    ]
    assert capabilities.bounding_set() == int(shown["CapBnd"], 16)


def test_the_bounding_set_is_limited_for_good() -> None:
    keep = capabilities.mask(("CHOWN", "KILL"))

    def limit() -> tuple[int, str]:
        capabilities.limit_bounding_set(keep)
        read, write = os.pipe()
        if os.fork() == 0:
            os.dup2(write, 1)
            os.execv("/bin/grep", ["grep", "CapPrm", "/proc/self/status"])
        os.wait()
        return capabilities.bounding_set(), os.read(read, 100).decode()

    bounding, permitted = in_child(limit)
    assert bounding == keep & capabilities.bounding_set()
    assert int(permitted.split()[1], 16) == bounding  # root gains no more than that by executing


def test_inheritable_and_ambient_capabilities_go() -> None:
    bit = capabilities.mask(("CHOWN",))

    def drop() -> tuple[capabilities.Sets, str]:
        capabilities.set_sets(capabilities.get_sets()._replace(inheritable=bit))
        libc.prctl(process.PR_CAP_AMBIENT, 2, 0, 0, 0)  # PR_CAP_AMBIENT_RAISE CHOWN
        before = Path("/proc/self/status").read_text()
        assert f"CapAmb:\t{bit:016x}" in before and f"CapInh:\t{bit:016x}" in before
        capabilities.drop_inheritable()
        return capabilities.get_sets(), Path("/proc/self/status").read_text()

    sets, status = in_child(drop)
    assert sets.inheritable == 0 and sets.permitted & bit
    assert "CapAmb:\t0000000000000000" in status


def test_a_sealed_copy_cannot_be_changed_and_can_be_executed(tmp_path: Path) -> None:
    fd = process.sealed_copy("/bin/true")
    try:
        assert os.pread(fd, 1 << 20, 0) == Path("/bin/true").read_bytes()
        for change in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 0), lambda: os.ftruncate(fd, 1 << 21)):
            with pytest.raises(PermissionError):
                change()
        writable = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)  # as root may: the seal is what holds
        with pytest.raises(PermissionError):
            os.write(writable, b"x")
        os.close(writable)
        pid = os.fork()
        if pid == 0:
            try:
                process.execute_fd(fd, ["true"], [])
            finally:
                os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        os.close(fd)


def test_what_cannot_be_executed_raises(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")
    (tmp_path / "text").chmod(0o755)
    fd = os.open(tmp_path / "text", os.O_RDONLY)
    with pytest.raises(OSError, match="execveat") as caught:
        process.execute_fd(fd, ["text"], [])
    os.close(fd)
    assert caught.value.errno == errno.ENOEXEC


def test_a_new_session_keyring_is_not_the_old_one() -> None:
    def session() -> int:
        found: int = libc.syscall(SYS_KEYCTL, 0, -3, 0)  # KEYCTL_GET_KEYRING_ID, the session's
        return found

    def fresh() -> int:
        process.new_session_keyring()
        return session()

    if session() < 0:
        in_child(process.new_session_keyring)  # a kernel without keys: nothing to do, and no error
        pytest.skip("this kernel has no keys")
    assert in_child(fresh) > 0
    assert in_child(fresh) != session()


def test_a_child_subreaper_inherits_orphans() -> None:
    def adopt() -> int:
        process.prctl(process.PR_SET_CHILD_SUBREAPER, 1)
        outer = os.fork()
        if outer == 0:
            if os.fork() == 0:
                signal.pause()
            os._exit(0)
        os.waitpid(outer, 0)
        (orphan,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        os.kill(int(orphan), signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(int(orphan), 0)[1])

    assert in_child(adopt) == -signal.SIGKILL
