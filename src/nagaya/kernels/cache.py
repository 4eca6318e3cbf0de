"""The kernels that have been built: a directory each, named by the content that they were made of.

    $XDG_CACHE_HOME/nagaya/kernels/ID/vmlinux        x86_64: uncompressed ELF, stripped
                                  /ID/Image          other CPUs: what their boot loaders take, uncompressed
                                  /ID/config         the whole .config
                                  /ID/kernel.json    `Record`
                                  /build/            source, objects and log of the build that goes on
                                  /lock              held by whoever builds

A kernel is complete before its directory has its name; what has no readable record is none.
"""

from __future__ import annotations

import os

from nagaya.errors import HostError, IntegrityError, NotFound, UsageError
from nagaya.kernels.architectures import ARCHITECTURES, X86_64
from nagaya.static import NamedTuple
from nagaya.storage import paths, records
from nagaya.storage.lock import FileLock
from nagaya.storage.tree import remove_tree

ID_DIGITS = 16
_DIGITS = frozenset("0123456789abcdef")
BUILD_HINT = "build one with 'nagaya kernel build'"


class Record(NamedTuple):
    """kernel.json. `fragment` is "shipped", or the path that was given on top of it; sizes in bytes, times in ns."""

    version: str
    architecture: str
    fragment: str
    source: str
    compiler: str
    built_ns: int
    build_s: float
    steps: int
    size_bytes: int
    digest: str


class Kernel(NamedTuple):
    """A built kernel; `path` is its image."""

    id: str
    path: str
    record: Record


def cache_directory() -> str:
    """Where this user's kernels are."""
    return paths.cache_directory("kernels")


def list_kernels() -> list[Kernel]:
    """Every complete kernel, the newest first."""
    directory = cache_directory()
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise HostError.from_os(error, "cannot read the cache of kernels") from None
    found = [kernel for name in names if (kernel := load_kernel(directory, name)) is not None]
    return sorted(found, key=lambda kernel: kernel.record.built_ns, reverse=True)


def load_kernel(directory: str, name: str) -> Kernel | None:
    """The kernel in the cache at `directory` that is called `name`; None when it is damaged, or none at all."""
    if len(name) != ID_DIGITS or not _DIGITS.issuperset(name):
        return None
    try:
        record = records.load(os.path.join(directory, name, "kernel.json"), Record)
        path = os.path.join(directory, name, ARCHITECTURES.get(record.architecture, X86_64).file)
        size = os.stat(path).st_size
    except (OSError, IntegrityError):
        return None
    return Kernel(name, path, record) if size == record.size_bytes else None


def find_kernel(architecture: str = "") -> Kernel | None:
    """The newest built kernel for `architecture` (as uname(2) calls it); "" = this host's CPU."""
    architecture = architecture or os.uname().machine
    return next((kernel for kernel in list_kernels() if kernel.record.architecture == architecture), None)


def get_kernel(name: str = "", *, architecture: str = "") -> Kernel:
    """The kernel whose id begins with `name`, or what `find_kernel` finds. Raises `NotFound` with what to do."""
    if not name:
        newest = find_kernel(architecture)
        if newest is None and architecture not in ("", os.uname().machine):
            raise NotFound(
                f"no guest kernel for {architecture} has been built yet",
                hint=f"build one with 'nagaya kernel build --arch {architecture}'",
            )
        if newest is None:
            raise NotFound("no guest kernel has been built yet", hint=BUILD_HINT)
        return newest
    found = [kernel for kernel in list_kernels() if kernel.id.startswith(name)]
    if not found:
        raise NotFound(f"there is no guest kernel '{name}'", hint="'nagaya kernel ls' lists them")
    if len(found) > 1:
        raise UsageError(f"'{name}' begins the ids of {len(found)} kernels", hint="give more digits of the id")
    return found[0]


def remove_kernel(kernel: Kernel) -> None:
    """Take a kernel away; a machine that runs it keeps it. Its name goes first, so that no half of it is found."""
    directory = os.path.dirname(kernel.path)
    gone = f"{directory}.gone-{os.getpid()}"
    try:
        os.rename(directory, gone)
        remove_tree(gone)
    except FileNotFoundError:
        return  # somebody else was quicker
    except OSError as error:
        raise HostError.from_os(error, f"cannot remove the kernel {kernel.id}") from None


def remove_build() -> None:
    """Take away what `--keep` or a build that failed has left; nothing when a build goes on."""
    directory = cache_directory()
    lock = FileLock(os.path.join(directory, "lock"))
    try:
        if lock.acquire(wait=False):
            with lock:
                remove_tree(os.path.join(directory, "build"))
    except FileNotFoundError:
        return  # nothing was ever built
    except OSError as error:
        raise HostError.from_os(error, "cannot remove the last build's files") from None
