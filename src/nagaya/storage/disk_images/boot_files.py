"""The kernel and initramfs that a disk would boot, read out of its ext4 without mounting anything: debugfs(8) does it.

The disk is the guest's. debugfs gets the limits that qemu-img has, and of its answers only names and files of a plain form
are taken. A file system that was not unmounted is read as it is: its journal is the guest's to replay.
"""

from __future__ import annotations

import fcntl
import os
import re
import resource
import signal
import subprocess

from nagaya.errors import HostError, IntegrityError, NotFound, Unsupported
from nagaya.static import NamedTuple
from nagaya.storage.disk_images.partitions import Partition, find_ext4, read_partitions
from nagaya.storage.disk_images.program import give_up

PROGRAM = "debugfs"
_PLACES = ("/usr/sbin", "/sbin", "/usr/bin")
_MOST_BYTES = 1 << 30  # of an initramfs
_MOST_LISTING_BYTES = 1 << 20
_WITHIN_S = 60.0
_KERNEL = re.compile(r"vmlinuz-([A-Za-z0-9._+~-]{1,128})")
# What distributions call the initramfs of a kernel's version.
_INITRAMFS = ("initrd.img-{}", "initramfs-{}.img", "initrd-{}")
_ENTRY = re.compile(rb"/(\d+)/(\d+)/\d+/\d+/([^/\n]+)/(\d*)/")
_REGULAR = 0o10
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class BootFiles(NamedTuple):
    """What a disk boots. The paths are those inside the partition; `root` is the UUID of the root's file system."""

    partition: Partition
    kernel: str
    initramfs: str
    root: str


class _Entry(NamedTuple):
    kind: int
    size_bytes: int


def find_boot_files(fd: int, size_bytes: int) -> BootFiles:
    """Those of the raw disk `fd`. Raises `NotFound` where there are none, `IntegrityError`, `Unsupported`, `HostError`."""
    systems = [(each, name) for each in read_partitions(fd, size_bytes) if (name := find_ext4(fd, each))]
    for partition, name in systems:
        top = _list(fd, partition, "/")
        root = name if "etc" in top else _find_root(fd, [each for each in systems if each[0] != partition])
        for place in ("/boot", "/") if "boot" in top else ("/",):
            names = _choose_kernel({*(top if place == "/" else _list(fd, partition, place))})
            if names and root:
                kernel, initramfs = (os.path.join(place, each) for each in names)
                return BootFiles(partition, kernel, initramfs, root)
    raise NotFound(
        "the disk has no ext4 file system with a kernel and its initramfs in /boot",
        hint="boot it by its own loader: --firmware bios or uefi",
    )


def copy_out(fd: int, partition: Partition, path: str) -> int:
    """The file at `path` as a memory file that nobody can change; it is the caller's.

    Raises `IntegrityError`, `Unsupported`, `HostError`.
    """
    place, name = os.path.split(path)
    entry = _list(fd, partition, place).get(name)
    if entry is None or entry.kind != _REGULAR or not 0 < entry.size_bytes <= _MOST_BYTES:
        raise IntegrityError(f"'{path}' on the disk is no file that a machine could boot")
    target = os.memfd_create("boot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        _ask(fd, partition, f"cat {path}", output=target, most_bytes=_MOST_BYTES)
        if os.fstat(target).st_size != entry.size_bytes:
            raise IntegrityError(f"'{path}' cannot be read whole: its file system is damaged")
        fcntl.fcntl(target, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(target)
        raise
    return target


def _find_root(fd: int, others: list[tuple[Partition, str]]) -> str:
    """Of a disk whose /boot is a file system of its own."""
    return next((name for partition, name in others if "etc" in _list(fd, partition, "/")), "")


def _choose_kernel(names: set[str]) -> tuple[str, str] | None:
    """The newest kernel that has an initramfs."""
    versions = sorted((found[1] for name in names if (found := _KERNEL.fullmatch(name))), key=_order, reverse=True)
    for version in versions:
        for form in _INITRAMFS:
            if form.format(version) in names:
                return f"vmlinuz-{version}", form.format(version)
    return None


def _order(version: str) -> list[tuple[int, int, str]]:
    """6.10 is newer than 6.9."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d{1,18})", version)]


def _list(fd: int, partition: Partition, path: str) -> dict[str, _Entry]:
    output = os.memfd_create("listing", os.MFD_CLOEXEC)
    try:
        _ask(fd, partition, f"ls -p {path}", output=output, most_bytes=_MOST_LISTING_BYTES)
        text = os.pread(output, _MOST_LISTING_BYTES, 0)
    finally:
        os.close(output)
    return {
        found[3].decode("utf-8", "replace"): _Entry(int(found[2], 8) >> 12, int(found[4] or b"0"))
        for line in text.splitlines()
        if (found := _ENTRY.fullmatch(line)) and found[1] != b"0" and not found[2].strip(b"01234567")
    }


def _ask(fd: int, partition: Partition, request: str, *, output: int, most_bytes: int) -> None:
    """One request to debugfs, which says nothing but its name on its standard error when it succeeds."""
    parent = os.getpid()

    def prepare() -> None:
        give_up(parent, look=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    disk = f"/proc/self/fd/{fd}?offset={partition.start_bytes}"
    try:
        done = subprocess.run(
            [find_debugfs(), "-R", request, disk], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE,
            pass_fds=(fd,), env={"PATH": os.defpath, "LC_ALL": "C", "HOME": "/"}, preexec_fn=prepare, check=False,
            timeout=_WITHIN_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise IntegrityError("the disk's file system cannot be read in any reasonable time") from None
    except OSError as error:
        raise HostError.from_os(error, "cannot read the disk's file system") from None
    said = [line.strip() for line in done.stderr.decode("utf-8", "replace").splitlines()[1:] if line.strip()]
    if done.returncode in (-signal.SIGXFSZ, -signal.SIGXCPU, -signal.SIGSEGV, -signal.SIGABRT):
        raise IntegrityError("the disk's file system needs more room or time than a sound one would")
    if done.returncode or said:
        reason = "".join(letter if letter.isprintable() else "?" for letter in (said or ["no reason given"])[0][:200])
        raise IntegrityError(f"the disk's file system cannot be read: {reason}")


def find_debugfs() -> str:
    """Raises `Unsupported` where it is not installed."""
    for place in _PLACES:
        if os.access(f"{place}/{PROGRAM}", os.X_OK):
            return f"{place}/{PROGRAM}"
    raise Unsupported(
        "taking a kernel out of a disk needs debugfs, and it is not installed",
        hint="as root: apt-get install e2fsprogs",
    )
