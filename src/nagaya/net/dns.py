"""Names and DHCP: a dnsmasq for each network, which runs while machines of the network do.

Nobody watches it: who starts a machine, or looks at networks, starts it again if it was killed. Its files are below
/run/nagaya-names/BRIDGE, where the user that it becomes can read them; it sees changes by inotify.

    pid                  its own; believed only of a process that has our arguments and sees our network
    pid-PORT             of a further one, which asks the servers that machines were given by --dns; the firewall leads
                         these machines' questions there
    hosts/ID             names of a machine, as in /etc/hosts
    dhcp/ID              "MAC,ADDRESS,[ADDRESS6],name" of a machine, for one that asks by DHCP
    servers              who answers for the domains of other networks, for machines that are on these too
"""

from __future__ import annotations

import os
import signal
import zlib

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
LEAST_MTU6 = 1280  # RFC 8200, 5
LEAST_PREFIX6 = 64  # of dnsmasq's
ADVERTISE_S = 600
ROUTER_LIFETIME_S = 1800
FIRST_PORT, PORTS = 20000, 10000  # below those that the kernel gives to clients


def directory(bridge: str) -> str:
    return f"{DIRECTORY}/{bridge}"


def domain(network: str) -> str:
    """Where a network's names are, beside that its own machines find them without it."""
    return f"{network}.{DOMAIN}"


def arguments(record: NetworkRecord, bridge: str, mtu: int, *, resolvers: tuple[str, ...]) -> list[str]:
    """dnsmasq's command line. `resolvers` replace the host's own; an internal network has none at all."""
    argv = [
        *_common_arguments(record, bridge, 0), "--dhcp-ignore=tag:!known", f"--dhcp-hostsdir={directory(bridge)}/dhcp",
        "--leasefile-ro", "--quiet-dhcp",
    ]  # fmt: skip
    if record.internal or resolvers:
        argv += ["--no-resolv", *(f"--server={server}" for server in resolvers if not record.internal)]
    if record.subnet:
        subnet = parse_subnet(record.subnet)
        mask = format_address((1 << 32) - subnet.size, 4)
        argv += [
            f"--dhcp-range={subnet.address(0)},static,{mask},1h", "--dhcp-authoritative",
            f"--dhcp-option=option:mtu,{mtu}", f"--dhcp-option=option:dns-server,{record.gateway}",
            "--dhcp-option=option:router" + ("" if record.internal else f",{record.gateway}"),
        ]  # fmt: skip
    if record.gateway6 and mtu >= LEAST_MTU6 and parse_subnet(record.subnet6).prefix >= LEAST_PREFIX6:
        # "static" has the advertisements say that addresses come by DHCPv6: the firewall knows of no other ones.
        subnet = parse_subnet(record.subnet6)
        argv += [
            f"--dhcp-range={subnet.address(0)},static,{subnet.prefix},1h", "--enable-ra",
            f"--ra-param={bridge},mtu:{mtu},{ADVERTISE_S},{0 if record.internal else ROUTER_LIFETIME_S}",
            f"--dhcp-option=option6:dns-server,[{record.gateway6}]",
        ]  # fmt: skip
    return argv


def further_arguments(record: NetworkRecord, bridge: str, servers: tuple[str, ...]) -> list[str]:
    """The command line of one that knows the same names, and asks other servers for all others."""
    asked = (f"--server={server}" for server in servers)
    return [*_common_arguments(record, bridge, port_of(servers)), "--no-resolv", *asked]


def _common_arguments(record: NetworkRecord, bridge: str, port: int) -> list[str]:
    place = directory(bridge)
    return [
        PROGRAM, "--conf-file=/dev/null", f"--user={USER}", f"--pid-file={_pid_file(bridge, port)}",
        *((f"--port={port}",) if port else ()),
        f"--interface={bridge}", "--except-interface=lo", "--bind-interfaces",
        f"--servers-file={place}/servers", f"--local=/{domain(record.name)}/",
        "--no-hosts", f"--hostsdir={place}/hosts", "--domain-needed", "--bogus-priv", "--cache-size=1000",
        f"--host-record={HOST_NAME},{','.join(filter(None, (record.gateway, record.gateway6)))}",
    ]  # fmt: skip


def port_of(servers: tuple[str, ...]) -> int:
    """Where the one that asks these servers listens; 0 = for none, so at the port that everybody asks."""
    return FIRST_PORT + zlib.crc32(" ".join(servers).encode()) % PORTS if servers else 0


def _pid_file(bridge: str, port: int) -> str:
    return f"{directory(bridge)}/pid-{port}" if port else f"{directory(bridge)}/pid"


def find(bridge: str, port: int = 0) -> int:
    """A pidfd of the network's dnsmasq, or -1 when none runs."""
    path = _pid_file(bridge, port)
    try:
        with open(path, encoding="utf-8") as file:
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


def _find_all(bridge: str) -> list[int]:
    """Pidfds of all that the network has."""
    try:
        names = os.listdir(directory(bridge))
    except FileNotFoundError:
        return []
    ports = [int(word) for name in names if name.startswith("pid-") and (word := name[4:]).isdecimal()]
    return [fd for port in (0, *ports) if (fd := find(bridge, port)) >= 0]


def is_running(bridge: str, port: int = 0) -> bool:
    fd = find(bridge, port)
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


def start_further(record: NetworkRecord, bridge: str, servers: tuple[str, ...]) -> programs.Started | None:
    """The same for the one that asks `servers`."""
    if not servers or is_running(bridge, port_of(servers)):
        return None
    make_directories(bridge)
    return programs.start(further_arguments(record, bridge, servers))


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
    for fd in _find_all(bridge):
        _signal(fd, signal.SIGHUP)


def write_names(machine_id: str, link: LinkPlan) -> None:
    """Tell a machine's names and its address for DHCP."""
    make_directories(link.bridge)
    place = directory(link.bridge)
    names = " ".join((*link.names, *(f"{name}.{domain(link.network)}" for name in link.names)))
    lines = [f"{address} {names}\n" for address in (link.address, link.address6) if address]
    _write(place, "hosts", machine_id, "".join(lines))
    own = [link.address] if link.address else []
    own += [f"[{link.address6}]"] if link.address6 else []
    _write(place, "dhcp", machine_id, ",".join((link.mac, *own, machine_id[:12])) + "\n")


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
    for fd in _find_all(bridge):
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
