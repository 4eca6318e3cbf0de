"""Which KVM this host has, as the probe found out once since the host booted: 3 ms that not every machine has to pay."""

from __future__ import annotations

import os

from nagaya.static import NamedTuple
from nagaya.storage.paths import find_paths, make_directory

HARDWARE = "hardware"
PVM = "pvm"
DEVICE = "/dev/kvm"
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_MOST_BYTES = 200
_HOW = {
    HARDWARE: "a guest's syscall instruction entered its kernel",
    PVM: "a guest's syscall instruction faulted at its kernel's entry, as under a software KVM",
}


class Finding(NamedTuple):
    """`kind`: hardware or pvm. `how` says how it was found out."""

    kind: str
    how: str


def make_finding(kind: str) -> Finding:
    return Finding(kind, _HOW[kind])


_known: tuple[tuple[int, ...], Finding] | None = None  # of this process, and of those that it forks


def find_kvm() -> Finding:
    """What is known, or what the probe says. Raises as `probe_kvm`; a KVM that cannot be used is tried out each time."""
    global _known
    node = _look()
    if _known is None or not node or _known[0] != node:
        _known = (node, _find())
    return _known[1]


def _look() -> tuple[int, ...]:
    """The device node, which is made anew with each load of KVM's module; () when there is none."""
    try:
        node = os.stat(DEVICE)
    except OSError:
        return ()
    return (node.st_dev, node.st_ino, node.st_ctime_ns)


def _find() -> Finding:
    path = f"{find_paths().run}/kvm"
    key = _identify()
    kind = _read(path, key) if key else ""
    if kind in _HOW:
        return make_finding(kind)
    from nagaya.engines.kvm.probe import probe_kvm  # lazy: once since the host booted

    finding = probe_kvm()
    if key:
        _write(path, f"{key} {finding.kind}")
    return finding


def _identify() -> str:
    """This boot, and this load of KVM's module; "" when there is no such."""
    try:
        with open(_BOOT_ID, encoding="utf-8") as file:  # other codecs have to be imported
            boot_id = file.read().strip()
    except OSError:
        return ""
    node = _look()
    return f"{boot_id} {':'.join(map(str, node))}" if node else ""


def _read(path: str, key: str) -> str:
    """The kind that was noted under `key`; "" for none, or for a note that is not our own."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return ""
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            return ""
        found, _, kind = os.read(fd, _MOST_BYTES).decode("utf-8", "replace").rpartition(" ")
    finally:
        os.close(fd)
    return kind if found == key else ""


def _write(path: str, note: str) -> None:
    """A note that cannot be written is found out anew the next time."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        make_directory(os.path.dirname(path))
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.write(fd, note.encode())
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError:
        return
