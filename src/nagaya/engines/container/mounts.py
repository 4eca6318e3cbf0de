"""A container's mounts as data. `plan_mounts` is pure; `apply` carries the plan out inside the new mount namespace."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from nagaya.engines.container.devices import STANDARD
from nagaya.engines.mount_rules import check_target, covers, mount_flags
from nagaya.errors import IntegrityError, UsageError
from nagaya.kernel import mount as kernel
from nagaya.kernel.mount import MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, MS_STRICTATIME
from nagaya.static import NamedTuple
from nagaya.storage.plan import MountPlan

# What runc and podman hide or protect: the kernel's own windows that a container must not look through.
MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap",
    "/sys/firmware", "/sys/fs/selinux",
)  # fmt: skip
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
CPUS = "/sys/devices/system/cpu"  # each CPU's thermal_throttle tells what the neighbours do: masked as moby does
LINKS_MAX = 40  # as the kernel's own MAXSYMLINKS

_ATTRIBUTES = {
    MS_RDONLY: kernel.MOUNT_ATTR_RDONLY,
    MS_NOSUID: kernel.MOUNT_ATTR_NOSUID,
    MS_NODEV: kernel.MOUNT_ATTR_NODEV,
    MS_NOEXEC: kernel.MOUNT_ATTR_NOEXEC,
}
_PROPAGATION = {"private": kernel.MS_PRIVATE, "slave": kernel.MS_SLAVE, "shared": kernel.MS_SHARED}


class MountStep(NamedTuple):
    """One mount below the new root. `fstype` "" is a bind of `source`; `tree` is its detached copy's descriptor."""

    fstype: str
    source: str
    target: str
    flags: int = 0
    data: str = ""
    propagation: str = "rprivate"
    tree: int = -1
    is_file: bool = False
    owned: bool = False  # in a user namespace: shown with the machine's own ids
    optional: bool = False  # a host without this file system goes on without it
    system: bool = False  # ours: mounted before the devices are made, and never through a link of the image's


class CgroupMounts(NamedTuple):
    """What to show at /sys/fs/cgroup: v2, or each v1 mount's options by directory name."""

    v2: bool
    v1: tuple[tuple[str, str], ...] = ()  # (name below /sys/fs/cgroup, mount options)


def plan_mounts(
    mounts: tuple[MountPlan, ...],
    *,
    cgroups: CgroupMounts,
    host_network: bool,
    userns: bool,
    etc: tuple[tuple[str, str], ...],
) -> tuple[MountStep, ...]:
    """All mounts of a container in order: the kernel's file systems, ours over /etc, then the user's own."""
    quiet = MS_NOSUID | MS_NODEV | MS_NOEXEC
    steps = [
        MountStep("proc", "proc", "/proc", quiet),
        MountStep("tmpfs", "tmpfs", "/dev", MS_NOSUID | MS_STRICTATIME, "mode=755,size=65536k"),
        MountStep("devpts", "devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"),
        MountStep("tmpfs", "shm", "/dev/shm", quiet, "mode=1777,size=65536k"),
        MountStep("mqueue", "mqueue", "/dev/mqueue", quiet, optional=True),
    ]
    # A user namespace may mount sysfs only with a network namespace of its own.
    if userns and host_network:
        steps.append(MountStep("", "/sys", "/sys", quiet | MS_RDONLY, propagation="rslave"))
    else:
        steps.append(MountStep("sysfs", "sysfs", "/sys", quiet | MS_RDONLY))
    if userns:  # which must not make device nodes: show it the host's
        steps += [MountStep("", f"/dev/{name}", f"/dev/{name}", is_file=True) for name, _, _ in STANDARD]
    steps += _plan_cgroups(cgroups, quiet, userns=userns)
    steps = [step._replace(system=True) for step in steps]
    steps += [
        MountStep("", source, target, is_file=True, owned=True) for target, source in etc if not covers(mounts, target)
    ]
    steps += [plan_user_mount(plan) for plan in mounts]
    return tuple(steps)


def _plan_cgroups(cgroups: CgroupMounts, quiet: int, *, userns: bool) -> list[MountStep]:
    if cgroups.v2:
        return [MountStep("cgroup2", "cgroup", "/sys/fs/cgroup", quiet | MS_RDONLY, optional=userns)]
    if userns:
        return []  # version 1 cannot be mounted from a user namespace, and its files are root's
    steps = [MountStep("tmpfs", "cgroup", "/sys/fs/cgroup", quiet, "mode=755,size=64k")]
    steps += [
        MountStep("cgroup", "cgroup", f"/sys/fs/cgroup/{name}", quiet | MS_RDONLY, options, optional=True)
        for name, options in cgroups.v1
    ]
    return steps


def plan_user_mount(plan: MountPlan) -> MountStep:
    """A bind or tmpfs that the user asked for. Raises `UsageError`."""
    check_target(plan.target)
    flags = mount_flags(plan)
    if plan.kind == "tmpfs":
        size = f",size={plan.size_bytes}" if plan.size_bytes else ""
        return MountStep("tmpfs", "tmpfs", plan.target, flags, f"mode={plan.mode:o}{size}")
    is_file = not os.path.isdir(plan.source)
    return MountStep(
        "", plan.source, plan.target, flags, propagation=plan.propagation, is_file=is_file, owned=plan.owned
    )


def open_trees(
    steps: tuple[MountStep, ...], userns_fd: int = -1, *, warn: Callable[[str], None]
) -> tuple[MountStep, ...]:
    """Take a detached copy of each bind's source, while we still see the host's tree with its propagation."""
    recursive = kernel.OPEN_TREE_CLONE | kernel.OPEN_TREE_CLOEXEC | kernel.AT_RECURSIVE
    opened = []
    for step in steps:
        if not step.fstype:
            step = step._replace(tree=kernel.open_tree(step.source, recursive))
            if step.owned and userns_fd >= 0:
                _show_own_ids(step, userns_fd, warn)
        opened.append(step)
    return tuple(opened)


def _show_own_ids(step: MountStep, userns_fd: int, warn: Callable[[str], None]) -> None:
    try:
        kernel.mount_setattr(step.tree, set_=kernel.MOUNT_ATTR_IDMAP, userns_fd=userns_fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if not step.is_file:  # our files over /etc are for all to read anyway
            warn(f"{step.target}: its file system cannot map owners, so all files there belong to nobody")


def apply(steps: tuple[MountStep, ...], root: int) -> None:
    """Mount everything below directory descriptor `root`, following the image's links only inside of it.

    Raises `OSError` with the target as its file name, `IntegrityError`, `UsageError`.
    """
    for step in steps:
        try:
            target = open_target(root, step.target, is_file=step.is_file, follow=not step.system)
            try:
                if not step.system:
                    _check_place(root, target)
                _apply_step(step, target)
            finally:
                os.close(target)
        except OSError as error:
            if step.optional and error.errno in (errno.ENODEV, errno.EINVAL, errno.EPERM, errno.EBUSY):
                continue
            if step.system and error.errno == errno.ELOOP:
                raise IntegrityError(
                    f"the image has a symbolic link where the machine's {step.target} belongs",
                    hint="it must be a directory; an image that has it otherwise may be hostile",
                ) from None
            error.filename = step.target
            raise


def _check_place(root: int, target: int) -> None:
    """The target again, now that the image's links are resolved."""
    base, place = os.readlink(f"/proc/self/fd/{root}"), os.readlink(f"/proc/self/fd/{target}")
    check_target(place.removeprefix(base) or "/")


def _apply_step(step: MountStep, target: int) -> None:
    if step.fstype:
        # Through /proc, so that the place is the one we opened and not what its name leads to by now.
        kernel.mount(step.source, f"/proc/self/fd/{target}", step.fstype, step.flags, step.data)
        return
    if stat.S_ISDIR(os.fstat(target).st_mode) == step.is_file:  # which move_mount(2) has only EINVAL for
        number = errno.EISDIR if step.is_file else errno.ENOTDIR
        raise OSError(number, os.strerror(number))
    kernel.move_mount(step.tree, target)
    set_ = sum(attribute for bit, attribute in _ATTRIBUTES.items() if step.flags & bit)
    kernel.mount_setattr(
        step.tree, set_=set_, propagation=_PROPAGATION[step.propagation.removeprefix("r")], recursive=True
    )
    os.close(step.tree)


def open_target(root: int, path: str, *, is_file: bool, follow: bool = True, links: int = 0) -> int:
    """An O_PATH descriptor of `path` below `root`, made when missing: directories, or an empty file.

    A link to what is missing (/etc/resolv.conf of an image made for systemd) has its target made, inside of `root`.
    """
    relative = path.strip("/") or "."
    try:
        return kernel.open_in_root(root, relative, os.O_PATH, follow=follow)
    except FileNotFoundError:
        pass
    parent_path, name = os.path.split(relative)
    parent = open_target(root, parent_path or ".", is_file=False, follow=follow, links=links)
    try:
        # Only its last part may be missing now: no link of the image's is followed in making it.
        if is_file:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=parent))
        else:
            os.mkdir(name, 0o755, dir_fd=parent)
    except FileExistsError:
        link = _read_link(parent, name)
        if link and follow:
            if links == LINKS_MAX:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path) from None
            leads_to = link if link.startswith("/") else f"{parent_path}/{link}"
            return open_target(root, leads_to, is_file=is_file, links=links + 1)
    finally:
        os.close(parent)
    return kernel.open_in_root(root, relative, os.O_PATH, follow=follow)


def _read_link(directory: int, name: str) -> str:
    """Where a symbolic link leads; "" for what is none."""
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return ""


def mask_paths() -> None:
    """After the pivot: hide what must not be seen, protect what must not be written."""
    for path in READ_ONLY:
        _bind_read_only(path)
    if os.path.isdir("/sys/fs/cgroup/pids") or os.path.isdir("/sys/fs/cgroup/memory"):
        _bind_read_only("/sys/fs/cgroup")  # version 1's tmpfs, which had to be writable for the mounts on it
    empty = _open_null()
    for path in (*MASKED, *_thermal_paths()):
        try:
            found = os.stat(path)
        except OSError:
            continue
        if stat.S_ISDIR(found.st_mode):
            kernel.mount("tmpfs", path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=0k")
        else:
            kernel.mount(f"/proc/self/fd/{empty}", path, "", kernel.MS_BIND)
    os.close(empty)


def _open_null() -> int:
    """The null device, made sure of: a volume at /dev may have put something else there (CVE-2025-31133)."""
    fd = os.open("/dev/null", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(fd)
    if not stat.S_ISCHR(found.st_mode) or found.st_rdev != os.makedev(1, 3):
        os.close(fd)
        raise OSError(errno.ENODEV, "not the null device", "/dev/null")
    return fd


def _thermal_paths() -> list[str]:
    if not os.path.isdir(f"{CPUS}/cpu0/thermal_throttle"):  # virtual machines have none
        return []
    return [f"{CPUS}/{name}/thermal_throttle" for name in os.listdir(CPUS) if name[3:].isdigit()]


def _bind_read_only(path: str) -> None:
    try:
        kernel.mount(path, path, "", kernel.MS_BIND | kernel.MS_REC)
    except FileNotFoundError:
        return
    flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
    kernel.mount(path, path, "", kernel.MS_BIND | kernel.MS_REMOUNT | flags)


def require_propagation(steps: tuple[MountStep, ...], mountinfo: str) -> None:
    """A mount that is to share or follow the host's mounts must lie on one that shares them. Raises `UsageError`."""
    for step in steps:
        kind = step.propagation.removeprefix("r")
        if step.fstype or kind == "private" or step.source == "/sys":
            continue
        if not _is_shared(step.source, mountinfo):
            raise UsageError(
                f"the mount source '{step.source}' does not lie on a shared mount, so its propagation cannot be {step.propagation}",
                hint="make it one first: mount --make-shared",
            )


def _is_shared(path: str, mountinfo: str) -> bool:
    best, shared = "", False
    real = os.path.realpath(path)
    for line in mountinfo.splitlines():
        left, _, _ = line.partition(" - ")
        fields = left.split(" ")
        if len(fields) < 6:
            continue
        where = fields[4].encode().decode("unicode_escape")
        if len(where) >= len(best) and (real == where or real.startswith(where.rstrip("/") + "/")):
            best, shared = where, any(field.startswith("shared:") for field in fields[6:])
    return shared
