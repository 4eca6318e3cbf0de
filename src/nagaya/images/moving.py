"""Images to and from archives, layouts and registries."""

from __future__ import annotations

import os
import sys

from nagaya.errors import HostError, NagayaError, NotFound, UsageError
from nagaya.images.content import CHUNK
from nagaya.images.image import Image
from nagaya.images.manifest import Descriptor
from nagaya.images.progress import Progress, Silent
from nagaya.images.pulling import adopt
from nagaya.images.references import parse_reference
from nagaya.images.sources.base import Sink
from nagaya.images.store import ImageStore, is_transport

FORMATS = ("oci-archive", "docker-archive", "oci")


def load(store: ImageStore, path: str, *, progress: Progress | None = None) -> list[Image]:
    """See `ImageStore.load`."""
    progress = progress or Silent()
    if path != "-":
        return _load(store, path, progress, what=path)
    spool = f"{store.blobs.partial_directory}/load-{os.getpid()}-{os.urandom(4).hex()}"
    with store.using():
        try:
            os.makedirs(os.path.dirname(spool), 0o700, exist_ok=True)
            with open(spool, "xb") as target:
                while chunk := sys.stdin.buffer.read(CHUNK):
                    target.write(chunk)
            return _load(store, spool, progress, what="standard input")
        except OSError as error:
            raise HostError.from_os(error, "cannot read the archive from standard input") from None
        finally:
            if os.path.lexists(spool):
                os.unlink(spool)


def _load(store: ImageStore, path: str, progress: Progress, *, what: str) -> list[Image]:
    from nagaya.images import sources

    if not os.path.exists(path):
        raise NotFound(f"there is no archive '{path}'")
    images = []
    with store.using():
        for found in sources.find_images(path):
            descriptor = found.source.fetch(store.blobs, platform="", progress=progress)
            names = tuple(name for text in found.names if (name := _archived_name(text)))
            images.append(
                adopt(
                    store, descriptor, names, source=f"load {os.path.basename(what)}", action="load", progress=progress
                )
            )
    return images


def _archived_name(text: str) -> str:
    """The local name for what an archive calls an image; "" for what is no name."""
    try:
        reference = parse_reference(text)
    except UsageError:
        return ""
    return reference.name if reference.tag else f"{reference.familiar}@{reference.digest}"


def save(
    store: ImageStore,
    references: tuple[str, ...],
    path: str,
    *,
    format: str = "oci-archive",
    progress: Progress | None = None,
) -> None:
    """See `ImageStore.save`."""
    from nagaya.images import sources

    if format not in FORMATS:
        raise UsageError(f"unknown archive format '{format}'", hint=f"one of: {', '.join(FORMATS)}")
    if format == "oci" and path == "-":
        raise UsageError("an OCI layout is a directory, and cannot go to standard output")
    chosen: dict[str, list[str]] = {}  # an image given by several names is written once
    for reference in references:
        image = store.get(reference)
        by_id = image.id.removeprefix("sha256:").startswith(reference.removeprefix("sha256:"))
        given = list(image.names) if by_id else [_archived_name(reference)]
        chosen.setdefault(image.id, []).extend(given)
    with store.using():
        sink = sources.open_sink(path, format=format)
        _store_all(store, sink, chosen, progress or Silent())
    for image_id, names in chosen.items():
        store.on_event("save", image_id, names[0] if names else "")


def push(
    store: ImageStore,
    reference: str,
    destination: str = "",
    *,
    insecure: bool = False,
    progress: Progress | None = None,
) -> str:
    """See `ImageStore.push`."""
    from nagaya.images import sources

    image = store.get(reference)
    target = destination or (reference if parse_or_none(reference) else "")
    if not target:
        raise UsageError(f"'{reference}' does not say where to push to", hint="name a destination after it")
    if not is_transport(target):
        parsed = parse_reference(target.removeprefix("docker://"))
        if parsed.digest:
            raise UsageError(f"'{target}' names a digest where a tag is to be given")
        target = f"docker://{parsed}"
    with store.using():
        sink = sources.open_sink(target, insecure=insecure)
        digest = _store_all(store, sink, {image.id: list(image.names)}, progress or Silent())
    store.on_event("push", image.id, target)
    return digest


def parse_or_none(text: str) -> object | None:
    try:
        return parse_reference(text.removeprefix("docker://"))
    except UsageError:
        return None


def _store_all(store: ImageStore, sink: Sink, chosen: dict[str, list[str]], progress: Progress) -> str:
    """Write the images to the sink and close it; answers the last one's digest there."""
    digest = ""
    try:
        for image_id, names in chosen.items():
            record = store.index.load(image_id)
            if record is None:
                raise NotFound(f"image {image_id} has been removed meanwhile")
            descriptor = Descriptor(record.media_type, record.digest, record.manifest_bytes, record.platform)
            digest = sink.store(store.blobs, descriptor, names=tuple(dict.fromkeys(names)), progress=progress)
    except BaseException as error:
        sink.close(failed=True)
        if isinstance(error, OSError):
            raise HostError.from_os(error, f"cannot write to {sink.label}") from None
        raise
    try:
        sink.close()
    except NagayaError:
        raise
    except OSError as error:
        raise HostError.from_os(error, f"cannot write to {sink.label}") from None
    return digest
