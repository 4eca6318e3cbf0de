"""Manifests, indexes and configs, checked: OCI image specification 1.1 and Docker's v2 schema 2.

Everything here was written by strangers. A document that is not what the specification says is refused with
`IntegrityError`, whatever is wrong with it.
"""

from __future__ import annotations

import json
import os

from nagaya.errors import IntegrityError, NotFound, Unsupported, UsageError
from nagaya.images.image import ImageConfig
from nagaya.static import Any, NamedTuple

DOCUMENT_MAX = 8 << 20  # bytes of a manifest, index or config
BLOB_MAX = 1 << 40
LAYERS_MAX = 1024
TEXT_MAX = 1 << 20

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
DOCKER_LAYER_ZSTD = "application/vnd.docker.image.rootfs.diff.tar.zstd"

MANIFEST_TYPES = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEX_TYPES = (OCI_INDEX, DOCKER_INDEX)
CONFIG_TYPES = (OCI_CONFIG, DOCKER_CONFIG)
LAYER_TYPES = (
    OCI_LAYER, OCI_LAYER_GZIP, OCI_LAYER_ZSTD,
    DOCKER_LAYER, DOCKER_LAYER_GZIP, DOCKER_LAYER_ZSTD,
)  # fmt: skip

_DIGEST_LENGTHS = {"sha256": 64, "sha512": 128}
_HEX = frozenset("0123456789abcdef")


class Descriptor(NamedTuple):
    """A reference to a blob (OCI descriptor.md)."""

    media_type: str
    digest: str
    size: int
    platform: str = ""  # "linux/arm64/v8", "" = not said
    annotations: tuple[tuple[str, str], ...] = ()


class Manifest(NamedTuple):
    digest: str
    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]  # bottom first
    raw: bytes


class History(NamedTuple):
    """One step in the making of an image."""

    created_ns: int  # 0 = not said
    created_by: str
    size_bytes: int  # of its layer; 0 from `parse_config`, the store fills it in
    comment: str
    empty_layer: bool


class Config(NamedTuple):
    """A config blob, parsed."""

    config: ImageConfig
    diff_ids: tuple[str, ...]  # bottom first
    history: tuple[History, ...]
    created_ns: int  # 0 = not said
    platform: str  # "linux/amd64"


def check_digest(digest: object, what: str = "digest") -> str:
    """`digest` if it is `sha256:` or `sha512:` with lower-case hexadecimal of the right length, else `IntegrityError`."""
    if isinstance(digest, str):
        algorithm, _, text = digest.partition(":")
        if _DIGEST_LENGTHS.get(algorithm) == len(text) and _HEX.issuperset(text):
            return digest
    raise IntegrityError(f"{what}: {_show(digest)} is not a sha256 digest")


def compute_digest(data: bytes, like: str = "sha256:") -> str:
    """The digest of `data`, with the algorithm of the digest `like`."""
    import hashlib  # lazy: 3 ms

    algorithm = "sha512" if like.startswith("sha512:") else "sha256"
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def verify_digest(data: bytes, digest: str, what: str) -> None:
    """Raise `IntegrityError` unless `data` has `digest`."""
    found = compute_digest(data, check_digest(digest, what))
    if found != digest:
        raise IntegrityError(f"{what} does not match its digest: expected {digest}, found {found}")


def parse_manifest(raw: bytes, *, digest: str = "", media_type: str = "") -> Manifest:
    """Parse an image manifest. `digest` is checked when given and computed otherwise; `media_type` is the transport's.

    Raises `IntegrityError`; `Unsupported` for formats that are well-formed but no image that can run.
    """
    if digest:
        verify_digest(raw, digest, "the image's manifest")
    data = _parse_object(raw, "manifest")
    media_type = _find_type(data, media_type, MANIFEST_TYPES)
    if data.get("schemaVersion") != 2:
        raise IntegrityError(f"manifest: schemaVersion is {_show(data.get('schemaVersion'))}, expected 2")
    config = _parse_descriptor(data.get("config"), "manifest: config")
    if config.media_type not in CONFIG_TYPES:
        raise Unsupported(
            f"this is no image that can run but an artifact of type {_show(config.media_type)}",
            finding="its manifest's config has that media type",
        )
    if config.size > DOCUMENT_MAX:
        raise IntegrityError(f"manifest: a config of {config.size} bytes is beyond {DOCUMENT_MAX}")
    entries = _array(data.get("layers"), "manifest: layers")
    if len(entries) > LAYERS_MAX:
        raise IntegrityError(f"manifest: {len(entries)} layers are beyond {LAYERS_MAX}")
    layers = tuple(_parse_layer(entry, f"manifest: layer {number}") for number, entry in enumerate(entries))
    return Manifest(digest or compute_digest(raw), media_type, config, layers, bytes(raw))


def parse_index(raw: bytes) -> tuple[Descriptor, ...]:
    """The manifests that an index (manifest list) names. Raises `IntegrityError`."""
    data = _parse_object(raw, "index")
    _find_type(data, "", INDEX_TYPES)
    if data.get("schemaVersion") != 2:
        raise IntegrityError(f"index: schemaVersion is {_show(data.get('schemaVersion'))}, expected 2")
    entries = _array(data.get("manifests"), "index: manifests")
    found = tuple(_parse_descriptor(entry, f"index: manifest {number}") for number, entry in enumerate(entries))
    for number, descriptor in enumerate(found):
        if descriptor.size > DOCUMENT_MAX:
            raise IntegrityError(f"index: manifest {number} of {descriptor.size} bytes is beyond {DOCUMENT_MAX}")
    return found


def is_index(media_type: str, raw: bytes) -> bool:
    """Whether a document is an index: by its transport's media type, else by what it says itself."""
    media_type = media_type.partition(";")[0].strip()
    if media_type in INDEX_TYPES or media_type in MANIFEST_TYPES:
        return media_type in INDEX_TYPES
    data = _parse_object(raw, "manifest")
    if data.get("mediaType") in INDEX_TYPES or data.get("mediaType") in MANIFEST_TYPES:
        return data["mediaType"] in INDEX_TYPES
    return "manifests" in data


def parse_config(raw: bytes) -> Config:
    """Parse an image's config blob. Raises `IntegrityError`."""
    data = _parse_object(raw, "config")
    rootfs = _object(data.get("rootfs"), "config: rootfs")
    if rootfs.get("type") != "layers":
        raise IntegrityError(f"config: rootfs.type is {_show(rootfs.get('type'))}, expected 'layers'")
    diff_ids = tuple(
        check_digest(diff_id, "config: rootfs.diff_ids")
        for diff_id in _array(_or(rootfs.get("diff_ids"), []), "config: rootfs.diff_ids")
    )
    inner = _object(_or(data.get("config"), {}), "config: config")
    history = _array(_or(data.get("history"), []), "config: history")
    return Config(
        _parse_run_config(inner),
        diff_ids,
        tuple(_parse_history(entry, f"config: history {number}") for number, entry in enumerate(history)),
        parse_time(_text(data.get("created"), "config: created")),
        _join_platform(data, "config"),
    )


def check_layers(manifest: Manifest, config: Config) -> None:
    """Raise `IntegrityError` unless manifest and config speak of the same number of layers."""
    if len(manifest.layers) != len(config.diff_ids):
        raise IntegrityError(
            f"the manifest has {len(manifest.layers)} layers, but the config {len(config.diff_ids)} diff ids"
        )


def _parse_run_config(inner: dict[str, Any]) -> ImageConfig:
    labels = _object(_or(inner.get("Labels"), {}), "config: Labels")
    return ImageConfig(
        entrypoint=_texts(inner.get("Entrypoint"), "config: Entrypoint"),
        command=_texts(inner.get("Cmd"), "config: Cmd"),
        env=_texts(inner.get("Env"), "config: Env"),
        workdir=_text(inner.get("WorkingDir"), "config: WorkingDir"),
        user=_text(inner.get("User"), "config: User"),
        labels=tuple((key, _text(value, f"config: label {key}")) for key, value in labels.items()),
        stop_signal=_text(inner.get("StopSignal"), "config: StopSignal"),
        volumes=tuple(_object(_or(inner.get("Volumes"), {}), "config: Volumes")),
        exposed_ports=tuple(_object(_or(inner.get("ExposedPorts"), {}), "config: ExposedPorts")),
    )


def _parse_history(entry: object, what: str) -> History:
    data = _object(entry, what)
    empty = data.get("empty_layer", False)
    if not isinstance(empty, bool):
        raise IntegrityError(f"{what}: empty_layer is not a boolean")
    return History(
        parse_time(_text(data.get("created"), what)),
        _text(data.get("created_by"), what),
        0,
        _text(data.get("comment"), what),
        empty,
    )


# -- platforms


def host_platform() -> str:
    """The platform of this host, "linux/amd64"."""
    return normalise_platform(f"linux/{os.uname().machine}")


_ARCHITECTURES = {
    "x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "i386": "386", "i686": "386", "armhf": "arm/v7",
    "armel": "arm/v6", "armv7l": "arm/v7", "armv6l": "arm/v6", "armv8l": "arm/v7", "ppc64el": "ppc64le",
}  # fmt: skip


def normalise_platform(text: str) -> str:
    """ "aarch64", "linux/x86_64", "linux/arm64/v8" … as "os/arch[/variant]". Raises `UsageError`."""
    parts = text.strip().lower().split("/")
    if len(parts) == 1:
        parts = ["linux", *parts]
    if not 2 <= len(parts) <= 3 or not all(parts) or not all(c.isalnum() or c in "._-" for p in parts for c in p):
        raise UsageError(f"'{text}' is not a platform", hint="for example linux/amd64 or linux/arm64")
    system, *rest = parts
    architecture = _ARCHITECTURES.get(rest[0], rest[0]).split("/")
    variant = rest[1] if len(rest) > 1 else (architecture[1] if len(architecture) > 1 else "")
    if (architecture[0], variant) in (("arm64", "v8"), ("amd64", "v1")):
        variant = ""
    if architecture[0] == "arm" and not variant:
        variant = "v7"
    return "/".join([system, architecture[0], *([variant] if variant else [])])


def select_platform(descriptors: tuple[Descriptor, ...], platform: str) -> Descriptor:
    """The manifest for `platform` ("" = this host's). Raises `NotFound` naming the platforms that there are.

    An exact match first, then one that the platform can run as well: arm/v7 runs v6 and v5, amd64/v3 plain amd64.
    A single manifest that says no platform is taken as it is.
    """
    wanted = normalise_platform(platform) if platform else host_platform()
    there = [d for d in descriptors if d.media_type in MANIFEST_TYPES or not d.media_type]
    for choice in _acceptable(wanted):
        for descriptor in there:
            if descriptor.platform and _normal(descriptor.platform) == choice:
                return descriptor
    silent = [descriptor for descriptor in there if not descriptor.platform]
    if len(there) == 1 and silent:
        return silent[0]
    names = sorted({_normal(d.platform) for d in there if d.platform and not d.platform.startswith("unknown/")})
    raise NotFound(
        f"the image is not there for {wanted}",
        hint=f"it is there for: {', '.join(names)}" if names else "its index names no platform that can run",
    )


def runs_on(platform: str, wanted: str) -> bool:
    """Whether an image for `platform` is what somebody who asks for `wanted` gets. Raises `UsageError`."""
    return _normal(platform) in _acceptable(normalise_platform(wanted))


def _normal(text: str) -> str:
    try:
        return normalise_platform(text)
    except UsageError:
        return text


def _acceptable(platform: str) -> list[str]:
    system, architecture, *variant = platform.split("/")
    plain = f"{system}/{architecture}"
    if not variant or not variant[0][1:].isdigit() or variant[0][0] != "v":
        return [platform]
    least = 5 if architecture == "arm" else 1
    highest = min(int(variant[0][1:]), 16)
    return [f"{plain}/v{number}" for number in range(highest, least - 1, -1)] + [plain]


def _join_platform(data: dict[str, Any], what: str) -> str:
    system = _text(data.get("os"), f"{what}: os")
    architecture = _text(data.get("architecture"), f"{what}: architecture")
    variant = _text(data.get("variant"), f"{what}: variant")
    if not system or not architecture:
        raise IntegrityError(f"{what}: os or architecture is missing")
    text = "/".join(part for part in (system, architecture, variant) if part)
    return _normal(text)


# -- times


def parse_time(text: str) -> int:
    """RFC 3339 to nanoseconds since 1970; 0 for "" and for what is no time: it is shown, never relied on."""
    import calendar  # lazy: 1 ms, and not on the path of `run`

    day, mark, clock = text.replace("t", "T").partition("T")
    if not mark:
        return 0
    offset_s = 0
    if clock[-1:] in ("Z", "z"):
        clock = clock[:-1]
    elif clock[-6:-5] in ("+", "-") and clock[-3:-2] == ":" and (clock[-5:-3] + clock[-2:]).isdigit():
        offset_s = (int(clock[-5:-3]) * 60 + int(clock[-2:])) * 60 * (-1 if clock[-6] == "-" else 1)
        clock = clock[:-6]
    clock, _, fraction = clock.partition(".")
    parts = [*day.split("-"), *clock.split(":")]
    if len(parts) != 6 or not all(part.isascii() and part.isdigit() and len(part) <= 4 for part in parts):
        return 0
    if fraction and not (fraction.isascii() and fraction.isdigit()):
        return 0
    year, month, date, hour, minute, second = (int(part) for part in parts)
    if not (year >= 1970 and 1 <= month <= 12 and 1 <= date <= 31 and hour < 24 and minute < 60 and second <= 60):
        return 0
    seconds = calendar.timegm((year, month, date, hour, minute, second, 0, 0, 0)) - offset_s
    return max(0, seconds * 1_000_000_000 + int((fraction + "000000000")[:9]))


def format_time(time_ns: int) -> str:
    """RFC 3339 in UTC, as Go writes it; the year 1 for 0, as Docker does."""
    import time

    if time_ns <= 0:
        return "0001-01-01T00:00:00Z"
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    fraction = f".{nanoseconds:09d}".rstrip("0").rstrip(".")
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + fraction + "Z"


# -- parsing, piece by piece


def _parse_object(raw: bytes, what: str) -> dict[str, Any]:
    if len(raw) > DOCUMENT_MAX:
        raise IntegrityError(f"{what}: {len(raw)} bytes are beyond {DOCUMENT_MAX}")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):  # ValueError: no UTF-8 and too long an integer as well
        raise IntegrityError(f"{what}: not valid JSON") from None
    return _object(data, what)


def _find_type(data: dict[str, Any], media_type: str, allowed: tuple[str, ...]) -> str:
    """The document's media type; what it says and what its transport says must agree."""
    media_type = media_type.partition(";")[0].strip()
    said = data.get("mediaType") or ""
    kind = "manifest" if OCI_MANIFEST in allowed else "index"
    if not isinstance(said, str):
        raise IntegrityError(f"{kind}: mediaType is not a string")
    if any("docker.distribution.manifest.v1+" in text for text in (said, media_type)) or data.get("schemaVersion") == 1:
        raise Unsupported(
            "the image is in Docker's schema 1, which has been obsolete since 2017",
            hint="pull it with another tool, push it again, and it is in a current format",
        )
    if (kind == "manifest" and "manifests" in data) or (kind == "index" and ("layers" in data or "config" in data)):
        raise IntegrityError(f"{kind}: it has the fields of a manifest and of an index")  # CVE-2021-41190
    if said and said not in allowed:
        raise IntegrityError(f"{kind}: unknown media type {_show(said)}")
    if media_type in MANIFEST_TYPES + INDEX_TYPES and said and media_type != said:
        raise IntegrityError(f"{kind}: it says {_show(said)}, its transport {_show(media_type)}")
    if said:
        return said
    return media_type if media_type in allowed else allowed[0]


def _parse_descriptor(entry: object, what: str) -> Descriptor:
    data = _object(entry, what)
    size = data.get("size")
    if type(size) is not int or not 0 <= size <= BLOB_MAX:
        raise IntegrityError(f"{what}: the size {_show(size)} is not between 0 and {BLOB_MAX}")
    platform = ""
    if data.get("platform") is not None:
        platform = _join_platform(_object(data["platform"], f"{what}: platform"), f"{what}: platform")
    annotations = _object(_or(data.get("annotations"), {}), f"{what}: annotations")
    return Descriptor(
        _text(data.get("mediaType"), f"{what}: mediaType"),
        check_digest(data.get("digest"), what),
        size,
        platform,
        tuple((key, _text(value, f"{what}: annotation {key}")) for key, value in annotations.items()),
    )


def _parse_layer(entry: object, what: str) -> Descriptor:
    descriptor = _parse_descriptor(entry, what)
    foreign = "foreign" in descriptor.media_type or "nondistributable" in descriptor.media_type
    if foreign or (isinstance(entry, dict) and entry.get("urls")):
        raise IntegrityError(
            f"{what} is a foreign one, to be fetched from an address that the image names, and is refused",
            hint="the image's publisher can include the layer, for example by 'push --allow-nondistributable'",
        )
    if descriptor.media_type not in LAYER_TYPES:
        raise IntegrityError(f"{what}: unknown media type {_show(descriptor.media_type)}")
    return descriptor


def _or(value: object, default: object) -> object:
    """Go writes an empty map or slice as null."""
    return default if value is None else value


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise IntegrityError(f"{what}: expected an object, found {_show(value)}")
    return value


def _array(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise IntegrityError(f"{what}: expected an array, found {_show(value)}")
    return value


def _text(value: object, what: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > TEXT_MAX:
        raise IntegrityError(f"{what}: expected a string, found {_show(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON's "\ud800" alone
        raise IntegrityError(f"{what}: a string with half a character") from None
    if "\0" in value:
        raise IntegrityError(f"{what}: a string with a NUL")
    return value


def _texts(value: object, what: str) -> tuple[str, ...]:
    if isinstance(value, str):  # Docker before 1.0 wrote a lone string
        value = [value]
    parts = _array(_or(value, []), what)
    if None in parts:
        raise IntegrityError(f"{what}: null among the strings")
    return tuple(_text(part, what) for part in parts)


def _show(value: object) -> str:
    """A stranger's value in a message: short and printable."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
