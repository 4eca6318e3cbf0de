"""Rootfs and mounts as data: printable and testable before anything is mounted."""

from __future__ import annotations

from nagaya.static import NamedTuple


class RootfsPlan(NamedTuple):
    """An overlay: read-only `lower` directories, topmost first, under a writable `upper` with its `work`."""

    lower: tuple[str, ...]
    upper: str
    work: str
    read_only: bool = False


class DiskPlan(NamedTuple):
    """A virtual machine's root: an image's tree on a disk that nobody writes, under an overlay on a disk of its own."""

    image: str  # a read-only file system, as `images/rootimage.py` makes it
    data: str  # raw and sparse, with ext4 on it; the machine writes it
    read_only: bool = False  # the root as programs see it
    blanks: str = ""  # the directory of what an empty disk looks like (storage/blank_disks.py)
    backing: str = ""  # what `data` has not written itself is read from there (storage/shared_disks.py)


class InstallPlan(NamedTuple):
    """An installer that is to be started instead of what is on the disks. The first two are paths."""

    kernel: str
    initramfs: str
    command_line: str


class HardwarePlan(NamedTuple):
    """A whole machine's drives, in the order of its record, with their paths on this host ("" = no disc is in)."""

    paths: tuple[str, ...]
    backing_places: tuple[str, ...]  # directories in which backing files may lie beside the images' own
    firmware_state: str  # the file with UEFI's variables
    tpm_state: str = ""  # the file of a TPM's
    install: InstallPlan | None = None


class MountPlan(NamedTuple):
    """A mount whose source is a host path already checked to exist ("" for tmpfs)."""

    kind: str  # "bind" | "tmpfs"
    source: str
    target: str
    read_only: bool
    propagation: str
    size_bytes: int
    mode: int
    options: tuple[str, ...]
    owned: bool = False  # the machine's own (a volume): its owners are the machine's ids, in a user namespace too
