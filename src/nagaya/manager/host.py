"""One store on this host: the object that the CLI and the library begin with."""

from __future__ import annotations

from collections.abc import Iterator

from nagaya.storage import events
from nagaya.storage.events import Event
from nagaya.storage.paths import find_paths, make_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.images.store import ImageStore
    from nagaya.manager.machines import Machines
    from nagaya.manager.networks import Networks
    from nagaya.storage.disk_images.store import Disks
    from nagaya.storage.volumes import Volumes


class Host:
    """The machines, images, networks, volumes and disks of one store (`root`, default: root's or the user's own)."""

    def __init__(self, *, root: str = "", run_dir: str = "") -> None:
        self.paths = find_paths(root, run_dir)
        self._images: ImageStore | None = None
        self._machines: Machines | None = None
        self._networks: Networks | None = None
        self._volumes: Volumes | None = None
        self._disks: Disks | None = None

    def __repr__(self) -> str:
        return f"<Host {self.paths.root}>"

    @property
    def images(self) -> ImageStore:
        if self._images is None:
            from nagaya.images.store import ImageStore  # lazy: `exec` and `ps` need no images

            self._images = ImageStore(self.paths.images, on_event=self._image_event)
        return self._images

    @property
    def machines(self) -> Machines:
        if self._machines is None:
            from nagaya.manager.machines import Machines  # lazy: `images` and `pull` need no machines

            self._machines = Machines(self.paths, self)
        return self._machines

    @property
    def networks(self) -> Networks:
        if self._networks is None:
            from nagaya.manager.networks import Networks  # lazy: most commands need none

            self._networks = Networks(self.paths, self)
        return self._networks

    @property
    def volumes(self) -> Volumes:
        if self._volumes is None:
            from nagaya.storage.volumes import Volumes  # lazy: most commands need none

            self._volumes = Volumes(self.paths.root)
        return self._volumes

    @property
    def disks(self) -> Disks:
        if self._disks is None:
            from nagaya.storage.disk_images.store import Disks  # lazy: whole machines alone have them

            self._disks = Disks(self.paths.root)
        return self._disks

    def events(self, *, since_ns: int = 0, until_ns: int = 0, follow: bool = False) -> Iterator[Event]:
        """What happened, oldest first; with `follow` also what is to come."""
        make_directory(self.paths.root, 0o711)
        return events.follow(self.paths.events, since_ns=since_ns, until_ns=until_ns, wait=follow)

    def _image_event(self, action: str, id: str, name: str) -> None:
        events.record(self.paths.events, "image", action, id, name)
