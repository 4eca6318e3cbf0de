"""Telling about an image, in the shapes that Docker's users know."""

from __future__ import annotations

import json

from nagaya.errors import IntegrityError, NotFound
from nagaya.images.image import Image
from nagaya.images.index import Record
from nagaya.images.manifest import Config, History, format_time, parse_config
from nagaya.images.store import ImageStore


def history(store: ImageStore, reference: str) -> list[History]:
    """See `ImageStore.history`. Steps and layers are matched from the bottom; some builders miscount them."""
    _, record = _look(store, reference)
    config = _config(store, record)
    sizes = iter([store.layers.facts(diff_id).size_bytes for diff_id in record.layers])
    steps = config.history or tuple(History(config.created_ns, "", 0, "", False) for _ in record.layers)
    sized = [step if step.empty_layer else step._replace(size_bytes=next(sizes, 0)) for step in steps]
    return sized[::-1]


def inspect(store: ImageStore, reference: str) -> dict[str, object]:
    """See `ImageStore.inspect`."""
    image, record = _look(store, reference)
    raw = json.loads(store.blobs.read(record.id))
    system, architecture, *variant = image.platform.split("/")
    steps = raw.get("history") or []
    return {
        "Id": image.id,
        "RepoTags": list(image.names),
        "RepoDigests": _repo_digests(store, record),
        "Comment": str(steps[-1].get("comment", "")) if steps else "",
        "Created": format_time(image.created_ns),
        "Author": raw.get("author", ""),
        "Architecture": architecture,
        "Variant": variant[0] if variant else "",
        "Os": system,
        "Platform": image.platform,
        "Size": image.size_bytes,
        "Digest": image.digest,
        "MediaType": record.media_type,
        "Source": image.source,
        "Added": format_time(record.added_ns),
        "Config": {**_EMPTY_CONFIG, **(raw.get("config") or {})},
        "RootFS": {"Type": "layers", "Layers": list(image.layers)},
        "Layers": [
            {
                "DiffId": diff_id, "Blob": blob, "Size": store.layers.facts(diff_id).size_bytes,
                "Directory": store.layers.path(diff_id),
            }
            for diff_id, blob in zip(record.layers, record.blobs, strict=True)
        ],
    }  # fmt: skip


_EMPTY_CONFIG: dict[str, object] = {
    "User": "", "Env": None, "Entrypoint": None, "Cmd": None, "WorkingDir": "", "Labels": None, "Volumes": None,
    "ExposedPorts": None, "StopSignal": "",
}  # fmt: skip


def _look(store: ImageStore, reference: str) -> tuple[Image, Record]:
    image = store.get(reference)
    record = store.index.load(image.id)
    if record is None:
        raise NotFound(f"image '{reference}' has been removed meanwhile")
    return image, record


def _config(store: ImageStore, record: Record) -> Config:
    try:
        return parse_config(store.blobs.read(record.id))
    except NotFound:
        raise IntegrityError(
            f"the config of image {record.id[7:19]} is missing from the store", hint="bring it back by pulling it again"
        ) from None


def _repo_digests(store: ImageStore, record: Record) -> list[str]:
    """ "debian@sha256:…": the manifest under each of its repositories, and what it was pulled by."""
    mine = [name for name, image_id in store.index.names().items() if image_id == record.id]
    by_name = {f"{name.rpartition(':')[0]}@{record.digest}" for name in mine if "@" not in name}
    return sorted(by_name | {name for name in mine if "@" in name})
