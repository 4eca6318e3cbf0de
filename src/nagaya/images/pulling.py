"""Bringing an image into the store from wherever it is."""

from __future__ import annotations

import os
import time

from nagaya.errors import (
    HostError,
    IntegrityError,
    LaunchError,
    NagayaError,
    NotFound,
    RemoteError,
    Unsupported,
    UsageError,
)
from nagaya.images.image import Image
from nagaya.images.index import Record, to_image
from nagaya.images.locks import Lock
from nagaya.images.manifest import (
    Config,
    Descriptor,
    Manifest,
    check_layers,
    normalise_platform,
    parse_config,
    parse_manifest,
    runs_on,
)
from nagaya.images.progress import Progress, Silent
from nagaya.images.references import Reference, parse_reference
from nagaya.images.sources.base import Source
from nagaya.images.store import ImageStore, is_transport

_WORD = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")


def pull(
    store: ImageStore,
    reference: str,
    *,
    platform: str = "",
    insecure: bool = False,
    progress: Progress | None = None,
    missing: bool = False,
) -> Image:
    """Bring the image in. With `missing`, one that another process has brought meanwhile will do."""
    progress = progress or Silent()
    platform = normalise_platform(platform) if platform else ""
    sources, name = _open(reference, insecure=insecure)
    with store.using(), Lock(f"{store.root}/pulling/{_file_name(name or reference)}.lock", remove=True):
        if missing and name:
            image = store.find(name)
            if image is not None and (not platform or runs_on(image.platform, platform)):
                return image
        source, descriptor = _fetch(store, sources, reference, platform=platform, progress=progress)
        names = (name,) if name else _derive_names(reference)
        return adopt(
            store, descriptor, names, platform=platform, source=source.label, action="pull", progress=progress
        )  # fmt: skip


def adopt(
    store: ImageStore,
    descriptor: Descriptor,
    names: tuple[str, ...],
    *,
    source: str,
    action: str,
    progress: Progress,
    platform: str = "",
) -> Image:
    """Make an image of blobs that are in the store: check, unpack, record, name. The caller is inside `using()`."""
    manifest, config = read_image(store, descriptor)
    if platform and not runs_on(config.platform, platform):
        raise NotFound(f"the image is not there for {platform}", hint=f"it is there for: {config.platform}")
    for layer, diff_id in zip(manifest.layers, config.diff_ids, strict=True):
        store.layers.unpack(store.blobs, layer.digest, diff_id, progress)
    record = Record(
        id=manifest.config.digest,
        digest=manifest.digest,
        media_type=manifest.media_type,
        manifest_bytes=len(manifest.raw),
        platform=config.platform,
        created_ns=config.created_ns,
        size_bytes=sum(store.layers.facts(diff_id).size_bytes for diff_id in config.diff_ids),
        layers=config.diff_ids,
        blobs=tuple(layer.digest for layer in manifest.layers),
        source=source,
        added_ns=time.time_ns(),
        config=config.config,
    )
    with store.naming() as known:
        before = store.index.load(record.id)
        if action == "load" and before is not None and all(map(store.blobs.has, (before.digest, *before.blobs))):
            record = (
                before  # an archive's recompressed layers are no reason to give up the digest that a registry knows
            )
        store.index.store(record)
        for name in names:
            known[name] = record.id
    store.on_event(action, record.id, names[0] if names else "")
    return to_image(record, known)


def read_image(store: ImageStore, descriptor: Descriptor) -> tuple[Manifest, Config]:
    """Manifest and config from the blob store, checked against each other."""
    manifest = parse_manifest(
        store.blobs.read(descriptor.digest), digest=descriptor.digest, media_type=descriptor.media_type
    )
    if not manifest.config.digest.startswith("sha256:"):
        raise IntegrityError("the image's config has no sha256 digest, and so the image no id")
    config = parse_config(store.blobs.read(manifest.config.digest))
    check_layers(manifest, config)
    return manifest, config


def _open(reference: str, *, insecure: bool) -> tuple[list[Source], str]:
    """The places to try in turn, and the local name ("" = the source or its place has to give one)."""
    from nagaya.images import sources  # lazy: with what it imports, only once a pull is certain

    if is_transport(reference):
        return [sources.open_source(reference, insecure=insecure)], ""
    if reference.startswith(("/", ".")):
        raise UsageError(
            f"'{reference}' is a path, not an image name",
            hint=f"a root file system: nagaya import {reference} NAME; an archive of images: nagaya load -i {reference}",
        )
    parsed = parse_reference(reference.removeprefix("docker://"))
    if reference.startswith("docker://") or not parsed.is_bare:
        return [sources.open_source(f"docker://{parsed}", insecure=insecure)], _local_name(parsed)
    return sources.bare_sources(parsed, insecure=insecure), _local_name(parsed)


def _local_name(reference: Reference) -> str:
    if reference.digest:
        return f"{reference.familiar}@{reference.digest}"
    return reference.name


def _fetch(
    store: ImageStore, sources: list[Source], reference: str, *, platform: str, progress: Progress
) -> tuple[Source, Descriptor]:
    """The first source that has the image. What does not match its digest is no reason to look elsewhere."""
    problems: list[NagayaError] = []
    for source in sources:
        progress.step(f"trying {source.label}" if len(sources) > 1 else f"pulling from {source.label}")
        try:
            return source, source.fetch(store.blobs, platform=platform, progress=progress)
        except (NotFound, RemoteError, Unsupported, LaunchError) as error:
            problems.append(error)
            if len(sources) > 1:
                progress.step(f"{source.label}: {error.message}")
        except HostError as error:
            # The network is a host's too: only what the disk refuses would fail the next source as well.
            if error.path:
                raise
            problems.append(error)
        except OSError as error:
            raise HostError.from_os(error, f"cannot fetch from {source.label}") from None
    if not problems:
        raise NotFound(f"there is no source for '{reference}'")
    if len(problems) == 1:
        raise problems[0]
    told = "; ".join(f"{source.label}: {problem.message}" for source, problem in zip(sources, problems, strict=True))
    raise NotFound(f"cannot get image '{reference}': {told}", hint=problems[-1].hint or problems[0].hint)


def _derive_names(reference: str) -> tuple[str, ...]:
    """Names for an image from a layout or archive: its own, else one of its place, "oci:/srv/Apps:1.0" → "apps:1.0"."""
    from nagaya.images import sources

    path, tag = sources.split_path(reference.partition(":")[2])
    if not tag:
        found = sources.find_images(path)
        own = _valid_names(found[0].names) if len(found) == 1 else ()
        if own:
            return own
    elif ":" in tag or "/" in tag:
        own = _valid_names((tag,))
        if own:
            return own
    base = os.path.basename(path.rstrip("/"))
    for ending in (".gz", ".xz", ".zst", ".bz2", ".tar", ".tgz", ".oci"):
        base = base.removesuffix(ending)
    words = "".join(letter if letter in _WORD else "-" for letter in base.lower()).split("-")
    name = "-".join(word for word in words if word) or "image"
    return _valid_names((f"{name}:{tag}" if tag else f"{name}:latest",)) or (f"{name}:latest",)


def _valid_names(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Those that are names, as they are called here. A layout's bare tag ("latest") is none of its own."""
    names = []
    for text in texts:
        try:
            parsed = parse_reference(text)
        except UsageError:
            continue
        if ":" in text or "/" in text:
            names.append(parsed.name)
    return tuple(names)


def _file_name(text: str) -> str:
    import hashlib  # lazy: 3 ms

    return hashlib.sha256(text.encode()).hexdigest()[:32]
