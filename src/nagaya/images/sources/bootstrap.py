"""Images where no registry can be reached: `debian[:SUITE]` by mmdebstrap, `busybox` from Debian's busybox-static."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack

from nagaya.errors import HostError, LaunchError, NotFound, Unsupported
from nagaya.images.content import Blobs
from nagaya.images.foreign import Enter, find_emulator, foreign_programs
from nagaya.images.manifest import Descriptor, format_time, host_platform
from nagaya.images.pack import compress_blob, pack_layer
from nagaya.images.progress import Progress
from nagaya.images.references import Reference
from nagaya.images.sources.apt_sources import find_debian_sources, find_proxies, find_release_date, rewrite_suite
from nagaya.images.sources.copy import put_image
from nagaya.images.streams import TarStream
from nagaya.static import IO, BinaryIO, cast

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    import threading

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NUMBERS = {"10": "buster", "11": "bullseye", "12": "bookworm", "13": "trixie", "14": "forky"}
SUITES = (*NUMBERS.values(), "sid", "unstable", "testing", "stable", "oldstable")
SLIM = "-slim"
# Debian's words for CPUs that came later.
_FIRST_RELEASES = {"riscv64": 13}
INSTALLED = "/bin/busybox"
PT_INTERP = 3
# What Debian calls the CPUs of platforms.
DEBIAN_ARCHITECTURES = {
    "linux/386": "i386", "linux/amd64": "amd64", "linux/arm/v5": "armel", "linux/arm/v7": "armhf", "linux/arm64": "arm64",
    "linux/ppc64le": "ppc64el", "linux/riscv64": "riscv64", "linux/s390x": "s390x",
}  # fmt: skip


def find_bootstrap(reference: Reference) -> DebianSource | BusyboxSource | None:
    """The bootstrap for a bare name, if there is one."""
    if reference.repository == "busybox" and reference.tag in ("latest", "stable", "static"):
        return BusyboxSource()
    if reference.repository != "debian":
        return None
    tag = reference.tag.removesuffix(SLIM)
    suite = host_suite() if tag == "latest" else NUMBERS.get(tag.partition(".")[0], tag)
    return DebianSource(suite, slim=reference.tag.endswith(SLIM)) if suite in SUITES else None


def host_suite() -> str:
    """This host's own suite when it is a Debian, else "stable"."""
    try:
        with open("/etc/os-release", encoding="utf-8") as file:
            pairs = dict(line.rstrip().split("=", 1) for line in file if "=" in line)
    except OSError:
        return "stable"
    name = pairs.get("VERSION_CODENAME", "").strip('"')
    return name if pairs.get("ID", "").strip('"') == "debian" and name in SUITES else "stable"


def _put(
    blobs: Blobs,
    layer: Descriptor,
    diff_id: str,
    *,
    platform: str,
    command: str,
    made_by: str,
    labels: dict[str, str],
    created_s: int,
) -> Descriptor:
    import json

    system, architecture, *variant = platform.split("/")
    created = format_time(created_s * 1_000_000_000)
    config: dict[str, object] = {
        "created": created,
        "os": system,
        "architecture": architecture,
        "config": {"Cmd": [command], "Env": [PATH], "Labels": labels},
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [{"created": created, "created_by": made_by}],
    }
    if variant:
        config["variant"] = variant[0]
    return put_image(blobs, json.dumps(config, separators=(",", ":")).encode(), (layer,))


def _set_epoch() -> int:
    """SOURCE_DATE_EPOCH as the environment has it (reproducible-builds.org), 0 when it has none."""
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 12 else 0


def _refuse_platform(platform: str, what: str) -> None:
    if platform and platform != host_platform():
        raise Unsupported(
            f"the bootstrap of {what} makes images for this host only ({host_platform()}), not for {platform}",
            hint="pull it from a registry instead",
        )


class DebianSource:
    """A minimal Debian of one suite, from the machine's own apt sources."""

    def __init__(self, suite: str, *, slim: bool = False) -> None:
        self._suite = suite
        self._slim = slim
        self.label = f"bootstrap debian {suite} (mmdebstrap)"

    def fetch(self, blobs: Blobs, *, platform: str, progress: Progress) -> Descriptor:
        """See `Source.fetch`. Takes 10 to 30 seconds, most of it downloads and dpkg."""
        platform = platform or host_platform()
        if platform not in DEBIAN_ARCHITECTURES:
            raise Unsupported(f"there is no Debian for {platform}", hint=f"for {', '.join(DEBIAN_ARCHITECTURES)}")
        foreign = platform != host_platform()
        require_port(self._suite, DEBIAN_ARCHITECTURES[platform])
        found = find_debian_sources()
        if foreign:  # a line for this host's CPU alone stands for its archive
            found = [one._replace(options=tuple(o for o in one.options if not o.startswith("arch="))) for one in found]
        lines = rewrite_suite(found, self._suite)
        if not lines:
            raise Unsupported(
                "this machine's apt has no Debian sources to make a Debian from",
                hint="add a 'deb' line to /etc/apt/sources.list, or pull the image from a registry",
                finding="/etc/apt/sources.list and /etc/apt/sources.list.d were read",
            )
        # No file is to be younger than the archive was: the same packages then make the same image on every day.
        epoch_s = _set_epoch() or find_release_date(self._suite) or int(time.time())
        command = ["mmdebstrap", "--variant=minbase", "--format=tar", *HOST_PARTS]
        if foreign:
            command.append(f"--architectures={DEBIAN_ARCHITECTURES[platform]}")
        if self._slim:
            command += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "info", "locale")]
            command += ["--dpkgopt=path-include=/usr/share/doc/*/copyright"]
        command += [f"--aptopt={option}" for option in find_proxies()]
        command += [self._suite, "-", *lines]
        with ExitStack() as stack:
            enter = None
            if foreign and not os.geteuid() and (emulated := _find_emulated(platform)):
                command.insert(1, "--skip=check/qemu")  # which looks for what is registered with the host
                enter = stack.enter_context(foreign_programs(emulated))
            hint = FOREIGN_HINT.format(platform) if foreign and enter is None else USUAL_HINT
            layer, diff_id = _run(command, blobs, progress, label=self.label, epoch_s=epoch_s, hint=hint, enter=enter)
        labels = {"org.opencontainers.image.title": "debian", "org.opencontainers.image.version": self._suite}
        made_by = f"mmdebstrap --variant=minbase {self._suite}"
        return _put(
            blobs, layer, diff_id, platform=platform, command="bash", made_by=made_by, labels=labels, created_s=epoch_s
        )


# mmdebstrap leaves in what it copied from this host.
HOST_PARTS = ('--customize-hook=cd "$1/etc" && rm -f resolv.conf hostname && : > resolv.conf && : > hostname',)


USUAL_HINT = "check that 'apt-get update' works on this machine"
# Its packages' own scripts have to run, in an emulator. Where `foreign_programs` knows none, the host has to be told of one.
FOREIGN_HINT = (
    "check that 'apt-get update' works on this machine, and that it runs programs for {}: as root, "
    "apt-get install qemu-user-static; for other CPUs than arm64 and riscv64, and plain users, also binfmt-support arch-test"
)


def _find_emulated(platform: str) -> str:
    """The CPU, by uname(2)'s word, whose programs can run without this host being told of them; "" where they cannot."""
    architecture = {"linux/arm64": "aarch64", "linux/riscv64": "riscv64"}.get(platform, "")
    try:
        return architecture if architecture and find_emulator(architecture) else ""
    except Unsupported:
        return ""


def require_port(suite: str, architecture: str) -> None:
    """Raise `Unsupported` where Debian had not got that far yet. `architecture` is Debian's word."""
    number = next((int(number) for number, name in NUMBERS.items() if name == suite), 0)
    first = _FIRST_RELEASES.get(architecture, 0)
    if number and number < first:
        raise Unsupported(
            f"Debian {suite} was not made for {architecture}",
            hint=f"the first one with it: debian:{NUMBERS[str(first)]}",
        )


def _run(
    command: list[str], blobs: Blobs, progress: Progress, *, label: str, epoch_s: int, hint: str, enter: Enter | None
) -> tuple[Descriptor, str]:
    """Run mmdebstrap and take the tar from its standard output: (layer, diff id). Nothing stays when it fails.

    `enter` is called in the child first.
    """
    import subprocess  # lazy: 8 ms
    import threading

    progress.start("mmdebstrap", label, 0)
    tail: list[str] = []
    environment = {
        **os.environ,
        "LC_ALL": "C.UTF-8",
        "DEBIAN_FRONTEND": "noninteractive",
        "SOURCE_DATE_EPOCH": str(epoch_s),
    }
    environment.pop("TMPDIR", None)  # a place that only we may enter would stop apt's own user
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            preexec_fn=_beginning(enter),
        )
    except FileNotFoundError:
        raise Unsupported(
            "making a Debian image needs the program 'mmdebstrap', which is not installed",
            hint="apt install mmdebstrap",
        ) from None
    assert process.stdout is not None
    assert process.stderr is not None
    listener = threading.Thread(target=_listen, args=(process.stderr, tail, progress), name="mmdebstrap", daemon=True)
    reading = ExitStack()
    try:
        listener.start()
        reading.callback(process.stdout.close)
        chunks = reading.enter_context(TarStream(cast(BinaryIO, process.stdout)))
        chunks.on_chunk(lambda done: progress.advance("mmdebstrap", done))
        layer = compress_blob(blobs, _checked(chunks, process, listener, command, tail, hint))
        diff_id = chunks.diff_id
    finally:
        _end(process)  # first of all: closing its output waits for the thread that reads it, which waits for its end
        reading.close()
        listener.join()
    progress.finish("mmdebstrap")
    return layer, diff_id


def _checked(
    chunks: TarStream,
    process: subprocess.Popen[bytes],
    listener: threading.Thread,
    command: list[str],
    tail: list[str],
    hint: str,
) -> Iterator[bytes]:
    """The chunks; an exception in the place of their end when mmdebstrap failed, so that no blob comes of them."""
    yield from chunks
    status = process.wait()
    listener.join()
    if status or not chunks.size:
        said = [line for line in tail if line.startswith("E:")] or tail
        raise LaunchError(
            f"mmdebstrap failed: {said[-1] if said else f'status {status}, and no reason given'}",
            hint=hint,
            command=" ".join(command[:3]),
            status=status,
            log_tail="\n".join(tail[-20:]),
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """After an interruption: mmdebstrap removes its directory when it is asked to end, which takes a while."""
    import subprocess

    if process.poll() is None:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _beginning(enter: Enter | None) -> Enter:
    """What the child does first: an interrupted or killed pull must not leave mmdebstrap at work."""
    from nagaya.kernel.process import PR_SET_PDEATHSIG, prctl

    def begin() -> None:
        if enter is not None:
            enter()  # first: with other credentials the kernel may forget what follows (prctl(2))
        prctl(PR_SET_PDEATHSIG, 15)

    return begin


def _listen(stream: IO[bytes], tail: list[str], progress: Progress) -> None:
    with stream:
        _follow(stream, tail, progress)


def _follow(stream: IO[bytes], tail: list[str], progress: Progress) -> None:
    for raw in stream:
        line = raw.decode(errors="replace").strip()
        if not line:
            continue
        tail.append(line)
        del tail[:-50]
        if line.startswith("I: ") and not line.startswith("I: automatically"):
            progress.step(f"mmdebstrap: {line[3:]}")


class BusyboxSource:
    """One static busybox with a link for each of its programs."""

    label = "bootstrap busybox (busybox-static)"

    def fetch(self, blobs: Blobs, *, platform: str, progress: Progress) -> Descriptor:
        """See `Source.fetch`. Takes a moment when busybox-static is installed, else fetches the package by apt."""
        import tempfile  # lazy: 8 ms

        _refuse_platform(platform, "busybox")
        try:
            with tempfile.TemporaryDirectory(prefix="nagaya-busybox-") as work:
                program = INSTALLED if is_static(INSTALLED) else _download(work, progress)
                root = f"{work}/root"
                epoch_s = _set_epoch() or int(os.stat(program).st_mtime)
                _make_tree(root, program, epoch_s)
                packed = pack_layer(blobs, root, overlay=False, progress=progress)
        except OSError as error:
            raise HostError.from_os(error, "cannot make the busybox image") from None
        return _put(
            blobs,
            packed.descriptor,
            packed.diff_id,
            platform=host_platform(),
            command="sh",
            made_by="busybox-static",
            labels={"org.opencontainers.image.title": "busybox"},
            created_s=epoch_s,
        )


def is_static(path: str) -> bool:
    """Whether an ELF program needs no dynamic loader: it has no PT_INTERP segment (elf(5))."""
    from struct import unpack_from

    try:
        with open(path, "rb") as file:
            head = file.read(64)
            if len(head) < 64 or head[:5] != b"\x7fELF\x02":
                return False
            offset = unpack_from("<Q", head, 32)[0]
            size, count = unpack_from("<HH", head, 54)
            file.seek(offset)
            table = file.read(size * count)
    except (OSError, OverflowError):  # an offset beyond what a file can have
        return False
    if not count or size < 4 or len(table) < size * count:
        return False
    return all(unpack_from("<I", table, at * size)[0] != PT_INTERP for at in range(count))


def _download(work: str, progress: Progress) -> str:
    """Busybox out of Debian's package, without installing it."""
    import subprocess

    progress.step("fetching the package busybox-static")
    steps = [
        ["apt-get", "download", "-q", "busybox-static"],
        ["sh", "-c", "dpkg-deb -x busybox-static_*.deb package"],
    ]
    for command in steps:
        try:
            done = subprocess.run(command, cwd=work, capture_output=True, check=False, stdin=subprocess.DEVNULL)
        except FileNotFoundError:
            raise Unsupported(
                "making a busybox image needs busybox-static, and this machine has no apt to fetch it",
                hint="install a static busybox as /bin/busybox",
            ) from None
        if done.returncode:
            tail = done.stderr.decode(errors="replace").strip().splitlines()
            raise LaunchError(
                f"cannot fetch busybox-static: {tail[-1] if tail else 'no reason given'}",
                hint="apt install busybox-static",
                command=" ".join(command),
                status=done.returncode,
                log_tail="\n".join(tail[-10:]),
            )
    for path in (f"{work}/package/bin/busybox", f"{work}/package/usr/bin/busybox"):
        if is_static(path):
            return path
    raise NotFound("the package busybox-static holds no static busybox", hint="apt install busybox-static")


_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\n"
    "www-data:x:33:33:www-data:/var/www:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n",
    "etc/group": "root:x:0:\ndaemon:x:1:\ntty:x:5:\nwww-data:x:33:\nusers:x:100:\nnogroup:x:65534:\n",
    "etc/shadow": "root:*:::::::\ndaemon:*:::::::\nwww-data:*:::::::\nnobody:*:::::::\n",
    "etc/hosts": "127.0.0.1\tlocalhost\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}
_DIRECTORIES = {
    ".": 0o755, "bin": 0o755, "dev": 0o755, "etc": 0o755, "home": 0o755, "proc": 0o755, "root": 0o700, "run": 0o755, "sys": 0o755,
    "tmp": 0o1777, "usr/bin": 0o755, "usr/sbin": 0o755, "var/log": 0o755, "var/spool/mail": 0o755, "var/tmp": 0o1777,
    "var/www": 0o755,
}  # fmt: skip


def _make_tree(root: str, program: str, epoch_s: int) -> None:
    import shutil

    for name, mode in _DIRECTORIES.items():
        os.makedirs(f"{root}/{name}", exist_ok=True)
        os.chmod(f"{root}/{name}", mode)
    for name, text in _FILES.items():
        with open(f"{root}/{name}", "w", encoding="ascii") as file:
            file.write(text)
    os.chmod(f"{root}/etc/shadow", 0o600)
    shutil.copyfile(program, f"{root}/bin/busybox")
    os.chmod(f"{root}/bin/busybox", 0o755)
    for name in _list_programs(program):
        if "/" not in name and name != "busybox":
            os.link(f"{root}/bin/busybox", f"{root}/bin/{name}")
    os.link(f"{root}/bin/busybox", f"{root}/usr/bin/env")  # where scripts look for it
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            os.utime(f"{directory}/{name}", (epoch_s, epoch_s))
        os.utime(directory, (epoch_s, epoch_s))


def _list_programs(program: str) -> list[str]:
    import subprocess

    listed = subprocess.run([program, "--list"], capture_output=True, check=False, stdin=subprocess.DEVNULL)
    names = listed.stdout.decode(errors="replace").split()
    if listed.returncode or "sh" not in names:
        raise LaunchError(
            f"{program} does not list its programs", hint="apt install busybox-static",
            command=f"{program} --list", status=listed.returncode,
        )  # fmt: skip
    return names
