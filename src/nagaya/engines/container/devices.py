"""Which devices a container has, and which it may use."""

from __future__ import annotations

import os
import stat

from nagaya.engines.cgroups.devices import ANY, DeviceRule
from nagaya.errors import NotFound, UsageError
from nagaya.model.spec import Device
from nagaya.static import NamedTuple

# name, major, minor (Documentation/admin-guide/devices.txt)
STANDARD = (
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
)
LINKS = (
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
    ("core", "/proc/kcore"),
)


class DeviceNode(NamedTuple):
    """A node to make below the machine's /dev. `mode` has the type's bits."""

    name: str  # below /dev, for example "net/tun"
    mode: int
    device: int
    uid: int = 0
    gid: int = 0


def plan_nodes(devices: tuple[Device, ...]) -> tuple[DeviceNode, ...]:
    """The standard nodes and the machine's own, with the host's mode and owners. Raises `NotFound`, `UsageError`."""
    nodes = [DeviceNode(name, 0o20666, os.makedev(major, minor)) for name, major, minor in STANDARD]
    for device in devices:
        found = look_at(device)
        if (device.path.removeprefix("/dev/"), found.st_rdev) in {(node.name, node.device) for node in nodes}:
            continue  # --device /dev/null: there already
        nodes.append(
            DeviceNode(
                device.path.removeprefix("/dev/"), found.st_mode, found.st_rdev, uid=found.st_uid, gid=found.st_gid
            )
        )
    return tuple(nodes)


def device_rules(devices: tuple[Device, ...]) -> list[DeviceRule]:
    """The standard devices, terminals, mknod of anything (opening it is what is denied), and the machine's own."""
    rules = [DeviceRule("c", ANY, ANY, "m"), DeviceRule("b", ANY, ANY, "m")]
    rules += [DeviceRule("c", major, minor, "rwm") for _, major, minor in STANDARD]
    rules += [DeviceRule("c", 5, 2, "rwm"), DeviceRule("c", 136, ANY, "rwm")]  # /dev/ptmx and /dev/pts/*
    for device in devices:
        found = look_at(device)
        rules.append(
            DeviceRule(
                "b" if stat.S_ISBLK(found.st_mode) else "c",
                os.major(found.st_rdev),
                os.minor(found.st_rdev),
                device.access,
            )
        )
    return rules


def look_at(device: Device) -> os.stat_result:
    """The host's device node. Raises `NotFound`, `UsageError`, for what could not be made inside too."""
    try:
        found = os.stat(device.host_path)
    except OSError:
        raise NotFound(f"there is no device '{device.host_path}' on this host") from None
    if not (stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode)):
        raise UsageError(f"'{device.host_path}' is not a device", hint="use -v to mount files and directories")
    if not device.access or set(device.access) - set("rwm"):
        raise UsageError(f"device access '{device.access}' is not made of r, w and m")
    taken = {name for name, *numbers in STANDARD if found.st_rdev != os.makedev(*numbers)} | {name for name, _ in LINKS}
    inside = device.path.removeprefix("/dev/")
    if inside == device.path or os.path.normpath(inside) != inside or inside.startswith("."):
        raise UsageError(f"the device's path inside, '{device.path}', is not below /dev")
    if inside.split("/")[0] in taken | {"pts", "shm", "mqueue"}:
        raise UsageError(f"every machine has its own {device.path}: choose another path for {device.host_path}")
    return found
