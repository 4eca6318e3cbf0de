"""Whole machines: from what a caller asks for to a record, and the disks that are made for one machine alone."""

from __future__ import annotations

import os
import re
import time
from contextlib import ExitStack

from nagaya.engines import TYPES, engine_of
from nagaya.engines.kvm.direct import SLOW
from nagaya.engines.kvm.known import HARDWARE, find_kvm
from nagaya.engines.qemu.host_pci import parse_address
from nagaya.errors import NagayaError, NotFound, Unsupported, UsageError
from nagaya.manager.creating import check_options
from nagaya.manager.options import CreateOptions
from nagaya.manager.settings import AUTO, choose_first
from nagaya.model.spec import Drive, Hardware, Install, Limits, MachineSpec, Process, Seed
from nagaya.static import NamedTuple
from nagaya.storage import rootfs
from nagaya.storage.disk_images.chain import choose_format, open_chain
from nagaya.storage.disk_images.formats import get_format
from nagaya.storage.disk_images.installer import with_disc
from nagaya.storage.disk_images.seed import MOST_USER_DATA, SEED, USER_DATA, make_key, require_seed_programs
from nagaya.storage.disk_images.store import Disk, Disks
from nagaya.storage.paths import Paths
from nagaya.storage.records import write_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.manager.installing import Installer

DIRECT = "direct"  # no firmware: our own VMM starts the kernel that is on the disk
FIRMWARES = ("bios", "uefi", DIRECT)
ARCHITECTURES = {"x86_64": "linux/amd64", "aarch64": "linux/arm64", "riscv64": "linux/riscv64"}
_ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}
DEFAULT_MEMORY_BYTES = 1 << 30
DEFAULT_STOP_S = 60.0
MOST_PRESEED = 1 << 20
_SIZE = re.compile(r"[0-9]+(\.[0-9]+)?([kmgt](i?b)?)?", re.IGNORECASE)


class DriveOptions(NamedTuple):
    """One --disk or --cdrom. `text` names a disk, or is "" with a size for a new one; "" of a CD drive: no disc."""

    text: str = ""
    size_bytes: int = 0  # of a new disk, or of a clone that is to be larger
    format: str = ""
    cdrom: bool = False
    read_only: bool = False
    clone: bool = False  # a linked clone for this machine alone
    allow_backing: bool = False


class SeedOptions(NamedTuple):
    """What cloud-init is to be told. `user` "" = root, or with user-data of one's own the image's usual user."""

    user_data: bytes = b""
    ssh_keys: tuple[str, ...] = ()
    user: str = ""


class InstallOptions(NamedTuple):
    """`source`: an ISO file, a directory with a netboot installer, "debian" or "debian:SUITE". `preseed`: answers that win."""

    source: str
    preseed: bytes = b""


class HardwareOptions(NamedTuple):
    """What a caller may ask of a whole machine. "" = the default."""

    name: str = ""
    type: str = ""
    architecture: str = ""
    firmware: str = ""
    drives: tuple[DriveOptions, ...] = ()
    boot: str = ""  # "disk" | "cdrom": what is tried first
    compat: bool = False
    seed: SeedOptions | None = None
    install: InstallOptions | None = None
    tpm: bool = False
    secure_boot: bool = False
    usb: tuple[str, ...] = ()
    pci: tuple[str, ...] = ()
    common: CreateOptions = CreateOptions(image="")  # network, limits, restart, labels, hostname, log


def is_size(text: str) -> bool:
    """Whether --disk's value is a size and no name."""
    return _SIZE.fullmatch(text) is not None


class Runner(NamedTuple):
    """What runs a machine's CPUs, how it is booted, and what there is to say about that."""

    type: str
    firmware: str
    note: str = ""


def choose_runner(wanted: str, architecture: str, firmware: str = "") -> Runner:
    """Raises `UsageError`, `Unsupported`.

    QEMU needs a KVM that the CPU does the work of: with a software one (PVM) it does not run. Our own VMM does, and is
    what --type kvm means there, unless a firmware was asked for, which it has not got.
    """
    if firmware and firmware not in FIRMWARES:
        raise UsageError(f"unknown firmware '{firmware}'", hint=f"one of: {', '.join(FIRMWARES)}")
    name = choose_first(wanted)
    if name == TYPES[0]:
        if wanted:
            raise UsageError(
                f"a whole machine is no {name}: it boots a system of its own", hint="use --type kvm, emulated or auto"
            )
        name = AUTO  # settled for machines from images
    foreign = "" if architecture == os.uname().machine else f"this host's CPU runs no {architecture} system"
    kind, finding = ("", foreign) if foreign else _find_kvm()
    if firmware == DIRECT:
        return _choose_direct(name, kind, finding)
    usual = firmware or ("uefi" if architecture == "aarch64" else "bios")
    if name == "kvm" and finding:
        if kind and not firmware:
            return _choose_direct(name, kind, finding)
        raise Unsupported(f"QEMU cannot use KVM here: {finding}", hint="use --type emulated", finding=finding)
    if name == "kvm" or (name == AUTO and not finding):
        return Runner("kvm", usual)
    return Runner("emulated", usual, f"the machine is emulated, and slow: {finding}" if name == AUTO else "")


def _choose_direct(name: str, kind: str, finding: str) -> Runner:
    if name not in ("kvm", AUTO):
        raise UsageError(
            f"--firmware {DIRECT} is for Nagaya's own VMM, which runs on KVM",
            hint=f"leave --type {name} away, or use --firmware bios or uefi",
        )
    if not kind:
        raise Unsupported(f"a machine without firmware needs KVM: {finding}", hint="use --firmware bios or uefi")
    slow = "" if kind == HARDWARE else f"Nagaya's own VMM starts the kernel that is on the disk; {SLOW}"
    return Runner("kvm", DIRECT, slow)


def _find_kvm() -> tuple[str, str]:
    """Which KVM there is, and why QEMU cannot use it; "" for none, and when it can."""
    try:
        finding = find_kvm()
    except NagayaError as error:
        return "", error.message
    if finding.kind == HARDWARE:
        return finding.kind, ""
    return finding.kind, f"this host's KVM is a software one ({finding.kind}), on which QEMU does not run"


def plan_whole_machine(options: HardwareOptions, disks: Disks, *, runner: Runner, machine_id: str) -> MachineSpec:
    """The record. Raises `UsageError`, `NotFound`, `Unsupported`, `IntegrityError` for what could not work; changes nothing."""
    common = options.common
    check_options(common)
    architecture = find_architecture(options.architecture)
    firmware = runner.firmware
    if options.boot not in ("", "disk", "cdrom"):
        raise UsageError(f"--boot: '{options.boot}' is neither disk nor cdrom")
    pci = tuple(parse_address(text) for text in options.pci)
    if firmware == DIRECT and (options.tpm or options.secure_boot or options.usb or pci):
        raise Unsupported(
            "Nagaya's own VMM has no TPM, no secure boot, and no devices of this host's",
            hint="use --firmware bios or uefi",
        )
    if options.install is not None:
        _check_install(options, firmware)
    drives = tuple(plan_drive(each, number, disks, own_format(firmware)) for number, each in enumerate(options.drives))
    if drives and options.seed is not None and options.install is None:
        drives += (Drive(SEED, "raw", cdrom=True, read_only=True, own=True),)
    if not drives:
        raise UsageError("a whole machine needs a disk or a CD", hint="for example --disk 20g --cdrom installer.iso")
    paths = [drive.path for drive in drives if drive.path and not drive.read_only]
    if len(set(paths)) < len(paths):
        raise UsageError("two drives of the machine have the same disk")
    if common.append and firmware != DIRECT:
        raise UsageError(
            "--append is for a kernel that Nagaya starts, and here the machine's own loader does",
            hint=f"use --firmware {DIRECT}, or change the loader's configuration inside",
        )
    limits = common.limits
    spec = MachineSpec(
        id=machine_id,
        name=options.name,
        type=runner.type,
        image="",
        image_id="",
        platform=ARCHITECTURES[architecture],
        process=Process(argv=(firmware,), tty=True, stdin=True),
        hostname=common.hostname or options.name or machine_id[:12],
        created_ns=time.time_ns(),
        network=common.network,
        attachments=common.attachments,
        ports=common.ports,
        net_rate_bits=common.net_rate_bits,
        allow_host=common.allow_host,
        append=common.append,
        limits=limits._replace(memory_bytes=limits.memory_bytes or DEFAULT_MEMORY_BYTES),
        restart=common.restart,
        log=common.log,
        auto_remove=common.auto_remove,
        stop_timeout_s=common.stop_timeout_s,
        labels=common.labels,
        hardware=Hardware(
            firmware=firmware,
            drives=drives,
            boot_cdrom=options.boot == "cdrom",
            compat=options.compat,
            seed=_plan_seed(options.seed, installed=options.install is not None),
            tpm=options.tpm,
            secure_boot=options.secure_boot,
            usb=options.usb,
            pci=pci,
            install=_plan_install(options.install),
        ),
    )
    _check_limits(spec.limits)
    engine = engine_of(spec)
    engine.check_host()
    engine.check(with_disc(spec))
    return spec


def find_architecture(text: str) -> str:
    """uname(2)'s word. Raises `UsageError`."""
    name = _ALIASES.get(text, text) or os.uname().machine
    if name not in ARCHITECTURES:
        raise UsageError(f"unknown architecture '{text}'", hint=f"one of: {', '.join(ARCHITECTURES)}")
    return name


def _check_install(options: HardwareOptions, firmware: str) -> None:
    assert options.install is not None
    preseed, seed = options.install.preseed, options.seed
    if firmware == DIRECT:
        raise Unsupported(
            "an installer is started by QEMU, and this machine would run on Nagaya's own VMM",
            hint="use --firmware bios or uefi, with --type emulated where QEMU cannot use KVM",
        )
    if options.secure_boot:
        raise Unsupported(
            "with secure boot no installer is started without its loader",
            hint="boot its disc: --cdrom FILE instead of --install",
        )
    disk = next((each for each in options.drives if not each.cdrom), None)
    if disk is None or disk.text:
        raise UsageError(
            "an installer needs a new disk, for it writes over the machine's first one",
            hint="for example --disk 20g, before any other",
        )
    if seed is not None and (seed.user_data or seed.user):
        raise UsageError(
            "a system that is installed has no cloud-init, and a key for root",
            hint="leave --user-data and --ssh-user away",
        )
    if len(preseed) > MOST_PRESEED:
        raise UsageError(f"--preseed: more than {MOST_PRESEED >> 20} MiB are no answers to an installer's questions")
    if b"\0" in preseed:
        raise UsageError("--preseed: it is no text, and answers to an installer's questions are")


def _plan_install(options: InstallOptions | None) -> Install | None:
    if options is None:
        return None
    path = os.path.realpath(options.source)
    return Install(options.source, path if os.path.isfile(path) else "")


def _plan_seed(options: SeedOptions | None, *, installed: bool) -> Seed | None:
    if options is None and not installed:
        return None
    options = options or SeedOptions()
    require_seed_programs(disc=not installed)
    if len(options.user_data) > MOST_USER_DATA:
        raise UsageError(f"--user-data: more than {MOST_USER_DATA >> 20} MiB are not passed on")
    for key in options.ssh_keys:
        words = key.split()
        if len(words) < 2 or not words[0].startswith(("ssh-", "ecdsa-", "sk-")) or not key.isprintable():
            raise UsageError("--ssh-key: no public key is in it", hint="for example --ssh-key ~/.ssh/id_ed25519.pub")
    user = options.user or ("debian" if options.user_data else "root")
    if not user.replace("-", "").replace("_", "").replace(".", "").isalnum() or user.startswith("-"):
        raise UsageError(f"--ssh-user: '{user}' is no user's name")
    return Seed(options.ssh_keys, user)


def _check_limits(limits: Limits) -> None:
    if limits.pids:
        raise Unsupported(
            "--pids-limit is for machines from images: a whole machine's system counts its processes itself",
            hint="leave --pids-limit away",
        )


def own_format(firmware: str) -> str:
    """The format of disks that are made for one machine: our own VMM reads raw ones alone."""
    return "raw" if firmware == DIRECT else "qcow2"


def plan_drive(options: DriveOptions, number: int, disks: Disks, own: str) -> Drive:
    """With the path of the disk that is to be used, and checked as far as its header and what lies under it go.

    `own` is the format of a disk that is made for the machine.
    """
    if options.cdrom and not options.text:
        return Drive("", "raw", cdrom=True, read_only=True)
    if not options.text:
        if options.size_bytes <= 0:
            raise UsageError("--disk needs a size or the name of a disk", hint="for example --disk 20g")
        return Drive(f"disk{number}.{own}", own, own=True)
    if options.size_bytes and not options.clone:
        raise UsageError(
            f"--disk {options.text}: a size is for a new disk, or for a clone",
            hint="make it larger first: nagaya disk resize",
        )
    path = os.path.realpath(disks.locate(options.text))
    read_only = options.read_only or options.cdrom
    format_ = choose_format(path, options.format or ("raw" if options.cdrom else ""))
    with ExitStack() as stack:
        chain = open_chain(
            path, stack, format=format_, allowed=(disks.directory,), allow_backing=options.allow_backing, lock=False
        )
        if any(layer.header.extents for layer in chain.layers):
            raise Unsupported(
                f"'{path}' is a VMDK in several files, which no machine can use", hint="convert it: nagaya disk convert"
            )
    if options.clone:
        # Everything that it stands on is what the user has named: it lies where it lies.
        return Drive(f"disk{number}.{own}", own, own=True, allow_backing=own == "qcow2")
    if not read_only:
        disks.refuse_dependants(path)
        if not os.access(path, os.W_OK):
            raise UsageError(f"'{path}' cannot be written", hint=f"use --disk {options.text},ro, or a clone of it")
    return Drive(path, format_, options.cdrom, read_only, allow_backing=options.allow_backing)


def make_own_files(
    paths: Paths, spec: MachineSpec, options: HardwareOptions, installer: Installer | None = None
) -> None:
    """The disks for this machine alone, its UEFI's variables and its installer, in its directory."""
    hardware, directory = spec.hardware, paths.machine(spec.id)
    assert hardware is not None
    disks = Disks(paths.root)
    if hardware.seed is not None:
        make_key(directory, spec.name)
    if options.seed is not None and options.seed.user_data:
        write_file(f"{directory}/{USER_DATA}", options.seed.user_data)
    if installer is not None:
        from nagaya.manager.installing import give_installer  # lazy: few are installed

        give_installer(directory, spec, options.install, installer)
    for drive, wanted in zip(hardware.drives, options.drives, strict=False):  # behind them is what cloud-init reads
        if not drive.own:
            continue
        make_own_disk(disks, f"{directory}/{drive.path}", drive, wanted)
    if hardware.firmware == "uefi":
        _copy_variables(spec, f"{directory}/{rootfs.FIRMWARE_STATE}")


def make_own_disk(disks: Disks, target: str, drive: Drive, wanted: DriveOptions) -> None:
    """The file `target` of a drive that `plan_drive` has planned for one machine alone."""
    if not wanted.clone:
        disks.create(target, wanted.size_bytes, format=get_format(drive.format).name)
        return
    base = _clone(disks, wanted, target, linked=drive.format == "qcow2")
    if wanted.size_bytes > base.virtual_bytes:
        disks.resize(target, "", wanted.size_bytes)


def _clone(disks: Disks, wanted: DriveOptions, target: str, *, linked: bool) -> Disk:
    """A linked clone; or all of it, for a VMM that reads no other format than raw."""
    source = disks.locate(wanted.text)
    if linked:
        return disks.clone(source, target, linked=True, format=wanted.format, allow_backing=wanted.allow_backing)
    return disks.convert(source, target, format=wanted.format, to="raw", allow_backing=wanted.allow_backing)


def _copy_variables(spec: MachineSpec, target: str) -> None:
    from nagaya.engines.qemu.pc_boards import find_firmware, find_pc_board  # lazy: UEFI alone

    secure = spec.hardware is not None and spec.hardware.secure_boot
    _, template = find_firmware(find_pc_board(spec.platform), secure=secure)
    try:
        with open(template, "rb") as file:
            write_file(target, file.read())
    except FileNotFoundError:
        raise NotFound(f"UEFI's variables are missing ({template})") from None
