"""Read a bzImage (a distribution's `vmlinuz`), and take the ELF kernel out of it: Documentation/arch/x86/boot.rst.

To decompress here takes a tenth of a second, and on a KVM that emulates the guest's kernel it takes the guest minutes.
"""

from __future__ import annotations

import ctypes
import struct

from nagaya.engines.kvm.boot.elf import Segment
from nagaya.engines.kvm.boot.image import BootImage, Handover, plan_segments
from nagaya.engines.kvm.boot.linux import SETUP_HEADER_AT, SETUP_HEADER_END, enter_long_mode, plan_handover
from nagaya.errors import IntegrityError, Unsupported, UsageError
from nagaya.static import Callable, NamedTuple

_BOOT_FLAG_AT = 0x1FE
_BOOT_FLAG = b"\x55\xaa"
_JUMP_TARGET_AT = 0x201  # of a two-byte jump over the header, which so says where that ends
_MAGIC_AT = 0x202
_MAGIC = b"HdrS"
_VERSION_AT = 0x206
_LOADFLAGS_AT = 0x211
_LOADED_HIGH = 1 << 0
_XLOADFLAGS_AT = 0x236
_KERNEL_64 = 1 << 0
_PAYLOAD_AT = 0x248
_PLACE_AT = 0x258
_OLDEST_VERSION = 0x020C  # Linux 3.8: it has xloadflags, so it can say that it is a 64-bit kernel
_SECTOR_BYTES = 512
_ENTRY_64 = 0x200  # from where it was loaded
_MOST_KERNEL_BYTES = 512 << 20
_MOST_DICTIONARY_BYTES = 256 << 20

_LZ4_MAGIC = b"\x02\x21\x4c\x18"
_LZ4_BLOCK_BYTES = 8 << 20  # of the "legacy frame", decompressed


class BzImage(NamedTuple):
    """What a bzImage says of itself. Offsets are in its file; all of them are inside."""

    setup_header: bytes
    """From 0x1f1 on."""
    code_offset: int
    """The protected-mode code: the decompressor and its payload."""
    payload_offset: int
    payload_bytes: int
    load_gpa: int
    init_bytes: int
    """The memory from `load_gpa` on that decompressor and kernel work in."""


def is_bzimage(start: bytes) -> bool:
    """Whether a file begins with a setup header."""
    return start[_MAGIC_AT : _MAGIC_AT + 4] == _MAGIC and start[_BOOT_FLAG_AT : _BOOT_FLAG_AT + 2] == _BOOT_FLAG


def parse_bzimage(content: memoryview) -> BzImage:
    """Raises `UsageError` for what is cut off or damaged, `Unsupported` for a kernel of 32 bits or of an old protocol."""
    if len(content) < SETUP_HEADER_END:
        raise UsageError("the kernel's file is cut off: it ends in its header")
    (version,) = struct.unpack_from("<H", content, _VERSION_AT)
    if version < _OLDEST_VERSION:
        raise Unsupported(
            f"the kernel is too old: its boot protocol is {version >> 8}.{version & 0xFF:02}",
            hint="use Linux 3.8 or later, built for x86-64",
        )
    (flags,) = struct.unpack_from("<H", content, _XLOADFLAGS_AT)
    if not flags & _KERNEL_64:
        raise Unsupported("the kernel is for another CPU: i386", hint="a machine of this type runs x86-64 kernels only")
    if not content[_LOADFLAGS_AT] & _LOADED_HIGH:
        raise UsageError("the kernel's file is damaged: a 64-bit kernel cannot be a zImage")
    code_offset = ((content[SETUP_HEADER_AT] or 4) + 1) * _SECTOR_BYTES
    payload_offset, payload_bytes = struct.unpack_from("<II", content, _PAYLOAD_AT)
    payload_offset += code_offset
    if payload_offset > len(content) or payload_bytes > len(content) - payload_offset:
        raise UsageError("the kernel's file is cut off: its compressed part lies beyond its end")
    if payload_bytes < 8:
        raise UsageError("the kernel's file is damaged: it says that it contains no kernel")
    load_gpa, init_bytes = struct.unpack_from("<QI", content, _PLACE_AT)
    end = min(_MAGIC_AT + content[_JUMP_TARGET_AT], SETUP_HEADER_END)
    header = bytes(content[SETUP_HEADER_AT : max(end, _PLACE_AT + 12)])
    return BzImage(header, code_offset, payload_offset, payload_bytes, load_gpa, init_bytes)


def plan_bzimage(image: BzImage, content: memoryview, handover: Handover) -> BootImage:
    """Start its own decompressor, by the 64-bit protocol. Raises `UsageError` when something does not fit into memory."""
    code_bytes = len(content) - image.code_offset
    segment = Segment(image.code_offset, image.load_gpa, code_bytes, max(code_bytes, image.init_bytes))
    writes = plan_segments([segment], content, handover.memory)
    kernel_end = segment.gpa + segment.memory_bytes
    writes += plan_handover(handover, header=image.setup_header, kernel_end=kernel_end)
    return BootImage(tuple(writes), enter_long_mode(image.load_gpa + _ENTRY_64))


def extract_payload(image: BzImage, content: memoryview) -> memoryview:
    """What it contains, decompressed: an ELF kernel, and after that the relocations of one that can move.

    Raises `Unsupported` when there is nothing to decompress it with, `IntegrityError` when it is damaged.
    """
    payload = content[image.payload_offset : image.payload_offset + image.payload_bytes]
    # Whatever the compression, the last four bytes are the size: gzip's own trailer, or appended by the kernel's build.
    size_bytes = int.from_bytes(payload[-4:], "little")
    if not 0 < size_bytes <= _MOST_KERNEL_BYTES:
        raise IntegrityError(f"the kernel in it would have {size_bytes} bytes: it is damaged")
    name, inflate = _find_format(payload)
    try:
        kernel = inflate(payload if name == "gzip" else payload[:-4], size_bytes)
    except _Damaged as error:
        raise IntegrityError(f"the kernel in it is damaged ({name}: {error})") from None
    if len(kernel) != size_bytes:
        raise IntegrityError(f"the kernel in it is damaged ({name}: {len(kernel)} bytes and not {size_bytes})")
    return kernel


def _find_format(payload: memoryview) -> tuple[str, Callable[[memoryview, int], memoryview]]:
    for magic, name, inflate in _FORMATS:
        if payload[: len(magic)] == magic:
            return name, inflate
    raise Unsupported(
        "the kernel in it is compressed in a way that is not known here",
        finding=f"it begins with {payload[:8].hex()}",
        hint="name its vmlinux: scripts/extract-vmlinux of Linux takes it out",
    )


class _Damaged(Exception):
    """What a decompressor says of its input."""


def _inflate_gzip(data: memoryview, size_bytes: int) -> memoryview:
    import zlib  # lazy: only for a compressed kernel, as the others below

    stream = zlib.decompressobj(wbits=31)
    try:
        kernel = stream.decompress(data, size_bytes + 1)
    except zlib.error as error:
        raise _Damaged(error) from None
    return _whole(kernel, stream.eof)


def _inflate_xz(data: memoryview, size_bytes: int) -> memoryview:
    import lzma

    stream = lzma.LZMADecompressor(memlimit=_MOST_DICTIONARY_BYTES)
    try:
        kernel = stream.decompress(data, size_bytes + 1)
    except lzma.LZMAError as error:
        raise _Damaged(error) from None
    return _whole(kernel, stream.eof)


def _inflate_bzip2(data: memoryview, size_bytes: int) -> memoryview:
    import bz2

    stream = bz2.BZ2Decompressor()
    try:
        kernel = stream.decompress(data, size_bytes + 1)
    except OSError as error:
        raise _Damaged(error) from None
    return _whole(kernel, stream.eof)


def _inflate_lz4(data: memoryview, size_bytes: int) -> memoryview:
    """The "legacy frame": blocks of 8 MiB, each after its compressed size."""
    decompress = _library_function("liblz4.so.1", "LZ4_decompress_safe", "lz4", "liblz4-1")
    decompress.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    decompress.restype = ctypes.c_int
    kernel = bytearray(size_bytes)
    start = ctypes.addressof(ctypes.c_char.from_buffer(kernel))
    at, done = len(_LZ4_MAGIC), 0
    while at < len(data):
        block = bytes(data[at + 4 : at + 4 + int.from_bytes(data[at : at + 4], "little")])
        at += 4 + len(block)
        got = decompress(block, start + done, len(block), min(_LZ4_BLOCK_BYTES, size_bytes - done))
        if got <= 0:
            raise _Damaged("a block that is none, or more than there should be")
        done += got
    return memoryview(kernel)[:done]


def _inflate_zstd(data: memoryview, size_bytes: int) -> memoryview:
    decompress = _library_function("libzstd.so.1", "ZSTD_decompress", "zstd", "libzstd1")
    decompress.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    decompress.restype = ctypes.c_ssize_t  # an error is a small negative number
    kernel = bytearray(size_bytes)
    got = decompress(ctypes.addressof(ctypes.c_char.from_buffer(kernel)), size_bytes, bytes(data), len(data))
    if got < 0:
        raise _Damaged(f"error {-got}")
    return memoryview(kernel)[:got]


def _refuse_lzo(data: memoryview, size_bytes: int) -> memoryview:
    raise Unsupported(
        "the kernel in it is compressed with LZO, which is not known here",
        hint="name its vmlinux: scripts/extract-vmlinux of Linux takes it out",
    )


_FORMATS: tuple[tuple[bytes, str, Callable[[memoryview, int], memoryview]], ...] = (
    (b"\x1f\x8b", "gzip", _inflate_gzip),
    (b"\xfd7zXZ\0", "xz", _inflate_xz),
    (b"\x5d\0\0", "lzma", _inflate_xz),
    (b"BZh", "bzip2", _inflate_bzip2),
    (_LZ4_MAGIC, "lz4", _inflate_lz4),
    (b"\x28\xb5\x2f\xfd", "zstd", _inflate_zstd),
    (b"\x89LZO", "lzo", _refuse_lzo),
)


def _whole(kernel: bytes, ended: bool) -> memoryview:
    if not ended:
        raise _Damaged("it does not end where it should")
    return memoryview(kernel)


def _library_function(library: str, name: str, compression: str, package: str) -> ctypes._NamedFuncPointer:
    """A decompressor of the system: dpkg itself needs these libraries, so that a Debian has them."""
    try:
        return ctypes.CDLL(library)[name]
    except (OSError, AttributeError):
        raise Unsupported(
            f"the kernel in it is compressed with {compression}, and there is no library to decompress it",
            hint=f"install it: apt install {package}",
            finding=f"no {library}",
        ) from None
