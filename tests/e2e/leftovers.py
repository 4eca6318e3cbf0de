"""What a test run leaves on the host: processes, mounts, control groups, links, firewall tables, held locks.

Other sessions may use this host at the same time. A thing counts as ours when it carries our mark (an environment
variable that every process below pytest inherits), our temporary directory, or the id of a machine of one of our stores.
On a CI machine (`CI` is set) nobody else is there, and everything new counts.
"""

from __future__ import annotations

import contextlib
import glob
import os
import subprocess
import time
from typing import NamedTuple

from nagaya.kernel.netlink import Netlink
from nagaya.storage.lock import is_held

MARK = "NAGAYA_TEST_SESSION"
GRACE_S = 3.0


class Footprint(NamedTuple):
    """What is there at one moment; every entry is a line for people."""

    processes: frozenset[str]
    mounts: frozenset[str]
    cgroups: frozenset[str]
    links: frozenset[str]
    tables: frozenset[str]
    locks: frozenset[str]
    runtimes: frozenset[str]
    unwaited: frozenset[str]

    def beyond(self, earlier: Footprint) -> list[str]:
        """What is there and was not there earlier."""
        return [
            f"{kind}: {entry}"
            for kind, now, then in zip(self._fields, self, earlier, strict=True)
            for entry in sorted(now - then)
        ]


def take_footprint(scratch: str) -> Footprint:
    """What of ours is there; `scratch` is the directory below which all our stores are."""
    stores = find_stores(scratch)
    ids = known_ids(stores)
    everything = bool(os.environ.get("CI"))
    return Footprint(
        processes=frozenset(_processes(scratch)),
        mounts=frozenset(_mounts(scratch, everything=everything)),
        cgroups=frozenset(path for path in cgroups() if everything or os.path.basename(path).partition("-")[0] in ids),
        links=frozenset(_links(ids, stores, everything=everything)),
        tables=frozenset(_tables(stores, everything=everything)),
        locks=frozenset(path for path in _lock_files(stores) if is_held(path)),
        runtimes=frozenset(path for store in stores for path in glob.glob(f"{store}/run/{'[0-9a-f]' * 32}")),
        unwaited=frozenset(own_children()),
    )


def find_new(before: Footprint, scratch: str, *, grace_s: float = GRACE_S) -> list[str]:
    """What has been left since `before`. What is just ending gets `grace_s` to end."""
    deadline = time.monotonic() + grace_s
    while True:
        left = take_footprint(scratch).beyond(before)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def find_stores(scratch: str) -> list[str]:
    """Store directories at most four levels below `scratch` (deeper there are only machines' own files)."""
    found = []
    for depth in range(1, 5):
        found += [os.path.dirname(path) for path in glob.glob(scratch + "/*" * depth + "/machines")]
    return found


def known_ids(stores: list[str]) -> set[str]:
    """Ids of all machines that our stores have or had, by their events (removed machines are what leaks)."""
    ids: set[str] = set()
    for store in stores:
        ids.update(name.removeprefix(".trash-") for name in os.listdir(f"{store}/machines"))
        try:
            with open(f"{store}/events", encoding="utf-8", errors="replace") as file:
                for line in file:
                    ids.update(word for word in line.split('"') if len(word) == 32)
        except FileNotFoundError:
            continue
    return ids


def cgroups() -> list[str]:
    """Control groups of machines, in every hierarchy."""
    paths = glob.glob("/sys/fs/cgroup/nagaya/*/") + glob.glob("/sys/fs/cgroup/*/nagaya/*/")
    return [path.rstrip("/") for path in paths]


def own_children() -> set[str]:
    """Pids of this process's children, the dead ones that nobody has waited for among them, whichever thread began them."""
    found: set[str] = set()
    for path in glob.glob("/proc/self/task/*/children"):
        with contextlib.suppress(FileNotFoundError), open(path) as file:  # a thread that has just ended
            found.update(file.read().split())
    return found


def processes_with(text: bytes) -> list[int]:
    """Pids of the processes, zombies left out, whose command line or environment has `text`."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if int(pid) == os.getpid():
            continue
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                known = file.read()
            with open(f"/proc/{pid}/environ", "rb") as file:
                known += b"\0" + file.read()
        except OSError:
            continue  # it has ended
        if text in known:
            found.append(int(pid))
    return found


def _processes(scratch: str) -> list[str]:
    mark = os.environ.get(MARK, "")
    pids = set(processes_with(os.fsencode(scratch) + b"/"))
    if mark:
        pids.update(processes_with(f"{MARK}={mark}".encode()))
    lines = []
    for pid in pids:
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                command = file.read().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if command:  # a zombie has none
            lines.append(f"{pid} {command}")
    return lines


def _mounts(scratch: str, *, everything: bool) -> list[str]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        return [line.strip() for line in file if scratch in line or (everything and "nagaya" in line)]


def _links(ids: set[str], stores: list[str], *, everything: bool) -> list[str]:
    from nagaya.net.planning import host_links

    ours = _bridges(stores) | {link for id_ in ids for link in host_links(id_)}
    with Netlink() as netlink:
        names = [link.name for link in netlink.links()]
    return [name for name in names if name in ours or (everything and name.startswith(("ngy", "nagaya")))]


def _bridges(stores: list[str]) -> set[str]:
    from nagaya.net import networks

    return {networks.bridge_name(store, name) for store in stores for name in networks.names(store)}


def _tables(stores: list[str], *, everything: bool) -> list[str]:
    from nagaya.net.firewall import table_name

    ours = {table_name(store) for store in stores}
    try:
        done = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return []  # nothing can have been loaded without it
    names = [line.split()[-1] for line in done.stdout.splitlines() if line]
    names += [f"names of {bridge}" for bridge in _bridges(stores) if os.path.exists(f"/run/nagaya-names/{bridge}")]
    return [
        name
        for name in names
        if name in ours or name.startswith("names of ") or (everything and name.startswith("nagaya"))
    ]


def _lock_files(stores: list[str]) -> list[str]:
    return [path for store in stores for path in glob.glob(f"{store}/*.lock") + glob.glob(f"{store}/machines/*/*lock")]
