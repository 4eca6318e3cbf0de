"""A disk that boots by UEFI, and a PC's by BIOS too, made of a root file system's tree with GRUB in it; no loop device, no
mount.

Partitions (GPT): one for GRUB's second part on a BIOS, one for UEFI, and the root, which is last, so that it can grow.
Sources: UEFI 2.10, chapter 5 (GPT); GRUB 2, util/setup.c (what grub-bios-setup writes, and where).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
import zlib
from collections.abc import Callable
from struct import pack, unpack_from

from nagaya.errors import IntegrityError, LaunchError, NotFound
from nagaya.kernel.process import die_with
from nagaya.static import NamedTuple

SECTOR = 512
MIB = 1 << 20
_BIOS_START, _BIOS_SECTORS = 2048, 2048
_ESP_START, _ESP_SECTORS = 4096, 64 * 2048
_ROOT_START = _ESP_START + _ESP_SECTORS
_BIOS_TYPE = "21686148-6449-6E6F-744E-656564454649"
_ESP_TYPE = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
_LINUX_TYPE = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
_MODULES = (
    "part_gpt", "ext2", "search", "search_fs_uuid", "normal", "configfile", "linux", "echo", "test", "terminal", "gzio", "ls",
    "cat", "reboot", "halt",
)  # fmt: skip
_SERIAL = "serial --unit=0 --speed=115200\nterminal_input console serial\nterminal_output console serial\n"
_KERNEL_SECTOR = 0x5C  # in boot.img: where GRUB's second part begins
_BLOCK_LIST = 0x1F4  # in the second part's first sector: where its rest is


class Platform(NamedTuple):
    """What a disk for one CPU boots by. GRUB's words are those of its directories and modules."""

    efi: str  # GRUB's platform for UEFI
    program: str  # what UEFI looks for on a disk (UEFI 2.10, 3.5.1.1)
    console: str
    modules: tuple[str, ...] = ("efi_gop", "fat")
    bios: bool = False
    grub: str = ""  # lines for its own console: UEFI's leads to the serial line where there is no other


PLATFORMS = {
    "x86_64": Platform(
        "x86_64-efi", "BOOTX64.EFI", "ttyS0,115200", ("efi_gop", "efi_uga", "fat", "serial"), bios=True, grub=_SERIAL
    ),
    "aarch64": Platform("arm64-efi", "BOOTAA64.EFI", "ttyAMA0,115200"),
    "riscv64": Platform("riscv64-efi", "BOOTRISCV64.EFI", "ttyS0,115200"),
}
Enter = Callable[[], None]


class Uuids(NamedTuple):
    """What the parts of the disk are found by."""

    root: str
    esp: str  # a FAT volume id, 8 hex digits


def find_kernel(tree: str) -> tuple[str, str]:
    """The names of the newest kernel and its initramfs in /boot of `tree`. Raises `NotFound`.

    Debian's for riscv64 is not compressed: vmlinux.
    """
    try:
        names = sorted(name for name in os.listdir(f"{tree}/boot") if name.startswith(("vmlinuz-", "vmlinux-")))
    except FileNotFoundError:
        names = []
    for name in reversed(names):
        initrd = f"initrd.img-{name.partition('-')[2]}"
        if os.path.exists(f"{tree}/boot/{initrd}"):
            return name, initrd
    raise NotFound(
        "the root file system has no kernel with an initramfs in /boot", hint="install linux-image of its CPU"
    )


def assemble_disk(
    tree: str, disk: str, *, size_bytes: int, uuids: Uuids, platform: Platform, enter: Enter = lambda: None
) -> None:
    """Make the raw image `disk` of the tree, in which GRUB's files, dosfstools and mtools are installed.

    `enter` is called in each child that executes a program of the tree. Writes /boot/grub, and below /tmp of the tree. Needs
    root. Raises `LaunchError`, `NotFound`, `OSError`.
    """
    kernel, initrd = find_kernel(tree)
    _write_grub_files(tree, kernel, initrd, uuids, platform)
    core, efi = _make_grub(tree, uuids, platform, enter)
    esp = _make_esp(tree, efi, uuids, platform, enter)
    with open(disk, "wb") as file:
        file.truncate(size_bytes)
    sectors = size_bytes // SECTOR
    root_sectors = (sectors - _ROOT_START - 34) // 8 * 8
    _run([
        "mke2fs", "-q", "-F", "-t", "ext4", "-L", "root", "-U", uuids.root, "-d", tree,
        "-E", f"offset={_ROOT_START * SECTOR},lazy_itable_init=0,lazy_journal_init=1", disk, f"{root_sectors // 2}k",
    ])  # fmt: skip
    with open(disk, "r+b") as file:
        _write_table(file.fileno(), sectors, root_sectors, uuids)
        _copy(esp, file.fileno(), _ESP_START * SECTOR)
        if platform.bios:
            install_bios(file.fileno(), f"{tree}/usr/lib/grub/i386-pc/boot.img", core)


def plan_table(sectors: int, partitions: tuple[tuple[int, int, str, str], ...], disk_uuid: str) -> tuple[bytes, bytes]:
    """A GPT as the disk's first 34 and last 33 sectors. A partition: (start, sectors, type, UUID); in sectors."""
    entries = b"".join(
        pack("<16s16sQQQ72x", uuid.UUID(kind).bytes_le, uuid.UUID(own).bytes_le, start, start + size - 1, 0)
        for start, size, kind, own in partitions
    ).ljust(128 * 128, b"\0")

    def header(here: int, other: int, table: int) -> bytes:
        raw = pack(
            "<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, here, other, 34, sectors - 34,
            uuid.UUID(disk_uuid).bytes_le, table, 128, 128, zlib.crc32(entries),
        )  # fmt: skip
        return (raw[:16] + pack("<I", zlib.crc32(raw)) + raw[20:]).ljust(SECTOR, b"\0")

    # The protective MBR: one partition of type EE. A BIOS that wants an active one gets it as well.
    mbr = bytes(446) + pack("<B3sB3sII", 0x80, b"\0\2\0", 0xEE, b"\xff" * 3, 1, min(sectors - 1, 0xFFFFFFFF))
    first = mbr.ljust(510, b"\0") + b"\x55\xaa" + header(1, sectors - 1, 2) + entries
    return first, entries + header(sectors - 1, 1, sectors - 33)


def _write_table(fd: int, sectors: int, root_sectors: int, uuids: Uuids) -> None:
    names = [str(uuid.uuid5(uuid.UUID(uuids.root), name)) for name in ("bios", "esp", "root", "disk")]
    partitions = (
        (_BIOS_START, _BIOS_SECTORS, _BIOS_TYPE, names[0]),
        (_ESP_START, _ESP_SECTORS, _ESP_TYPE, names[1]),
        (_ROOT_START, root_sectors, _LINUX_TYPE, names[2]),
    )
    first, last = plan_table(sectors, partitions, names[3])
    os.pwrite(fd, first, 0)
    os.pwrite(fd, last, (sectors - 33) * SECTOR)


def _write_grub_files(tree: str, kernel: str, initrd: str, uuids: Uuids, platform: Platform) -> None:
    """GRUB's own files, and what it shows until the system's update-grub writes that anew."""
    for kind in (*(("i386-pc",) if platform.bios else ()), platform.efi):
        place = f"{tree}/boot/grub/{kind}"
        os.makedirs(place, exist_ok=True)
        for name in os.listdir(f"{tree}/usr/lib/grub/{kind}"):
            if name.endswith((".mod", ".lst")):
                shutil.copyfile(f"{tree}/usr/lib/grub/{kind}/{name}", f"{place}/{name}")
    with open(f"{tree}/boot/grub/grub.cfg", "w", encoding="utf-8") as file:
        file.write(
            f"{platform.grub}set timeout=1\n"
            'menuentry "Debian" {\n'
            f"  search --no-floppy --fs-uuid --set=root {uuids.root}\n"
            f"  linux /boot/{kernel} root=UUID={uuids.root} ro console=tty0 console={platform.console}\n"
            f"  initrd /boot/{initrd}\n"
            "}\n"
        )


def _make_grub(tree: str, uuids: Uuids, platform: Platform, enter: Enter) -> tuple[bytes, str]:
    """GRUB's second part for a BIOS (b"" where there is none), and the path in the tree of the program for UEFI."""
    os.makedirs(f"{tree}/tmp", exist_ok=True)
    with open(f"{tree}/tmp/early.cfg", "w", encoding="utf-8") as file:
        file.write(f"search.fs_uuid {uuids.root} root\nset prefix=($root)/boot/grub\n")
    efi, core = f"/tmp/{platform.program}", b""
    wanted = [(platform.efi, efi, platform.modules)]
    if platform.bios:
        wanted.append(("i386-pc", "/tmp/core.img", ("biosdisk", "serial")))
    for kind, output, more in wanted:
        command = ["grub-mkimage", "-O", kind, "-o", output, "-p", "/boot/grub", "-c", "/tmp/early.cfg"]
        _run(["chroot", tree, *command, *_MODULES, *more], enter)
    if platform.bios:
        with open(f"{tree}/tmp/core.img", "rb") as file:
            core = file.read()
        os.unlink(f"{tree}/tmp/core.img")
    os.unlink(f"{tree}/tmp/early.cfg")
    return core, efi


def _make_esp(tree: str, efi: str, uuids: Uuids, platform: Platform, enter: Enter) -> bytes:
    image = "/tmp/esp.img"
    size = str(_ESP_SECTORS // 2)
    _run(["chroot", tree, "mkfs.fat", "-F", "32", "-i", uuids.esp, "-n", "EFI", "-C", image, size], enter)
    _run(["chroot", tree, "mmd", "-i", image, "::/EFI", "::/EFI/BOOT"], enter)
    _run(["chroot", tree, "mcopy", "-i", image, efi, f"::/EFI/BOOT/{platform.program}"], enter)
    with open(f"{tree}{image}", "rb") as file:
        data = file.read()
    os.unlink(f"{tree}{image}")
    os.unlink(f"{tree}{efi}")
    return data


def _copy(data: bytes, fd: int, offset: int) -> None:
    """Write it, leaving holes where it is empty."""
    for at in range(0, len(data), MIB):
        chunk = data[at : at + MIB]
        if chunk.strip(b"\0"):
            os.pwrite(fd, chunk, offset + at)


def install_bios(fd: int, boot_path: str, core: bytes) -> None:
    """What grub-bios-setup does: the first part into the first sector, which leads to the second one."""
    sectors = -(-len(core) // SECTOR)
    if sectors > _BIOS_SECTORS:
        raise IntegrityError(f"GRUB's second part has {sectors} sectors, and there is room for {_BIOS_SECTORS}")
    with open(boot_path, "rb") as file:
        boot = bytearray(file.read(440))
    boot[_KERNEL_SECTOR : _KERNEL_SECTOR + 8] = pack("<Q", _BIOS_START)
    second = bytearray(core.ljust(sectors * SECTOR, b"\0"))
    _, count, segment = unpack_from("<QHH", second, _BLOCK_LIST)
    second[_BLOCK_LIST : _BLOCK_LIST + 12] = pack("<QHH", _BIOS_START + 1, count or sectors - 1, segment)
    os.pwrite(fd, bytes(boot), 0)
    os.pwrite(fd, bytes(second), _BIOS_START * SECTOR)


def _run(argv: list[str], enter: Enter = lambda: None) -> None:
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "SOURCE_DATE_EPOCH": "0"}
    parent = os.getpid()

    def begin() -> None:
        enter()  # first: with other credentials the kernel may forget what follows (prctl(2))
        die_with(parent, 127)

    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment,
            check=False,
            preexec_fn=begin,
        )
    except FileNotFoundError:
        raise NotFound(f"'{argv[0]}' is not installed", hint="apt-get install e2fsprogs coreutils") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise LaunchError(
            f"{argv[2] if argv[0] == 'chroot' else argv[0]}: {said.splitlines()[-1] if said else done.returncode}",
            command=" ".join(argv), status=done.returncode, log_tail=said[-2000:],
        )  # fmt: skip
