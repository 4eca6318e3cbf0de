"""Where a Linux comes from: Debian's `linux-source-X.Y` packages, or any archive that unpacks to one directory."""

from __future__ import annotations

import glob
import os
import re

from nagaya.errors import HostError, NotFound, Unsupported, UsageError
from nagaya.kernels.architectures import X86_64, Architecture
from nagaya.static import NamedTuple

DIRECTORY = "/usr/src"
TESTED = (6, 1)  # what the shipped fragment was written for; another one is taken when this one is not there
PACKAGES = "bc bison flex gcc libelf-dev make patch xz-utils"
_ARCHIVE = re.compile(r"linux-source-(\d+)\.(\d+)\.tar\.xz")
_TOOLS = {"bc": "bc", "bison": "bison", "flex": "flex", "gcc": "gcc", "make": "make", "patch": "patch", "xz": "xz-utils",
          "ld": "binutils", "strip": "binutils", "tar": "tar"}  # fmt: skip
_HEADERS = {"gelf.h": "libelf-dev"}  # the kernel's own objtool reads ELF

# What no guest can use is not unpacked: it is most of a Linux. Kconfig files and Makefiles stay, everything reads those.
_ARCHITECTURES = (
    "alpha", "arc", "arm", "arm64", "csky", "hexagon", "ia64", "loongarch", "m68k", "microblaze", "mips", "nios2",
    "openrisc", "parisc", "powerpc", "riscv", "s390", "sh", "sparc", "xtensa",
)  # fmt: skip
_DRIVERS = (
    "accel", "ata", "bluetooth", "clk", "comedi", "crypto", "edac", "fpga", "gpu", "greybus", "hid", "hwmon", "iio",
    "infiniband", "isdn", "leds", "media", "message", "mfd", "mtd", "net/can", "net/dsa", "net/ethernet", "net/usb",
    "net/wireless", "nvme", "phy", "pinctrl", "platform", "power", "regulator", "scsi", "soc", "spi", "staging", "target",
    "thunderbolt", "usb", "video",
)  # fmt: skip
_LEFT_OUT = (
    *(f"fs/{name}/*.[ch]" for name in ("bcachefs", "btrfs", "ceph", "f2fs", "gfs2", "ntfs3", "ocfs2", "smb", "xfs")),
    "Documentation/*.rst", "Documentation/*.yaml", "Documentation/*.txt", "Documentation/*.svg",
    "samples/*.[ch]", "sound/*.[ch]", "tools/perf/*", "tools/testing/*",
)  # fmt: skip


class Source(NamedTuple):
    """An archive of Linux. `digest` is the SHA-256 of its bytes, in hexadecimal."""

    path: str
    digest: str


def open_source(path: str = "") -> Source:
    """The archive at `path`, or the best installed one. Raises `NotFound` with the package to install."""
    import hashlib  # lazy: only a build needs it

    path = path or find_archive()
    try:
        with open(path, "rb") as file:
            return Source(path, hashlib.file_digest(file, "sha256").hexdigest())
    except IsADirectoryError:
        raise UsageError(f"{path} is a directory", hint="pack it as a tar archive: tar cf linux.tar linux/") from None
    except OSError as error:
        raise HostError.from_os(error, "cannot read the kernel's source") from None


def find_archive(directory: str = DIRECTORY) -> str:
    """The path of the installed source that fits best: the tested version, else the newest."""
    found: dict[tuple[int, int], str] = {}
    for path in glob.glob(f"{directory}/linux-source-*.tar.xz"):
        match = _ARCHIVE.fullmatch(os.path.basename(path))
        if match:
            found[int(match[1]), int(match[2])] = path
    if not found:
        raise NotFound(
            f"there is no source of Linux in {directory}",
            hint=f"as root: apt-get install linux-source {PACKAGES}; or name an archive of any Linux with --source",
        )
    return found[TESTED] if TESTED in found else found[max(found)]


def require_tools(architecture: Architecture = X86_64) -> None:
    """Raises `Unsupported` naming the packages that a build lacks, all of them at once."""
    import shutil  # lazy: only a build needs it

    tools = dict(_TOOLS)
    if architecture.cross:  # beside the host's own: a kernel's build makes programs that it runs
        package = architecture.cross.rstrip("-").replace("_", "-")
        tools |= {f"{architecture.cross}gcc": f"gcc-{package}", f"{architecture.cross}ld": f"binutils-{package}"}
    missing = {package for tool, package in tools.items() if shutil.which(tool) is None}
    missing |= {package for name, package in _HEADERS.items() if not _has_header(name)}
    if missing:
        names = " ".join(sorted(missing))
        raise Unsupported(
            f"this host lacks what builds a kernel: {names}",
            hint=f"as root: apt-get install {names}",
            finding="programs were looked for in PATH, headers where gcc looks",
        )


def _has_header(name: str) -> bool:
    """As the compiler itself finds it: where headers are differs between distributions."""
    import subprocess  # lazy: 8 ms

    command = ("gcc", "-E", "-x", "c", "-include", name, "-o", os.devnull, os.devnull)
    try:
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
    except FileNotFoundError:
        return True  # no compiler is what is missing, and that is said already


def compiler_version(architecture: Architecture = X86_64) -> str:
    """What `gcc --version` says of itself: another compiler makes another kernel."""
    import subprocess  # lazy: as above

    command = (f"{architecture.cross}gcc", "--version")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def left_out(architecture: Architecture) -> tuple[str, ...]:
    """Patterns of files that the shipped fragments for `architecture` do not need."""
    others = tuple(name for name in _ARCHITECTURES if name != architecture.make)
    drivers = (name for name in _DRIVERS if name not in architecture.directories)
    return (
        *(f"arch/{name}/*.{kind}" for kind in ("[chS]", "dts", "dtsi", "pl", "tbl") for name in others),
        *(f"drivers/{name}/*.[chS]" for name in drivers),
        *_LEFT_OUT,
    )


def unpack_command(source: Source, directory: str, *, left_out: tuple[str, ...]) -> list[str]:
    """The tar(1) that unpacks a Linux without its top directory, and without the files of some patterns."""
    patterns = [f"--exclude=*/{pattern}" for pattern in left_out]
    return ["tar", "-x", "-f", source.path, "-C", directory, "--strip-components=1", "--no-same-owner", *patterns]
