"""User namespaces: a machine's root that is nobody on the host.

Every machine gets 65,536 ids of its own out of a range: the lines of /etc/subuid and /etc/subgid for user "nagaya"
where both have the same, else 4,096 ranges from 0x70000000 on, which no distribution hands out.
"""

from __future__ import annotations

import os

from nagaya.errors import HostError
from nagaya.kernel import unix
from nagaya.kernel.namespaces import CLONE_NEWUSER, unshare
from nagaya.kernel.process import close_all_but

IDS = 65536
DEFAULT_BASE = 0x70000000
DEFAULT_RANGES = 4096
OWNER = "nagaya"


def find_base(machine_id: str, subids: str) -> int:
    """The machine's first host id, by the text of /etc/subuid (or /etc/subgid)."""
    number = int(machine_id[:8], 16)
    for line in subids.splitlines():
        fields = line.split(":")
        if len(fields) == 3 and fields[0] == OWNER and fields[1].isdigit() and fields[2].isdigit():
            ranges = int(fields[2]) // IDS
            if ranges:
                return int(fields[1]) + number % ranges * IDS
    return DEFAULT_BASE + number % DEFAULT_RANGES * IDS


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""


def open_userns(machine_id: str) -> tuple[int, int]:
    """Make the machine's user namespace: (descriptor of it, first host id, user or group). Nobody lives in it yet."""
    base = find_base(machine_id, _read("/etc/subuid"))
    if base != find_base(machine_id, _read("/etc/subgid")):  # half a range is nobody's: take one of ours
        base = find_base(machine_id, "")
    ours, theirs = unix.socket_pair()
    pid = os.fork()
    if pid == 0:
        _hold(theirs)
    os.close(theirs)
    try:
        if os.read(ours, 1) != b"1":
            raise HostError(
                "this host does not allow user namespaces",
                hint="see /proc/sys/user/max_user_namespaces",
                operation="unshare",
            )
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{pid}/{name}", "w", encoding="ascii") as file:
                file.write(f"0 {base} {IDS}\n")
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC), base
    finally:
        os.close(ours)
        os.waitpid(pid, 0)


def _hold(channel: int) -> None:
    """In a child: be in a new user namespace until the other end closes, as it also does when our parent is killed."""
    try:
        # Nothing of the supervisor's, and least its locks, may live on in here.
        close_all_but((channel,))
        unshare(CLONE_NEWUSER)
        os.write(channel, b"1")
        os.read(channel, 1)
    finally:
        os._exit(0)
