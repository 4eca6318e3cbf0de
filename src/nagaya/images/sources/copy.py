"""Copying blobs into the store from something that can be read, and making manifests for what has none."""

from __future__ import annotations

import json

from nagaya.images.content import Blobs
from nagaya.images.manifest import OCI_CONFIG, OCI_MANIFEST, Descriptor
from nagaya.images.progress import Progress
from nagaya.static import Any, BinaryIO

CHUNK = 1 << 20


def copy_blob(blobs: Blobs, descriptor: Descriptor, stream: BinaryIO, progress: Progress) -> None:
    """Copy one blob, checked, unless it is there. Raises `IntegrityError` when it is not what the descriptor says."""
    key = descriptor.digest
    progress.start(key, short_digest(key), descriptor.size)
    with blobs.writer(key, descriptor.size) as writer:
        if writer.complete:
            progress.finish(key, "already here")
            return
        writer.restart()
        while data := stream.read(CHUNK):
            writer.write(data)
            progress.advance(key, writer.offset)
    progress.finish(key)


def put_image(blobs: Blobs, config: bytes, layers: tuple[Descriptor, ...]) -> Descriptor:
    """Store a config and an OCI manifest over it and the layers; the manifest's descriptor."""
    entries = [{"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size} for layer in layers]
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": OCI_CONFIG, "digest": blobs.put(config), "size": len(config)},
        "layers": entries,
    }
    raw = json.dumps(manifest, separators=(",", ":")).encode()
    return Descriptor(OCI_MANIFEST, blobs.put(raw), len(raw))


def short_digest(digest: str) -> str:
    """As progress shows it."""
    return digest.partition(":")[2][:12]
