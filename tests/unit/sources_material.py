"""Images, archives and hostile variants of them, made by hand: independent of the code that reads them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
REF_NAME = "org.opencontainers.image.ref.name"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def layer_tar(files: dict[str, bytes]) -> bytes:
    """A plain tar of regular files, deterministic."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o755
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


class Made(NamedTuple):
    """An image by hand: everything it consists of, by digest."""

    manifest: bytes
    config: bytes
    layers: tuple[bytes, ...]  # compressed
    plain: tuple[bytes, ...]

    @property
    def digest(self) -> str:
        return digest_of(self.manifest)

    @property
    def blobs(self) -> dict[str, bytes]:
        return {digest_of(data): data for data in (self.config, *self.layers)}

    @property
    def everything(self) -> dict[str, bytes]:
        return {**self.blobs, self.digest: self.manifest}

    def descriptor(self, **more: Any) -> dict[str, Any]:
        return {"mediaType": OCI_MANIFEST, "digest": self.digest, "size": len(self.manifest), **more}


def make_image(*layers: bytes, architecture: str = "amd64", command: str = "/x") -> Made:
    """An OCI image over these plain tars."""
    packed = tuple(gzip.compress(layer, 1, mtime=0) for layer in layers)
    config = json.dumps(
        {
            "architecture": architecture,
            "os": "linux",
            "config": {"Cmd": [command], "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [digest_of(layer) for layer in layers]},
        }
    ).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": OCI_CONFIG, "digest": digest_of(config), "size": len(config)},
        "layers": [{"mediaType": OCI_LAYER_GZIP, "digest": digest_of(data), "size": len(data)} for data in packed],
    }
    # Spaces that our own serialiser would not write: whoever re-serialises it changes its digest.
    return Made(json.dumps(manifest, indent=3).encode(), config, packed, layers)


def make_index(entries: list[dict[str, Any]]) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()


def write_layout(directory: Path, blobs: dict[str, bytes], index: bytes) -> Path:
    """An OCI layout with these blobs."""
    (directory / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (directory / "index.json").write_bytes(index)
    for digest, data in blobs.items():
        (directory / "blobs" / "sha256" / digest.partition(":")[2]).write_bytes(data)
    return directory


def named_layout(directory: Path, images: dict[str, Made]) -> Path:
    """A layout of several images, each under its tag."""
    blobs: dict[str, bytes] = {}
    for made in images.values():
        blobs.update(made.everything)
    index = make_index([made.descriptor(annotations={REF_NAME: tag}) for tag, made in images.items()])
    return write_layout(directory, blobs, index)


def write_tar(path: Path, members: list[tuple[str, bytes]], *, compression: str = "") -> Path:
    """A tar of members in this order; names are taken as they are."""
    with tarfile.open(path, f"w:{compression}") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def docker_members(made: Made, names: list[str], *, hybrid: bool = False) -> list[tuple[str, bytes]]:
    """What `docker save` wrote before version 25 (ID/layer.tar), or with `hybrid` writes since (blobs/sha256/…)."""
    config = digest_of(made.config).partition(":")[2]
    layer_names = []
    members = []
    for plain in made.plain:
        hexadecimal = digest_of(plain).partition(":")[2]
        name = f"blobs/sha256/{hexadecimal}" if hybrid else f"{hexadecimal}/layer.tar"
        layer_names.append(name)
        members.append((name, plain))
    config_name = f"blobs/sha256/{config}" if hybrid else f"{config}.json"
    members.append((config_name, made.config))
    entry = {"Config": config_name, "RepoTags": names or None, "Layers": layer_names}
    members.append(("manifest.json", json.dumps([entry]).encode()))
    return members


class Heard:
    """A `Progress` that remembers; thread-safe, as the protocol wants."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.steps: list[str] = []
        self.started: dict[str, int] = {}
        self.reached: dict[str, int] = {}
        self.finished: dict[str, str] = {}

    def step(self, text: str) -> None:
        with self._lock:
            self.steps.append(text)

    def start(self, key: str, label: str, total_bytes: int) -> None:
        with self._lock:
            self.started[key] = total_bytes

    def advance(self, key: str, done_bytes: int) -> None:
        with self._lock:
            self.reached[key] = done_bytes

    def finish(self, key: str, note: str = "") -> None:
        with self._lock:
            self.finished[key] = note


def stored_digests(root: Path) -> set[str]:
    """The blobs that a store has, read from its directories."""
    directory = root / "blobs" / "sha256"
    return {f"sha256:{name}" for name in os.listdir(directory)} if directory.is_dir() else set()


def partial_files(root: Path) -> list[str]:
    directory = root / "partial"
    return sorted(os.listdir(directory)) if directory.is_dir() else []
