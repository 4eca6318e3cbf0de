"""Names and DHCP: a dnsmasq for each network, which runs while machines of the network do.

Nobody watches it: who starts a machine, or looks at networks, starts it again if it was killed. Its files are below
/run/nagaya-names/BRIDGE, where the user that it becomes can read them; it sees changes by inotify.

    pid                  its own; believed only of a process that has our arguments and sees our network
    hosts/ID             names of a machine, as in /etc/hosts
    dhcp/ID              "MAC,ADDRESS,name" of a machine, for one that asks by DHCP
    servers              who answers for the domains of other networks, for machines that are on these too
"""

from __future__ import annotations

import os
import signal

from nagaya.net import programs
from nagaya.net.names import FALLBACK_DNS, has_nameserver
from nagaya.net.networks import NetworkRecord
from nagaya.net.plan import LinkPlan
from nagaya.net.subnets import format_address, parse_subnet
from nagaya.storage.paths import make_directory
from nagaya.storage.tree import remove_tree

PROGRAM = "dnsmasq"
DIRECTORY = "/run/nagaya-names"  # not below /run/nagaya, which is closed to the user that dnsmasq becomes
DOMAIN = "nagaya.internal"
HOST_NAME = f"host.{DOMAIN}"
USER = "nobody"


def directory(bridge: str) -> str:
    return f"{DIRECTORY}/{bridge}"


def domain(network: str) -> str:
    """Where a network's names are, beside that its own machines find them without it."""
    return f"{network}.{DOMAIN}"


def arguments(record: NetworkRecord, bridge: str, mtu: int, *, resolvers: tuple[str, ...]) -> list[str]:
    """dnsmasq's command line. `resolvers` replace the host's own; an internal network has none at all."""
    place = directory(bridge)
    argv = [
        PROGRAM, "--conf-file=/dev/null", f"--user={USER}", f"--pid-file={place}/pid",
        f"--interface={bridge}", "--except-interface=lo", "--bind-interfaces",
        f"--servers-file={place}/servers", f"--local=/{domain(record.name)}/",
        "--no-hosts", f"--hostsdir={place}/hosts", f"--dhcp-hostsdir={place}/dhcp",
        "--domain-needed", "--bogus-priv", "--cache-size=1000", "--leasefile-ro", "--quiet-dhcp",
        f"--host-record={HOST_NAME},{','.join(filter(None, (record.gateway, record.gateway6)))}",
    ]  # fmt: skip
    if record.internal or resolvers:
        argv += ["--no-resolv", *(f"--server={server}" for server in resolvers if not record.internal)]
    if record.subnet:
        subnet = parse_subnet(record.subnet)
        mask = format_address((1 << 32) - subnet.size, 4)
        argv += [
            f"--dhcp-range={subnet.address(0)},static,{mask},1h", "--dhcp-ignore=tag:!known", "--dhcp-authoritative",
            f"--dhcp-option=option:mtu,{mtu}", f"--dhcp-option=option:dns-server,{record.gateway}",
            "--dhcp-option=option:router" + ("" if record.internal else f",{record.gateway}"),
        ]  # fmt: skip
    return argv


def find(bridge: str) -> int:
    """A pidfd of the network's dnsmasq, or -1 when none runs."""
    path = f"{directory(bridge)}/pid"
    try:
        with open(path, encoding="ascii") as file:
            pid = int(file.read())
        fd = os.pidfd_open(pid)
    except (OSError, ValueError):
        return -1
    try:
        # Read after the descriptor was opened: should the number have become another process's in between, then that
        # is a process which the descriptor does not mean, and to which nothing can happen by it.
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            ours = f"--pid-file={path}".encode() in file.read().split(b"\0")
        if ours and os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino:
            return fd
    except OSError:
        pass  # it has just ended
    os.close(fd)
    return -1


def is_running(bridge: str) -> bool:
    fd = find(bridge)
    if fd >= 0:
        os.close(fd)
    return fd >= 0


def is_installed() -> bool:
    try:
        programs.find(PROGRAM)
    except FileNotFoundError:
        return False
    return True


def start(record: NetworkRecord, bridge: str, mtu: int) -> programs.Started | None:
    """Start the network's dnsmasq, unless one runs. `finish` tells what came of it. Raises `FileNotFoundError`."""
    if is_running(bridge):
        return None
    make_directories(bridge)
    resolvers = () if has_nameserver(_host_resolv_conf()) else FALLBACK_DNS
    return programs.start(arguments(record, bridge, mtu, resolvers=resolvers))


def finish(started: programs.Started) -> str:
    """Until it answers: "", or why it does not. (Its first process ends when its sockets are bound.)"""
    ended = programs.finish(started)
    return "" if ended.status == 0 else (ended.text.splitlines() or [f"status {ended.status}"])[-1]


def make_directories(bridge: str) -> None:
    for name in ("hosts", "dhcp"):
        make_directory(f"{directory(bridge)}/{name}", 0o755)
    if not os.path.exists(f"{directory(bridge)}/servers"):
        _replace(f"{directory(bridge)}/servers", f"{directory(bridge)}/servers.tmp", "")


def add_servers(bridge: str, others: list[tuple[str, str]]) -> None:
    """Let the network's name server ask those of other networks: (network, its gateway)."""
    make_directories(bridge)
    path = f"{directory(bridge)}/servers"
    with open(path, encoding="utf-8") as file:
        before = file.read().splitlines()
    lines = dict.fromkeys(before) | dict.fromkeys(f"server=/{domain(name)}/{gateway}" for name, gateway in others)
    if list(lines) != before:
        _replace(path, f"{path}.tmp", "".join(f"{line}\n" for line in lines))
        _hang_up(bridge)


def _hang_up(bridge: str) -> None:
    """Have dnsmasq read again what it does not watch."""
    fd = find(bridge)
    if fd >= 0:
        _signal(fd, signal.SIGHUP)


def write_names(machine_id: str, link: LinkPlan) -> None:
    """Tell a machine's names and its address for DHCP."""
    make_directories(link.bridge)
    place = directory(link.bridge)
    names = " ".join((*link.names, *(f"{name}.{domain(link.network)}" for name in link.names)))
    lines = [f"{address} {names}\n" for address in (link.address, link.address6) if address]
    _write(place, "hosts", machine_id, "".join(lines))
    if link.address:
        _write(place, "dhcp", machine_id, f"{link.mac},{link.address},{machine_id[:12]}\n")


def _write(place: str, name: str, machine_id: str, text: str) -> None:
    """Moved in whole: dnsmasq reads whatever it sees there."""
    _replace(f"{place}/{name}/{machine_id}", f"{place}/{machine_id}.tmp", text)


def _replace(path: str, temporary: str, text: str) -> None:
    with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(text)
    os.rename(temporary, path)


def remove_names(machine_id: str, bridge: str) -> None:
    place = directory(bridge)
    for name in ("hosts", "dhcp"):
        try:
            os.unlink(f"{place}/{name}/{machine_id}")
        except FileNotFoundError:
            continue
    _hang_up(bridge)  # of DHCP's directory it takes note of what comes alone


def machines_of(bridge: str) -> set[str]:
    """Ids of the machines that names are told of."""
    try:
        return set(os.listdir(f"{directory(bridge)}/hosts"))
    except FileNotFoundError:
        return set()


def stop(bridge: str) -> None:
    """End the network's dnsmasq and remove its files."""
    fd = find(bridge)
    if fd >= 0:
        _signal(fd, signal.SIGTERM)
    remove_tree(directory(bridge))


def _signal(fd: int, number: int) -> None:
    try:
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        pass
    finally:
        os.close(fd)


def _host_resolv_conf() -> str:
    try:
        with open("/etc/resolv.conf", encoding="utf-8", errors="replace") as file:
            return file.read(64 << 10)
    except OSError:
        return ""
