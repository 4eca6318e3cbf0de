"""`nagaya machine create NAME --disk …`: a whole machine, with whatever system is on its disks."""

from __future__ import annotations

import os

from nagaya.cli import create_flags, values
from nagaya.cli.context import Context
from nagaya.cli.create_flags import tell
from nagaya.cli.flags import Command, Flag, Parsed
from nagaya.cli.network_flags import read as read_network
from nagaya.cli.progress import Late
from nagaya.errors import UsageError
from nagaya.manager.hardware import (
    DEFAULT_STOP_S,
    DriveOptions,
    HardwareOptions,
    InstallOptions,
    SeedOptions,
    is_size,
)
from nagaya.manager.options import CreateOptions
from nagaya.manager.settings import read_settings
from nagaya.model.spec import Limits
from nagaya.storage.disk_images.seed import MOST_USER_DATA

_SHARED = (
    "hostname", "label", "label-file", "network", "ip", "ip6", "mac-address", "network-alias", "publish", "net-rate",
    "allow-host", "cpus", "memory", "cpuset-cpus", "blkio-weight", "restart", "log-opt", "rm", "append",
)  # fmt: skip
_OWN = (
    Flag("--disk", "A disk: a size for a new one, or DISK[,clone][,ro][,format=F][,size=S][,allow-backing]", value="DISK", many=True),
    Flag("--cdrom", "A CD: an ISO file, or 'empty' for a drive without a disc", value="FILE", many=True),
    Flag("--firmware", "bios (default), uefi, or direct: Nagaya's own VMM starts the kernel that is on the disk", value="NAME"),
    Flag("--arch", "CPU: x86_64, aarch64 or riscv64 (default: the host's)", value="NAME"),
    Flag("--type", "kvm, emulated or auto (default): what runs its CPUs", value="TYPE"),
    Flag("--boot", "What is tried first: disk (default) or cdrom", value="WHAT"),
    Flag("--compat", "Devices that every system has drivers for (IDE, e1000, plain VGA), instead of virtio"),
    Flag("--tpm", "With a TPM 2.0 (swtpm)"),
    Flag("--secure-boot", "UEFI that starts only what is signed (Microsoft's keys)"),
    Flag("--usb", "A USB device of this host: VENDOR:PRODUCT or BUS.DEVICE", value="DEVICE", many=True),
    Flag("--pci", "A PCI device of this host that is bound to vfio-pci, for example 01:00.0", value="ADDRESS", many=True),
    Flag("--stop-timeout", "Seconds from the power button to being switched off (default 60)", value="SECONDS"),
    Flag("--name", "Name of the machine; or the only word", value="NAME"),
)  # fmt: skip
_SEED = (
    Flag("--cloud-init", "Tell the system who it is by cloud-init: name, network, and a key for 'nagaya ssh'"),
    Flag("--user-data", "Pass this on to cloud-init (and the above)", value="FILE"),
    Flag("--ssh-key", "Let the owner of a public key log in (and the above)", value="FILE", many=True),
    Flag("--ssh-user", "Whom 'nagaya ssh' logs in as (default root; with --user-data debian)", value="NAME"),
)  # fmt: skip
_INSTALL = (
    Flag("--install", "Install a Debian at the first start: an ISO file, a netboot directory, or debian[:SUITE]", value="SOURCE"),
    Flag("--preseed", "Answers for the installer, which win over those that Nagaya gives", value="FILE"),
)  # fmt: skip
_MARKS = ("--disk", "--cdrom", "--firmware", "--arch", "--boot", "--compat", "--install")
_DRIVE_WORDS = ("clone", "ro", "allow-backing")


def create(context: Context, parsed: Parsed) -> int:
    """Create it, and print its id."""
    with Late() as progress:
        machine, note = context.host.machines.create_whole(read_options(parsed), progress=progress)
    if note:
        tell((note,))
    print(machine.id)
    return 0


def instead(argv: list[str]) -> Command | None:
    """Without a word about hardware, `nagaya machine create IMAGE` is `nagaya create IMAGE`."""
    if any(word.split("=", 1)[0] in (*_MARKS, "--help", "-h") for word in argv) or not argv:
        return None
    from nagaya.cli.commands.create import CREATE as FROM_IMAGE  # lazy: the other meaning

    return FROM_IMAGE


def read_options(parsed: Parsed) -> HardwareOptions:
    """What the manager is asked for. Raises `UsageError`."""
    name = parsed.text("name")
    if parsed.words:
        if name:
            raise UsageError(f"the machine has two names, '{name}' and '{parsed.words[0]}'")
        name = parsed.words[0]
    drives = [parse_disk(text) for text in parsed.texts("disk")]
    drives += [
        DriveOptions(cdrom=True) if text == "empty" else DriveOptions(os.path.abspath(text), cdrom=True)
        for text in parsed.texts("cdrom")
    ]
    # A new disk has nothing on it: its CD is what there is to boot.
    fresh = bool(parsed.texts("cdrom")) and all(not drive.text for drive in drives if not drive.cdrom)
    return HardwareOptions(
        name=name,
        type=parsed.text("type"),
        architecture=parsed.text("arch"),
        firmware=parsed.text("firmware") or ("uefi" if parsed.switch("secure-boot") else ""),
        drives=tuple(drives),
        boot=parsed.text("boot") or ("cdrom" if fresh and all(drive.cdrom for drive in drives) else "disk"),
        compat=parsed.switch("compat"),
        seed=_read_seed(parsed),
        install=_read_install(parsed),
        tpm=parsed.switch("tpm"),
        secure_boot=parsed.switch("secure-boot"),
        usb=tuple(parsed.texts("usb")),
        pci=tuple(parsed.texts("pci")),
        common=_read_common(parsed),
    )


def _read_seed(parsed: Parsed) -> SeedOptions | None:
    user_data, keys = parsed.text("user-data"), parsed.texts("ssh-key")
    if not (parsed.switch("cloud-init") or user_data or keys):
        if parsed.given("ssh-user"):
            raise UsageError("--ssh-user is for machines with cloud-init", hint="add --cloud-init")
        return None
    lines = [
        line.strip() for path in keys for line in _read_file(path, "--ssh-key").decode(errors="replace").splitlines()
    ]
    return SeedOptions(
        user_data=_read_file(user_data, "--user-data") if user_data else b"",
        ssh_keys=tuple(line for line in lines if line and not line.startswith("#")),
        user=parsed.text("ssh-user"),
    )


def _read_install(parsed: Parsed) -> InstallOptions | None:
    source, preseed = parsed.text("install"), parsed.text("preseed")
    if not source:
        if preseed:
            raise UsageError("--preseed is for an installer", hint="add --install, for example --install debian")
        return None
    if parsed.switch("cloud-init"):
        raise UsageError("a system that is installed has no cloud-init", hint="leave --cloud-init away")
    return InstallOptions(source, _read_file(preseed, "--preseed") if preseed else b"")


def _read_file(path: str, what: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(MOST_USER_DATA + 1)
    except OSError as error:
        raise UsageError(f"{what}: cannot read {path}: {error.strerror}") from None


def parse_disk(text: str) -> DriveOptions:
    """`20g`, `web`, `./web.qcow2,ro`, `debian,clone,size=40g`. Raises `UsageError`."""
    name, *rest = text.split(",")
    if is_size(name):
        drive = DriveOptions(size_bytes=values.parse_size(name, "--disk"))
    elif not name:
        raise UsageError("--disk: no disk was named", hint="for example --disk 20g, or --disk web")
    else:
        drive = DriveOptions(os.path.abspath(name) if "/" in name else name)
    for word in rest:
        key, equals, value = word.partition("=")
        if key == "format" and value and drive.text:
            drive = drive._replace(format=value)
        elif key == "size" and value and drive.text:
            drive = drive._replace(size_bytes=values.parse_size(value, "--disk: size"))
        elif not equals and key in _DRIVE_WORDS and drive.text:
            drive = drive._replace(
                clone=drive.clone or key == "clone",
                read_only=drive.read_only or key == "ro",
                allow_backing=drive.allow_backing or key == "allow-backing",
            )
        else:
            raise UsageError(
                f"--disk: '{word}' is nothing that '{name}' can have",
                hint=f"a disk has {', '.join(_DRIVE_WORDS)}, format=FORMAT, size=SIZE",
            )
    return drive


def _read_common(parsed: Parsed) -> CreateOptions:
    """The flags that every kind of machine has, by their one reader."""
    settings = read_settings()
    network = read_network(parsed, parsed.texts("network") or ["user"])
    timeout_s = DEFAULT_STOP_S
    if parsed.given("stop-timeout"):
        timeout_s = values.parse_timeout(parsed.text("stop-timeout"), "--stop-timeout")
    return CreateOptions(
        image="",
        hostname=parsed.text("hostname"),
        network=network.network,
        attachments=network.attachments,
        ports=network.ports,
        net_rate_bits=network.net_rate_bits,
        allow_host=network.allow_host,
        limits=Limits(
            memory_bytes=values.parse_size(*create_flags.settled(parsed, settings, "memory", "0")),
            cpus_milli=values.parse_cpus(*create_flags.settled(parsed, settings, "cpus", "0")),
            cpuset_cpus=values.parse_cpuset(parsed.text("cpuset-cpus")),
            blkio_weight=values.parse_weight(parsed.text("blkio-weight", "0")),
        ),
        restart=values.parse_restart(parsed.text("restart", "no")),
        log=values.parse_log_options(parsed.texts("log-opt")),
        append=parsed.text("append"),
        auto_remove=parsed.switch("rm"),
        stop_timeout_s=timeout_s,
        labels=values.parse_labels(parsed.texts("label"), parsed.texts("label-file")),
    )


CREATE = Command(
    create,
    usage="[NAME]",
    words=(0, 1),
    flags=(*_OWN, *_SEED, *_INSTALL, *(flag for flag in create_flags.FLAGS if flag.key in _SHARED)),
    about="A whole machine boots from its disks, whatever system is on them; Nagaya has nothing inside it. The same"
    " commands start, stop, pause, remove and look at it; 'nagaya attach' is its serial console. Its network is 'user'"
    " unless another is named: it gets an address by DHCP, and nobody can reach it.\n"
    "DISK is a name of 'nagaya disk ls', or the path of a file.",
    examples=(
        ("nagaya machine create web --disk 20g --cdrom ./installer.iso", "install a system"),
        ("nagaya machine create db --disk ./debian.qcow2,clone --firmware uefi -m 2g", "on top of an image"),
        ("nagaya machine create ci --disk debian,clone --cloud-init", "a cloud image; then nagaya ssh ci"),
        ("nagaya machine create new --disk 20g --install debian", "install it from this host's package sources"),
        ("nagaya machine create own --disk debian,clone --firmware direct", "on Nagaya's own VMM, without firmware"),
        ("nagaya machine create old --disk ./appliance.vmdk --compat", "a system without virtio drivers"),
    ),
    instead=instead,
)
