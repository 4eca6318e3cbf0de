"""Running another CPU's programs while a system for it is being made: QEMU's user-mode emulator, told to the kernel.

The kernel starts an emulator for programs that binfmt_misc names. Since Linux 6.7 each user namespace can have a binfmt_misc
of its own: nothing that this host runs changes, and nothing stays behind. Where that is not to be had, what the host itself
has registered will do.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nagaya.errors import HostError, Unsupported
from nagaya.kernel import mount, namespaces, unix
from nagaya.kernel.process import die_with
from nagaya.static import NoReturn

BINFMT = "/proc/sys/fs/binfmt_misc"
_PLACES = ("/usr/bin", "/usr/local/bin")
_MACHINES = {"aarch64": 183, "riscv64": 243}  # e_machine (elf.h)
_IDS = 65536
Enter = Callable[[], None]


def find_emulator(architecture: str) -> str:
    """The static emulator for a CPU, by uname(2)'s word. Raises `Unsupported`."""
    for place in _PLACES:
        path = f"{place}/qemu-{architecture}-static"
        if architecture in _MACHINES and os.access(path, os.X_OK):
            return path
    raise Unsupported(
        f"this host runs no programs for {architecture}",
        hint="as root: apt-get install qemu-user-static",
        finding=f"qemu-{architecture}-static was looked for in {', '.join(_PLACES)}",
    )


def plan_rule(architecture: str, emulator: str) -> bytes:
    """The line for binfmt_misc's `register`: a 64-bit ELF program or shared object for that machine (gABI, chapter 4).

    F opens the emulator at once, so that it is found inside a root that has none; C keeps what set-user-id means.
    """
    machine = _MACHINES[architecture].to_bytes(2, "little")
    magic = b"\x7fELF\x02\x01\x01\x00" + bytes(8) + b"\x02\x00" + machine
    mask = b"\xff" * 7 + b"\x00" + b"\xff" * 8 + b"\xfe\xff\xff\xff"

    def escaped(raw: bytes) -> bytes:
        return b"".join(b"\\x%02x" % byte for byte in raw)

    return b":nagaya-%s:M::%s:%s:%s:OCF" % (architecture.encode(), escaped(magic), escaped(mask), emulator.encode())


@contextmanager
def foreign_programs(architecture: str) -> Iterator[Enter]:
    """What a child has to call before it executes a program that is, or starts, one for `architecture`. Needs root.

    A process holds the namespaces while the context lasts, and dies with us. Raises `Unsupported`, `HostError`.
    """
    emulator = find_emulator(architecture)
    ours, theirs = unix.socket_pair()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        _hold(theirs, parent, plan_rule(architecture, emulator))
    os.close(theirs)
    pidfd = os.pidfd_open(pid)
    try:
        said = _map_ids(ours, pid)
        if said == b"2":
            yield lambda: namespaces.setns(pidfd, namespaces.CLONE_NEWUSER | namespaces.CLONE_NEWNS)
        elif os.path.exists(f"{BINFMT}/qemu-{architecture}"):
            yield lambda: None
        else:
            raise Unsupported(
                f"this host's kernel keeps emulators for all of it alone, and has none for {architecture}",
                hint="as root: apt-get install binfmt-support qemu-user-static; or use Linux 6.7 or newer",
            )
    finally:
        os.close(ours)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(pidfd)


def _map_ids(ours: int, pid: int) -> bytes:
    """Every id is itself in there: what is made has the owners that it should. The last word of the process."""
    if os.read(ours, 1) != b"1":
        return b""
    try:
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{pid}/{name}", "w", encoding="ascii") as file:
                file.write(f"0 0 {_IDS}\n")
    except OSError as error:
        raise HostError.from_os(error, "cannot make a user namespace") from None
    os.write(ours, b"1")
    return os.read(ours, 1)


def _hold(socket: int, parent: int, rule: bytes) -> NoReturn:
    """In the child; never returns."""
    try:
        die_with(parent)
        namespaces.unshare(namespaces.CLONE_NEWUSER | namespaces.CLONE_NEWNS)
        os.write(socket, b"1")
        if os.read(socket, 1) != b"1":
            os._exit(1)
        mount.mount("binfmt_misc", BINFMT, "binfmt_misc")
        with open(f"{BINFMT}/register", "wb", buffering=0) as file:
            file.write(rule)
        os.write(socket, b"2")
        os.read(socket, 1)  # until our parent has no more use for us
    finally:
        os._exit(1)
