"""What machines are made with: facilities of this host's kernel, and programs. Tried out where trying leaves nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from nagaya.errors import NagayaError
from nagaya.manager.criu import PROGRAM as CRIU
from nagaya.manager.criu import look_at_criu
from nagaya.manager.finding import LIMITED, MISSING, OK, Finding
from nagaya.static import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

MOUNTS = "/proc/self/mountinfo"
SECCOMP = "/proc/sys/kernel/seccomp/actions_avail"
TUN = "/dev/net/tun"
NO_UPPER = ("overlay", "nfs", "nfs4", "cifs", "smb3", "9p", "vfat", "exfat", "ntfs3", "fuse", "fuseblk", "ceph")
"""File systems that overlayfs cannot write to."""
VHOST = ("/dev/vhost-net", "/dev/vhost-vsock")
_ANSWER_BYTES = 4096
_TRIAL_BRIDGE, _TRIAL_ROOT = "trial", "/trial"


class Program(NamedTuple):
    """A program of another package, and what needs it."""

    name: str
    package: str
    gives: str
    without: str


PROGRAMS = (
    Program("dnsmasq", "dnsmasq-base", "machines find each other by name", "machines have no names for each other"),
    Program("mmdebstrap", "mmdebstrap", "'debian' images are made without a registry", "'debian' comes from a registry only"),
    Program("mkfs.erofs", "erofs-utils", "images become disks of virtual machines", "no virtual machine can be created"),
    Program("mke2fs", "e2fsprogs", "virtual machines get disks to write to", "no virtual machine can be created"),
    Program(
        "passt", "passt", "virtual machines can have user-mode networks, with published ports",
        "a plain user's machine of type kvm needs --network none, and emulated ones have QEMU's slower network",
    ),
    Program("swtpm", "swtpm", "whole machines can have a TPM", "--tpm is refused"),
    Program("tc", "iproute2", "--net-rate limits what machines receive", "--net-rate is refused"),
)  # fmt: skip


def look_at_facilities(root: str) -> list[Finding]:
    """All of them; `root` is the store's directory, which need not exist yet."""
    from nagaya.engines.vm.shares import find_program as find_virtiofsd

    return [
        look_at_overlay(root),
        look_at_reflinks(root),
        look_at_user_namespaces(),
        look_at_seccomp(),
        look_at_network(),
        look_at_forwarding(),
        look_at_foreign_firewall(),
        look_at_damage(root),
        look_at_bridge_filter(),
        look_at_tap(),
        look_at_ports(),
        look_at_agent(),
        *(look_at_program(program, find_program(program.name)) for program in PROGRAMS),
        look_at_program(
            Program(
                "virtiofsd", "qemu-system-common (Debian 12) or virtiofsd", "virtual machines get volumes and bind mounts",
                "virtual machines get copies of their volumes and bind mounts at each start",
            ),
            find_virtiofsd(),
        ),
        look_at_vhost(),
        look_at_criu(find_program(CRIU)),
    ]  # fmt: skip


def look_at_overlay(root: str) -> Finding:
    """Containers' roots; and the store's file system, which takes what they write."""
    from nagaya.kernel.mount import fsopen

    copies = "a container begins with a copy of its image: slower, and it takes the disk space again"
    how = "fsopen(2)"
    try:
        os.close(fsopen("overlay"))
    except OSError as error:
        if error.errno != errno.EPERM:
            hint = "; modprobe overlay"
            return Finding("overlayfs", MISSING, f"none: {os.strerror(error.errno or 0)}", how, copies + hint)
        how = "/proc/filesystems"
        if "\toverlay\n" not in _read(how):
            return Finding("overlayfs", MISSING, "not loaded", how, f"{copies}; modprobe overlay, as root")
    kind = find_file_system(root, _read(MOUNTS))
    how = f"{how}, {MOUNTS}"
    if kind.partition(".")[0] in NO_UPPER:
        follows = f"{copies}; choose a store on another file system with --root"
        return Finding("overlayfs", LIMITED, f"the store is on {kind}", how, follows)
    return Finding("overlayfs", OK, f"the store is on {kind}", how, "containers share their image's files")


def look_at_reflinks(root: str) -> Finding:
    """Whether copies of disks, for snapshots and forks, share their blocks."""
    from nagaya.kernel.reflink import clone

    place = os.path.realpath(root)
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    kind, how = find_file_system(root, _read(MOUNTS)), "FICLONE on two files without names"
    copies = "a snapshot copies what is on the disk, of type kvm before the machine stands, of others meanwhile; XFS and Btrfs need not"
    try:
        with _unnamed(place) as source, _unnamed(place) as target:
            source.write(b"x" * 4096)
            source.flush()
            shared = clone(source.fileno(), target.fileno())
    except OSError as error:
        return Finding("reflinks", LIMITED, f"cannot be tried: {os.strerror(error.errno or 0)}", how, copies)
    if shared:
        return Finding(
            "reflinks", OK, f"{kind} has them", how, "a snapshot of a disk takes no time and no room at first"
        )
    return Finding("reflinks", LIMITED, f"{kind} has none", how, copies)


def _unnamed(directory: str) -> BinaryIO:
    return open(os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), "w+b")


def find_file_system(path: str, mounts: str) -> str:
    """The type of the file system that has `path`, or would, by the text of mountinfo (proc_pid_mountinfo(5))."""
    path = os.path.realpath(path)
    found = (0, "unknown")
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        place = left.split()[4].replace("\\040", " ")
        # The last of equals: it lies on top of the others.
        if (path == place or path.startswith(f"{place.rstrip('/')}/")) and len(place) >= found[0]:
            found = (len(place), right.split()[0])
    return found[1]


def look_at_user_namespaces() -> Finding:
    """For --userns."""
    from nagaya.engines.container.userns import DEFAULT_BASE, OWNER, find_base
    from nagaya.kernel.namespaces import CLONE_NEWUSER, unshare

    topic, how = "user namespaces", "unshare(2), in a child"
    error, _ = _try(lambda: unshare(CLONE_NEWUSER))
    if error:
        follows = "--userns does not work; see user.max_user_namespaces and kernel.unprivileged_userns_clone in sysctl"
        return Finding(topic, MISSING, error, how, follows)
    base = find_base("0" * 32, _read("/etc/subuid"))
    where = f"no range of '{OWNER}' in /etc/subuid" if base == DEFAULT_BASE else "/etc/subuid"
    return Finding(
        topic, OK, f"host ids from {base} on", f"{how}; {where}", "--userns makes a machine's root nobody here"
    )


def look_at_seccomp() -> Finding:
    """Containers are filtered by default."""
    from nagaya.kernel.seccomp import LIBRARY, version

    if not _read(SECCOMP):
        return Finding(
            "seccomp", MISSING, "this kernel has no filters", SECCOMP,
            "containers need --security-opt seccomp=unconfined, and are less apart from this host",
        )  # fmt: skip
    try:
        found = version()
    except OSError:
        return Finding(
            "seccomp", MISSING, f"{LIBRARY} is not installed", "loading it",
            "apt install libseccomp2; until then containers need --security-opt seccomp=unconfined",
        )  # fmt: skip
    return Finding(
        "seccomp", OK, f"libseccomp {found}", f"{SECCOMP}, loading it", "system calls of containers are filtered"
    )


def look_at_network() -> Finding:
    """Root's bridge with its firewall, tried out in a network namespace that goes at once; a plain user's passt."""
    if os.geteuid():
        from nagaya.engines.vm.passt import PROGRAM, require_passt

        try:
            require_passt()
        except NagayaError as error:
            return Finding(
                "network", LIMITED, "no passt", "PATH", f"{error.hint}; emulated machines have QEMU's network"
            )
        return Finding("network", OK, PROGRAM, "PATH", "your virtual machines reach out, and nobody reaches in")
    refusal, hint = _try(_make_network)
    how = "a bridge and its nftables rules, in a network namespace of their own"
    if refusal:
        return Finding("network", MISSING, refusal, how, hint or "machines need --network none or --network host")
    return Finding("network", OK, "bridge and nftables", how, "machines have addresses, and reach out by this host's")


def _make_network() -> None:
    from nagaya.kernel.namespaces import CLONE_NEWNET, unshare
    from nagaya.kernel.netlink import Netlink
    from nagaya.net.firewall import rebuild

    unshare(CLONE_NEWNET)
    with Netlink() as netlink:
        netlink.add_bridge(_TRIAL_BRIDGE)
    rebuild(_TRIAL_ROOT, [("inet", "bridges", f'"{_TRIAL_BRIDGE}"')])


def look_at_forwarding() -> Finding:
    """Of packets between a bridge and the world."""
    from nagaya.net.planning import FORWARDING

    if _read(FORWARDING).strip() == "1":
        return Finding("forwarding", OK, "on", FORWARDING, "machines on the bridge reach out")
    if os.geteuid():
        return Finding("forwarding", OK, "off", FORWARDING, "a plain user's machines do without")
    if os.access(FORWARDING, os.W_OK):
        return Finding("forwarding", OK, "off", FORWARDING, "the first machine on the bridge switches it on")
    return Finding(
        "forwarding", MISSING, "off, and it cannot be written", FORWARDING,
        "machines on the bridge reach this host only; sysctl net.ipv4.ip_forward=1 where that is allowed",
    )  # fmt: skip


def look_at_foreign_firewall() -> Finding:
    """Others' nftables chains, iptables-nft's too: what one of them drops is dropped, whatever ours accept."""
    topic = "foreign firewall"
    if os.geteuid():
        return Finding(topic, OK, "not looked at", "only root may", "a plain user's machines are not forwarded")
    import subprocess  # lazy: 16 ms, and the doctor has the time

    how = "nft list chains"
    try:
        done = subprocess.run(
            [find_program("nft") or "nft", "list", "chains"], capture_output=True, text=True, check=False
        )
    except OSError:
        return Finding(topic, OK, "unknown, without nft", how, "")
    dropping = find_dropping_chains(done.stdout)
    if not dropping:
        return Finding(topic, OK, "none drops what is forwarded", how, "machines reach out")
    return Finding(
        topic, LIMITED, f"forwarding is dropped by {', '.join(dropping)}", how,
        "machines on bridges reach nothing beyond this host, unless it has rules for them: for iptables and Docker, "
        "iptables -I FORWARD -i nagaya+ -j ACCEPT and the same with -o",
    )  # fmt: skip


def look_at_damage(root: str) -> Finding:
    """What somebody has taken away of the networks that this store's machines use."""
    from nagaya.net.damage import find
    from nagaya.storage.paths import find_paths

    topic, how = (
        "networks in use",
        "their bridges, name servers and firewall, beside the plans of the machines that run",
    )
    try:
        found = find(find_paths(root))
    except (NagayaError, OSError) as error:
        return Finding(topic, LIMITED, f"cannot be looked at: {error}", how, "nagaya network ls may say more")
    if not found:
        return Finding(topic, OK, "nothing is missing", how, "machines that run are reached as they were planned")
    return Finding(topic, LIMITED, "; ".join(found), how, "nagaya network ls makes it again, as does the next start")


def find_dropping_chains(text: str) -> list[str]:
    """Of "nft list chains": the chains at the forward hook whose policy is to drop, but for ours."""
    found, table, chain = [], "", ""
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["table"] and len(words) > 2:
            table = f"{words[1]} {words[2]}"
        elif words[:1] == ["chain"] and len(words) > 1:
            chain = words[1]
        elif "hook forward" in line and "policy drop" in line and not table.split()[-1].startswith("nagaya"):
            found.append(f"{table} {chain}")
    return found


def look_at_bridge_filter() -> Finding:
    """br_netfilter shows frames between two ports of one bridge to iptables, as though they were forwarded."""
    path = "/proc/sys/net/bridge/bridge-nf-call-iptables"
    topic = "bridge filter"
    if _read(path).strip() != "1":
        return Finding(topic, OK, "off", path, "machines of one network reach each other whatever iptables says")
    return Finding(
        topic, LIMITED, "on (br_netfilter)", path,
        "iptables' forward chain judges frames between machines of one network too; sysctl net.bridge.bridge-nf-call-iptables=0",
    )  # fmt: skip


def look_at_tap() -> Finding:
    """Links of virtual machines on the bridge."""
    how = f"opening {TUN}"
    try:
        os.close(os.open(TUN, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        follows = "virtual machines have no bridge network; modprobe tun, as root"
        return Finding("tap devices", MISSING, os.strerror(error.errno or 0), how, follows)
    if os.geteuid():
        return Finding(
            "tap devices", OK, TUN, how, "only root's machines are on the bridge; yours have networks of their own"
        )
    return Finding("tap devices", OK, TUN, how, "virtual machines are on the bridge too")


def look_at_ports() -> Finding:
    """What may be published: all ports by root, those from a first one on by others."""
    from nagaya.net.ports import UNPRIVILEGED

    first = _read(UNPRIVILEGED).strip() or "1024"
    how = UNPRIVILEGED
    try:
        _hold_port()
    except (NagayaError, OSError) as error:
        return Finding("ports", MISSING, str(error), "holding one", "no port can be published; bring loopback up")
    if os.geteuid() == 0 or first == "0":
        return Finding("ports", OK, "all of them", how, "-p publishes them on loopback, or the address that it names")
    return Finding("ports", LIMITED, f"from {first} on", how, "-p takes these; lower ones are root's")


def _hold_port() -> None:
    from nagaya.model.spec import PortMapping
    from nagaya.net import ports

    ports.release(ports.hold((PortMapping("", 0, 1),)))


def look_at_agent() -> Finding:
    """What every machine begins with."""
    from nagaya.engines.vm.agent import agent_path
    from nagaya.kernels.architectures import ARCHITECTURES

    path, host = agent_path(), os.uname().machine
    if not os.access(path, os.X_OK):
        return Finding(
            "agent", MISSING, "not built", path, "no machine can start; run 'make agent', or install the package again"
        )
    others = [name for name in ARCHITECTURES if name != host and os.access(agent_path(name), os.R_OK)]
    return Finding("agent", OK, ", ".join((host, *others)), path, "machines for these CPUs can start")


def find_program(name: str) -> str:
    """The path of a program in the PATH, or where only root's has one; "" when there is none."""
    for directory in f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin".split(":"):
        if directory and os.access(f"{directory}/{name}", os.X_OK):
            return f"{directory}/{name}"
    return ""


def look_at_program(program: Program, path: str) -> Finding:
    if not path:
        follows = f"{program.without}; apt install {program.package}"
        return Finding(program.name, MISSING, "not installed", "PATH, /usr/sbin", follows)
    return Finding(program.name, OK, path, "PATH, /usr/sbin", program.gives)


def look_at_vhost() -> Finding:
    """Devices that live in the host's kernel. Nobody has to have them: see `virtio.vhost_net`."""
    found = [path for path in VHOST if os.access(path, os.R_OK | os.W_OK)]
    follows = "Nagaya's own devices move what machines of type kvm send and receive"
    if VHOST[0] in found:
        follows = "the kernel moves what machines of type kvm send and receive on a bridge"
    return Finding("vhost", OK if found else MISSING, ", ".join(found) or "none", ", ".join(VHOST), follows)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _try(call: Callable[[], None]) -> tuple[str, str]:
    """Run it in a child, whose namespaces go with it: what it failed with and what to do about that, or two times ""."""
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.write(theirs, "\n".join(_run(call)).encode(errors="replace")[:_ANSWER_BYTES])
        finally:
            os._exit(0)
    os.close(theirs)
    try:
        answer = os.read(ours, _ANSWER_BYTES)
    finally:
        os.close(ours)
        os.waitpid(pid, 0)
    if not answer:
        return "the trial ended without an answer", ""
    error, _, hint = answer.decode(errors="replace").partition("\n")
    return error, hint


def _run(call: Callable[[], None]) -> tuple[str, str]:
    try:
        call()
    except NagayaError as error:
        return error.message, error.hint
    except OSError as error:
        return str(error.strerror or error), ""
    return "", ""
