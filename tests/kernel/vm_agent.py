"""The agent as a virtual machine's first program, in namespaces: what a fuzzer can start forty times a second.

The agent is the real one with the compiler's checks; `vm_doubles.c` stands in for what a guest kernel alone has. Its root is
nobody on the host, in a user namespace, so that whatever a mutated SETUP says stays in there: the kernel's own settings, clock
and power are out of its reach. Not covered: finding the host's port and loading modules, which no frame decides.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import subprocess
from pathlib import Path

from nagaya.kernel import mount, namespaces
from nagaya.kernel.netlink import (
    IFLA_ADDRESS,
    IFLA_IFNAME,
    IFLA_INFO_KIND,
    IFLA_LINKINFO,
    NLM_F_CREATE,
    RTM_NEWLINK,
    Netlink,
    attribute,
    text,
)  # fmt: skip
from tests.kernel.agent_machine import Host, Machine, build_agent

PLACE = "/mnt"  # in a mount namespace of its own: any directory that nobody's root may enter
MAC = "02:00:00:00:00:07"
HERE = Path(__file__).parent
WRAPPED = ("vm_start", "mount", "opendir", "vm_read_line", "vm_await", "ioctl", "syscall", "mkdirat", "mknodat", "mknod",
           "clock_settime", "sync")  # fmt: skip
SEPARATE = (
    namespaces.CLONE_NEWNS | namespaces.CLONE_NEWPID | namespaces.CLONE_NEWNET | namespaces.CLONE_NEWUTS
    | namespaces.CLONE_NEWIPC | namespaces.CLONE_NEWCGROUP
)  # fmt: skip
_IFINFO = struct.Struct("=BxHiII")


def build_vm_agent(place: Path) -> str:
    """The checked agent, linked with the doubles."""
    build_agent(checked=True)  # skips where it cannot be built
    extra = " ".join([str(HERE / "vm_doubles.c"), *(f"-Wl,--wrap={name}" for name in WRAPPED)])
    command = ["make", "-s", "-C", str(HERE.parent.parent / "guest"), "asan", f"BUILD={place}", f"EXTRA={extra}"]
    subprocess.run(command, check=True, timeout=120)
    return str(place / "nagaya-agent-asan")


def make_initramfs(place: str) -> None:
    """What stands beside the agent: the initramfs's directories, a few devices, and what the doubles show as hardware."""
    mount.mount("none", place, "tmpfs", 0, "mode=755")
    doubles = f"{place}/doubles"
    for name in ("usr", "proc", "sys", "dev", "lower", "data", "root", "files", "shares", "host",
                 *(f"doubles/{part}" for part in ("image/bin", "image/etc", "image/var/lib", "image/locked", "share/directory",
                                                  "groups", "block/vda", "block/vdb", "block/loop0"))):  # fmt: skip
        os.makedirs(f"{place}/{name}")
    for name in ("bin", "lib", "lib64", "sbin"):  # the agent's own libraries; the machine has busybox
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), f"{place}/{name}")
    mount.mount("/usr", f"{place}/usr", "", mount.MS_BIND | mount.MS_REC)
    for name in ("null", "zero", "urandom"):
        Path(f"{place}/dev/{name}").touch()
        mount.mount(f"/dev/{name}", f"{place}/dev/{name}", "", mount.MS_BIND)
    for name, serial in (("vda", "root"), ("vdb", "data"), ("loop0", "")):
        Path(f"{doubles}/block/{name}/serial").write_text(f"{serial}\n")
        with open(f"{place}/dev/{name}", "wb") as disk:
            disk.write(bytes(1024) + b"\xff" * 1024)
    Path(f"{doubles}/groups/cgroup.subtree_control").touch()
    image = f"{doubles}/image"
    shutil.copy("/bin/busybox", f"{image}/bin/busybox")
    for name in ("sh", "cat", "true", "sleep", "seq"):
        os.link(f"{image}/bin/busybox", f"{image}/bin/{name}")
    Path(f"{image}/etc/passwd").write_text("root:x:0:0::/:/bin/sh\nbob:x:7:7::/:/bin/sh\n")
    for link, target in (("etc/resolv.conf", "../run/resolv.conf"), ("to-proc", "/proc"), ("loop", "loop"), ("a", "b/b"),
                         ("up", "../../../.."), ("long", "/n" * 1900), ("var/run", "/run"), ("many", "many/many")):  # fmt: skip
        os.symlink(target, f"{image}/{link}")
    Path(f"{doubles}/share/single").write_text("of the host\n")
    os.symlink("/etc/passwd", f"{doubles}/share/link")
    os.mkfifo(f"{doubles}/share/fifo")


class VmMachine(Machine):
    """The host's end of one; `log` takes what the sanitizers say."""

    def __init__(self, agent: str, userns: int, log: str) -> None:
        ours, theirs = socket.socketpair()
        Host.__init__(self, ours)
        self._outer = os.fork()
        if self._outer == 0:
            try:
                self._socket.close()
                _outer(agent, theirs.detach(), userns, log)
            except BaseException as error:
                os.write(2, f"vm_agent: {error!r}\n".encode())
            finally:
                os._exit(99)
        theirs.close()
        self.pidfd = os.pidfd_open(self._outer)


def _outer(agent: str, stream: int, userns: int, log: str) -> None:
    """In the forked child: nobody's root, then a machine's namespaces, then PID 1, and tell how that ended."""
    os.setsid()
    program = fcntl.fcntl(os.open(agent, os.O_RDONLY), fcntl.F_DUPFD_CLOEXEC, 40)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    namespaces.setns(userns, namespaces.CLONE_NEWUSER)
    os.setgid(0)
    os.setuid(0)
    os.setgroups([])
    namespaces.unshare(SEPARATE)
    inner = os.fork()
    if inner:
        os.close(stream)
        _, status = os.waitpid(inner, 0)
        os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
    mount.mount("", "/", "", mount.MS_PRIVATE | mount.MS_REC)
    make_initramfs(PLACE)
    mount.mount("proc", f"{PLACE}/proc", "proc", 0)
    mount.mount("sysfs", f"{PLACE}/sys", "sysfs", mount.MS_RDONLY)
    add_link()
    enter_root(PLACE)
    os.dup2(output, 2)
    os.dup2(output, 1)
    os.dup2(stream, 3, inheritable=True)
    os.execve(program, ["/init"], os.environ)


def enter_root(place: str) -> None:
    os.chdir(place)
    mount.pivot_root(".", "host")
    os.chdir("/")
    mount.umount("/host", 2)  # MNT_DETACH
    os.rmdir("/host")


def add_link() -> None:
    """A network card, as far as the agent can tell."""
    with Netlink() as netlink:
        info = attribute(IFLA_LINKINFO, attribute(IFLA_INFO_KIND, b"veth"))
        mac = attribute(IFLA_ADDRESS, bytes.fromhex(MAC.replace(":", "")))
        body = _IFINFO.pack(0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, text("card0")) + mac + info
        netlink.request(RTM_NEWLINK, NLM_F_CREATE, body, "make a link")
