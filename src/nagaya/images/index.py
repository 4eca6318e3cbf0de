"""Which images there are and what they are called: `names.json` and `records/HEX.json`.

On the path of every `run`, so that it imports next to nothing. Both are replaced atomically; a record that a power
cut damaged counts as not there, and the next pull writes it anew.
"""

from __future__ import annotations

import json
import os

from nagaya.errors import HostError, IntegrityError
from nagaya.images.image import Image, ImageConfig
from nagaya.static import Any, NamedTuple

RECORD_MAX = 16 << 20


class Record(NamedTuple):
    """What the store keeps of an image beside its blobs."""

    id: str
    digest: str  # of the manifest
    media_type: str  # of the manifest
    manifest_bytes: int
    platform: str
    created_ns: int
    size_bytes: int
    layers: tuple[str, ...]  # diff ids, bottom first
    blobs: tuple[str, ...]  # the layers' blobs, bottom first
    source: str
    added_ns: int
    config: ImageConfig


class Index:
    """The names and records below `root` (the store's images directory)."""

    def __init__(self, root: str) -> None:
        self.root = root

    def names(self) -> dict[str, str]:
        """Name -> image id. Names with a digest ("app@sha256:…") are among them. Raises `IntegrityError`."""
        path = f"{self.root}/names.json"
        raw = _read(path)
        if raw is None:
            return {}
        try:
            data = json.loads(raw)
        except ValueError:
            data = None
        if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
            raise IntegrityError(
                f"{path}: the images' names are damaged", hint=f"remove that file, and pull the images again: rm {path}"
            )
        return data

    def write_names(self, names: dict[str, str]) -> None:
        """Replace all names; the caller holds `names.lock`."""
        _write(f"{self.root}/names.json", dict(sorted(names.items())))

    def load(self, image_id: str) -> Record | None:
        """The record of an image; None when there is none, or a damaged one."""
        raw = _read(self._path(image_id))
        if raw is None:
            return None
        try:
            record = _from_data(json.loads(raw))
        except (ValueError, TypeError, KeyError):
            return None
        return record if record.id == image_id else None

    def store(self, record: Record) -> None:
        """Write an image's record: from then on it exists."""
        _write(self._path(record.id), {**record._asdict(), "config": record.config._asdict()})

    def remove(self, image_id: str) -> None:
        try:
            os.unlink(self._path(image_id))
        except FileNotFoundError:
            return

    def ids(self) -> list[str]:
        """Ids of all records, damaged ones included."""
        try:
            names = os.listdir(f"{self.root}/records")
        except FileNotFoundError:
            return []
        return [f"sha256:{name[:64]}" for name in names if len(name) == 69 and name.endswith(".json")]

    def _path(self, image_id: str) -> str:
        return f"{self.root}/records/{image_id.partition(':')[2]}.json"


def to_image(record: Record, names: dict[str, str]) -> Image:
    """The record as callers see it, with its names (those with a digest left out)."""
    mine = tuple(name for name, image_id in names.items() if image_id == record.id and "@" not in name)
    return Image(
        record.id, record.digest, mine, record.platform, record.created_ns, record.size_bytes, record.layers,
        record.config, record.source,
    )  # fmt: skip


def _from_data(data: Any) -> Record:
    """Raises KeyError or TypeError for what is no record."""
    config = data["config"]
    record = Record(
        id=_text(data["id"]),
        digest=_text(data["digest"]),
        media_type=_text(data["media_type"]),
        manifest_bytes=_number(data["manifest_bytes"]),
        platform=_text(data["platform"]),
        created_ns=_number(data["created_ns"]),
        size_bytes=_number(data["size_bytes"]),
        layers=_texts(data["layers"]),
        blobs=_texts(data["blobs"]),
        source=_text(data["source"]),
        added_ns=_number(data["added_ns"]),
        config=ImageConfig(
            entrypoint=_texts(config["entrypoint"]),
            command=_texts(config["command"]),
            env=_texts(config["env"]),
            workdir=_text(config["workdir"]),
            user=_text(config["user"]),
            labels=tuple((_text(key), _text(value)) for key, value in config["labels"]),
            stop_signal=_text(config["stop_signal"]),
            volumes=_texts(config["volumes"]),
            exposed_ports=_texts(config["exposed_ports"]),
        ),
    )
    if len(record.layers) != len(record.blobs):
        raise TypeError("layers and blobs")
    return record


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError("text")
    return value


def _number(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("number")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if type(value) is not list:
        raise TypeError("texts")
    return tuple(_text(part) for part in value)


def _read(path: str) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HostError.from_os(error, "cannot read the image store") from None
    try:
        size = os.fstat(fd).st_size
        return os.read(fd, size + 1) if size <= RECORD_MAX else b""
    finally:
        os.close(fd)


def _write(path: str, data: object) -> None:
    from nagaya.storage.records import write_file  # lazy: only who changes something

    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        write_file(path, json.dumps(data, separators=(",", ":")).encode(), durable=True)
    except OSError as error:
        raise HostError.from_os(error, "cannot write to the image store") from None
