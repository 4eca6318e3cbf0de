"""SETUP's payload: what a virtual machine's agent makes of a bare kernel and two disks (docs/agent-protocol.md).

A container's inside is made by the engine before its agent runs; a virtual machine's can only be made from within.
"""

from __future__ import annotations

from struct import Struct

from nagaya.errors import UsageError
from nagaya.protocol.frame import MAX_PAYLOAD
from nagaya.static import NamedTuple

_HOSTNAME, _FLAGS, _TIME, _ENTROPY, _FILE, _MOUNT, _NETWORK, _SYSCTL, _POWER_OFF, _DEVICE, _PIDS = range(1, 12)
_MACHINE_ID = 12
_WARM, _BOUND = 13, 14
_READ_ONLY, _UNMASK, _DATA_ONLY, _OWN_PIDS = 1, 2, 4, 8

MOUNT_KINDS = {"virtiofs": 1, "tmpfs": 2}
MOUNT_OPTIONS = {"nosuid": 2, "nodev": 4, "noexec": 8}  # the numbers are mount(2)'s
_MOUNT_READ_ONLY = 1
POWER_OFF = {"acpi": 1, "reboot": 2, "port": 3}
HOSTNAME_MAX = 64  # sethostname(2)
ENTROPY_MAX = 512

_FIELD = Struct("<HHI")
_U32 = Struct("<I")
_U64 = Struct("<Q")
_MOUNT_HEAD = Struct("<IIIIQ")  # kind, flags, mode, zero, size
_NETWORK_BODY = Struct("<6sBBI4s4s16s16s")  # MAC, prefixes, MTU, IPv4 address and gateway, IPv6 address and gateway
LINK_NAME_MAX = 15  # IFNAMSIZ less its NUL


class GuestMount(NamedTuple):
    """A mount for the machine's own root. Missing targets are made; links in the way are followed inside the root.

    With "virtiofs", `source` is a tag, or "tag/path": what lies at that path of the share, a directory or a file.
    `options` are out of nosuid, nodev, noexec; `size_bytes` (0 = the kernel's default) and `mode` are a tmpfs's.
    """

    kind: str  # "virtiofs" | "tmpfs"
    source: str
    target: str
    read_only: bool = False
    options: tuple[str, ...] = ()
    size_bytes: int = 0
    mode: int = 0o1777


class GuestNetwork(NamedTuple):
    """One of the machine's links, found by its MAC and given its name. `mtu` 0 = as it is.

    An address "" = none of that family, a gateway "" = no default route.
    """

    mac: str
    address: str
    prefix: int
    gateway: str
    mtu: int
    name: str = "eth0"
    address6: str = ""
    prefix6: int = 0
    gateway6: str = ""


class GuestSetup(NamedTuple):
    """What SETUP says. `power_off` is how the guest ends its machine.

    "acpi": by the kernel's own power-off; "reboot": by a restart, which the VMM takes for the end; "port": by the
    ACPI sleep register at I/O port 0x600, without ACPI (x86 only).
    """

    hostname: str
    read_only: bool = False
    time_ns: int = 0  # since the epoch; 0 = leave the clock alone
    entropy: bytes = b""
    files: tuple[tuple[str, bytes], ...] = ()  # (path, content): mounted over the image's own, so no change to it
    mounts: tuple[GuestMount, ...] = ()  # parents before children
    networks: tuple[GuestNetwork, ...] = ()  # lo is always up
    sysctls: tuple[tuple[str, str], ...] = ()
    unmask: bool = False  # no masked or read-only paths under /proc and /sys
    power_off: str = "acpi"
    devices: tuple[tuple[str, str], ...] = ()  # (node of the guest kernel's /dev, path inside) beside the standard ones
    data_only: bool = False  # no root at all: only the data disk, for applets that run on it; all else is left alone
    own_pids: bool = (
        False  # the programs have a PID namespace of their own, and the main one is the first process in it
    )
    pids: int = 0  # the most processes and threads that its programs may have; 0 = no limit


def setup_payload(setup: GuestSetup) -> bytes:
    """SETUP's fields. Raises `UsageError` for what the agent would take for a violation."""
    flags = (_READ_ONLY if setup.read_only else 0) | (_UNMASK if setup.unmask else 0)
    flags |= (_DATA_ONLY if setup.data_only else 0) | (_OWN_PIDS if setup.own_pids else 0)
    if len(_text(setup.hostname)) > HOSTNAME_MAX:
        raise UsageError(f"the host name '{setup.hostname}' is longer than {HOSTNAME_MAX} bytes")
    if len(setup.entropy) > ENTROPY_MAX:
        raise UsageError(f"more than {ENTROPY_MAX} bytes of entropy")
    if setup.power_off not in POWER_OFF:
        raise UsageError(f"no machine ends by '{setup.power_off}'", hint=f"one of: {', '.join(POWER_OFF)}")
    fields = [
        _field(_TIME, _U64.pack(setup.time_ns)),  # first: see `with_time`
        _field(_HOSTNAME, _text(setup.hostname)),
        _field(_FLAGS, _U32.pack(flags)),
        _field(_POWER_OFF, _U32.pack(POWER_OFF[setup.power_off])),
    ]
    if setup.entropy:
        fields.append(_field(_ENTROPY, setup.entropy))
    fields += [_field(_NETWORK, _network(network)) for network in setup.networks]
    if setup.pids:
        fields.append(_field(_PIDS, _U32.pack(setup.pids)))
    fields += [_field(_DEVICE, _text(node) + b"\0" + _absolute(path) + b"\0") for node, path in setup.devices]
    fields += [_field(_FILE, _absolute(path) + b"\0" + content) for path, content in setup.files]
    fields += [_field(_MOUNT, _mount(mount)) for mount in setup.mounts]
    fields += [_field(_SYSCTL, _text(key) + b"\0" + _text(value) + b"\0") for key, value in setup.sysctls]
    payload = b"".join(fields)
    if len(payload) > MAX_PAYLOAD:
        raise UsageError(f"the machine's set-up is too long ({len(payload)} bytes, at most {MAX_PAYLOAD})")
    return payload


def time_payload(time_ns: int) -> bytes:
    """CONTINUE's for a machine that is still itself: the time, nanoseconds since the epoch, and nothing else."""
    return _field(_TIME, _U64.pack(time_ns))


def renewal_payload(links: tuple[GuestNetwork, ...], files: tuple[tuple[str, bytes, bytes], ...]) -> bytes:
    """What the agent's `renew` reads: links as they are to be from now on, and files, each with what it has and is to have."""
    fields = [_field(_NETWORK, _network(link)) for link in links]
    for path, old, new in files:
        fields += [_field(_FILE, _absolute(path) + b"\0" + content) for content in (old, new)]
    return b"".join(fields)


def with_machine_id(payload: bytes, machine_id: str) -> bytes:
    """The same set-up for a machine that was another until now: 32 hex digits for /etc/machine-id, where it has one."""
    return payload + _field(_MACHINE_ID, machine_id.encode("ascii"))


def warm_payload(paths: tuple[str, ...]) -> bytes:
    """What PREPARE has beside SETUP's fields: files that are to be in memory. Those that there are not do not matter."""
    return b"".join(_field(_WARM, _absolute(path) + b"\0") for path in paths)


def bound_payload(capabilities: int) -> bytes:
    """And this: the capabilities, a mask, that the machine's main program will have at most."""
    return _field(_BOUND, _U64.pack(capabilities))


def with_time(payload: bytes, time_ns: int) -> bytes:
    """The same set-up at another time: a guest may take seconds from when it was planned to where it reads it.

    A set-up that leaves the clock alone does so still.
    """
    old, new = (_field(_TIME, _U64.pack(time)) for time in (0, time_ns))
    if payload[: _FIELD.size] != new[: _FIELD.size] or payload.startswith(old):
        return payload
    return new + payload[len(new) :]


def _mount(mount: GuestMount) -> bytes:
    if mount.kind not in MOUNT_KINDS:
        raise UsageError(f"a virtual machine cannot mount a '{mount.kind}'")
    flags = _MOUNT_READ_ONLY if mount.read_only else 0
    for option in mount.options:
        if option not in MOUNT_OPTIONS:
            raise UsageError(f"unknown mount option '{option}'", hint=f"one of: {', '.join(MOUNT_OPTIONS)}")
        flags |= MOUNT_OPTIONS[option]
    head = _MOUNT_HEAD.pack(MOUNT_KINDS[mount.kind], flags, mount.mode, 0, mount.size_bytes)
    return head + _text(mount.source) + b"\0" + _absolute(mount.target) + b"\0"


def _network(network: GuestNetwork) -> bytes:
    if not 0 <= network.prefix <= 32:
        raise UsageError(f"{network.prefix} is not the length of an IPv4 network's prefix")
    if not 0 <= network.prefix6 <= 128:
        raise UsageError(f"{network.prefix6} is not the length of an IPv6 network's prefix")
    name = _text(network.name)
    if not 0 < len(name) <= LINK_NAME_MAX or b"/" in name or name in (b".", b".."):
        raise UsageError(f"'{network.name}' is not the name of a network link")
    try:
        mac = bytes.fromhex(network.mac.replace(":", ""))
    except ValueError:
        mac = b""
    if len(mac) != 6:
        raise UsageError(f"'{network.mac}' is not a MAC address")
    body = _NETWORK_BODY.pack(
        mac, network.prefix, network.prefix6, network.mtu, _address(network.address or "0.0.0.0"),
        _address(network.gateway or "0.0.0.0"), _address6(network.address6 or "::"), _address6(network.gateway6 or "::"),
    )  # fmt: skip
    return body + name + b"\0"


def _address(text: str) -> bytes:
    parts = text.split(".")
    if len(parts) != 4 or not all(part.isascii() and part.isdigit() and int(part) < 256 for part in parts):
        raise UsageError(f"'{text}' is not an IPv4 address")
    return bytes(int(part) for part in parts)


def _address6(text: str) -> bytes:
    """RFC 4291, 2.2, but for the form that ends in an IPv4 address. (`socket` is I/O, which this layer has none of.)"""
    head, gap, tail = text.partition("::")
    groups, rest = head.split(":") if head else [], tail.split(":") if tail else []
    missing = 8 - len(groups) - len(rest)
    digits = set("0123456789abcdefABCDEF")
    if not all(0 < len(group) < 5 and digits.issuperset(group) for group in groups + rest) or (
        missing < 1 if gap else missing
    ):
        raise UsageError(f"'{text}' is not an IPv6 address")
    return b"".join(int(group, 16).to_bytes(2, "big") for group in [*groups, *["0"] * missing, *rest])


def _absolute(path: str) -> bytes:
    if not path.startswith("/"):
        raise UsageError(f"'{path}' is not an absolute path")
    return _text(path)


def _text(text: str) -> bytes:
    if "\0" in text:
        raise UsageError(f"{text!r} holds a NUL character")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        raise UsageError(f"{text!r} cannot be encoded") from None


def _field(tag: int, value: bytes) -> bytes:
    return _FIELD.pack(tag, 0, len(value)) + value
