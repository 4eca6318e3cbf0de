"""mount(2), the new mount API (fsopen(2) and friends), pivot_root(2), openat2(2)."""

from __future__ import annotations

import ctypes
import errno
import os

from nagaya.kernel.libc import (
    SYS_FSCONFIG,
    SYS_FSMOUNT,
    SYS_FSOPEN,
    SYS_MOUNT_SETATTR,
    SYS_MOVE_MOUNT,
    SYS_OPEN_TREE,
    SYS_OPENAT2,
    SYS_PIVOT_ROOT,
    fail,
    libc,
    syscall,
)

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_EMPTY_PATH = 0x40
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6
FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_IDMAP = 0x100000

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_IN_ROOT = 0x10


class MountAttr(ctypes.Structure):
    """struct mount_attr, <linux/mount.h>."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


class OpenHow(ctypes.Structure):
    """struct open_how, <linux/openat2.h>."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    if libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        fstype.encode() or None,
        ctypes.c_ulong(flags),
        os.fsencode(data) or None,
    ):
        raise fail(f"mount {fstype}".rstrip(), target)


def umount(target: str, flags: int = 0) -> None:
    if libc.umount2(os.fsencode(target), ctypes.c_int(flags)):
        raise fail("umount", target)


def pivot_root(new_root: str, put_old: str) -> None:
    syscall("pivot_root", SYS_PIVOT_ROOT, os.fsencode(new_root), os.fsencode(put_old), path=new_root)


def open_tree(path: str, flags: int, directory: int = AT_FDCWD) -> int:
    """A descriptor of the mount at `path`; with OPEN_TREE_CLONE a detached copy of it."""
    return syscall(
        "open_tree", SYS_OPEN_TREE, ctypes.c_int(directory), os.fsencode(path), ctypes.c_uint(flags), path=path
    )


def move_mount(mount_fd: int, target_fd: int) -> None:
    """Attach a detached mount on top of what `target_fd` is."""
    syscall(
        "move_mount", SYS_MOVE_MOUNT, ctypes.c_int(mount_fd), b"", ctypes.c_int(target_fd), b"",
        ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH),
    )  # fmt: skip


def mount_setattr(
    fd: int, *, set_: int = 0, clear: int = 0, propagation: int = 0, userns_fd: int = 0, recursive: bool = False
) -> None:
    """Change the attributes of the mount that `fd` is (Linux 5.12)."""
    attributes = MountAttr(set_, clear, propagation, userns_fd)
    syscall(
        "mount_setattr", SYS_MOUNT_SETATTR, ctypes.c_int(fd), b"",
        ctypes.c_uint(AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)),
        ctypes.byref(attributes), ctypes.c_size_t(ctypes.sizeof(attributes)),
    )  # fmt: skip


def fsopen(fstype: str) -> int:
    return syscall("fsopen", SYS_FSOPEN, fstype.encode(), ctypes.c_uint(FSOPEN_CLOEXEC))


def fsconfig_string(fd: int, key: str, value: str) -> None:
    """Set one option. The kernel takes values of at most 255 bytes."""
    syscall(
        f"fsconfig {key}", SYS_FSCONFIG, ctypes.c_int(fd), ctypes.c_uint(FSCONFIG_SET_STRING), key.encode(),
        os.fsencode(value), ctypes.c_int(0), path=value,
    )  # fmt: skip


def fsconfig_create(fd: int) -> None:
    syscall(
        "fsconfig create",
        SYS_FSCONFIG,
        ctypes.c_int(fd),
        ctypes.c_uint(FSCONFIG_CMD_CREATE),
        None,
        None,
        ctypes.c_int(0),
    )


def fsmount(fd: int, attributes: int = 0) -> int:
    """A detached mount of a created file system context."""
    return syscall("fsmount", SYS_FSMOUNT, ctypes.c_int(fd), ctypes.c_uint(FSMOUNT_CLOEXEC), ctypes.c_uint(attributes))


def make_memory_directory() -> int:
    """A directory in a tmpfs that is mounted nowhere: it goes with the last descriptor of anything in it. Raises `OSError`."""
    context = fsopen("tmpfs")
    try:
        fsconfig_string(context, "mode", "0700")
        fsconfig_create(context)
        return fsmount(context, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC)
    finally:
        os.close(context)


def open_in_root(root: int, path: str, flags: int, *, mode: int = 0, follow: bool = True) -> int:
    """Open `path` as if directory descriptor `root` were /: neither "..", nor absolute links, lead out of it.

    With `follow` off, any symbolic link on the way is ELOOP.
    """
    resolve = RESOLVE_IN_ROOT | (RESOLVE_NO_MAGICLINKS if follow else RESOLVE_NO_SYMLINKS)
    how = OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    while True:
        try:
            return syscall(
                "openat2", SYS_OPENAT2, ctypes.c_int(root), os.fsencode(path), ctypes.byref(how),
                ctypes.c_size_t(ctypes.sizeof(how)), path=path,
            )  # fmt: skip
        except OSError as error:
            if error.errno != errno.EAGAIN:  # a rename somewhere raced with "..": openat2(2) says to try again
                raise
