"""Sources and sinks by the prefixes that people know; each kind is a module of its own, imported when it is named."""

from __future__ import annotations

import os

from nagaya.errors import NotFound, UsageError
from nagaya.images.references import Reference, parse_reference
from nagaya.images.sources.base import Found, Sink, Source

PREFIXES = ("docker://", "oci:", "oci-archive:", "docker-archive:")
FORMATS = ("oci-archive", "docker-archive", "oci")


def open_source(text: str, *, insecure: bool = False) -> Source:
    """The source that `text` names: a prefix of `PREFIXES`, or a bare name for a registry. Raises `UsageError`."""
    kind, _, rest = text.partition(":")
    if kind == "docker" and rest.startswith("//"):
        from nagaya.images.sources.registry import RegistrySource

        return RegistrySource(parse_reference(rest[2:]), insecure=insecure)
    if kind in ("oci", "oci-archive"):
        from nagaya.images.sources.layout import open_layout

        path, tag = split_path(rest)
        return open_layout(path, tag, archive=kind == "oci-archive")
    if kind == "docker-archive":
        from nagaya.images.sources.docker_archive import open_docker_archive

        path, tag = split_path(rest)
        return open_docker_archive(path, tag)
    return open_source(f"docker://{text}", insecure=insecure)


def open_sink(text: str, *, format: str = "", insecure: bool = False) -> Sink:
    """Where to write: a registry's name (with or without docker://), FORMAT:PATH[:TAG], or with `format` a path.

    "-" as a path is standard output. A TAG takes the place of the names that `store` is given.
    """
    kind, _, rest = text.partition(":")
    tag = ""
    if not format and kind in FORMATS:
        format = kind
        text, tag = split_path(rest)
    if not format:
        from nagaya.images.sources.registry import RegistrySink

        return RegistrySink(parse_reference(text.removeprefix("docker://")), insecure=insecure)
    if format not in FORMATS:
        raise UsageError(f"unknown image format '{format}'", hint=f"one of: {', '.join(FORMATS)}")
    if format == "docker-archive":
        from nagaya.images.sources.docker_archive import DockerArchiveSink

        return DockerArchiveSink(text, tag)
    from nagaya.images.sources.layout import LayoutArchiveSink, LayoutDirectorySink

    return LayoutArchiveSink(text, tag) if format == "oci-archive" else LayoutDirectorySink(text, tag)


def bare_sources(reference: Reference, *, insecure: bool = False) -> list[Source]:
    """What a name without a prefix may mean: the registry, and for `debian` and `busybox` then a bootstrap."""
    from nagaya.images.sources.registry import RegistrySource

    sources: list[Source] = [RegistrySource(reference, insecure=insecure)]
    if reference.is_bare and not reference.digest:
        from nagaya.images.sources.bootstrap import find_bootstrap

        bootstrap = find_bootstrap(reference)
        if bootstrap is not None:
            sources.append(bootstrap)
    return sources


def find_images(path: str) -> list[Found]:
    """Every image of an archive or an OCI directory, its format detected. Raises `NotFound`, `IntegrityError`."""
    if not os.path.exists(path):
        raise NotFound(f"there is no file or directory '{path}'")
    from nagaya.images.sources.archive import open_archive
    from nagaya.images.sources.docker_archive import find_docker_images
    from nagaya.images.sources.layout import find_layout_images

    archive = open_archive(path)
    if archive.has("index.json") and archive.has("oci-layout"):
        return find_layout_images(archive)
    return find_docker_images(archive)


def split_path(text: str) -> tuple[str, str]:
    """PATH[:TAG], where TAG may be a whole name with a colon of its own; a colon before a slash is the path's."""
    path, _, tag = text.partition(":")
    if not path:
        raise UsageError(f"'{text}' names no path", hint="for example oci:/tmp/layout or oci-archive:/tmp/image.tar")
    return path, tag
