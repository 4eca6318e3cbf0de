"""What a disk image says of itself, read by us before QEMU sees it: its size, and every other file that it names.

QEMU would open what a header names. Sources: qcow2, QEMU's docs/interop/qcow2.txt; VMDK, VMware's "Virtual Disk Format
5.0"; VDI, VirtualBox's VDICore.h; VHD, Microsoft's "Virtual Hard Disk Image Format"; VHDX, [MS-VHDX].
"""

from __future__ import annotations

import os
from struct import Struct

from nagaya.errors import IntegrityError, Unsupported
from nagaya.static import NamedTuple

MOST_BYTES = 64 << 40
SECTOR = 512
_NAME_MAX = 1023  # qcow2's; nobody has longer ones
_DESCRIPTOR_MAX = 64 << 10
_QCOW2 = Struct(">4sIQIIQIIQQIIQ")  # to snapshots_offset
_QCOW2_V3 = Struct(">QQQII")
_QCOW2_EXTENSION = Struct(">II")
_BACKING_FORMAT, _DATA_FILE = 0xE2792ACA, 0x44415441
_EXTERNAL_DATA = 1 << 2
_KNOWN_INCOMPATIBLE = 0b11011  # dirty, corrupt, compression type, extended L2; bit 2 is the external data file
_VMDK = Struct("<4sIIQQQQI")
_VDI = Struct("<IIII")
_VDI_SIGNATURE = 0xBEDA107F
_VHD_SIZE, _VHD_TYPE = Struct(">Q"), Struct(">I")
_VHDX_REGIONS, _VHDX_REGIONS_MAX = 192 << 10, 2047
_VHDX_METADATA = bytes.fromhex("06a27c8b90479a4bb8fe575f050f886e")
_VHDX_DISK_SIZE = bytes.fromhex("2442a52f1bcd7648b2115dbed83bf4b8")
_VHDX_FILE_PARAMETERS = bytes.fromhex("3767a1ca36fa434db3b633f0aa44e76b")
_MAGICS = (
    (b"QFI\xfb", "qcow2"), (b"KDMV", "vmdk"), (b"# Disk Descript", "vmdk"), (b"COWD", "vmdk"), (b"conectix", "vhd"),
    (b"vhdxfile", "vhdx"), (b"QED\0", "QED"), (b"LUKS\xba\xbe", "LUKS"), (b"WithoutFreeSpace", "Parallels"),
    (b"Bochs Virtual HD", "Bochs"),
)  # fmt: skip


class Header(NamedTuple):
    """`backing` and `extents` are names as they stand in the image, neither resolved nor allowed yet."""

    virtual_bytes: int
    backing: str = ""
    backing_format: str = ""  # QEMU's word; "" = the header does not say
    extents: tuple[str, ...] = ()  # of a VMDK that is a text: the files with its content


def recognise(fd: int) -> str:
    """The format that the content looks like; "" for none, so raw. For a warning, never for a decision."""
    start = os.pread(fd, 68, 0)
    for magic, name in _MAGICS:
        if start.startswith(magic):
            return name
    if len(start) == 68 and start[64:] == _VDI_SIGNATURE.to_bytes(4, "little"):
        return "vdi"
    return ""


def read_header(fd: int, format: str) -> Header:
    """The header of an image that is of `format` by its name. Raises `IntegrityError`, `Unsupported`."""
    header = _READERS[format](fd)
    if not 0 <= header.virtual_bytes <= MOST_BYTES:
        raise IntegrityError(
            f"it says that its disk has {header.virtual_bytes} bytes, and more than {MOST_BYTES >> 40} TiB are not believed"
        )
    return header


def _read(fd: int, size: int, offset: int, what: str) -> bytes:
    data = os.pread(fd, size, offset)
    if len(data) < size:
        raise IntegrityError(f"its {what} is cut off")
    return data


def _text(raw: bytes) -> str:
    text = raw.rstrip(b"\0").decode("utf-8", "surrogateescape")
    if not text or "\0" in text or any(ord(letter) < 32 for letter in text):
        raise IntegrityError("it names another file by what is no file name")
    return text


def _raw(fd: int) -> Header:
    return Header(os.lseek(fd, 0, os.SEEK_END))


def _qcow2(fd: int) -> Header:
    (magic, version, backing_at, backing_bytes, cluster_bits, size, encryption, l1_entries, l1_at, refcounts_at,
     refcount_clusters, _, _) = _QCOW2.unpack(_read(fd, _QCOW2.size, 0, "qcow2 header"))  # fmt: skip
    if magic != b"QFI\xfb":
        raise IntegrityError("it is no qcow2 image")
    if version not in (2, 3):
        raise Unsupported(f"its qcow2 version is {version}, and 2 and 3 are known")
    if encryption:
        raise Unsupported("it is encrypted", hint="decrypt it first: qemu-img convert")
    end = os.lseek(fd, 0, os.SEEK_END)
    if not 9 <= cluster_bits <= 21 or refcount_clusters > (8 << 20) >> cluster_bits:
        raise IntegrityError("its qcow2 header gives impossible sizes")
    covered = l1_entries << (2 * cluster_bits - 3)
    if size <= MOST_BYTES and (covered < size or l1_entries * 8 > 32 << 20):
        raise IntegrityError("its table of clusters does not fit its size")
    if l1_at + l1_entries * 8 > end or refcounts_at >= end:
        raise IntegrityError("its tables lie behind the end of the file")
    length = _QCOW2.size
    if version == 3:
        incompatible, _, _, _, length = _QCOW2_V3.unpack(_read(fd, _QCOW2_V3.size, _QCOW2.size, "qcow2 header"))
        if incompatible & _EXTERNAL_DATA:
            raise Unsupported("it keeps its data in another file, which is not allowed")
        if incompatible & ~_KNOWN_INCOMPATIBLE:
            raise Unsupported("it uses features of qcow2 that are not known here")
        if incompatible & 2:
            raise IntegrityError("QEMU has marked it as corrupt", hint="repair it: nagaya disk check --repair")
    backing_format = _qcow2_extensions(fd, length, backing_at or 1 << cluster_bits)
    if not backing_at:
        return Header(size)
    if not 0 < backing_bytes <= _NAME_MAX or backing_at + backing_bytes > 1 << cluster_bits:
        raise IntegrityError("the name of its backing file does not fit its header")
    return Header(size, _text(_read(fd, backing_bytes, backing_at, "backing file's name")), backing_format)


def _qcow2_extensions(fd: int, at: int, end: int) -> str:
    """The backing file's format; refuses an external data file."""
    backing_format = ""
    while at + _QCOW2_EXTENSION.size <= end:
        kind, size = _QCOW2_EXTENSION.unpack(_read(fd, _QCOW2_EXTENSION.size, at, "qcow2 header"))
        at += _QCOW2_EXTENSION.size
        if not kind:
            break
        if at + size > end:
            raise IntegrityError("an extension of its qcow2 header does not fit in")
        if kind == _DATA_FILE:
            raise Unsupported("it keeps its data in another file, which is not allowed")
        if kind == _BACKING_FORMAT:
            backing_format = _text(_read(fd, size, at, "backing format"))
        at += size + -size % 8
    return backing_format


def _vmdk(fd: int) -> Header:
    start = os.pread(fd, 64, 0)
    if start.startswith(b"COWD"):
        raise Unsupported("it is a VMDK of VMware's first servers (COWD), which is not read")
    if start.startswith(b"KDMV"):
        _, version, _, sectors, grain, descriptor_at, descriptor_sectors, entries = _VMDK.unpack(start[: _VMDK.size])
        if not 1 <= version <= 3 or not 0 < grain <= 1 << 16 or grain & (grain - 1) or not 0 < entries <= 1 << 16:
            raise IntegrityError("its VMDK header gives impossible sizes")
        if not sectors:  # QEMU would take the description in it for that of other files
            raise Unsupported("its VMDK header has no size, and sends to other files, which is not allowed")
        text = b""
        if descriptor_at:
            if descriptor_sectors * SECTOR > _DESCRIPTOR_MAX:
                raise IntegrityError("the description in it is too large")
            text = _read(fd, descriptor_sectors * SECTOR, descriptor_at * SECTOR, "description").split(b"\0")[0]
        fields, extents = _descriptor(text)
        if any(kind != "SPARSE" for _, kind, _ in extents) or len(extents) > 1:
            raise Unsupported("the description in it names other files, which is not allowed")
        return Header(sectors * SECTOR, *_vmdk_parent(fields))
    if not start.startswith(b"# Disk Descript"):
        raise IntegrityError("it is no VMDK image")
    text = os.pread(fd, _DESCRIPTOR_MAX + 1, 0)
    if len(text) > _DESCRIPTOR_MAX:
        raise IntegrityError("the VMDK's description is too large")
    fields, extents = _descriptor(text)
    if not extents or len(extents) > 512 or any(kind not in ("SPARSE", "FLAT", "ZERO") for _, kind, _ in extents):
        raise Unsupported("it is a VMDK of a kind that is not read", hint="export it as a single file")
    total = sum(sectors for sectors, _, _ in extents) * SECTOR
    names = tuple(name for _, kind, name in extents if kind != "ZERO")
    return Header(total, *_vmdk_parent(fields), extents=names)


def _vmdk_parent(fields: dict[str, str]) -> tuple[str, str]:
    if fields.get("parentCID", "ffffffff").lower() == "ffffffff" and "parentFileNameHint" not in fields:
        return "", ""
    return _text(fields.get("parentFileNameHint", "").encode("utf-8", "surrogateescape")), "vmdk"


def _descriptor(text: bytes) -> tuple[dict[str, str], list[tuple[int, str, str]]]:
    """The fields, and each extent as (sectors, kind, name), of `RW 4192256 SPARSE "name"`."""
    fields, extents = {}, []
    for line in text.decode("utf-8", "surrogateescape").splitlines():
        key, equals, value = line.partition("=")
        words = line.split(None, 3)
        if words and words[0] in ("RW", "RDONLY", "NOACCESS"):
            if len(words) < 3 or not words[1].isdigit() or len(words[1]) > 18:
                raise IntegrityError("an extent in the VMDK's description is malformed")
            name = words[3].split('"')[1] if len(words) > 3 and words[3].count('"') >= 2 else ""
            extents.append((int(words[1]), words[2], name))
        elif equals:
            fields[key.strip()] = value.strip().strip('"')
    return fields, extents


def _vdi(fd: int) -> Header:
    head = _read(fd, 512, 0, "VDI header")
    signature, version, _, kind = _VDI.unpack_from(head, 64)
    if signature != _VDI_SIGNATURE:
        raise IntegrityError("it is no VDI image")
    if version >> 16 != 1:
        raise Unsupported(f"its VDI version is {version >> 16}.{version & 0xFFFF}, and 1.1 is known")
    if kind not in (1, 2) or any(head[0x1A8:0x1C8]):
        raise Unsupported("it is the difference to another VDI", hint="merge it first: VBoxManage clonemedium")
    block = int.from_bytes(head[0x178:0x17C], "little")
    blocks = int.from_bytes(head[0x180:0x184], "little")
    size = int.from_bytes(head[0x170:0x178], "little")
    if block != 1 << 20 or blocks * block < size:
        raise IntegrityError("its VDI header gives impossible sizes")
    return Header(size)


def _vhd(fd: int) -> Header:
    end = os.lseek(fd, 0, os.SEEK_END)
    footer = os.pread(fd, SECTOR, 0)
    if not footer.startswith(b"conectix"):  # a fixed one is the raw disk, and a footer
        footer = os.pread(fd, SECTOR, max(0, end - SECTOR))
    if len(footer) < SECTOR or not footer.startswith(b"conectix"):
        raise IntegrityError("it is no VHD image")
    total = (sum(footer) - sum(footer[64:68])) ^ 0xFFFFFFFF
    if total != int.from_bytes(footer[64:68], "big"):
        raise IntegrityError("the checksum of its VHD header is wrong")
    kind = _VHD_TYPE.unpack_from(footer, 60)[0]
    if kind == 4:
        raise Unsupported("it is the difference to another VHD", hint="merge it first, with the tool that made it")
    if kind not in (2, 3):
        raise Unsupported(f"it is a VHD of an unknown kind ({kind})")
    return Header(_VHD_SIZE.unpack_from(footer, 48)[0])


def _vhdx(fd: int) -> Header:
    if os.pread(fd, 8, 0) != b"vhdxfile":
        raise IntegrityError("it is no VHDX image")
    regions = _read(fd, 64 << 10, _VHDX_REGIONS, "VHDX region table")
    count = int.from_bytes(regions[8:12], "little")
    if regions[:4] != b"regi" or count > _VHDX_REGIONS_MAX:
        raise IntegrityError("its VHDX region table is malformed")
    for at in range(16, 16 + 32 * count, 32):
        if regions[at : at + 16] == _VHDX_METADATA:
            return _vhdx_metadata(fd, int.from_bytes(regions[at + 16 : at + 24], "little"))
    raise IntegrityError("it has no VHDX metadata")


def _vhdx_metadata(fd: int, at: int) -> Header:
    table = _read(fd, 64 << 10, at, "VHDX metadata")
    count = int.from_bytes(table[10:12], "little")
    if table[:8] != b"metadata" or count > 2047:
        raise IntegrityError("its VHDX metadata is malformed")
    size = -1
    for entry in range(32, 32 + 32 * count, 32):
        item, place = table[entry : entry + 16], int.from_bytes(table[entry + 16 : entry + 20], "little")
        if item == _VHDX_DISK_SIZE:
            size = int.from_bytes(_read(fd, 8, at + place, "VHDX metadata"), "little")
        elif item == _VHDX_FILE_PARAMETERS and _read(fd, 8, at + place, "VHDX metadata")[4] & 2:
            raise Unsupported("it is the difference to another VHDX", hint="merge it first, with the tool that made it")
    if size < 0:
        raise IntegrityError("its VHDX metadata does not say how large the disk is")
    return Header(size)


_READERS = {"raw": _raw, "qcow2": _qcow2, "vmdk": _vmdk, "vdi": _vdi, "vhd": _vhd, "vhdx": _vhdx}
