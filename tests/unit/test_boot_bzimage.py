"""bzImages: every compression, every refusal, and damage anywhere."""

from __future__ import annotations

import random
import struct
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nagaya.engines.kvm.boot import bzimage
from nagaya.errors import IntegrityError, Unsupported, UsageError
from tests.kernel_images import COMPRESSORS, make_bzimage, make_elf, make_payload

KERNEL = make_elf() + b"relocations"


def extract(content: bytes) -> bytes:
    view = memoryview(content)
    return bytes(bzimage.extract_payload(bzimage.parse_bzimage(view), view))


@pytest.mark.parametrize("compression", COMPRESSORS)
def test_every_compression_is_undone(compression: str) -> None:
    assert extract(make_bzimage(make_payload(KERNEL, compression))) == KERNEL


@pytest.mark.parametrize("compression", ["lz4", "zstd", "gzip"])
def test_kernels_of_many_blocks(compression: str) -> None:
    kernel = random.Random(1).randbytes(1 << 20) * 17 + b"end"  # three blocks of LZ4's legacy frame
    assert extract(make_bzimage(make_payload(kernel, compression))) == kernel


@pytest.mark.parametrize("compression", COMPRESSORS)
def test_a_damaged_payload_is_never_passed_on(compression: str) -> None:
    good = make_payload(KERNEL, compression)
    chance = random.Random(2)
    for _ in range(300):
        damaged = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(6, len(good))] = chance.randrange(256)
        try:
            found = extract(make_bzimage(bytes(damaged)))
        except (IntegrityError, UsageError, Unsupported):
            continue
        # LZ4, lzma and the kernel's zstd have no checksum; what comes out has the size that was promised.
        assert len(found) == int.from_bytes(damaged[-4:], "little")


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("change", [-1, 1, 4096])
def test_the_size_at_the_end_is_checked(compression: str, change: int) -> None:
    payload = make_payload(KERNEL, compression)
    payload = payload[:-4] + struct.pack("<I", len(KERNEL) + change)
    with pytest.raises(IntegrityError, match="damaged"):
        extract(make_bzimage(payload))


@pytest.mark.parametrize("compression", COMPRESSORS)
def test_a_payload_that_ends_early_is_refused(compression: str) -> None:
    payload = make_payload(KERNEL, compression)
    with pytest.raises(IntegrityError, match="damaged"):
        extract(make_bzimage(payload[: len(payload) // 2] + struct.pack("<I", len(KERNEL))))


@pytest.mark.parametrize("compression", ["gzip", "xz", "bzip2", "zstd", "lz4"])
def test_a_bomb_is_given_up_at_the_promised_size(compression: str) -> None:
    payload = make_payload(bytes(32 << 20), compression)[:-4] + struct.pack("<I", 4096)
    with pytest.raises(IntegrityError):
        extract(make_bzimage(payload))


@pytest.mark.parametrize("size", [0, 1 << 31, (1 << 32) - 1])
def test_a_size_that_no_kernel_has(size: int) -> None:
    with pytest.raises(IntegrityError, match=f"{size} bytes"):
        extract(make_bzimage(make_payload(KERNEL, "xz")[:-4] + struct.pack("<I", size)))


@pytest.mark.parametrize(("start", "message"), [(b"\x89LZO\0\r\n\x1a\n", "LZO"), (b"unknown!", "not known here")])
def test_what_cannot_be_decompressed_here_says_so(start: bytes, message: str) -> None:
    with pytest.raises(Unsupported, match=message) as caught:
        extract(make_bzimage(start + bytes(64) + struct.pack("<I", 4096)))
    assert "vmlinux" in caught.value.hint


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    content = make_bzimage(make_payload(KERNEL, "lz4"))
    monkeypatch.setattr(bzimage.ctypes, "CDLL", refuse)
    with pytest.raises(Unsupported, match="lz4") as caught:
        extract(content)
    assert "apt install liblz4-1" in caught.value.hint


def test_setup_sectors_of_zero_mean_four() -> None:
    assert extract(make_bzimage(make_payload(KERNEL), setup_sectors=0)) == KERNEL


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"version": 0x020B}, Unsupported, "too old: its boot protocol is 2.11"),
        ({"xloadflags": 0}, Unsupported, "another CPU: i386"),
        ({"loadflags": 0}, UsageError, "zImage"),
        ({"payload_at": 0x7FFFFFFF - 0x1000}, UsageError, "cut off"),
        ({"payload_bytes": 0xFFFFFFFF}, UsageError, "cut off"),
        ({"payload_bytes": 0}, UsageError, "no kernel"),
        ({"payload_bytes": 7}, UsageError, "no kernel"),
    ],
)
def test_headers_that_are_refused(changes: dict[str, int], error: type[Exception], message: str) -> None:
    far = changes.pop("payload_at", None)
    content = bytearray(make_bzimage(make_payload(KERNEL), **changes))  # type: ignore[arg-type]
    if far is not None:
        struct.pack_into("<I", content, 0x248, far)
    with pytest.raises(error, match=message):
        extract(bytes(content))


def test_cut_off_anywhere_it_is_refused() -> None:
    content = make_bzimage(make_payload(KERNEL))
    needed = len(content) - 64  # what follows the payload
    for size in (*range(0, 0x26C, 7), 0x26B, 0x26C, 0x700, needed - 1):
        with pytest.raises(UsageError, match="cut off"):
            extract(content[:size])


def test_marks() -> None:
    assert bzimage.is_bzimage(make_bzimage(b"12345678"))
    for other in (b"", b"\x7fELF", KERNEL, bytes(1024)):
        assert not bzimage.is_bzimage(other)


GOOD = make_bzimage(make_payload(KERNEL, "zstd"))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0x1F1, 0x270), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
def test_a_changed_header_is_a_kernel_or_an_error(changes: list[tuple[int, bytes]]) -> None:
    content = bytearray(GOOD)
    for at, data in changes:
        content[at : at + len(data)] = data
    try:
        extract(bytes(content))
    except (UsageError, Unsupported, IntegrityError):
        pass


def test_random_damage_is_a_kernel_or_an_error() -> None:
    chance = random.Random(4)
    spots = [*range(0x1F1, 0x26C), *range(0x900, len(GOOD))]
    for _ in range(5000):
        content = bytearray(GOOD)
        for _ in range(chance.randint(1, 6)):
            content[chance.choice(spots)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        try:
            extract(bytes(content[: chance.choice((len(content), chance.randrange(len(content))))]))
        except (UsageError, Unsupported, IntegrityError):
            pass


def test_nothing_is_decompressed_for_a_vmlinux() -> None:
    import subprocess

    code = "import sys, nagaya.engines.kvm.boot.load; print({'zlib', 'lzma', 'bz2', 'nagaya.engines.kvm.boot.bzimage'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env={"PYTHONPATH": "src"})
    assert done.stdout.strip() == "set()", done.stderr
