"""Making the volumes that a new machine asks for."""

from __future__ import annotations

from nagaya.model.spec import Mount
from nagaya.storage.paths import Paths
from nagaya.storage.rootfs import find_in_layers
from nagaya.storage.volumes import Volumes


def make_volumes(paths: Paths, mounts: tuple[Mount, ...], lower: tuple[str, ...]) -> None:
    """Make every volume that is not there yet, and fill the empty ones with what the image has at their place."""
    volumes = Volumes(paths.root)
    for mount in mounts:
        if mount.kind != "volume":
            continue
        volume = volumes.ensure(mount.source)
        sources = () if "nocopy" in mount.options else find_in_layers(lower, mount.target)
        if sources:
            volumes.populate(volume, sources)
