"""Who is whose child, and which processes are supervisors: for tests that kill them, and benchmarks that measure them."""

from __future__ import annotations

import os
from collections.abc import Sequence


def parents() -> dict[int, int]:
    """Parent by pid, of all processes."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                found[int(pid)] = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            continue
    return found


def below(pids: Sequence[int]) -> list[int]:
    """Children of `pids`, and theirs, the nearer ones first."""
    known = parents()
    found = list(pids)
    for pid in found:
        found += sorted(child for child, parent in known.items() if parent == pid)
    return found[len(pids) :]


def supervisors(root: str, machine_id: str = "") -> list[int]:
    """Processes that have a liveness lock of this store open, or the machine's: supervisors, and nobody else for long."""
    prefix = f"{root}/machines/{machine_id}"
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
                if target.startswith(prefix) and target.endswith("/lock"):
                    found.append(int(pid))
                    break
        except OSError:
            continue
    return found
