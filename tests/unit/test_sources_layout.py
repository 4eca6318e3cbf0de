"""`oci:` and `oci-archive:`: read, written, and hostile."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import tarfile
from pathlib import Path
from typing import Any

import pytest

from nagaya.errors import IntegrityError, NagayaError, NotFound, UsageError
from nagaya.images.content import Blobs
from nagaya.images.manifest import Descriptor
from nagaya.images.progress import Silent
from nagaya.images.sources import find_images, open_sink, open_source
from tests.unit.sources_material import (
    OCI_INDEX,
    REF_NAME,
    Heard,
    Made,
    digest_of,
    docker_members,
    layer_tar,
    make_image,
    make_index,
    named_layout,
    partial_files,
    stored_digests,
    write_layout,
    write_tar,
)

ONE = make_image(layer_tar({"x": b"one" * 100}), layer_tar({"y": b"two"}))
TWO = make_image(layer_tar({"x": b"other"}), command="/two")


def fetch(text: str, root: Path, *, platform: str = "") -> Descriptor:
    return open_source(text).fetch(Blobs(str(root)), platform=platform, progress=Silent())


def archive_of(layout: Path, path: Path, *, compression: str = "", prefix: str = "") -> Path:
    """The layout in a tar, as `tar -C layout -cf path .` makes it for prefix "./"."""
    files = sorted(file for file in layout.rglob("*") if file.is_file())
    members = [(prefix + str(file.relative_to(layout)), file.read_bytes()) for file in files]
    return write_tar(path, members, compression=compression)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


# -- reading


def test_reads_the_tag_that_is_asked_for(tmp_path: Path, root: Path) -> None:
    layout = named_layout(tmp_path / "oci", {"one": ONE, "two": TWO})
    heard = Heard()
    got = open_source(f"oci:{layout}:two").fetch(Blobs(str(root)), platform="", progress=heard)
    assert got == Descriptor(TWO_TYPE, TWO.digest, len(TWO.manifest))
    assert stored_digests(root) == set(TWO.everything)
    assert heard.finished.keys() == set(TWO.blobs)


TWO_TYPE = json.loads(TWO.manifest)["mediaType"]


def test_a_lone_image_needs_no_tag(tmp_path: Path, root: Path) -> None:
    assert fetch(f"oci:{named_layout(tmp_path / 'oci', {'v': ONE})}", root).digest == ONE.digest
    assert Blobs(str(root)).read(ONE.digest) == ONE.manifest  # byte by byte, not serialised anew


def test_a_tag_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    layout = named_layout(tmp_path / "oci", {"one": ONE, "two": TWO})
    with pytest.raises(NotFound, match="no image 'three'") as caught:
        open_source(f"oci:{layout}:three")
    assert caught.value.hint == "name one of: one, two"
    with pytest.raises(NotFound, match="has 2 images"):
        open_source(f"oci:{layout}")


def test_a_directory_that_is_no_layout_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(NagayaError) as caught:
        open_source(f"oci:{tmp_path}")
    assert str(tmp_path) in caught.value.message
    for kind in ("oci", "oci-archive", "docker-archive"):
        with pytest.raises(NotFound):
            open_source(f"{kind}:{tmp_path}/missing")
    with pytest.raises(UsageError):
        open_source("oci:")


@pytest.mark.parametrize(("wanted", "chosen"), [("linux/amd64", ONE), ("linux/arm64", TWO)])
def test_an_index_below_the_layout_picks_the_platform(tmp_path: Path, root: Path, wanted: str, chosen: Made) -> None:
    nested = make_index(
        [
            ONE.descriptor(platform={"os": "linux", "architecture": "amd64"}),
            TWO.descriptor(platform={"os": "linux", "architecture": "arm64", "variant": "v8"}),
        ]
    )
    entry = {"mediaType": OCI_INDEX, "digest": digest_of(nested), "size": len(nested), "annotations": {REF_NAME: "m"}}
    blobs = {**ONE.everything, **TWO.everything, digest_of(nested): nested}
    layout = write_layout(tmp_path / "oci", blobs, make_index([entry]))
    assert fetch(f"oci:{layout}:m", root, platform=wanted).digest == chosen.digest
    assert stored_digests(root) == set(chosen.everything)  # nothing of the other platform
    with pytest.raises(NotFound, match="linux/riscv64") as caught:
        fetch(f"oci:{layout}", root, platform="linux/riscv64")
    assert "linux/amd64" in caught.value.hint


def test_a_lone_image_for_another_platform_is_not_found(tmp_path: Path, root: Path) -> None:
    made = make_image(layer_tar({"x": b"1"}), architecture="s390x")
    with pytest.raises(NotFound, match="linux/amd64") as caught:
        fetch(f"oci:{named_layout(tmp_path / 'oci', {'v': made})}", root, platform="linux/amd64")
    assert "s390x" in caught.value.hint


@pytest.mark.parametrize("compression", ["", "gz", "xz", "bz2"])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_reads_an_archive(tmp_path: Path, root: Path, compression: str, prefix: str) -> None:
    layout = named_layout(tmp_path / "oci", {"one": ONE, "two": TWO})
    path = archive_of(layout, tmp_path / "a.tar", compression=compression, prefix=prefix)
    assert fetch(f"oci-archive:{path}:one", root).digest == ONE.digest
    assert stored_digests(root) == set(ONE.everything)


def test_finds_every_image_with_its_names(tmp_path: Path, root: Path) -> None:
    layout = named_layout(tmp_path / "oci", {"debian:one": ONE, "two": TWO})
    for path in (layout, archive_of(layout, tmp_path / "a.tar")):
        found = {names: source for source, names in find_images(str(path))}
        assert found.keys() == {("debian:one",), ("two",)}
        got = found[("two",)].fetch(Blobs(str(root)), platform="", progress=Silent())
        assert got.digest == TWO.digest
    with pytest.raises(NotFound):
        find_images(str(tmp_path / "missing"))


def test_finds_the_format_of_a_docker_archive(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "d.tar", docker_members(ONE, ["app:1", "app:2"]))
    assert [names for _, names in find_images(str(path))] == [("app:1", "app:2")]


def test_a_blob_that_is_there_is_not_copied_again(tmp_path: Path, root: Path) -> None:
    layout = named_layout(tmp_path / "oci", {"one": ONE})
    fetch(f"oci:{layout}", root)
    for digest in ONE.blobs:
        (layout / "blobs" / "sha256" / digest[7:]).write_bytes(b"")
    heard = Heard()
    open_source(f"oci:{layout}").fetch(Blobs(str(root)), platform="", progress=heard)
    assert set(heard.finished.values()) == {"already here"}


def test_the_store_shares_no_file_with_the_layout(tmp_path: Path, root: Path) -> None:
    """Whoever can write the layout later would else change what the store believes to have checked."""
    layout = named_layout(tmp_path / "oci", {"one": ONE})
    fetch(f"oci:{layout}", root)
    for digest in ONE.blobs:
        assert not os.path.samefile(Blobs(str(root)).path(digest), layout / "blobs" / "sha256" / digest[7:])


# -- hostile


def broken(tmp_path: Path, change: dict[str, bytes | None]) -> Path:
    """A layout of ONE whose blobs are changed, or (None) missing."""
    layout = named_layout(tmp_path / "oci", {"one": ONE})
    for digest, data in change.items():
        path = layout / "blobs" / "sha256" / digest[7:]
        path.unlink()
        if data is not None:
            path.write_bytes(data)
    return layout


LAYER = digest_of(ONE.layers[0])


@pytest.mark.parametrize("kind", ["oci", "oci-archive"])
@pytest.mark.parametrize(
    "change",
    [
        {LAYER: ONE.layers[0][:-1]},
        {LAYER: ONE.layers[0] + b"!"},
        {LAYER: bytes(len(ONE.layers[0]))},
        {LAYER: b""},
        {LAYER: None},
        {digest_of(ONE.config): b"{}"},
        {ONE.digest: ONE.manifest + b" "},
        {ONE.digest: None},
        {ONE.digest: b" " * (9 << 20)},
    ],
    ids=["short", "long", "other", "empty", "missing", "config", "manifest", "no-manifest", "huge-manifest"],
)
def test_refuses_what_does_not_match(tmp_path: Path, root: Path, change: dict[str, bytes | None], kind: str) -> None:
    path = broken(tmp_path, change)
    if kind == "oci-archive":
        path = archive_of(path, tmp_path / "a.tar")
    with pytest.raises(IntegrityError):
        fetch(f"{kind}:{path}", root)
    assert not stored_digests(root) & (set(change) | {ONE.digest}), "a blob that was refused must not be in the store"
    fetch(f"oci:{named_layout(tmp_path / 'good', {'one': ONE})}", root)  # and is no obstacle to the good one
    assert stored_digests(root) == set(ONE.everything)
    assert partial_files(root) == []


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"schemaVersion": 2, "manifests": {}}',
        b'{"schemaVersion": 2, "manifests": [1]}',
        b'{"schemaVersion": 2, "manifests": [{"mediaType": "x", "digest": "sha256:../../../../etc/shadow", "size": 1}]}',
        b'{"schemaVersion": 2, "manifests": [{"mediaType": "x", "digest": "sha256:%s", "size": -1}]}' % (b"a" * 64),
        b'{"schemaVersion": 2, "manifests": [{"mediaType": "x", "digest": "sha256:%s", "size": 1e99}]}' % (b"a" * 64),
        b"[" * 100_000,
        b'{"schemaVersion": %s, "manifests": []}' % (b"9" * 10_000),
        b'{"schemaVersion": 2, "pad": "' + b" " * (9 << 20) + b'", "manifests": []}',
    ],
    ids=[
        "empty", "array", "object", "not-utf8", "manifests-object", "entry-number", "digest-path", "negative",
        "float", "deep", "long-number", "huge",
    ],
)  # fmt: skip
def test_refuses_a_malformed_index(tmp_path: Path, root: Path, index: bytes) -> None:
    layout = write_layout(tmp_path / "oci", {}, index)
    with pytest.raises(IntegrityError):
        fetch(f"oci:{layout}:x", root)
    with pytest.raises(IntegrityError):
        find_images(str(layout))


def test_an_empty_index_has_no_image(tmp_path: Path, root: Path) -> None:
    layout = write_layout(tmp_path / "oci", {}, make_index([]))
    with pytest.raises(NotFound):
        fetch(f"oci:{layout}", root)


def test_indexes_that_name_each_other_endlessly_are_refused(tmp_path: Path, root: Path) -> None:
    """No index can name itself (its digest is of its content), but a chain of them may be long."""
    entry: dict[str, Any] = ONE.descriptor(platform={"os": "linux", "architecture": "amd64"})
    blobs = dict(ONE.everything)
    for _ in range(40):
        index = make_index([entry])
        entry = {"mediaType": OCI_INDEX, "digest": digest_of(index), "size": len(index)}
        blobs[digest_of(index)] = index
    layout = write_layout(tmp_path / "oci", blobs, make_index([entry]))
    with pytest.raises((IntegrityError, NotFound)):
        fetch(f"oci:{layout}", root, platform="linux/amd64")


def test_links_in_a_layout_lead_nowhere_outside(tmp_path: Path, root: Path) -> None:
    """The content is what the digest says, so that nothing but the link's destination can be at fault."""
    outside = tmp_path / "secret"
    outside.write_bytes(ONE.layers[0])
    for link in (str(outside), "../../../secret"):
        layout = broken(tmp_path, {LAYER: None})
        (layout / "blobs" / "sha256" / LAYER[7:]).symlink_to(link)
        with pytest.raises(IntegrityError):
            fetch(f"oci:{layout}", root)
        (layout / "blobs" / "sha256" / LAYER[7:]).unlink()
        (layout / "blobs" / "sha256" / LAYER[7:]).touch()
    assert LAYER not in stored_digests(root)


def test_a_linked_blobs_directory_leads_nowhere_outside(tmp_path: Path, root: Path) -> None:
    layout = named_layout(tmp_path / "oci", {"one": ONE})
    (layout / "blobs").rename(tmp_path / "blobs")
    (layout / "blobs").symlink_to(tmp_path / "blobs")
    with pytest.raises(IntegrityError):
        fetch(f"oci:{layout}", root)


@pytest.mark.timeout(10)
def test_a_pipe_in_the_place_of_a_blob_does_not_block(tmp_path: Path, root: Path) -> None:
    layout = broken(tmp_path, {LAYER: None})
    os.mkfifo(layout / "blobs" / "sha256" / LAYER[7:])
    with pytest.raises(IntegrityError):
        fetch(f"oci:{layout}", root)


def test_an_archive_cut_off_anywhere_is_refused(tmp_path: Path, root: Path) -> None:
    whole = archive_of(named_layout(tmp_path / "oci", {"one": ONE}), tmp_path / "a.tar").read_bytes()
    end = len(whole.rstrip(b"\0"))
    cut = tmp_path / "cut.tar"
    for size in (0, 1, 511, 512, 700, 1024, end // 2, end - 600, end - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(NagayaError) as caught:
            fetch(f"oci-archive:{cut}", root)
        assert isinstance(caught.value, IntegrityError | NotFound), size
        assert ONE.digest not in stored_digests(root)


def test_a_compressed_archive_cut_off_is_refused(tmp_path: Path, root: Path) -> None:
    whole = archive_of(named_layout(tmp_path / "oci", {"one": ONE}), tmp_path / "a.tgz", compression="gz").read_bytes()
    (tmp_path / "cut.tgz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IntegrityError):
        fetch(f"oci-archive:{tmp_path}/cut.tgz", root)


def test_a_member_that_is_there_twice_is_refused(tmp_path: Path, root: Path) -> None:
    """Two readers may believe different ones of them."""
    layout = named_layout(tmp_path / "oci", {"one": ONE})
    members = [(str(f.relative_to(layout)), f.read_bytes()) for f in sorted(layout.rglob("*")) if f.is_file()]
    for name in ("index.json", "./index.json", "blobs/../index.json"):
        path = write_tar(tmp_path / "a.tar", [*members, (name, make_index([]))])
        with pytest.raises(IntegrityError, match="twice"):
            fetch(f"oci-archive:{path}", root)


def test_members_with_paths_leading_out_are_never_written(tmp_path: Path, root: Path) -> None:
    layout = named_layout(tmp_path / "oci", {"one": ONE})
    members = [(str(f.relative_to(layout)), f.read_bytes()) for f in sorted(layout.rglob("*")) if f.is_file()]
    path = write_tar(tmp_path / "a.tar", [("../evil", b"x"), ("/tmp/sources-evil", b"x"), *members])
    before = set(tmp_path.iterdir())
    try:
        fetch(f"oci-archive:{path}", root)
    except IntegrityError:
        pass  # refusing it is as good as leaving them where they are
    assert set(tmp_path.iterdir()) - before <= {root}
    assert not os.path.exists("/tmp/sources-evil")


def test_links_in_an_archive_that_go_round_are_refused(tmp_path: Path, root: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, target in (("index.json", "b"), ("b", "index.json")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    with pytest.raises(IntegrityError):
        fetch(f"oci-archive:{path}", root)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("size", [-1024, -512, -1, -(1 << 62), (1 << 62), 1 << 40])
def test_a_member_of_an_impossible_size_neither_hangs_nor_crashes(tmp_path: Path, root: Path, size: int) -> None:
    """CVE-2025-8194: tarfile went back and forth for ever on a negative size."""
    good = tarfile.TarInfo("oci-layout").tobuf(tarfile.GNU_FORMAT)
    bad = bytearray(tarfile.TarInfo("index.json").tobuf(tarfile.GNU_FORMAT))
    bad[124:136] = (
        b"\x80\0\0\0" + struct.pack(">Q", size) if size >= 0 else b"\xff\xff\xff\xff" + struct.pack(">q", size)
    )
    bad[148:156] = b" " * 8
    bad[148:156] = b"%06o\0 " % sum(bad)
    (tmp_path / "a.tar").write_bytes(good + bytes(bad) + bytes(2048))
    with pytest.raises((IntegrityError, NotFound)):
        fetch(f"oci-archive:{tmp_path}/a.tar", root)


def test_an_extended_header_beyond_reason_is_not_read_into_memory(tmp_path: Path, root: Path) -> None:
    """A sparse gigabyte on disk, or a megabyte of gzip, must not become a gigabyte of memory."""
    import resource

    header = tarfile.TarInfo("index.json")
    header.type, header.size = tarfile.XHDTYPE, 1 << 30
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate((1 << 30) + 2048)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((IntegrityError, NotFound)):
        fetch(f"oci-archive:{path}", root)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10, "kibibytes"


def test_random_bytes_are_no_archive(tmp_path: Path, root: Path) -> None:
    for data in (os.urandom(4096), b"\x1f\x8b" + os.urandom(100), b"PK\3\4" + bytes(2000), b"\0" * 10240):
        (tmp_path / "a.tar").write_bytes(data)
        for kind in ("oci-archive", "docker-archive"):
            with pytest.raises((IntegrityError, NotFound)):
                fetch(f"{kind}:{tmp_path}/a.tar", root)


# -- writing


def in_store(root: Path, *images: Made) -> Blobs:
    blobs = Blobs(str(root))
    for made in images:
        for data in made.everything.values():
            blobs.put(data)
    return blobs


def stored(made: Made) -> Descriptor:
    return Descriptor(TWO_TYPE, made.digest, len(made.manifest))


def test_what_is_written_is_read_with_the_same_digest(tmp_path: Path, root: Path) -> None:
    blobs = in_store(root, ONE, TWO)
    for format, target in (("oci", tmp_path / "oci"), ("oci-archive", tmp_path / "a.tar")):
        sink = open_sink(str(target), format=format)
        assert sink.store(blobs, stored(ONE), names=("app:1", "app:latest"), progress=Silent()) == ONE.digest
        assert sink.store(blobs, stored(TWO), names=("two:1",), progress=Silent()) == TWO.digest
        sink.close()
        assert fetch(f"{format}:{target}:app:latest", tmp_path / f"{format}-back").digest == ONE.digest
        assert fetch(f"{format}:{target}:two:1", tmp_path / f"{format}-back").digest == TWO.digest
        assert stored_digests(tmp_path / f"{format}-back") == set(ONE.everything) | set(TWO.everything)
        names = {name for found in find_images(str(target)) for name in found.names}
        assert names == {"app:1", "app:latest", "two:1"}


def test_a_written_layout_is_what_the_specification_says(tmp_path: Path, root: Path) -> None:
    sink = open_sink(f"oci:{tmp_path}/oci:v1")
    sink.store(in_store(root, ONE), stored(ONE), names=("app:1",), progress=Silent())
    sink.close()
    layout = tmp_path / "oci"
    assert json.loads((layout / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((layout / "index.json").read_bytes())
    assert index["schemaVersion"] == 2
    assert [(m["digest"], m["size"], m["annotations"][REF_NAME]) for m in index["manifests"]] == [
        (ONE.digest, len(ONE.manifest), "v1")
    ]
    for digest, data in ONE.everything.items():
        assert (layout / "blobs" / "sha256" / digest[7:]).read_bytes() == data
    left = [file.name for file in layout.rglob("*") if file.is_file() and len(file.name) != 64]
    assert sorted(left) == ["index.json", "oci-layout"]


def test_a_tag_moves_and_other_images_stay(tmp_path: Path, root: Path) -> None:
    blobs = in_store(root, ONE, TWO)
    for made, tag in ((ONE, "a"), (ONE, "b"), (TWO, "a")):
        sink = open_sink(f"oci:{tmp_path}/oci:{tag}")
        sink.store(blobs, stored(made), names=(), progress=Silent())
        sink.close()
    assert fetch(f"oci:{tmp_path}/oci:a", tmp_path / "back").digest == TWO.digest
    assert fetch(f"oci:{tmp_path}/oci:b", tmp_path / "back").digest == ONE.digest


def test_what_others_wrote_into_an_index_is_kept(tmp_path: Path, root: Path) -> None:
    entry = ONE.descriptor(annotations={REF_NAME: "one", "org.example": "kept"}, artifactType="x/y")
    layout = write_layout(tmp_path / "oci", ONE.everything, make_index([entry]))
    sink = open_sink(f"oci:{layout}:two")
    sink.store(in_store(root, TWO), stored(TWO), names=(), progress=Silent())
    sink.close()
    assert json.loads((layout / "index.json").read_bytes())["manifests"][0] == entry


def test_the_same_images_make_the_same_archive(tmp_path: Path, root: Path) -> None:
    blobs = in_store(root, ONE)
    for name in ("a.tar", "b.tar"):
        sink = open_sink(str(tmp_path / name), format="oci-archive")
        sink.store(blobs, stored(ONE), names=("app:1",), progress=Silent())
        sink.close()
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


@pytest.mark.parametrize("format", ["oci-archive", "docker-archive"])
def test_a_failed_archive_leaves_nothing_and_spares_what_was_there(tmp_path: Path, root: Path, format: str) -> None:
    target = tmp_path / "out" / "a.tar"
    target.parent.mkdir()
    target.write_bytes(b"mine")
    sink = open_sink(str(target), format=format)
    sink.store(in_store(root, ONE), stored(ONE), names=("app:1",), progress=Silent())
    sink.close(failed=True)
    assert target.read_bytes() == b"mine"
    assert os.listdir(target.parent) == ["a.tar"]


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_a_tag_after_an_archive_is_a_tag_and_not_part_of_the_file(tmp_path: Path, root: Path, kind: str) -> None:
    sink = open_sink(f"{kind}:{tmp_path}/a.tar:app:9")
    sink.store(in_store(root, ONE), stored(ONE), names=("app:1",), progress=Silent())
    sink.close()
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "store"}
    assert [found.names for found in find_images(f"{tmp_path}/a.tar")] == [("app:9",)]


def test_a_target_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NagayaError, match="no directory"):
        open_sink(f"{tmp_path}/file", format="oci")
    with pytest.raises(NagayaError, match="cannot write"):
        open_sink(f"{tmp_path}/missing/a.tar", format="oci-archive")
    with pytest.raises(UsageError, match="unknown image format"):
        open_sink("x", format="zip")


def test_an_archive_reaches_standard_output_through_a_pipe(tmp_path: Path, root: Path) -> None:
    """`nagaya save app | …`: nothing may seek."""
    import subprocess
    import sys

    in_store(root, ONE)
    program = (
        "import sys\n"
        "from nagaya.images.content import Blobs\n"
        "from nagaya.images.manifest import Descriptor\n"
        "from nagaya.images.progress import Silent\n"
        "from nagaya.images.sources import open_sink\n"
        "sink = open_sink('-', format='oci-archive')\n"
        f"sink.store(Blobs({str(root)!r}), Descriptor({TWO_TYPE!r}, {ONE.digest!r}, {len(ONE.manifest)}),"
        " names=('app:1',), progress=Silent())\n"
        "sink.close()\n"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=20).stdout
    (tmp_path / "a.tar").write_bytes(out)
    assert fetch(f"oci-archive:{tmp_path}/a.tar:app:1", tmp_path / "back").digest == ONE.digest
    with tarfile.open(fileobj=io.BytesIO(out)) as tar:
        assert {member.name for member in tar if not member.name.startswith("blobs/")} == {"oci-layout", "index.json"}


def test_a_gzip_of_an_archive_is_found_by_its_content(tmp_path: Path, root: Path) -> None:
    path = archive_of(named_layout(tmp_path / "oci", {"one": ONE}), tmp_path / "a.tar")
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert [found.names for found in find_images(str(path))] == [("one",)]
