"""Where images come from and go to. A source fills the blob store; everything after that is the same for all."""

from __future__ import annotations

from nagaya.images.content import Blobs
from nagaya.images.manifest import Descriptor
from nagaya.images.progress import Progress
from nagaya.static import NamedTuple, Protocol


class Source(Protocol):
    """One image somewhere: in a registry, an archive, a directory, or about to be made."""

    @property
    def label(self) -> str:
        """How to call it in a message: "registry docker.io/library/debian:latest"."""

    def fetch(self, blobs: Blobs, *, platform: str, progress: Progress) -> Descriptor:
        """Bring the manifest, its config and its layers into `blobs`; answers the manifest's descriptor.

        `platform` is "os/arch[/variant]", or "" for the host's; it chooses from an index (`select_platform`).
        Every blob is checked against its digest. Raises `NotFound` (no such image), `RemoteError`,
        `IntegrityError`, `HostError`, `LaunchError`.
        """


class Sink(Protocol):
    """Somewhere to write images to. What it wrote is complete after `close`."""

    @property
    def label(self) -> str: ...

    def store(
        self,
        blobs: Blobs,
        manifest: Descriptor,
        *,
        names: tuple[str, ...],
        progress: Progress,
    ) -> str:
        """Write one image; answers the digest of its manifest as written. May be called more than once."""

    def close(self, *, failed: bool = False) -> None:
        """Finish what `store` began (an archive's index), or with `failed` remove what is half-made."""


class Found(NamedTuple):
    """One of the images in an archive or a layout."""

    source: Source
    names: tuple[str, ...]  # as the archive has them: "debian:latest", "docker.io/library/debian:12"; may be empty


# `nagaya.images.sources` has
#   open_source(text: str, *, insecure: bool = False) -> Source
#   open_sink(text: str, *, format: str = "", insecure: bool = False) -> Sink
#   bare_sources(reference: Reference) -> list[Source]     the registry, then a bootstrap where there is one
#   find_images(path: str) -> list[Found]                  every image of a file or directory, its format detected
