"""Making the disk of a whole machine from this host's own package sources, so that nothing comes from elsewhere."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Callable
from contextlib import ExitStack

from nagaya.errors import HostError, LaunchError, Unsupported, UsageError
from nagaya.images.enclosed import enclose
from nagaya.images.foreign import find_emulator, foreign_programs
from nagaya.images.progress import Progress
from nagaya.images.sources.apt_sources import find_debian_sources, find_proxies, rewrite_suite
from nagaya.images.sources.bootstrap import HOST_PARTS, NUMBERS, SUITES, host_suite, require_port
from nagaya.manager.hardware import find_architecture
from nagaya.static import NamedTuple
from nagaya.storage.disk_images.assemble import PLATFORMS, Platform, Uuids, assemble_disk
from nagaya.storage.disk_images.store import Disk, Disks
from nagaya.storage.paths import Paths
from nagaya.storage.workplace import open_workplace

LEAST_BYTES = 2 << 30
PACKAGES = (
    "systemd-sysv", "udev", "dbus", "openssh-server", "cloud-init", "cloud-guest-utils", "grub2-common", "dosfstools", "mtools",
    "e2fsprogs", "iproute2", "ifupdown", "isc-dhcp-client", "netbase", "ca-certificates", "sudo", "less", "qemu-guest-agent",
)  # fmt: skip
# Debian's name of each CPU, and what it boots by.
ARCHITECTURES = {
    "x86_64": ("amd64", ("linux-image-amd64", "grub-pc-bin", "grub-efi-amd64-bin")),
    "aarch64": ("arm64", ("linux-image-arm64", "grub-efi-arm64-bin")),
    "riscv64": ("riscv64", ("linux-image-riscv64", "grub-efi-riscv64-bin")),
}
# An initramfs with every driver takes a quarter of an hour where its programs are emulated: this has those of QEMU's `virt`.
# The system's own next one has all of them again.
_FEW_MODULES = {
    "etc/initramfs-tools/conf.d/first-boot": "MODULES=list\n",
    "etc/initramfs-tools/modules": "virtio_pci\nvirtio_mmio\nvirtio_blk\nvirtio_scsi\nsd_mod\next4\ncrc32c_generic\n",
}


# The locale stays as it is: cc_locale takes the word for that, whose type is a text in cloud-init's schema.
CLOUD_CONFIG = 'datasource_list: [NoCloud, None]\nlocale: "false"\n'


class BuildOptions(NamedTuple):
    """`system`: "debian" or "debian:SUITE". `disk`: the name of the new disk. `architecture`: uname(2)'s word, "" = ours."""

    system: str
    disk: str
    size_bytes: int
    packages: tuple[str, ...] = ()
    architecture: str = ""


def build_debian(paths: Paths, options: BuildOptions, progress: Progress) -> Disk:
    """Build the disk. Raises `Unsupported`, `UsageError`, `Conflict`, `LaunchError`; leaves nothing then."""
    suite = _find_suite(options.system)
    if os.geteuid():
        raise Unsupported("only root can make a Debian with all its owners", hint="run it as root")
    architecture = find_architecture(options.architecture)
    foreign = architecture != os.uname().machine
    require_port(suite, ARCHITECTURES[architecture][0])
    if foreign:
        find_emulator(architecture)
    if options.size_bytes < LEAST_BYTES:
        raise UsageError(f"--size: a Debian needs {LEAST_BYTES >> 30} GiB or more")
    for name in options.packages:
        if not name.replace("-", "").replace("+", "").replace(".", "").isalnum() or name.startswith("-"):
            raise UsageError(f"--include: '{name}' is no package's name")
    sources = find_debian_sources()
    if foreign:  # a line for this host's CPU alone stands for its archive
        sources = [one._replace(options=tuple(o for o in one.options if not o.startswith("arch="))) for one in sources]
    lines = rewrite_suite(sources, suite)
    if not lines:
        raise Unsupported(
            "this machine's apt has no Debian sources to make a Debian from",
            hint="add a 'deb' line to /etc/apt/sources.list",
        )
    disks = Disks(paths.root)
    disks.refuse_taken(options.disk)
    with ExitStack() as stack:
        place = stack.enter_context(open_workplace(disks.directory))
        enter = stack.enter_context(foreign_programs(architecture)) if foreign else _stay
        progress.step(f"debian {suite} for {architecture}: packages (takes {'many ' if foreign else ''}minutes)")
        _bootstrap(
            f"{place}/tree", _plan_bootstrap(architecture, options.packages, foreign=foreign), suite, lines, enter
        )
        progress.step("the disk")
        uuids = Uuids(str(uuid.uuid4()), os.urandom(4).hex())
        platform = PLATFORMS[architecture]
        _configure(f"{place}/tree", uuids, platform)
        try:
            assemble_disk(
                f"{place}/tree", f"{place}/disk.raw", size_bytes=options.size_bytes, uuids=uuids, platform=platform, enter=enter
            )  # fmt: skip
        except OSError as error:
            raise HostError.from_os(error, "cannot make the disk") from None
        progress.step("qcow2")
        return disks.convert(f"{place}/disk.raw", options.disk, to="qcow2")


def _find_suite(system: str) -> str:
    name, _, tag = system.partition(":")
    suite = NUMBERS.get(tag, tag) or host_suite()
    if name != "debian" or suite not in SUITES:
        raise UsageError(f"there is no recipe for '{system}'", hint="for example debian, or debian:bookworm")
    return suite


def _stay() -> None:
    """Of a child whose programs are for this CPU."""


def _plan_bootstrap(architecture: str, packages: tuple[str, ...], *, foreign: bool) -> list[str]:
    """mmdebstrap's options."""
    name, booted_by = ARCHITECTURES[architecture]
    plan = ["--variant=minbase", f"--include={','.join((*PACKAGES, *booted_by, *packages))}"]
    if not foreign:
        return plan
    plan += [f"--architectures={name}", "--skip=check/qemu"]  # which looks for what is registered with the host
    for path, text in _FEW_MODULES.items():
        words = text.replace("\n", " ").strip()
        plan.append(f'--essential-hook=mkdir -p "$1/{os.path.dirname(path)}" && printf "%s\\n" {words} > "$1/{path}"')
    removed = " ".join(f'"$1/{path}"' for path in _FEW_MODULES)
    return [*plan, f"--customize-hook=rm -f {removed}"]


def _bootstrap(tree: str, plan: list[str], suite: str, lines: list[str], enter: Callable[[], None]) -> None:
    command = [
        "mmdebstrap", "--mode=root", *plan, *HOST_PARTS, *(f"--aptopt={option}" for option in find_proxies()),
        suite, tree, *lines,
    ]  # fmt: skip
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    environment.pop("TMPDIR", None)
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=False,
            process_group=0, preexec_fn=enclose(enter),
        )  # fmt: skip
    except FileNotFoundError:
        raise Unsupported("making a Debian needs mmdebstrap", hint="as root: apt-get install mmdebstrap") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        raise LaunchError(
            f"mmdebstrap: {said[0].removeprefix('E: ') if said else done.returncode}",  # what follows comes of that
            hint="check that 'apt-get update' works on this machine",
            command="mmdebstrap", status=done.returncode, log_tail=done.stderr[-4000:],
        )  # fmt: skip


def _configure(tree: str, uuids: Uuids, platform: Platform) -> None:
    """What makes it a machine image: its file systems, and nothing that two machines must not share."""
    files = {
        "etc/fstab": f"UUID={uuids.root} / ext4 errors=remount-ro 0 1\n",
        "etc/machine-id": "",  # systemd makes one at the first boot
        "etc/hostname": "debian\n",
        "etc/default/grub.d/50_nagaya.cfg": 'GRUB_TIMEOUT=1\nGRUB_CMDLINE_LINUX_DEFAULT=""\n'
        f'GRUB_CMDLINE_LINUX="console=tty0 console={platform.console}"\n'
        f'GRUB_TERMINAL="console{" serial" if platform.grub else ""}"\n',
        "etc/cloud/cloud.cfg.d/90_nagaya.cfg": CLOUD_CONFIG,
        "etc/network/interfaces": "auto lo\niface lo inet loopback\nsource /etc/network/interfaces.d/*\n",
    }
    for path, text in files.items():
        os.makedirs(os.path.dirname(f"{tree}/{path}"), exist_ok=True)
        with open(f"{tree}/{path}", "w", encoding="utf-8") as file:
            file.write(text)
    keys = f"{tree}/etc/ssh"
    for name in os.listdir(keys):
        if name.startswith("ssh_host_"):
            os.unlink(f"{keys}/{name}")  # cloud-init makes the machine's own
