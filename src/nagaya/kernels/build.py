"""From an archive of Linux to a vmlinux in the cache: unpack, configure, compile, strip, put in place.

One build at a time, under a lock that the compilers inherit: should this process be killed, the next build waits until
the last of them has ended, and then removes what they left. Nothing half-built ever has a kernel's name.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nagaya.errors import HostError, LaunchError, UsageError
from nagaya.kernels import cache, config, patches, sources
from nagaya.kernels.architectures import Architecture, find_architecture
from nagaya.kernels.cache import Kernel, Record
from nagaya.static import NamedTuple, Protocol
from nagaya.storage import records
from nagaya.storage.lock import FileLock
from nagaya.storage.tree import remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess

FORMAT = "1"  # part of each id: to be raised when what this module does to a source changes the kernel
USUAL_STEPS = 1960  # of the shipped fragment on the tested version; the newest kernel's own number is better
NEEDED_BYTES = 1 << 30  # the shipped fragment's sources and objects
NEEDED_BYTES_WHOLE = 3 << 30  # all of Linux, and what a user's fragment may turn on
GRACE_S = 5.0
_STEP = re.compile(r"  [A-Z][A-Z0-9_]* +(\S+)")  # "  CC      fs/ext4/inode.o"


class Progress(Protocol):
    """Receives what a build does."""

    def step(self, text: str) -> None:
        """A part of the work begins."""

    def count(self, done: int, expected: int, what: str) -> None:
        """So many files are made, of about so many; `what` is the latest."""


class Request(NamedTuple):
    """What to build. `jobs` 0 is a compiler for each CPU that this process may use; paths may be ""."""

    jobs: int = 0
    fragment: str = ""
    source: str = ""
    force: bool = False
    keep: bool = False
    architecture: str = ""  # as uname(2) calls it; "" = this host's


def build_kernel(request: Request, progress: Progress) -> Kernel:
    """Build what is asked for, or find it built already. The shipped fragment takes minutes.

    Raises `NotFound` and `Unsupported` for missing packages, `UsageError` for a configuration that cannot be had,
    `LaunchError` with the compiler's last words, `HostError`.
    """
    architecture = find_architecture(request.architecture)
    wanted = config.read_shipped(architecture.name)
    if request.fragment:
        wanted |= config.read_fragment(request.fragment)
    source = sources.open_source(request.source)
    sources.require_tools(architecture)
    compiler = sources.compiler_version(architecture)
    name = _name(architecture, source, wanted, compiler)
    directory = cache.cache_directory()
    try:
        os.makedirs(directory, exist_ok=True)
        with _locked(directory, progress) as lock:
            built = None if request.force else cache.load_kernel(directory, name)
            if built is None:
                work = _Work(directory, name, lock, architecture, source, wanted, compiler, request, progress)
                built = work.run()
            else:
                progress.step(f"kernel {built.id} is here already")
            return built
    except OSError as error:
        raise HostError.from_os(error, "cannot build a kernel", hint=_space_hint(error, directory)) from None


def _space_hint(error: OSError, directory: str) -> str:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"a build needs {NEEDED_BYTES >> 20} MiB in {directory}; XDG_CACHE_HOME chooses another place"
    return ""


def _name(architecture: Architecture, source: sources.Source, wanted: dict[str, str], compiler: str) -> str:
    import hashlib  # lazy: only a build needs it

    added = [patch.digest() for patch in patches.shipped(architecture.name)]
    text = "\n".join((FORMAT, architecture.flags, source.digest, compiler, config.render(wanted), *added))
    return hashlib.sha256(text.encode()).hexdigest()[: cache.ID_DIGITS]


@contextmanager
def _locked(directory: str, progress: Progress) -> Iterator[FileLock]:
    """Hold the one lock of a cache, and begin with nothing left of builds and removals that were cut off."""
    lock = FileLock(os.path.join(directory, "lock"))
    if not lock.acquire(wait=False):
        progress.step("waiting for another build to end")
        lock.acquire()
    with lock:
        for name in os.listdir(directory):
            damaged = len(name) == cache.ID_DIGITS and cache.load_kernel(directory, name) is None
            if damaged or ".gone-" in name:
                remove_tree(os.path.join(directory, name))
        yield lock


class _Work:
    """One build, below `build/` in the cache."""

    def __init__(
        self,
        directory: str,
        name: str,
        lock: FileLock,
        architecture: Architecture,
        source: sources.Source,
        wanted: dict[str, str],
        compiler: str,
        request: Request,
        progress: Progress,
    ) -> None:
        self.directory = directory
        self.name = name
        self.lock = lock
        self.architecture = architecture
        self.source = source
        self.wanted = wanted
        self.compiler = compiler
        self.request = request
        self.progress = progress
        self.top = os.path.join(directory, "build")
        self.tree = os.path.join(self.top, "linux")
        self.made = os.path.join(self.top, name)
        self.steps = 0

    def run(self) -> Kernel:
        began_s = time.monotonic()
        remove_tree(self.top)
        self._require_space()
        os.makedirs(self.tree)
        os.mkdir(self.made)
        try:
            self._unpack()
            self._patch()
            self._configure()
            self._compile()
            self._strip()
            self._store(time.monotonic() - began_s)
            built = self._put_in_place()
        except LaunchError:
            raise  # the log stays, and the tree that it speaks of: the next build removes both
        except BaseException:
            remove_tree(self.top)
            raise
        if not self.request.keep:
            remove_tree(self.top)
        return built

    def _require_space(self) -> None:
        needed = NEEDED_BYTES_WHOLE if self.request.fragment else NEEDED_BYTES
        found = os.statvfs(self.directory)
        free = found.f_bavail * found.f_frsize
        if free < needed:
            raise HostError(
                f"a build needs {needed >> 20} MiB in {self.directory}, and {free >> 20} MiB are free",
                hint="free some space, or set XDG_CACHE_HOME to a directory on another disk",
                operation="statvfs",
                path=self.directory,
            )

    def _unpack(self) -> None:
        self.progress.step(f"unpacking {self.source.path}")
        # A fragment of the user's may turn on what the shipped one never needs.
        left_out = () if self.request.fragment else sources.left_out(self.architecture)
        self._run(sources.unpack_command(self.source, self.tree, left_out=left_out), what="tar")
        if not os.path.exists(os.path.join(self.tree, "Kbuild")):
            raise UsageError(
                f"{self.source.path} is not a source of Linux", hint="it has to unpack to one directory with a Kbuild"
            )

    def _patch(self) -> None:
        for patch in patches.shipped(self.architecture.name):
            if not patch.fits(self.tree):
                self.progress.step(f"leaving out {patch.name}: it was not written for this Linux")
                self.wanted = {name: value for name, value in self.wanted.items() if name != patch.symbol}
                continue
            self._run(patch.command(self.tree), what="patch")
            patch.copy_files(self.tree)

    def _configure(self) -> None:
        self.progress.step("configuring")
        wanted = os.path.join(self.top, "wanted")
        records.write_file(wanted, config.render(self.wanted).encode())
        # What the file does not name gets "n" where Kconfig allows: allnoconfig on top of which we stand.
        self._run([*self._make(), "-s", f"KCONFIG_ALLCONFIG={wanted}", "allnoconfig"], what="make allnoconfig")
        lost = config.find_lost(self.wanted, config.read_fragment(os.path.join(self.tree, ".config")))
        if lost:
            first = ", ".join(f"{line.name} is {line.found} instead of {line.wanted}" for line in lost[:4])
            raise UsageError(
                f"this Linux cannot be configured so: {first}" + (f" and {len(lost) - 4} more" if lost[4:] else ""),
                hint="a symbol that it depends on is off, or this version does not have it; "
                "a line of --config wins over the shipped one",
            )

    def _compile(self) -> None:
        jobs = self.request.jobs or len(os.sched_getaffinity(0))
        self.progress.step(f"compiling with {jobs} job{'' if jobs == 1 else 's'}")
        newest = cache.find_kernel(self.architecture.name)
        expected = newest.record.steps if newest is not None else USUAL_STEPS

        def show(line: str) -> None:
            match = _STEP.match(line)
            if match is not None:
                self.steps += 1
                self.progress.count(self.steps, max(expected, self.steps), match[1].removeprefix(f"{self.tree}/"))

        self._run(
            [*self._make(), f"-j{jobs}", self.architecture.target], what=f"make {self.architecture.target}", show=show
        )

    def _strip(self) -> None:
        """Keep the symbols of an ELF, a twelfth of it: profiles read them, and the VMM where KVM is software."""
        source = os.path.join(self.tree, self.architecture.image)
        target = os.path.join(self.made, self.architecture.file)
        if self.architecture.target == "vmlinux":
            self._run([f"{self.architecture.cross}strip", "--strip-debug", "-o", target, source], what="strip")
        else:
            os.rename(source, target)
        os.chmod(target, 0o644)

    def _store(self, build_s: float) -> None:
        import hashlib  # lazy: only a build needs it

        image = os.path.join(self.made, self.architecture.file)
        with open(image, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        with open(os.path.join(self.tree, ".config"), "rb") as file:
            records.write_file(os.path.join(self.made, "config"), file.read(), durable=True, mode=0o644)
        record = Record(
            version=_read_version(self.tree),
            architecture=self.architecture.name,
            fragment=os.path.abspath(self.request.fragment) if self.request.fragment else "shipped",
            source=self.source.path,
            compiler=self.compiler,
            built_ns=time.time_ns(),
            build_s=round(build_s, 1),
            steps=self.steps,
            size_bytes=os.stat(image).st_size,
            digest=digest,
        )
        records.store(os.path.join(self.made, "kernel.json"), record, durable=True)

    def _put_in_place(self) -> Kernel:
        target = os.path.join(self.directory, self.name)
        if os.path.lexists(target):  # --force
            os.rename(target, f"{target}.gone-{os.getpid()}")
        os.rename(self.made, target)
        remove_tree(f"{target}.gone-{os.getpid()}")
        built = cache.load_kernel(self.directory, self.name)
        if built is None:
            raise HostError(f"the kernel {self.name} vanished after it was built", hint="build it again")
        return built

    def _make(self) -> list[str]:
        """make(1) with what would change the kernel from one build to the next fixed: same name, same bytes."""
        return [
            "make", "-C", self.tree, f"ARCH={self.architecture.make}", f"CROSS_COMPILE={self.architecture.cross}",
            f"KCFLAGS={self.architecture.flags}", "KBUILD_BUILD_USER=nagaya", "KBUILD_BUILD_HOST=nagaya",
            "KBUILD_BUILD_VERSION=1", f"KBUILD_BUILD_TIMESTAMP={time.strftime('%F %T UTC', time.gmtime(_epoch(self.tree)))}",
        ]  # fmt: skip

    def _run(self, command: list[str], *, what: str, show: Callable[[str], None] | None = None) -> None:
        """Run a command to its end, its output in the log and by line to `show`; stopped with us when we are."""
        import subprocess  # lazy: 8 ms

        path = os.path.join(self.top, "log")
        with open(path, "a", encoding="utf-8", errors="replace") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                env=_environment(os.environ),
                pass_fds=(self.lock.fd,),
                process_group=0,  # a ctrl-c is ours to pass on
                preexec_fn=_die_with(os.getpid()),
            )
            assert process.stdout is not None
            try:
                with process.stdout:
                    for line in process.stdout:
                        log.write(line)
                        if show is not None:
                            show(line)
                status = process.wait()
            except BaseException:
                _stop(process)
                raise
        if status:
            raise LaunchError(
                f"{what} failed with status {status}",
                hint=f"the whole log is {path}",
                command=" ".join(command),
                status=status,
                log_tail=_tail(path),
            )


def _die_with(parent: int) -> Callable[[], None]:
    """To be run in the child: SIGTERM when we are killed, upon which make stops its compilers."""
    import signal

    from nagaya.kernel.process import PR_SET_PDEATHSIG, prctl  # lazy: ctypes costs 2 ms

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)  # we were killed before it could ask

    return ask


def _stop(process: subprocess.Popen[str]) -> None:
    """SIGTERM to the whole group, and SIGKILL to who is left."""
    import signal
    import subprocess

    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    process.wait()


def _environment(given: os._Environ[str]) -> dict[str, str]:
    """Ours without what would change the kernel or the language of the messages."""
    ours = {
        name: value
        for name, value in given.items()
        if not name.startswith(("KBUILD_", "KCONFIG_", "KC", "KA", "LC_", "MAKE", "MFLAGS"))
        and name
        not in ("ARCH", "SUBARCH", "CROSS_COMPILE", "CC", "HOSTCC", "LD", "LLVM", "LDFLAGS", "CFLAGS", "V", "O")
    }
    return ours | {"LC_ALL": "C"}


def _epoch(tree: str) -> int:
    """When the source was made, in seconds: what the kernel shows as the time of its build."""
    return int(os.stat(os.path.join(tree, "Makefile")).st_mtime)


def _read_version(tree: str) -> str:
    """What `uname -r` will say."""
    with open(os.path.join(tree, "include", "config", "kernel.release"), encoding="utf-8") as file:
        return file.read().strip()


def _tail(path: str, *, most_bytes: int = 4096, lines: int = 20) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - most_bytes))
        return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-lines:])
