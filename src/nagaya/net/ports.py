"""Taking a machine's published ports on this host: the sockets are bound before anything of it starts, and held.

What cannot be had is refused then, with who has it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable

from nagaya.errors import Conflict, HostError, NagayaError, Unsupported
from nagaya.kernel import inet
from nagaya.model.spec import PortMapping
from nagaya.static import NamedTuple

LOOPBACK = ("127.0.0.1", "::1")
UNPRIVILEGED = "/proc/sys/net/ipv4/ip_unprivileged_port_start"
_TRIES = 64
_NO_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

FindHolder = Callable[[str, str, int], str]  # (protocol, address, port) -> who has it, as part of a sentence, or ""


class HeldPort(NamedTuple):
    """A published port and its sockets, one for each of the host's addresses; `mapping.host_port` is the real one."""

    mapping: PortMapping
    sockets: tuple[int, ...]


def host_addresses(mapping: PortMapping) -> tuple[str, ...]:
    return (mapping.host_address,) if mapping.host_address else LOOPBACK


def private_address(machine_id: str) -> str:
    """A loopback address of a machine's own, where nobody else is likely to listen: all of 127/8 is loopback."""
    return f"127.{1 + int(machine_id[:2], 16) % 253}.{int(machine_id[2:4], 16)}.{1 + int(machine_id[4:6], 16) % 254}"


def settle(wanted: tuple[PortMapping, ...], recorded: tuple[PortMapping, ...]) -> list[tuple[PortMapping, int]]:
    """Each mapping with the port to try first where the host may choose: the one that it chose at the start before."""
    found = []
    for place, mapping in enumerate(wanted):
        earlier = recorded[place] if place < len(recorded) else mapping
        same = not mapping.host_port and earlier._replace(host_port=0) == mapping
        found.append((mapping, earlier.host_port if same else mapping.host_port))
    return found


def hold(
    wanted: tuple[PortMapping, ...], recorded: tuple[PortMapping, ...] = (), *, find_holder: FindHolder | None = None
) -> list[HeldPort]:
    """Bind them all. Raises `Conflict` or `HostError` for the first that cannot be had; none is held then."""
    held: list[HeldPort] = []
    # Named ports first: a free one that we choose must not be one that we are asked for later.
    order = sorted(enumerate(settle(wanted, recorded)), key=lambda item: not item[1][0].host_port)
    places: dict[int, HeldPort] = {}
    try:
        for place, (mapping, earlier) in order:
            made = None if mapping.host_port or not earlier else _try(mapping._replace(host_port=earlier))
            places[place] = made or _hold_one(mapping, find_holder)
            held.append(places[place])
    except BaseException:
        release(held)
        raise
    return [places[place] for place in range(len(wanted))]


def release(held: list[HeldPort]) -> None:
    for port in held:
        _close(port.sockets)


def _close(sockets: Iterable[int]) -> None:
    for fd in sockets:
        os.close(fd)


def _try(mapping: PortMapping) -> HeldPort | None:
    """The port that it had before, if it is free."""
    try:
        return _bind(mapping)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            return None
        raise _translate(error, mapping, None) from None


def _hold_one(mapping: PortMapping, find_holder: FindHolder | None) -> HeldPort:
    for _ in range(_TRIES):
        try:
            return _bind(mapping)
        except OSError as error:
            # The port that one address had free was taken at the other: another one is.
            if error.errno == errno.EADDRINUSE and not mapping.host_port and not mapping.host_address:
                continue
            raise _translate(error, mapping, find_holder) from None
    raise Conflict(f"no free port was found for the machine's port {mapping.guest_port}/{mapping.protocol}")


def _bind(mapping: PortMapping) -> HeldPort:
    sockets: list[int] = []
    open_one = inet.listen_tcp if mapping.protocol == inet.TCP else inet.bind_udp
    try:
        for address in host_addresses(mapping):
            try:
                sockets.append(open_one(address, mapping.host_port))
            except OSError as error:
                if sockets and error.errno in _NO_ADDRESS:
                    continue  # a host without IPv6 has one loopback
                error.filename = address
                raise
            if not mapping.host_port:
                mapping = mapping._replace(host_port=inet.local_port(sockets[0]))
    except BaseException:
        _close(sockets)
        raise
    return HeldPort(mapping, tuple(sockets))


def _translate(error: OSError, mapping: PortMapping, find_holder: FindHolder | None) -> NagayaError:
    address, port, protocol = str(error.filename), mapping.host_port, mapping.protocol
    where = f"[{address}]:{port}/{protocol}" if ":" in address else f"{address}:{port}/{protocol}"
    if error.errno == errno.EADDRINUSE:
        from nagaya.net.holders import find_holder as find_process  # lazy: only when somebody is asked for

        holder = (find_holder or find_process)(protocol, address, port)
        return Conflict(
            f"the port {where} is in use" + (f" by {holder}" if holder else ""),
            hint=f"publish another one, for example -p {_other(port)}:{mapping.guest_port}, or let the host choose: "
            f"-p {mapping.guest_port}",
            state=holder,
        )
    if error.errno in _NO_ADDRESS:
        return Conflict(
            f"cannot publish a port at {address}: this host has no such address",
            hint="'ip address' lists those that it has; 0.0.0.0 and [::] are all of them",
        )
    if error.errno == errno.EACCES:
        return Unsupported(
            f"the port {where} is one of those that only root may take",
            hint=f"publish one from {_first_unprivileged()} on, for example -p {_other(port)}:{mapping.guest_port}",
            finding=UNPRIVILEGED,
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return HostError.from_os(
            error, "cannot hold so many published ports", hint="raise the limit of open files (ulimit -n)"
        )
    return HostError.from_os(error, f"cannot publish a port at {where}")


def _other(port: int) -> int:
    return port + 8000 if port < 1024 else port + 1 if port < 65535 else 8080


def _first_unprivileged() -> int:
    try:
        with open(UNPRIVILEGED, encoding="utf-8") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 1024


def allow_many(count: int) -> None:
    """Lift our soft limit of open files for `count` ports with two sockets each, as far as we may."""
    import resource  # lazy: only who publishes many

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * count + 256
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
