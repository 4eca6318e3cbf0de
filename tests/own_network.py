"""The suite in a network namespace of its own, so that nothing of it touches this host's network, not even by a defect.

Entered before the first test, by pytest's own process: everything that it starts is there too. The namespace has loopback and
nothing else: no test needs the world, and those that want one make it themselves. /sys is mounted anew, for it shows the
links of the network namespace that it was mounted in (and what is mounted below it, control groups above all, put back).
NAGAYA_TEST_NETWORK=host leaves all that away.
"""

from __future__ import annotations

import os

from nagaya.kernel import mount as kernel
from nagaya.kernel import namespaces
from nagaya.kernel.netlink import Netlink, index_of

CHOICE = "NAGAYA_TEST_NETWORK"


def enter() -> str:
    """Enter it; "" or why not."""
    if os.environ.get(CHOICE) == "host":
        return f"{CHOICE}=host"
    if os.geteuid():
        return "only root can make one"
    below = _mounts_below("/sys")
    namespaces.unshare(namespaces.CLONE_NEWNET | namespaces.CLONE_NEWNS)
    kernel.mount("", "/", "", kernel.MS_SLAVE | kernel.MS_REC)
    kept = [(path, kernel.open_tree(path, kernel.OPEN_TREE_CLONE | kernel.OPEN_TREE_CLOEXEC)) for path in below]
    kernel.umount("/sys", kernel.MNT_DETACH)
    kernel.mount("sysfs", "/sys", "sysfs", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    for path, tree in kept:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        kernel.move_mount(tree, place)
        os.close(place)
        os.close(tree)
    with Netlink() as netlink:
        netlink.set_up(index_of("lo"))
    return ""


def _mounts_below(place: str) -> list[str]:
    """Mount points below a path, outer ones first."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        points = [line.split()[4].replace("\\040", " ") for line in file]
    return list(dict.fromkeys(point for point in points if point.startswith(f"{place}/")))
