"""Images that are made here: from a root file system, and from what a machine has changed."""

from __future__ import annotations

import json
import os
import stat
import sys
import time

from nagaya.errors import HostError, IntegrityError, NotFound, UsageError
from nagaya.images.content import CHUNK
from nagaya.images.image import Image
from nagaya.images.instructions import apply_instructions, check_instructions
from nagaya.images.manifest import (
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    Descriptor,
    format_time,
    host_platform,
    normalise_platform,
)
from nagaya.images.pack import compress_blob, pack_layer
from nagaya.images.progress import Progress, Silent
from nagaya.images.pulling import adopt, read_image
from nagaya.images.references import normalise
from nagaya.images.sources.copy import put_image
from nagaya.images.store import ImageStore
from nagaya.images.streams import BZIP2, GZIP, PLAIN, XZ, ZSTD, TarStream, find_compression
from nagaya.static import Any, BinaryIO

_OCI_TYPES = {
    "application/vnd.docker.image.rootfs.diff.tar": OCI_LAYER,
    "application/vnd.docker.image.rootfs.diff.tar.gzip": OCI_LAYER_GZIP,
    "application/vnd.docker.image.rootfs.diff.tar.zstd": OCI_LAYER_ZSTD,
}


def import_rootfs(
    store: ImageStore,
    source: str,
    reference: str,
    *,
    changes: tuple[str, ...] = (),
    message: str = "",
    platform: str = "",
    progress: Progress | None = None,
) -> Image:
    """See `ImageStore.import_rootfs`."""
    progress = progress or Silent()
    check_instructions(changes)
    platform = normalise_platform(platform) if platform else host_platform()
    names = (normalise(reference),) if reference else ()
    with store.using():
        if source != "-" and os.path.isdir(source):
            layer = pack_layer(store.blobs, source, overlay=False, progress=progress).descriptor
        else:
            layer = _store_tar(store, source, progress)
        diff_id = store.layers.unpack_new(store.blobs, layer.digest, progress)
        system, architecture, *variant = platform.split("/")
        data: dict[str, Any] = {"architecture": architecture, "os": system, "config": {}}
        if variant:
            data["variant"] = variant[0]
        apply_instructions(data["config"], changes)
        where = "standard input" if source == "-" else os.path.basename(os.path.abspath(source))
        _finish_config(data, [diff_id], comment=message or f"imported from {where}")
        descriptor = _put_image(store, data, (layer,))
        return adopt(store, descriptor, names, source=f"import {where}", action="import", progress=progress)


def commit(
    store: ImageStore,
    base: Image,
    upper: str,
    reference: str,
    *,
    author: str = "",
    message: str = "",
    changes: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> Image:
    """See `ImageStore.commit`."""
    progress = progress or Silent()
    check_instructions(changes)
    names = (normalise(reference),) if reference else ()
    with store.using():
        record = store.index.load(base.id)
        if record is None:
            raise NotFound(f"the machine's image {base.id} is no longer in the store")
        manifest, config = read_image(store, Descriptor(record.media_type, record.digest, record.manifest_bytes))
        data: dict[str, Any] = json.loads(store.blobs.read(base.id))
        packed = pack_layer(store.blobs, upper, overlay=True, progress=progress)
        for legacy in ("container", "container_config", "id", "parent", "Size"):  # of Docker's builds of old
            data.pop(legacy, None)
        data["config"] = data.get("config") or {}
        apply_instructions(data["config"], changes)
        if author:
            data["author"] = author
        layers = [
            layer._replace(media_type=_OCI_TYPES.get(layer.media_type, layer.media_type)) for layer in manifest.layers
        ]
        diff_ids = list(config.diff_ids)
        if packed.entries:
            layers.append(packed.descriptor)
            diff_ids.append(packed.diff_id)
        _finish_config(
            data, diff_ids, comment=message, author=author, created_by="nagaya commit", empty=not packed.entries
        )
        descriptor = _put_image(store, data, tuple(layers))
        return adopt(store, descriptor, names, source=f"commit of {base.id[:19]}", action="commit", progress=progress)


def _put_image(store: ImageStore, config: dict[str, Any], layers: tuple[Descriptor, ...]) -> Descriptor:
    raw = json.dumps(config, separators=(",", ":"), ensure_ascii=False).encode()
    return put_image(store.blobs, raw, layers)


def _finish_config(
    data: dict[str, Any],
    diff_ids: list[str],
    *,
    comment: str,
    author: str = "",
    created_by: str = "nagaya import",
    empty: bool = False,
) -> None:
    """Set what every new image has: its time, its layers, one more step in its history."""
    data["created"] = format_time(time.time_ns())
    data["rootfs"] = {"type": "layers", "diff_ids": diff_ids}
    step: dict[str, Any] = {"created": data["created"], "created_by": created_by}
    if comment:
        step["comment"] = comment
    if author:
        step["author"] = author
    if empty:
        step["empty_layer"] = True
    data["history"] = [*(data.get("history") or []), step]


def _store_tar(store: ImageStore, source: str, progress: Progress) -> Descriptor:
    """A tar of a root file system as a layer blob: as it is when its compression may be a layer's, else as gzip."""
    if source == "-":
        return _store_stream(store, sys.stdin.buffer, progress)
    try:
        with open(source, "rb", buffering=0) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode) and not stat.S_ISFIFO(
                os.fstat(stream.fileno()).st_mode
            ):
                raise UsageError(f"'{source}' is neither a tar archive nor a directory")
            return _store_stream(store, stream, progress)
    except FileNotFoundError:
        raise NotFound(f"there is no file or directory '{source}'") from None
    except OSError as error:
        raise HostError.from_os(error, f"cannot read {source}") from None


def _store_stream(store: ImageStore, stream: BinaryIO, progress: Progress) -> Descriptor:
    """Spool the stream into the blob store first: what is packed in another way is read again from there."""
    key = "import"
    try:
        progress.start(key, "reading", os.fstat(stream.fileno()).st_size)
    except (OSError, ValueError):
        progress.start(key, "reading", 0)
    start = b""
    with store.blobs.new() as spool:
        while chunk := stream.read(CHUNK):
            start = start or chunk[:8]
            spool.write(chunk)
            progress.advance(key, spool.size)
        if not spool.size:
            raise IntegrityError(
                "the archive is empty", hint="give a tar of a root file system, for example from tar -c"
            )
    progress.finish(key)
    kind = find_compression(start)
    if kind in (GZIP, ZSTD):
        return Descriptor(OCI_LAYER_GZIP if kind == GZIP else OCI_LAYER_ZSTD, spool.digest, spool.size)
    assert kind in (PLAIN, XZ, BZIP2)
    try:
        with store.blobs.open(spool.digest) as again, TarStream(again) as chunks:
            progress.start(key, "compressing", spool.size)
            chunks.on_chunk(lambda done: progress.advance(key, done))
            layer = compress_blob(store.blobs, iter(chunks))
    finally:
        store.blobs.remove(spool.digest)
    progress.finish(key)
    return layer
