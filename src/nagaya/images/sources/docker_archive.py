"""`docker-archive:FILE[:NAME]`: what `docker save` writes, old (ID/layer.tar) and new (blobs/sha256/…) alike."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator

from nagaya.errors import HostError, IntegrityError, NotFound
from nagaya.images.content import Blobs
from nagaya.images.manifest import Descriptor, parse_config, parse_manifest, select_platform
from nagaya.images.pack import compress_blob
from nagaya.images.progress import Progress
from nagaya.images.references import normalise
from nagaya.images.sources.archive import Archive, is_called, open_archive, read_document
from nagaya.images.sources.base import Found
from nagaya.images.sources.copy import put_image, short_digest
from nagaya.images.sources.tar_output import TarOutput
from nagaya.images.streams import TarStream
from nagaya.static import Any

MANIFEST = "manifest.json"


class DockerArchiveSource:
    """One image of an archive, by its entry in manifest.json."""

    def __init__(self, archive: Archive, config: str, layers: tuple[str, ...], label: str) -> None:
        self._archive = archive
        self._config = config
        self._layers = layers
        self.label = label

    def fetch(self, blobs: Blobs, *, platform: str, progress: Progress) -> Descriptor:
        """See `Source.fetch`. The archive has no manifest and plain layers: they are compressed, and one is made."""
        raw = read_document(self._archive, self._config)
        config = parse_config(raw)
        if platform:
            select_platform((Descriptor("", "", 0, platform=config.platform),), platform)
        if len(config.diff_ids) != len(self._layers):
            raise IntegrityError(
                f"{self._archive.path}: {len(self._layers)} layers, but the config has {len(config.diff_ids)} diff ids"
            )
        pairs = zip(self._layers, config.diff_ids, strict=True)
        layers = tuple(self._compress(blobs, name, diff_id, progress) for name, diff_id in pairs)
        return put_image(blobs, raw, layers)

    def _compress(self, blobs: Blobs, name: str, diff_id: str, progress: Progress) -> Descriptor:
        progress.start(diff_id, short_digest(diff_id), 0)
        with self._archive.open(name) as stream, TarStream(stream, like=diff_id) as chunks:
            descriptor = compress_blob(blobs, self._checked(chunks, diff_id))
        progress.finish(diff_id)
        return descriptor

    def _checked(self, chunks: TarStream, diff_id: str) -> Iterator[bytes]:
        """The chunks; an exception in the place of an end that does not match, so that no blob comes of them."""
        yield from chunks
        if chunks.diff_id != diff_id:
            raise IntegrityError(
                f"{self._archive.path}: a layer does not match its diff id: expected {diff_id}, found {chunks.diff_id}"
            )


def _entries(archive: Archive) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """(config, layers, names) of each image."""
    if not archive.has(MANIFEST):
        raise IntegrityError(
            f"{archive.path} is no image archive: it has neither an OCI layout nor a {MANIFEST}",
            hint="'nagaya import' takes the tar of a root file system",
        )
    try:
        data = json.loads(read_document(archive, MANIFEST))
    except (ValueError, RecursionError):
        raise IntegrityError(f"{archive.path}: {MANIFEST} is not valid JSON") from None
    if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
        raise IntegrityError(f"{archive.path}: {MANIFEST} is not a list of images")
    found = []
    for entry in data:
        config, layers, names = entry.get("Config"), entry.get("Layers") or [], entry.get("RepoTags") or []
        texts = [config, *layers, *names] if isinstance(layers, list) and isinstance(names, list) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise IntegrityError(f"{archive.path}: an entry of {MANIFEST} is malformed")
        found.append((config, tuple(layers), tuple(names)))
    return found


def open_docker_archive(path: str, name: str) -> DockerArchiveSource:
    """The image of that name, or the only one. Raises `NotFound`, `IntegrityError`."""
    archive = open_archive(path)
    entries = _entries(archive)
    for config, layers, names in entries:
        if (not name and len(entries) == 1) or (name and any(is_called(known, name) for known in names)):
            return DockerArchiveSource(archive, config, layers, f"docker-archive:{path}" + (f":{name}" if name else ""))
    there = sorted({known for _, _, names in entries for known in names})
    what = f"there is no image '{name}' in {path}" if name else f"{path} has {len(entries)} images"
    raise NotFound(what, hint=f"name one of: {', '.join(there)}" if there else "its images have no names")


def find_docker_images(archive: Archive) -> list[Found]:
    """Every image of an archive."""
    return [
        Found(DockerArchiveSource(archive, config, layers, archive.path), names)
        for config, layers, names in _entries(archive)
    ]


class DockerArchiveSink:
    """Writes what `docker load`, `podman load` and skopeo read."""

    def __init__(self, path: str, tag: str = "") -> None:
        self._tag = normalise(tag) if tag else ""
        self.label = f"docker-archive:{path}"
        self._output = TarOutput(path)
        self._entries: list[dict[str, Any]] = []
        self._written: set[str] = set()

    def store(self, blobs: Blobs, manifest: Descriptor, *, names: tuple[str, ...], progress: Progress) -> str:
        """See `Sink.store`. Layers are written plain, as the format wants them."""
        parsed = parse_manifest(blobs.read(manifest.digest), media_type=manifest.media_type)
        raw = blobs.read(parsed.config.digest)
        config_name = f"{parsed.config.digest.partition(':')[2]}.json"
        layers = [self._add_layer(blobs, layer, progress) for layer in parsed.layers]
        if config_name not in self._written:
            self._written.add(config_name)
            self._output.add_bytes(config_name, raw)
        # A name by digest is no name there: `docker load` refuses the whole archive for it.
        tags = [self._tag] if self._tag else [name for name in names if "@" not in name]
        self._entries.append({"Config": config_name, "RepoTags": tags or None, "Layers": layers})
        return manifest.digest

    def _add_layer(self, blobs: Blobs, layer: Descriptor, progress: Progress) -> str:
        progress.start(layer.digest, short_digest(layer.digest), 0)
        try:
            with tempfile.TemporaryFile() as plain, blobs.open(layer.digest) as source:
                with TarStream(source) as chunks:
                    for chunk in chunks:
                        plain.write(chunk)
                    name = f"{chunks.diff_id.partition(':')[2]}.tar"
                if name not in self._written:
                    self._written.add(name)
                    size = plain.tell()
                    plain.seek(0)
                    self._output.add_stream(name, plain, size)
        except OSError as error:
            raise HostError.from_os(error, "cannot write the archive") from None
        progress.finish(layer.digest)
        return name

    def close(self, *, failed: bool = False) -> None:
        """See `Sink.close`."""
        if not failed:
            self._output.add_bytes(MANIFEST, json.dumps(self._entries).encode())
        self._output.close(failed=failed)
