"""What an image is, once it is in the store. On the path of every `run`: this module imports nothing."""

from __future__ import annotations

from nagaya.static import NamedTuple


class ImageConfig(NamedTuple):
    """What the image says about running it (OCI image specification, config.md, `config`)."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    env: tuple[str, ...] = ()  # "NAME=value"
    workdir: str = ""
    user: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    stop_signal: str = ""  # "SIGTERM", "TERM" or "15"
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()  # "80/tcp"


class Image(NamedTuple):
    """An image in the store."""

    id: str  # digest of the config, "sha256:…"
    digest: str  # digest of the manifest
    names: tuple[str, ...]  # "debian:latest"
    platform: str  # "linux/amd64", "linux/arm/v7"
    created_ns: int  # 0 = the image does not say
    size_bytes: int  # of the files in its layers
    layers: tuple[str, ...]  # diff ids, bottom first
    config: ImageConfig
    source: str  # which source it came from
