"""`docker-archive:`: what every version of `docker save` wrote, and what ours is read by."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from nagaya.errors import IntegrityError, NotFound
from nagaya.images.content import Blobs
from nagaya.images.manifest import Descriptor, parse_config, parse_manifest
from nagaya.images.progress import Silent
from nagaya.images.sources import find_images, open_sink, open_source
from tests.unit.sources_material import (
    OCI_MANIFEST,
    Made,
    digest_of,
    docker_members,
    layer_tar,
    make_image,
    stored_digests,
    write_tar,
)

ONE = make_image(layer_tar({"x": b"one" * 100}), layer_tar({"y": b"two"}))
TWO = make_image(layer_tar({"z": b"other"}), command="/two")


def fetch(path: Path, root: Path, name: str = "", *, platform: str = "") -> Descriptor:
    text = f"docker-archive:{path}" + (f":{name}" if name else "")
    return open_source(text).fetch(Blobs(str(root)), platform=platform, progress=Silent())


def plain_layers(root: Path, descriptor: Descriptor) -> list[bytes]:
    blobs = Blobs(str(root))
    manifest = parse_manifest(blobs.read(descriptor.digest), digest=descriptor.digest)
    return [gzip.decompress(blobs.read(layer.digest)) for layer in manifest.layers]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("compression", ["", "gz", "xz"])
def test_reads_both_layouts(tmp_path: Path, root: Path, compression: str, hybrid: bool) -> None:
    path = write_tar(tmp_path / "d.tar", docker_members(ONE, ["app:1"], hybrid=hybrid), compression=compression)
    got = fetch(path, root, "app:1")
    assert plain_layers(root, got) == list(ONE.plain)
    manifest = parse_manifest(Blobs(str(root)).read(got.digest))
    assert manifest.config.digest == digest_of(ONE.config)  # the image's id survives
    assert got == Descriptor(OCI_MANIFEST, manifest.digest, len(manifest.raw))


def test_the_same_archive_gives_the_same_digest(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "d.tar", docker_members(ONE, ["app:1"]))
    assert fetch(path, tmp_path / "a").digest == fetch(path, tmp_path / "b").digest


def test_layers_that_are_links_to_an_earlier_one(tmp_path: Path, root: Path) -> None:
    """`docker save` before version 25 wrote a layer that an image has twice as a symbolic link (moby#17079)."""
    layer = layer_tar({"x": b"1"})
    made = make_image(layer, layer)
    path = tmp_path / "d.tar"
    with tarfile.open(path, "w") as tar:

        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

        add("aaa/layer.tar", layer)
        link = tarfile.TarInfo("bbb/layer.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "../aaa/layer.tar"
        tar.addfile(link)
        add("c.json", made.config)
        entry = {"Config": "c.json", "RepoTags": None, "Layers": ["aaa/layer.tar", "bbb/layer.tar"]}
        add("manifest.json", json.dumps([entry]).encode())
    assert plain_layers(root, fetch(path, root)) == [layer, layer]


def test_several_images_are_chosen_by_name(tmp_path: Path, root: Path) -> None:
    members = docker_members(ONE, ["app:1", "app:latest"])[:-1] + docker_members(TWO, [])[:-1]
    entries = [json.loads(docker_members(*case)[-1][1])[0] for case in ((ONE, ["app:1", "app:latest"]), (TWO, []))]
    path = write_tar(tmp_path / "d.tar", [*members, ("manifest.json", json.dumps(entries).encode())])
    assert plain_layers(root, fetch(path, root, "app")) == list(ONE.plain)
    with pytest.raises(NotFound, match="has 2 images"):
        fetch(path, root)
    with pytest.raises(NotFound, match="no image 'other'"):
        fetch(path, root, "other")
    assert [names for _, names in find_images(str(path))] == [("app:1", "app:latest"), ()]


def test_an_image_for_another_platform_is_not_found(tmp_path: Path, root: Path) -> None:
    made = make_image(layer_tar({"x": b"1"}), architecture="s390x")
    path = write_tar(tmp_path / "d.tar", docker_members(made, []))
    with pytest.raises(NotFound):
        fetch(path, root, platform="linux/amd64")


# -- hostile


def changed(tmp_path: Path, change: dict[str, Any]) -> Path:
    """ONE's archive with fields of its manifest.json replaced."""
    members = docker_members(ONE, ["app:1"])
    entry = {**json.loads(members[-1][1])[0], **change}
    return write_tar(tmp_path / "d.tar", [*members[:-1], ("manifest.json", json.dumps([entry]).encode())])


@pytest.mark.parametrize(
    "change",
    [
        {"Config": None},
        {"Config": 5},
        {"Config": "missing.json"},
        {"Config": "../../../../../etc/passwd"},
        {"Config": "/etc/passwd"},
        {"Layers": "text"},
        {"Layers": [1]},
        {"Layers": []},
        {"Layers": ["missing"]},
        {"Layers": ["../../../../../etc/passwd", "/etc/passwd"]},
        {"RepoTags": [{}]},
        {"RepoTags": "app:1"},
    ],
)
def test_refuses_a_malformed_manifest(tmp_path: Path, root: Path, change: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError):
        fetch(changed(tmp_path, change), root)


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff", b"[" * 100_000, b" " * (9 << 20), b"[" + b"9" * 9999])
def test_refuses_what_is_no_manifest(tmp_path: Path, root: Path, data: bytes) -> None:
    path = write_tar(tmp_path / "d.tar", [("manifest.json", data)])
    with pytest.raises(IntegrityError):
        fetch(path, root)


def test_an_archive_of_something_else_says_what_to_do(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "rootfs.tar", [("bin/sh", b"#!")])
    with pytest.raises(IntegrityError) as caught:
        find_images(str(path))
    assert "nagaya import" in caught.value.hint


def test_an_empty_list_of_images_has_none(tmp_path: Path, root: Path) -> None:
    path = write_tar(tmp_path / "d.tar", [("manifest.json", b"[]")])
    with pytest.raises(NotFound):
        fetch(path, root)
    assert find_images(str(path)) == []


def test_a_layer_that_does_not_match_its_diff_id_is_refused(tmp_path: Path, root: Path) -> None:
    members = docker_members(ONE, ["app:1"])
    members[0] = (members[0][0], layer_tar({"x": b"evil"}))
    with pytest.raises(IntegrityError, match="diff id"):
        fetch(write_tar(tmp_path / "d.tar", members), root)
    assert stored_digests(root) <= set(), "nothing stays of a layer that was refused"


def test_a_refused_archive_takes_nothing_from_images_that_are_there(tmp_path: Path, root: Path) -> None:
    """A stranger's archive with a layer that we have, under a wrong diff id, must not make us lose ours."""
    good = write_tar(tmp_path / "good.tar", docker_members(ONE, ["app:1"]))
    got = fetch(good, root)
    before = stored_digests(root)
    config = json.loads(ONE.config)
    config["rootfs"]["diff_ids"][0] = digest_of(b"something else")
    bad = write_tar(tmp_path / "bad.tar", docker_members(ONE._replace(config=json.dumps(config).encode()), ["app:1"]))
    with pytest.raises(IntegrityError):
        fetch(bad, root)
    assert before <= stored_digests(root)
    assert plain_layers(root, got) == list(ONE.plain)


@pytest.mark.timeout(30)
def test_a_layer_that_unfolds_without_end_is_refused(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAGAYA_MAX_LAYER_BYTES", str(4 << 20))
    bomb = gzip.compress(bytes(64 << 20), 9)
    made = ONE._replace(plain=(bomb, ONE.plain[1]))
    config = json.loads(ONE.config)
    config["rootfs"]["diff_ids"][0] = "sha256:" + hashlib.sha256(bytes(64 << 20)).hexdigest()
    members = docker_members(made._replace(config=json.dumps(config).encode()), ["app:1"])
    with pytest.raises(IntegrityError, match="unfolds to more than"):
        fetch(write_tar(tmp_path / "d.tar", members), root)
    assert not any((root / "partial").iterdir())


# -- writing


def in_store(root: Path, made: Made) -> Descriptor:
    blobs = Blobs(str(root))
    for data in made.everything.values():
        blobs.put(data)
    return Descriptor(OCI_MANIFEST, made.digest, len(made.manifest))


def test_what_is_written_is_what_docker_reads(tmp_path: Path, root: Path) -> None:
    """Member names and manifest.json as moby's image/tarexport/load.go wants them; layers plain, ids as they were."""
    layer = layer_tar({"x": b"1"})
    made = make_image(layer, ONE.plain[0], layer)  # one of them twice
    target = tmp_path / "d.tar"
    sink = open_sink(str(target), format="docker-archive")
    sink.store(Blobs(str(root)), in_store(root, made), names=("app:1", "registry.example/app:2"), progress=Silent())
    sink.store(Blobs(str(root)), in_store(root, TWO), names=(), progress=Silent())
    sink.close()
    with tarfile.open(target) as tar:
        names = tar.getnames()
        assert len(names) == len(set(names)), "no member twice"
        content = {member.name: tar.extractfile(member).read() for member in tar if member.isreg()}  # type: ignore[union-attr]
    first, second = json.loads(content["manifest.json"])
    assert first["RepoTags"] == ["app:1", "registry.example/app:2"]
    assert not second["RepoTags"]
    assert digest_of(content[first["Config"]]) == digest_of(made.config)
    assert [content[name] for name in first["Layers"]] == [layer, ONE.plain[0], layer]
    assert [content[name] for name in second["Layers"]] == list(TWO.plain)
    diff_ids = parse_config(content[first["Config"]]).diff_ids
    assert [digest_of(content[name]) for name in first["Layers"]] == list(diff_ids)
    assert sorted(os.listdir(tmp_path)) == ["d.tar", "store"]


def test_what_is_written_is_read_again(tmp_path: Path, root: Path) -> None:
    target = tmp_path / "d.tar"
    sink = open_sink(str(target), format="docker-archive")
    sink.store(Blobs(str(root)), in_store(root, ONE), names=("app:1",), progress=Silent())
    sink.close()
    got = fetch(target, tmp_path / "back", "app:1")
    assert plain_layers(tmp_path / "back", got) == list(ONE.plain)
    assert digest_of(ONE.config) in stored_digests(tmp_path / "back")


def test_a_name_by_digest_is_left_out(tmp_path: Path, root: Path) -> None:
    """`docker load` refuses an archive with "app@sha256:…" among its RepoTags."""
    target = tmp_path / "d.tar"
    sink = open_sink(str(target), format="docker-archive")
    sink.store(Blobs(str(root)), in_store(root, ONE), names=(f"app@{ONE.digest}", "app:1"), progress=Silent())
    sink.close()
    assert [names for _, names in find_images(str(target))] == [("app:1",)]


@pytest.mark.parametrize("asked", ["app:1", "docker.io/library/app:1", "library/app:1"])
@pytest.mark.parametrize("written", ["app:1", "docker.io/library/app:1"])
def test_names_are_compared_by_what_they_mean(tmp_path: Path, root: Path, written: str, asked: str) -> None:
    """skopeo and podman spell names out, Docker does not."""
    path = write_tar(tmp_path / "d.tar", docker_members(ONE, [written, "localhost/other:1"]))
    assert plain_layers(root, fetch(path, root, asked)) == list(ONE.plain)
    with pytest.raises(NotFound):
        fetch(path, root, "other:1")
