"""Disk images against the real qemu-img: every pair of formats, clones, snapshots, and images that mean harm."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from struct import pack, pack_into

import pytest

from nagaya.errors import Conflict, IntegrityError, NagayaError, NotFound, Unsupported, UsageError
from nagaya.storage.disk_images.formats import FORMATS, NAMES
from nagaya.storage.disk_images.store import Disks
from tests.e2e.command import PROGRAM

pytestmark = pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img")

MIB = 1 << 20


@pytest.fixture
def disks(tmp_path: Path) -> Disks:
    return Disks(str(tmp_path / "root"))


def qemu_img(*arguments: object) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True, timeout=60)


@pytest.fixture
def content(tmp_path: Path) -> Path:
    """A raw disk of 24 MiB with data at its ends and in between, and holes."""
    path = tmp_path / "content.raw"
    with path.open("wb") as file:
        file.truncate(24 * MIB)
        for at in (0, 3 * MIB + 512, 17 * MIB, 24 * MIB - 4096):
            file.seek(at)
            file.write(os.urandom(4096))
    return path


@pytest.mark.parametrize(("first", "second"), list(itertools.product(NAMES, NAMES)))
def test_every_pair_of_formats(disks: Disks, content: Path, tmp_path: Path, first: str, second: str) -> None:
    disks.convert(str(content), "a", to=first)
    made = disks.convert("a", "b", to=second)
    assert (made.name, made.format, made.virtual_bytes) == ("b", second, 24 * MIB)
    for name, format in (("a", first), ("b", second)):
        if next(kind for kind in FORMATS if kind.name == format).checks:
            assert disks.check(name).clean
    back = tmp_path / "back.raw"
    disks.convert("b", str(back))
    assert back.read_bytes() == content.read_bytes()


@pytest.mark.parametrize("subformat", ["monolithicFlat", "twoGbMaxExtentSparse", "streamOptimized"])
def test_other_kinds_of_vmdk_are_read(disks: Disks, content: Path, tmp_path: Path, subformat: str) -> None:
    source = tmp_path / "other.vmdk"
    qemu_img("convert", "-O", "vmdk", "-o", f"subformat={subformat}", content, source)
    disks.convert(str(source), "a", to="raw")
    assert Path(disks.locate("a")).read_bytes() == content.read_bytes()


LATE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <unistd.h>

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at)
{
	static atomic_int headers;
	ssize_t (*real)(int, const void *, size_t, off64_t) =
		(ssize_t (*)(int, const void *, size_t, off64_t))dlsym(RTLD_NEXT, "pwrite64");

	if (size == 512 && !at && atomic_fetch_add(&headers, 1) == 1)
		for (int seen = 0; seen != headers; usleep(200000))
			seen = headers;
	return real(fd, data, size, at);
}
"""


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_a_vdi_knows_how_many_blocks_it_has(disks: Disks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one write of its header comes behind all later ones, if others are made meanwhile (4 of 5 times, with -W)."""
    program = shutil.which("qemu-img")
    (tmp_path / "late.c").write_text(LATE)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "late.so", tmp_path / "late.c", "-ldl"], check=True)
    place = tmp_path / "bin"
    place.mkdir()
    (place / "qemu-img").write_text(f'#!/bin/sh\nLD_PRELOAD={tmp_path}/late.so exec {program} "$@"\n')
    (place / "qemu-img").chmod(0o755)
    source = tmp_path / "source.raw"
    with source.open("wb") as file:
        for at in range(0, 32 * MIB, MIB):
            file.seek(at)
            file.write(os.urandom(4096))
    for number in range(4):
        with monkeypatch.context() as late:
            late.setenv("PATH", f"{place}:{os.environ['PATH']}")
            disks.convert(str(source), f"a{number}", to="vdi")
        assert disks.check(f"a{number}").clean


def test_a_compressed_copy_is_smaller(disks: Disks, tmp_path: Path) -> None:
    source = tmp_path / "text.raw"
    source.write_bytes(b"nagaya " * (MIB // 7))
    plain, small = disks.convert(str(source), "plain"), disks.convert(str(source), "small", compress=True)
    assert small.actual_bytes < plain.actual_bytes / 2
    with pytest.raises(Unsupported):
        disks.convert(str(source), "other", to="vdi", compress=True)


def test_sparse_stays_sparse(disks: Disks) -> None:
    disks.create("a", 1 << 40)
    disks.create("b", 1 << 40, format="raw")
    for name in ("a", "b"):
        copy = disks.clone(name, f"{name}-copy")
        assert copy.virtual_bytes == 1 << 40 and copy.actual_bytes < 4 * MIB


def test_linked_clones_stand_on_each_other(disks: Disks, content: Path) -> None:
    disks.convert(str(content), "base")
    for below, above in itertools.pairwise(("base", "one", "two", "three")):
        disks.clone(below, above, linked=True)
    details = disks.info("three")
    assert [os.path.basename(path) for path in details.chain] == ["three.qcow2", "two.qcow2", "one.qcow2", "base.qcow2"]
    assert details.disk.virtual_bytes == 24 * MIB and details.disk.actual_bytes < MIB
    disks.convert("three", "whole", to="raw")
    assert Path(disks.locate("whole")).read_bytes() == content.read_bytes()
    for forbidden in (
        lambda: disks.remove("one"),
        lambda: disks.resize("base", "+", MIB),
        lambda: disks.snapshot("two", "create", "s"),
    ):
        with pytest.raises(Conflict, match="stands on it"):
            forbidden()
    disks.remove("three")
    disks.resize("two", "+", MIB)
    assert disks.get("two").virtual_bytes == 25 * MIB


def test_resizing(disks: Disks) -> None:
    for format in ("qcow2", "raw"):
        disks.create(format, 10 * MIB, format=format)
        assert disks.resize(format, "+", 5 * MIB).virtual_bytes == 15 * MIB
        with pytest.raises(UsageError, match="cut its end off"):
            disks.resize(format, "-", MIB)
        assert disks.resize(format, "", 8 * MIB, shrink=True).virtual_bytes == 8 * MIB
    disks.create("other", 10 * MIB, format="vdi")
    with pytest.raises(Unsupported, match="convert"):
        try:
            disks.resize("other", "+", MIB)
        except Unsupported as problem:
            raise Unsupported(problem.hint) from None


def test_snapshots_go_back(disks: Disks, content: Path) -> None:
    disks.convert(str(content), "a")
    path = disks.locate("a")
    contents = {}
    for number in range(5):
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", f"write -P {number + 1} {number}M 1M", path],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        disks.snapshot("a", "create", f"s{number}")
        disks.convert("a", "look", to="raw", force=True)
        contents[f"s{number}"] = Path(disks.locate("look")).read_bytes()
    assert [snapshot.name for snapshot in disks.info("a").snapshots] == list(contents)
    for name in ("s1", "s4", "s0"):
        disks.snapshot("a", "apply", name)
        disks.convert("a", "look", to="raw", force=True)
        assert Path(disks.locate("look")).read_bytes() == contents[name]
    disks.snapshot("a", "rm", "s1")
    assert "s1" not in [snapshot.name for snapshot in disks.info("a").snapshots]
    assert disks.check("a").clean
    with pytest.raises(NotFound):
        disks.snapshot("a", "apply", "s1")
    with pytest.raises(Conflict):
        disks.snapshot("a", "create", "s0")


def test_leaks_are_found_and_repaired(disks: Disks, content: Path) -> None:
    disks.convert(str(content), "a")
    with open(disks.locate("a"), "r+b") as file:  # the first entry of the table of clusters: what it leads to is lost
        file.seek(int.from_bytes(os.pread(file.fileno(), 8, 40), "big"))
        file.write(bytes(8))
    found = disks.check("a")
    assert not found.clean and found.leaks
    disks.check("a", repair=True)
    assert disks.check("a").clean


def test_a_disk_that_qemu_has_is_in_use(disks: Disks) -> None:
    disks.create("a", MIB)
    path = disks.locate("a")
    user = subprocess.Popen(["qemu-io", "-f", "qcow2", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert user.stdin is not None and user.stdout is not None
        user.stdin.write(b"length\n")
        user.stdin.flush()
        user.stdout.readline()
        assert disks.info("a").disk.virtual_bytes == MIB  # looking is always allowed
        with pytest.raises(Conflict, match="in use"):
            disks.resize("a", "+", MIB)
        with pytest.raises(Conflict, match="in use"):
            disks.convert("a", "b")
    finally:
        user.communicate(b"quit\n", timeout=10)
    assert os.listdir(disks.directory) == ["a.qcow2"]


def wait_for_half(directory: str, least_bytes: int) -> None:
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        for name in os.listdir(directory):
            if name.startswith(".tmp-") and os.stat(f"{directory}/{name}").st_blocks * 512 > least_bytes:
                return
        time.sleep(0.002)
    pytest.fail("the conversion did not begin")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_conversion_leaves_no_half(disks: Disks, tmp_path: Path, number: signal.Signals) -> None:
    source = tmp_path / "large.raw"
    with source.open("wb") as file:
        for _ in range(48):
            file.write(os.urandom(4 * MIB))
    os.makedirs(disks.directory)
    environment = {**os.environ, "NAGAYA_ROOT": os.path.dirname(disks.directory)}
    process = subprocess.Popen(
        [PROGRAM, "disk", "convert", str(source), "a", "--compress", "-q"], env=environment, stderr=subprocess.PIPE
    )
    wait_for_half(disks.directory, MIB)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode != 0
    with pytest.raises(NotFound):
        disks.locate("a")
    deadline_s = time.monotonic() + 10  # what qemu-img was killed with takes a moment
    while True:
        disks.create("b", MIB)  # the next one that makes a disk here
        if os.listdir(disks.directory) == ["b.qcow2"]:
            break
        assert time.monotonic() < deadline_s, os.listdir(disks.directory)
        disks.remove("b")
        time.sleep(0.05)


def test_nothing_appears_on_a_full_disk(disks: Disks, content: Path) -> None:
    """/dev/full is no directory: a quota by file size stands for it."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
        with pytest.raises(NagayaError):
            disks.convert(str(content), "a", to="raw")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(disks.directory) == []


# -- images that mean harm


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    place = tmp_path / "elsewhere"
    place.mkdir()
    path = place / "secret.raw"
    path.write_bytes(b"root:secret" + bytes(MIB - 11))
    return path


def backed(path: Path, backing: str, format: str = "raw") -> Path:
    """A qcow2 image with any text as its backing file's name."""
    qemu_img("create", "-u", "-f", "qcow2", "-F", format, "-b", backing, path, "1M")
    return path


@pytest.mark.parametrize("link", ["absolute", "relative", "symlink"])
def test_a_backing_file_elsewhere_is_refused(disks: Disks, secret: Path, tmp_path: Path, link: str) -> None:
    name = {"absolute": str(secret), "relative": "elsewhere/../elsewhere/secret.raw", "symlink": "beside.raw"}[link]
    if link == "symlink":
        (tmp_path / name).symlink_to(secret)
    image = backed(tmp_path / "evil.qcow2", name)
    for attempt in (
        lambda: disks.convert(str(image), "a"),
        lambda: disks.info(str(image)),
        lambda: disks.clone(str(image), "a", linked=True),
    ):
        with pytest.raises(IntegrityError, match="outside its own directory"):
            attempt()
    assert disks.list() == []
    disks.convert(str(image), "a", allow_backing=True)
    assert disks.info("a").disk.virtual_bytes == MIB


@pytest.mark.parametrize(
    "name",
    ["json:{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}", "nbd://127.0.0.1:1/x", "ssh://h/x", "fat:/etc", "nbd:unix:/x"],
)  # fmt: skip
def test_a_backing_file_that_is_none_is_refused(disks: Disks, tmp_path: Path, name: str) -> None:
    image = tmp_path / "evil.qcow2"
    qemu_img("create", "-f", "qcow2", image, "1M")
    with image.open("r+b") as file:  # qemu-img itself would not write some of these
        file.seek(1024)
        file.write(name.encode())
        file.seek(8)
        file.write(pack(">QI", 1024, len(name)))
    for allow in (False, True):
        with pytest.raises(IntegrityError, match="is no file"):
            disks.convert(str(image), "a", allow_backing=allow)


def test_what_lies_under_is_looked_at_too(disks: Disks, secret: Path, tmp_path: Path) -> None:
    backed(tmp_path / "middle.qcow2", str(secret))
    image = backed(tmp_path / "top.qcow2", "middle.qcow2", "qcow2")
    with pytest.raises(IntegrityError, match="outside its own directory"):
        disks.convert(str(image), "a")


def test_a_backing_file_without_a_format_is_not_probed(disks: Disks, tmp_path: Path) -> None:
    qemu_img("create", "-f", "raw", tmp_path / "base", "1M")
    image = tmp_path / "top.qcow2"
    qemu_img("create", "-u", "-f", "qcow2", "-F", "raw", "-b", "base", image, "1M")
    raw = bytearray(image.read_bytes())
    at = raw.index(pack(">I", 0xE2792ACA))
    raw[at : at + 4] = pack(">I", 0x12345678)  # an extension that nobody knows
    image.write_bytes(raw)
    with pytest.raises(IntegrityError, match="does not say what format"):
        disks.convert(str(image), "a")


def test_an_image_that_stands_on_itself(disks: Disks, tmp_path: Path) -> None:
    image = backed(tmp_path / "one.qcow2", "two.qcow2", "qcow2")
    backed(tmp_path / "two.qcow2", "one.qcow2", "qcow2")
    with pytest.raises(IntegrityError, match="stands on itself"):
        disks.info(str(image))


def test_a_guest_that_writes_a_header_into_its_raw_disk(disks: Disks, secret: Path, tmp_path: Path) -> None:
    """Probing by content would make the host's file the guest's disk."""
    evil = backed(tmp_path / "evil.qcow2", str(secret)).read_bytes()
    disks.create("a", MIB, format="raw")
    with open(disks.locate("a"), "r+b") as file:
        file.write(evil)
    disks.convert("a", "b", to="raw")
    assert Path(disks.locate("b")).read_bytes()[: len(evil)] == evil
    assert disks.info("a").disk.format == "raw"
    (tmp_path / "cloud.img").write_bytes(evil)
    with pytest.raises(UsageError, match="looks like qcow2"):
        disks.convert(str(tmp_path / "cloud.img"), "c")
    with pytest.raises(UsageError, match="does not follow from its name"):
        (tmp_path / "nameless").write_bytes(evil)
        disks.convert(str(tmp_path / "nameless"), "c")


def test_an_external_data_file_is_refused(disks: Disks, tmp_path: Path) -> None:
    qemu_img(
        "create", "-f", "qcow2", "-o", f"data_file={tmp_path}/data.raw,data_file_raw=on", tmp_path / "a.qcow2", "1M"
    )
    with pytest.raises(Unsupported, match="another file"):
        disks.convert(str(tmp_path / "a.qcow2"), "a")


@pytest.mark.parametrize("name", ["/etc/passwd", "../elsewhere/secret.raw", "json:{}", "link.raw"])
def test_a_vmdk_whose_parts_lie_elsewhere(disks: Disks, secret: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "link.raw").symlink_to(secret)
    image = tmp_path / "evil.vmdk"
    image.write_text(
        '# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
        f'RW 2048 FLAT "{name}" 0\n'
    )
    with pytest.raises(IntegrityError, match="part of it"):
        disks.convert(str(image), "a")


def test_a_vmdk_whose_header_sends_elsewhere(disks: Disks, tmp_path: Path) -> None:
    """QEMU takes an empty capacity for a description of other files."""
    image = tmp_path / "evil.vmdk"
    qemu_img("create", "-f", "vmdk", image, "1M")
    raw = bytearray(image.read_bytes())
    pack_into("<Q", raw, 12, 0)
    image.write_bytes(raw)
    with pytest.raises(Unsupported, match="other files"):
        disks.convert(str(image), "a")


@pytest.mark.parametrize("format", ["qcow2", "vhd", "vdi", "vhdx", "vmdk"])
def test_a_size_that_nobody_believes(disks: Disks, tmp_path: Path, format: str) -> None:
    disks.create("a", MIB, format=format)
    path = disks.locate("a")
    raw = bytearray(Path(path).read_bytes())
    if format == "vhdx":
        at = raw.index(bytes.fromhex("2442a52f1bcd7648b2115dbed83bf4b8"))
        region = at // 65536 * 65536
        pack_into("<Q", raw, region + int.from_bytes(raw[at + 16 : at + 20], "little"), 1 << 60)
    elif format == "vhd":
        pack_into(">Q", raw, 48, 1 << 60)
        pack_into(">I", raw, 64, (sum(raw[:64]) + sum(raw[68:512])) ^ 0xFFFFFFFF)
    else:
        kind, at = {"qcow2": (">Q", 24), "vdi": ("<Q", 0x170), "vmdk": ("<Q", 12)}[format]
        pack_into(kind, raw, at, 1 << 51)
    Path(path).write_bytes(raw)
    with pytest.raises(IntegrityError):
        disks.info("a")
    with pytest.raises(IntegrityError):
        disks.convert("a", "b", to="raw")


@pytest.mark.parametrize("format", [name for name in NAMES if name != "raw"])
def test_headers_that_are_damaged(disks: Disks, content: Path, format: str) -> None:
    """Whatever is wrong with them: one of our errors, never another, and no half of a disk."""
    import random

    disks.convert(str(content), "good", to=format)
    good = Path(disks.locate("good")).read_bytes()
    other = Path(disks.locate("good"))
    numbers = random.Random(7)
    for _ in range(12):
        bad = bytearray(good)
        for _ in range(numbers.choice((1, 4, 40))):
            bad[numbers.choice((numbers.randrange(512), numbers.randrange(min(len(bad), 300_000))))] = (
                numbers.randrange(256)
            )
        other.write_bytes(bad[: numbers.choice((len(bad), len(bad) // 2, 100))])
        try:
            disks.info("good")
            disks.convert("good", "made", to="raw", force=True)
        except NagayaError as problem:
            assert problem.message and "Traceback" not in problem.message
    assert set(os.listdir(disks.directory)) <= {other.name, "made.raw"}


# -- the command


def test_the_command(tmp_path: Path, content: Path) -> None:
    environment = {**os.environ, "NAGAYA_ROOT": str(tmp_path / "root")}

    def nagaya(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PROGRAM, "disk", *arguments], env=environment, capture_output=True, text=True, timeout=60
        )

    assert nagaya("create", "a", "20g").stdout == "a\n"
    assert "already" in nagaya("create", "a", "20g").stderr
    assert nagaya("clone", "--linked", "a", "b").stdout == "b\n"
    assert nagaya("ls", "-q").stdout == "a\nb\n"
    assert "stands on" in nagaya("info", "b").stdout
    assert '"size_bytes": 21474836480' in nagaya("info", "--json", "b").stdout
    done = nagaya("convert", str(content), "c")
    assert done.stdout == "c\n" and done.stderr.startswith(str(content))  # plain lines, no terminal
    assert "\r" not in done.stderr
    assert nagaya("check", "c").stdout == "c: clean\n"
    assert nagaya("resize", "c", "+1g").returncode == 0
    refused = nagaya("rm", "a")
    assert refused.returncode == 1 and "stands on it" in refused.stderr
    assert nagaya("rm", "b", "a", "c").returncode == 0
    assert nagaya("create", "x", "20q").returncode == 2
    assert nagaya("create", "../x", "1g").returncode == 2
    assert nagaya("info", "none").returncode == 1
