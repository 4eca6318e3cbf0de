"""`oci:DIR[:TAG]` and `oci-archive:FILE[:TAG]`: the OCI image layout (image-spec, image-layout.md)."""

from __future__ import annotations

import json
import os

from nagaya.errors import HostError, IntegrityError, NotFound, UsageError
from nagaya.images.content import Blobs
from nagaya.images.manifest import (
    INDEX_TYPES,
    OCI_INDEX,
    Descriptor,
    is_index,
    parse_config,
    parse_index,
    parse_manifest,
    select_platform,
    verify_digest,
)
from nagaya.images.progress import Progress
from nagaya.images.sources.archive import Archive, is_called, open_archive, read_document
from nagaya.images.sources.base import Found
from nagaya.images.sources.copy import copy_blob
from nagaya.static import Any

REF_NAME = "org.opencontainers.image.ref.name"
FULL_NAME = "io.containerd.image.name"
NESTING_MAX = 4
LAYOUT = b'{"imageLayoutVersion": "1.0.0"}'


class LayoutSource:
    """One image of a layout."""

    def __init__(self, archive: Archive, descriptor: Descriptor, label: str) -> None:
        self._archive = archive
        self._descriptor = descriptor
        self.label = label

    def fetch(self, blobs: Blobs, *, platform: str, progress: Progress) -> Descriptor:
        """See `Source.fetch`."""
        descriptor = self._descriptor
        for _ in range(NESTING_MAX):
            raw = self._read(descriptor)
            if not is_index(descriptor.media_type, raw):
                break
            descriptor = select_platform(parse_index(raw), platform)
        else:
            raise IntegrityError(f"{self._archive.path}: indexes within indexes, more than {NESTING_MAX} deep")
        manifest = parse_manifest(raw, digest=descriptor.digest, media_type=descriptor.media_type)
        for part in (manifest.config, *manifest.layers):
            with self._archive.open(_blob_name(part.digest)) as stream:
                copy_blob(blobs, part, stream, progress)
        if self._descriptor == descriptor and platform:
            self._check_platform(blobs, manifest.config, descriptor, platform)
        return Descriptor(manifest.media_type, blobs.put(raw), len(raw))

    def _read(self, descriptor: Descriptor) -> bytes:
        raw = read_document(self._archive, _blob_name(descriptor.digest))
        verify_digest(raw, descriptor.digest, f"{self._archive.path}: a manifest")
        return raw

    def _check_platform(self, blobs: Blobs, config: Descriptor, descriptor: Descriptor, platform: str) -> None:
        """A lone manifest has to be for the platform that was asked for."""
        found = parse_config(blobs.read(config.digest)).platform
        select_platform((descriptor._replace(platform=found),), platform)


def _blob_name(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def open_layout(path: str, tag: str, *, archive: bool) -> LayoutSource:
    """The image `tag` of a layout, or its only one. Raises `NotFound`, `IntegrityError`."""
    opened = open_archive(path)
    kind = "oci-archive" if archive else "oci"
    if not opened.has("index.json"):
        raise IntegrityError(f"{path} is no OCI layout: it has no index.json")
    entries = parse_index(read_document(opened, "index.json"))
    names = [_names(entry) for entry in entries]
    if not tag and len(entries) == 1:
        return LayoutSource(opened, entries[0], f"{kind}:{path}")
    exact = any(tag in known for known in names)
    for entry, known in zip(entries, names, strict=True):
        if tag and any(name == tag if exact else is_called(name, tag) for name in known):
            return LayoutSource(opened, entry, f"{kind}:{path}:{tag}")
    there = sorted({name for known in names for name in known})
    what = f"there is no image '{tag}' in {path}" if tag else f"{path} has {len(entries)} images"
    raise NotFound(what, hint=f"name one of: {', '.join(there)}" if there else "its images have no names")


def find_layout_images(archive: Archive) -> list[Found]:
    """Every image of a layout, with its names."""
    entries = parse_index(read_document(archive, "index.json"))
    found = []
    for entry in entries:
        annotations = dict(entry.annotations)
        name = annotations.get(FULL_NAME) or annotations.get(REF_NAME) or ""
        found.append(Found(LayoutSource(archive, entry, archive.path), (name,) if name else ()))
    return found


def _names(entry: Descriptor) -> tuple[str, ...]:
    annotations = dict(entry.annotations)
    return tuple(annotations[key] for key in (REF_NAME, FULL_NAME) if annotations.get(key))


def _index_entries(manifest: Descriptor, names: tuple[str, ...]) -> list[dict[str, Any]]:
    plain = {"mediaType": manifest.media_type, "digest": manifest.digest, "size": manifest.size}
    if not names:
        return [plain]
    return [{**plain, "annotations": {REF_NAME: name, FULL_NAME: name}} for name in names]


class LayoutDirectorySink:
    """Adds images to an OCI directory, which is made when missing. Blobs first, the index last."""

    def __init__(self, path: str, tag: str = "") -> None:
        self._path = path
        self._tag = tag
        self._entries: list[dict[str, Any]] = []
        self.label = f"oci:{path}"
        if os.path.exists(path) and not os.path.isdir(path):
            raise UsageError(f"'{path}' is there already and is no directory")
        if os.path.exists(f"{path}/index.json"):
            try:
                with open(f"{path}/index.json", "rb") as file:
                    raw = file.read()
            except OSError as error:
                raise HostError.from_os(error, "cannot read the layout's index") from None
            parse_index(raw)
            self._entries = json.loads(raw)["manifests"]

    def store(self, blobs: Blobs, manifest: Descriptor, *, names: tuple[str, ...], progress: Progress) -> str:
        """See `Sink.store`."""
        try:
            for part in _parts(blobs, manifest):
                self._copy(blobs, part, progress)
        except OSError as error:
            raise HostError.from_os(error, f"cannot write {self._path}") from None
        wanted = (self._tag,) if self._tag else names
        self._entries = [entry for entry in self._entries if not set(_entry_names(entry)) & set(wanted)]
        self._entries += _index_entries(manifest, wanted)
        return manifest.digest

    def _copy(self, blobs: Blobs, part: Descriptor, progress: Progress) -> None:
        target = f"{self._path}/{_blob_name(part.digest)}"
        progress.start(part.digest, part.digest[7:19], part.size)
        if os.path.isfile(target) and os.path.getsize(target) == part.size:
            progress.finish(part.digest, "already there")
            return
        os.makedirs(os.path.dirname(target), exist_ok=True)
        temporary = f"{target}.{os.getpid()}.tmp"
        try:
            with blobs.open(part.digest) as source, open(temporary, "wb") as copy:
                while os.sendfile(copy.fileno(), source.fileno(), None, 1 << 24):
                    pass
            os.replace(temporary, target)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise
        progress.finish(part.digest)

    def close(self, *, failed: bool = False) -> None:
        """See `Sink.close`."""
        if failed:
            return  # blobs that no index names are harmless, and the old index stands
        from nagaya.storage.records import write_file

        try:
            os.makedirs(self._path, exist_ok=True)
            write_file(f"{self._path}/oci-layout", LAYOUT, mode=0o644)
            write_file(f"{self._path}/index.json", _index(self._entries), mode=0o644)
        except OSError as error:
            raise HostError.from_os(error, f"cannot write {self._path}") from None


def _entry_names(entry: dict[str, Any]) -> list[str]:
    annotations = entry.get("annotations") or {}
    return [annotations[key] for key in (REF_NAME, FULL_NAME) if key in annotations]


def _index(entries: list[dict[str, Any]]) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}, indent=2).encode()


def _parts(blobs: Blobs, manifest: Descriptor) -> list[Descriptor]:
    """Everything that an image consists of, its manifest last."""
    raw = blobs.read(manifest.digest)
    if manifest.media_type in INDEX_TYPES:
        raise UsageError("an index cannot be saved as one image")
    parsed = parse_manifest(raw, media_type=manifest.media_type)
    return [*parsed.layers, parsed.config, manifest]


class LayoutArchiveSink:
    """An OCI layout in one tar file (or on standard output)."""

    def __init__(self, path: str, tag: str = "") -> None:
        from nagaya.images.sources.tar_output import TarOutput

        self.label = f"oci-archive:{path}"
        self._tag = tag
        self._output = TarOutput(path)
        self._entries: list[dict[str, Any]] = []
        self._written: set[str] = set()

    def store(self, blobs: Blobs, manifest: Descriptor, *, names: tuple[str, ...], progress: Progress) -> str:
        """See `Sink.store`."""
        for part in _parts(blobs, manifest):
            if part.digest in self._written:
                continue
            self._written.add(part.digest)
            progress.start(part.digest, part.digest[7:19], part.size)
            with blobs.open(part.digest) as stream:
                self._output.add_stream(_blob_name(part.digest), stream, blobs.size(part.digest))
            progress.finish(part.digest)
        self._entries += _index_entries(manifest, (self._tag,) if self._tag else names)
        return manifest.digest

    def close(self, *, failed: bool = False) -> None:
        """See `Sink.close`."""
        if not failed:
            self._output.add_bytes("oci-layout", LAYOUT)
            self._output.add_bytes("index.json", _index(self._entries))
        self._output.close(failed=failed)
