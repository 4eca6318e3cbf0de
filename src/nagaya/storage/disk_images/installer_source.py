"""Where a Debian installer's kernel and initramfs come from: a disc, or a directory.

A disc's ISO 9660 is read by bsdtar (libarchive), without mounting it, and with the limits that qemu-img has.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import stat
import subprocess
from struct import unpack_from

from nagaya.errors import HostError, IntegrityError, NotFound, Unsupported, UsageError
from nagaya.static import IO
from nagaya.storage.disk_images.installer import INITRAMFS, KERNEL, InstallerFiles
from nagaya.storage.disk_images.program import give_up

PROGRAM = "bsdtar"
_MOST_BYTES = 1 << 30
_MOST_LISTING_BYTES = 16 << 20
_WITHIN_S = 60.0
# Discs keep one for each CPU in a directory of its own; the small ones, that get everything from a network, at the top.
_ON_DISC = re.compile(r"(?:\./)?((?:install(?:\.[A-Za-z0-9]{1,16})?/)?)(vmlinuz|linux)")
_PE_MACHINES = {"x86_64": 0x8664, "aarch64": 0xAA64, "riscv64": 0x5064}


def take_from_disc(disc: str, place: str, *, architecture: str) -> InstallerFiles:
    """Copy them from the ISO image `disc` to the directory `place`. Raises `NotFound`, `Unsupported`, `IntegrityError`."""
    try:
        with open(disc, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(f"'{disc}' is no file")
            found = _list(file)
            for directory, kernel in found:
                target = f"{place}/{KERNEL}"
                _copy_out(file, f"{directory}{kernel}", target)
                if _runs_on(target) == architecture:
                    _copy_out(file, f"{directory}{INITRAMFS}", f"{place}/{INITRAMFS}")
                    return InstallerFiles(target, f"{place}/{INITRAMFS}", disc)
    except OSError as error:
        raise HostError.from_os(error, f"cannot read '{disc}'") from None
    if found:
        raise Unsupported(
            f"the installer on '{disc}' is for another CPU than {architecture}",
            hint="use its disc for that CPU, or another --arch",
        )
    raise NotFound(
        f"there is no Debian installer on '{disc}'",
        hint="other systems ask their questions: --cdrom FILE, then nagaya start and nagaya screen",
    )


def take_from_directory(directory: str, *, architecture: str) -> InstallerFiles:
    """Those of a netboot directory, where they lie. Raises `NotFound`, `Unsupported`, `IntegrityError`."""
    files = InstallerFiles(f"{directory}/{KERNEL}", f"{directory}/{INITRAMFS}")
    for path in files[:2]:
        if not os.path.isfile(path):
            raise NotFound(f"there is no installer in '{directory}': {os.path.basename(path)} is missing")
    check_kernel(files.kernel, architecture=architecture)
    return files


def check_kernel(path: str, *, architecture: str) -> None:
    """Raise `Unsupported` for another CPU's, `IntegrityError` for what is no kernel."""
    found = _runs_on(path)
    if not found:
        raise IntegrityError(f"'{path}' is no kernel that a machine could boot")
    if found != architecture:
        raise Unsupported(f"the kernel '{path}' is for {found}, and the machine's CPU is {architecture}")


def _runs_on(path: str) -> str:
    """The CPU of a kernel that UEFI could start as well, which all of Debian's are (PE format, COFF header); "" = of none."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise HostError.from_os(error, f"cannot read '{path}'") from None
    if len(head) < 64 or head[:2] != b"MZ":
        return ""
    at = unpack_from("<I", head, 0x3C)[0]
    if at + 6 > len(head) or head[at : at + 4] != b"PE\0\0":
        return ""
    machine = unpack_from("<H", head, at + 4)[0]
    return next((name for name, number in _PE_MACHINES.items() if number == machine), "another CPU")


def _list(disc: IO[bytes]) -> list[tuple[str, str]]:
    """(directory, name) of each kernel beside which an initramfs lies."""
    output = os.memfd_create("listing", os.MFD_CLOEXEC)
    try:
        _run(disc, ["-t"], output=output, most_bytes=_MOST_LISTING_BYTES)
        names = set(os.pread(output, _MOST_LISTING_BYTES, 0).decode("utf-8", "replace").splitlines())
    finally:
        os.close(output)
    found = [match for name in sorted(names) if (match := _ON_DISC.fullmatch(name))]
    return [(each[1], each[2]) for each in found if names & {f"{each[1]}{INITRAMFS}", f"./{each[1]}{INITRAMFS}"}]


def _copy_out(disc: IO[bytes], name: str, target: str) -> None:
    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        _run(disc, ["-x", "-O", name], output=fd, most_bytes=_MOST_BYTES)
        if not os.fstat(fd).st_size:
            raise IntegrityError(f"'{name}' on the disc is empty")
    finally:
        os.close(fd)


def _run(disc: IO[bytes], words: list[str], *, output: int, most_bytes: int) -> None:
    """bsdtar on the disc."""
    parent = os.getpid()

    def prepare() -> None:
        give_up(parent, look=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores

    disc.seek(0)
    try:
        done = subprocess.run(
            [PROGRAM, words[0], "-f", "-", *words[1:]], stdin=disc, stdout=output, stderr=subprocess.PIPE,
            env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "HOME": "/"}, preexec_fn=prepare, check=False, timeout=_WITHIN_S,
        )  # fmt: skip
    except FileNotFoundError:
        raise Unsupported(
            "taking an installer from a disc needs bsdtar, and it is not installed",
            hint="as root: apt-get install libarchive-tools",
        ) from None
    except subprocess.TimeoutExpired:
        raise IntegrityError("the disc cannot be read in any reasonable time") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"status {done.returncode}"]
        reason = "".join(letter if letter.isprintable() else "?" for letter in said[0][:200])
        raise IntegrityError(f"the disc cannot be read: {reason.removeprefix('bsdtar: ')}")
