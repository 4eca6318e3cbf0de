"""The disk that a virtual machine writes to: a raw, sparse file with ext4 on it.

Its root has the directories `upper` and `work` of the machine's overlay (made by the agent, when they are missing). Once
a guest has written the file, the host does not parse it any more: it is read back by a guest (engines/vm/offline.py), and
grown by the guest's kernel when the agent mounts it.
"""

from __future__ import annotations

import errno
import fcntl
import os

from nagaya.errors import Conflict, HostError, LaunchError, NotFound, Unsupported, UsageError
from nagaya.kernel.locks import pack_lock
from nagaya.kernel.reflink import copy_run, data_runs

DEFAULT_BYTES = 10 << 30
LEAST_BYTES = 64 << 20
BLOCK = 4096  # also below 512 MiB, where mke2fs would take smaller ones
# All that Linux 4.x knows and a machine can use, named here so that no mke2fs.conf of this host has a say. No checksums of
# metadata: where the guest's kernel is emulated, mounting costs a third of what it does with them. The journal is what
# makes synced data survive the end of a VMM at any moment.
_FEATURES = (
    "none,sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr,has_journal,extent,huge_file,flex_bg,64bit,"
    "dir_nlink,extra_isize,uninit_bg"
)
# A discard makes the file one hole; mke2fs knows then that all tables are zero, and the guest has none left to clear.
_EXTENDED = "discard,lazy_itable_init=0,lazy_journal_init=1"
_JOURNAL_MIB = 64  # at most: it is written from end to end, and its blocks stay
_GROWTH_BLOCKS = (1 << 40) // BLOCK  # reserve descriptors for growing to 1 TiB, where it is smaller
_MAGIC, _MAGIC_AT = b"\x53\xef", 1024 + 56  # of ext4's superblock
_DISK = "/proc/self/fd/3"  # as the programs see it
_LINE_MAX = 4000  # of a debugfs command; it reads 8191 bytes at once and would take the rest for another command


def create_data_disk(path: str, size_bytes: int) -> None:
    """A new, empty disk at `path`. Takes 5 to 20 ms and less than 1 MiB of the host's, whatever its size up to 100 GiB.

    Raises `UsageError` for a size that is none, `Unsupported` without mke2fs, `HostError`, `LaunchError`; leaves nothing
    then. A disk that is there already stays as it is: `HostError`.
    """
    _make(path, size_bytes, "")


def populate_data_disk(path: str, size_bytes: int, upper: str) -> None:
    """A new disk at `path` whose `upper` is a copy of the directory `upper`, that of a container's overlay. Needs root.

    Everything is kept: owners, modes, times, hard links, holes, devices, attributes, overlayfs's marks. (Of a file whose
    path has a line end, or about 4000 bytes, the times are kept in whole seconds.) Nobody may write below `upper`
    meanwhile. The disk appears when it is whole and on the host's disk. Raises as `create_data_disk`.
    """
    if os.geteuid() != 0:
        raise Unsupported(
            "only root can put a container's files on a disk", finding="overlayfs's attributes are trusted.*"
        )
    from nagaya.storage.tree import remove_tree  # lazy: as the rest of this, rare

    temporary = f"{path}.tmp"
    remove_tree(temporary)
    _make(temporary, size_bytes, upper)
    try:
        os.rename(temporary, path)
    except OSError as error:
        raise HostError.from_os(error, "cannot make the machine's disk") from None


def reserve_data_disk(path: str, size_bytes: int) -> None:
    """Room for a disk at `path`, which `format_data_disk` makes one of when it is first used. Raises as `create_data_disk`."""
    _check_size(size_bytes)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(fd, size_bytes // BLOCK * BLOCK)
        except OSError:
            os.unlink(path)
            raise
        finally:
            os.close(fd)
    except OSError as error:
        hint = "the largest file that this file system can have is smaller" if error.errno == errno.EFBIG else ""
        raise HostError.from_os(error, "cannot make the machine's disk", hint=hint) from None


def is_blank(fd: int) -> bool:
    """Whether the disk is only reserved: there is no file system on it. Raises `OSError`."""
    return os.pread(fd, 2, _MAGIC_AT) != _MAGIC


def format_data_disk(fd: int) -> None:
    """Make an empty file system on what was reserved. Raises `Unsupported` without mke2fs, `HostError`, `LaunchError`."""
    try:
        _run(fd, _format_command(os.fstat(fd).st_size))
    except OSError as error:
        raise HostError.from_os(error, "cannot make the machine's disk") from None


def describe_format(size_bytes: int) -> str:
    """What an empty file system of that size is made by: disks of one description differ by what is random alone."""
    return " ".join(_format_command(size_bytes))


def copy_data_disk(source: str, fd: int) -> None:
    """Make what was reserved a copy of another disk, of the same size; until it is whole, it is blank. Raises `OSError`."""
    other = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        size = os.fstat(other).st_size
        if size != os.fstat(fd).st_size:
            raise OSError(errno.EINVAL, "the disks are not of one size")
        for start, end in data_runs(other, BLOCK, size):
            copy_run(other, fd, start, end)
        copy_run(other, fd, 0, BLOCK)  # it says that there is a file system, and so comes last
    finally:
        os.close(other)


def grow_data_disk(path: str, size_bytes: int) -> None:
    """Make the disk of a machine that does not run larger. The agent grows the file system at the machine's next start.

    Raises `UsageError` for a smaller size, `Conflict` while anybody uses the disk, `NotFound`, `HostError`.
    """
    size_bytes = size_bytes // BLOCK * BLOCK
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise NotFound(f"there is no disk {path}") from None
    except OSError as error:
        raise HostError.from_os(error, "cannot open the machine's disk") from None
    try:
        # A VMM holds such a lock for as long as it has the disk.
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, pack_lock(fcntl.F_WRLCK))
        if size_bytes < os.fstat(fd).st_size:
            raise UsageError(
                f"the machine's disk has {os.fstat(fd).st_size >> 20} MiB, and cannot be made smaller",
                hint="copy what is to be kept into a new machine: nagaya cp",
            )
        os.ftruncate(fd, size_bytes)
        os.fsync(fd)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise Conflict("the machine's disk is in use", hint="stop the machine first", state="in use") from None
        raise HostError.from_os(error, "cannot grow the machine's disk") from None
    finally:
        os.close(fd)


def _make(path: str, size_bytes: int, upper: str) -> None:
    _check_size(size_bytes)
    size_bytes = size_bytes // BLOCK * BLOCK
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise HostError.from_os(error, "cannot make the machine's disk") from None
    try:
        os.ftruncate(fd, size_bytes)
        if upper:
            _format_with(fd, size_bytes, upper, f"{path}.upper")
            os.fsync(fd)
        else:
            _run(fd, _format_command(size_bytes))
    except BaseException as error:
        os.unlink(path)
        if isinstance(error, OSError):
            hint = "the largest file that this file system can have is smaller" if error.errno == errno.EFBIG else ""
            raise HostError.from_os(error, "cannot make the machine's disk", hint=hint) from None
        raise
    finally:
        os.close(fd)


def _check_size(size_bytes: int) -> None:
    if size_bytes < LEAST_BYTES:
        raise UsageError(
            f"a machine's disk needs {LEAST_BYTES >> 20} MiB or more", hint="leave --storage away for 10 GiB"
        )


def _format_command(size_bytes: int) -> list[str]:
    blocks = size_bytes // BLOCK
    extended = f"{_EXTENDED},resize={_GROWTH_BLOCKS}" if blocks < _GROWTH_BLOCKS else _EXTENDED
    argv = [
        "mke2fs",
        "-q",
        "-F",
        "-b",
        str(BLOCK),
        "-I",
        "256",
        "-i",
        "16384",
        "-m",
        "0",
        "-O",
        _FEATURES,
        "-E",
        extended,
    ]
    if size_bytes >= 2 << 30:
        argv += ["-J", f"size={_JOURNAL_MIB}"]
    return [*argv, _DISK]


def _format_with(fd: int, size_bytes: int, upper: str, staging: str) -> None:
    """mke2fs copies a directory's content to the disk's root: `upper` is shown to it inside another one."""
    from nagaya.storage.tree import remove_tree

    remove_tree(staging)
    try:
        os.makedirs(f"{staging}/upper")
        argv = _format_command(size_bytes)
        _run(fd, [*argv[:-1], "-d", staging, argv[-1]], bind=(upper, f"{staging}/upper"))
        commands = b"".join(_time_commands(os.fsencode(upper)))
        _run(fd, ["debugfs", "-w", "-f", "/proc/self/fd/0", _DISK], feed=commands)
    finally:
        remove_tree(staging)


def _time_commands(upper: bytes) -> list[bytes]:
    """debugfs commands for what mke2fs leaves out: nanoseconds, and the bits of times beyond 2038 (ext4, i_mtime_extra)."""
    commands = []
    waiting = [b""]
    while waiting:
        path = waiting.pop()
        found = os.lstat(upper + path)
        if os.path.isdir(upper + path) and not os.path.islink(upper + path):
            waiting += [path + b"/" + name for name in os.listdir(upper + path)]
        name = (b"/upper" + path).replace(b'"', b'""')
        for field, time_ns in ((b"mtime", found.st_mtime_ns), (b"atime", found.st_atime_ns)):
            seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
            line = b'sif "%s" %s_extra %d\n' % (name, field, nanoseconds << 2 | (seconds + (1 << 31)) >> 32 & 3)
            if b"\n" not in line[:-1] and len(line) < _LINE_MAX:
                commands.append(line)
    return commands


def _run(fd: int, argv: list[str], *, bind: tuple[str, str] | None = None, feed: bytes = b"") -> None:
    """Run one of e2fsprogs on the disk `fd`, in `argv` called _DISK. With `bind` = (source, target) it sees that mounted."""
    search = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    programs = (f"{directory}/{argv[0]}" for directory in search.split(":") if directory)
    program = next((path for path in programs if os.access(path, os.X_OK)), "")
    if not program:
        raise Unsupported(
            f"a machine with a kernel of its own needs {argv[0]}, to make its disk",
            hint="apt install e2fsprogs",
            finding=f"{argv[0]} is not in the PATH, nor in /usr/sbin",
        )
    # What it reads and says is in memory: no pipe to watch, and none of subprocess's 16 ms on the way to a machine.
    given, said = (os.memfd_create(name, os.MFD_CLOEXEC) for name in ("given", "said"))
    high = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 10) for each in (given, said, said, fd)]
    try:
        view = memoryview(feed)
        while view:
            view = view[os.write(given, view) :]
        os.lseek(given, 0, os.SEEK_SET)
        status = os.waitstatus_to_exitcode(os.waitpid(_start(program, argv, high, bind), 0)[1])
        told = os.pread(said, 64 << 10, 0).decode(errors="replace").strip()
    finally:
        for each in (given, said, *high):
            os.close(each)
    if status:
        raise LaunchError(
            f"{argv[0]} could not make the machine's disk: {told.splitlines()[-1] if told else f'status {status}'}",
            hint="look whether the disk is full (df -h), and whether --storage has room for the machine's files",
            command=" ".join(argv), status=status, log_tail=told[-2000:],
        )  # fmt: skip


def _start(program: str, argv: list[str], fds: list[int], bind: tuple[str, str] | None) -> int:
    """Execute it with `fds`, which are larger, as its descriptors 0 to 3; its pid."""
    environment = {"PATH": os.defpath, "LC_ALL": "C", "MKE2FS_CONFIG": "/dev/null", "DEBUGFS_PAGER": "cat"}
    if bind is None:
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(fds)]
        return os.posix_spawn(program, argv, environment, file_actions=actions)
    from nagaya.kernel import mount as kernel
    from nagaya.kernel import namespaces

    pid = os.fork()
    if pid:
        return pid
    try:
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
        namespaces.unshare(namespaces.CLONE_NEWNS)
        kernel.mount("", "/", "", kernel.MS_PRIVATE | kernel.MS_REC)
        kernel.mount(bind[0], bind[1], "", kernel.MS_BIND)
        os.execve(program, argv, environment)
    except OSError as error:
        os.write(2, f"cannot show it the machine's files: {error.strerror}\n".encode())
    finally:
        os._exit(1)
