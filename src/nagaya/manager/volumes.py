"""Making the volumes that a new machine asks for."""

from __future__ import annotations

import os

from nagaya.model.spec import Mount
from nagaya.storage.paths import Paths
from nagaya.storage.rootfs import find_in_layers
from nagaya.storage.volumes import Volumes


def make_volumes(paths: Paths, mounts: tuple[Mount, ...], lower: tuple[str, ...]) -> tuple[Mount, ...]:
    """The mounts with every volume existing, anonymous ones named, and new ones holding what the image has there."""
    volumes = Volumes(paths.root)
    made = []
    for mount in mounts:
        if mount.kind == "volume":
            name = mount.source or os.urandom(16).hex()
            mount = mount._replace(source=name, anonymous=mount.anonymous or not mount.source)
            volume = volumes.ensure(name)
            if "nocopy" not in mount.options:
                sources = find_in_layers(lower, mount.target)
                if sources:
                    volumes.populate(volume, sources)
        made.append(mount)
    return tuple(made)
