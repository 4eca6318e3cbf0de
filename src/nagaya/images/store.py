"""The image store: everything below `ROOT/images`. The front of this package; what is slow lives in its neighbours.

    lock, names.lock         locks.py
    names.json, records/     index.py    which images there are, and what they are called
    blobs/, partial/         content.py  manifests, configs and layers as they came, by digest
    layers/                  layers.py   layers unpacked, by diff id

`find` and `layer_directories` of an image that is there are on the path of every `run`: this module imports next to
nothing, and they take no lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nagaya.errors import Conflict, HostError, IntegrityError, NotFound, UsageError
from nagaya.images.image import Image as Image
from nagaya.images.image import ImageConfig as ImageConfig
from nagaya.images.index import Index, Record, to_image
from nagaya.static import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nagaya.images.content import Blobs
    from nagaya.images.layers import Layers
    from nagaya.images.manifest import History
    from nagaya.images.progress import Progress

SHORTEST_ID = 4
TRANSPORTS = ("oci", "oci-archive", "docker-archive")
_HEX = frozenset("0123456789abcdef")


class Pruned(NamedTuple):
    """What a `prune` removed."""

    removed: tuple[str, ...]  # ids of images
    bytes_freed: int


def _no_event(action: str, id: str, name: str) -> None:
    return


class ImageStore:
    """The images below `root`. Making one touches nothing; several processes may use the same root at once.

    `on_event(action, id, name)` hears of what was done: pull, import, load, save, push, tag, untag, delete, commit,
    prune.
    """

    def __init__(self, root: str, *, on_event: Callable[[str, str, str], None] = _no_event) -> None:
        self.root = root
        self.index = Index(root)
        self.on_event = on_event

    def __repr__(self) -> str:
        return f"<ImageStore {self.root}>"

    @property
    def blobs(self) -> Blobs:
        from nagaya.images.content import Blobs  # lazy: a `run` reads no blob

        return Blobs(self.root)

    @property
    def layers(self) -> Layers:
        from nagaya.images.layers import Layers  # lazy: a `run` unpacks nothing

        return Layers(self.root)

    # -- looking

    def find(self, reference: str) -> Image | None:
        """The image of that name (`name[:tag][@digest]`), id or prefix of an id; None when there is none.

        Raises `Conflict` for a prefix that several images have.
        """
        names = self.index.names()
        record = self._find_by_name(reference, names) or self._find_by_id(reference)
        return to_image(record, names) if record else None

    def get(self, reference: str) -> Image:
        """As `find`; raises `NotFound`."""
        image = self.find(reference)
        if image is None:
            raise NotFound(
                f"there is no image '{reference}' in the store",
                hint=f"'nagaya images' lists them; get it with: nagaya pull {reference}",
            )
        return image

    def list(self) -> list[Image]:
        """All images, newest first."""
        names = self.index.names()
        records = [record for image_id in self.index.ids() if (record := self.index.load(image_id)) is not None]
        records.sort(key=lambda record: (record.created_ns, record.id), reverse=True)
        return [to_image(record, names) for record in records]

    def layer_directories(self, image: Image) -> tuple[str, ...]:
        """The unpacked layers, topmost first, for an overlay's lower directories. Unpacks what is missing.

        A layer that an image has twice is given once, the topmost: overlayfs refuses the same directory twice, and
        the lower one could not show. Raises `IntegrityError`, `HostError`, `NotFound` (its blob is gone).
        """
        wanted = tuple(dict.fromkeys(reversed(image.layers)))
        paths = tuple(f"{self.root}/layers/{diff_id.partition(':')[2]}" for diff_id in wanted)
        if not paths:
            return (self._empty_layer(),)
        if not all(os.path.isdir(path) for path in paths):
            from nagaya.images.progress import Silent  # lazy: unpacking is rare here, `pull` did it

            self.unpack(image.id, Silent())
        return paths

    def _find_by_name(self, text: str, names: dict[str, str]) -> Record | None:
        image_id = names.get(text) or names.get(f"{text}:latest")
        if not image_id:
            from nagaya.images.references import parse_reference  # lazy: 1 ms, and most names are spelt as stored

            try:
                reference = parse_reference(text)
            except UsageError:
                return None
            if reference.digest:
                return self._find_by_digest(reference.familiar, reference.digest, names)
            image_id = names.get(reference.name, "")
        return self.index.load(image_id) if image_id else None

    def _find_by_digest(self, familiar: str, digest: str, names: dict[str, str]) -> Record | None:
        """By the digest that it was pulled by (which may be an index's), or by its manifest's."""
        known = names.get(f"{familiar}@{digest}")
        if known:
            return self.index.load(known)
        for name, image_id in names.items():
            if name.partition("@")[0].rpartition(":")[0] == familiar:
                record = self.index.load(image_id)
                if record is not None and record.digest == digest:
                    return record
        return None

    def _find_by_id(self, text: str) -> Record | None:
        prefix = text.removeprefix("sha256:")
        if not SHORTEST_ID <= len(prefix) <= 64 or not _HEX.issuperset(prefix):
            return None
        if len(prefix) == 64:
            return self.index.load(f"sha256:{prefix}")
        found = [image_id for image_id in self.index.ids() if image_id[7:].startswith(prefix)]
        if len(found) > 1:
            raise Conflict(
                f"'{text}' is the beginning of {len(found)} image ids",
                hint="give more digits; 'nagaya images --no-trunc' shows them",
            )
        return self.index.load(found[0]) if found else None

    def _empty_layer(self) -> str:
        path = f"{self.root}/layers/empty"
        os.makedirs(path, 0o755, exist_ok=True)
        return path

    # -- bringing

    def ensure(
        self,
        reference: str,
        *,
        platform: str = "",
        pull: str = "missing",
        insecure: bool = False,
        progress: Progress | None = None,
    ) -> Image:
        """The image, pulled if `pull` ("missing", "always", "never") says so. See `pull` for what is raised."""
        if pull not in ("missing", "always", "never"):
            raise UsageError(f"unknown pull policy '{pull}'", hint="one of: missing, always, never")
        if pull != "always" and not is_transport(reference):
            image = self.find(reference.removeprefix("docker://"))
            if image is not None and (not platform or self._is_for(image, platform)):
                if progress is not None:
                    progress.step("local image")
                return image
        if pull == "never":
            if is_transport(reference):
                raise UsageError(f"'{reference}' is somewhere else, and --pull never forbids to go there")
            self.get(reference.removeprefix("docker://"))
            raise NotFound(f"image '{reference}' in the store is not for {platform}", hint="try it with --pull missing")
        from nagaya.images import pulling  # lazy: 10 ms

        with self._sweeping_refused():
            return pulling.pull(
                self, reference, platform=platform, insecure=insecure, progress=progress, missing=pull == "missing"
            )

    def pull(
        self, reference: str, *, platform: str = "", insecure: bool = False, progress: Progress | None = None
    ) -> Image:
        """Bring an image in: `name[:tag][@digest]`, or with a prefix (docker:// oci: oci-archive: docker-archive: …).

        A bare `debian` or `busybox` is asked of the registry, and made here where that cannot be reached. Raises
        `UsageError`, `NotFound`, `RemoteError`, `IntegrityError`, `HostError`, `LaunchError`.
        """
        from nagaya.images import pulling

        with self._sweeping_refused():
            return pulling.pull(self, reference, platform=platform, insecure=insecure, progress=progress)

    def load(self, path: str, *, progress: Progress | None = None) -> builtins_list[Image]:
        """All images of an archive or layout, "-" for standard input; its format is detected."""
        from nagaya.images import moving

        with self._sweeping_refused():
            return moving.load(self, path, progress=progress)

    def import_rootfs(
        self,
        source: str,
        reference: str,
        *,
        changes: tuple[str, ...] = (),
        message: str = "",
        platform: str = "",
        progress: Progress | None = None,
    ) -> Image:
        """An image of one layer from a root file system: a directory, or a tar (any compression; "-" = standard input).

        `changes` are Dockerfile instructions (CMD ENTRYPOINT ENV EXPOSE LABEL STOPSIGNAL USER VOLUME WORKDIR).
        `platform` is what its programs are for; "" = this host.
        """
        from nagaya.images import making

        with self._sweeping_refused():
            return making.import_rootfs(
                self, source, reference, changes=changes, message=message, platform=platform, progress=progress
            )

    def commit(
        self,
        base: Image,
        upper: str,
        lower: tuple[str, ...],
        reference: str,
        *,
        author: str = "",
        message: str = "",
        changes: tuple[str, ...] = (),
        progress: Progress | None = None,
    ) -> Image:
        """`base` with the changes in the overlay directory `upper` as one more layer. "" as `reference`: no name.

        `lower` is what the machine has below (unused here: a layer holds only what `upper` has).
        """
        from nagaya.images import making

        return making.commit(
            self, base, upper, reference, author=author, message=message, changes=changes, progress=progress
        )

    @contextmanager
    def _sweeping_refused(self) -> Iterator[None]:
        """What is malformed, or finds no room, leaves nothing behind; a broken connection leaves its blobs for the next."""
        try:
            yield
        except (IntegrityError, HostError) as refusal:
            from nagaya.images import collect

            try:
                collect.sweep(self, partial=isinstance(refusal, HostError))
            except HostError:
                pass  # a store that cannot even be locked: the refusal has said why
            raise

    # -- taking out

    def save(
        self, references: tuple[str, ...], path: str, *, format: str = "oci-archive", progress: Progress | None = None
    ) -> None:
        """Write images to an archive ("oci-archive", "docker-archive"; "-" = standard output) or a layout ("oci")."""
        from nagaya.images import moving

        moving.save(self, references, path, format=format, progress=progress)

    def push(
        self, reference: str, destination: str = "", *, insecure: bool = False, progress: Progress | None = None
    ) -> str:
        """Send an image to a registry (or any prefix that `pull` takes); answers its manifest's digest there."""
        from nagaya.images import moving

        return moving.push(self, reference, destination, insecure=insecure, progress=progress)

    # -- naming and removing

    def tag(self, reference: str, new: str) -> None:
        """Give an image one more name, taking it from the image that has it."""
        from nagaya.images.references import normalise

        name = normalise(new)
        image = self.get(reference)
        with self.naming() as names:
            names[name] = image.id
        self.on_event("tag", image.id, name)

    def remove(
        self, reference: str, *, force: bool = False, in_use: Callable[[], frozenset[str]] = frozenset
    ) -> builtins_list[str]:
        """Take a name away, and delete the image with its last one. Answers lines, "untagged: X", "deleted: sha256:…".

        Raises `Conflict` when a machine uses it (`in_use` answers their image ids, once no new machine can claim one), or for an id with several names; with `force`
        these names go, but what a machine uses stays.
        """
        from nagaya.images import collect

        return collect.remove(self, reference, force=force, in_use=in_use)

    def prune(self, *, all: bool = False, in_use: Callable[[], frozenset[str]] = frozenset) -> Pruned:
        """Delete images without a name (with `all` every one that no machine uses), and what no image needs.

        Waits until nobody is adding to the store.
        """
        from nagaya.images import collect

        return collect.prune(self, all=all, in_use=in_use)

    # -- telling

    def history(self, reference: str) -> builtins_list[History]:
        """How the image was made, newest step first."""
        from nagaya.images import inspecting

        return inspecting.history(self, reference)

    def inspect(self, reference: str) -> dict[str, object]:
        """Everything about it, with the keys that Docker uses; JSON-ready."""
        from nagaya.images import inspecting

        return inspecting.inspect(self, reference)

    # -- for the neighbours

    @contextmanager
    def using(self) -> Iterator[None]:
        """Keeps content from being collected meanwhile. Whoever adds to the store does it inside."""
        from nagaya.images.locks import Lock

        with Lock(f"{self.root}/lock", shared=True):
            yield

    @contextmanager
    def claims(self, *, shared: bool) -> Iterator[None]:
        """Between a machine's choice of an image and its record (shared), no image is taken away (exclusive)."""
        from nagaya.images.locks import Lock

        with Lock(f"{self.root}/claims.lock", shared=shared):
            yield

    @contextmanager
    def naming(self) -> Iterator[dict[str, str]]:
        """The names, to be changed in place; they are written when the block ends without an exception."""
        from nagaya.images.locks import Lock

        with Lock(f"{self.root}/names.lock"):
            names = self.index.names()
            before = dict(names)
            yield names
            if names != before:
                self.index.write_names(names)

    def unpack(self, image_id: str, progress: Progress) -> None:
        """Unpack those of an image's layers that are missing."""
        record = self.index.load(image_id)
        if record is None:
            raise NotFound(f"there is no image {image_id} in the store")
        with self.using():
            for blob, diff_id in zip(record.blobs, record.layers, strict=True):
                self.layers.unpack(self.blobs, blob, diff_id, progress)

    def _is_for(self, image: Image, platform: str) -> bool:
        from nagaya.images.manifest import runs_on

        return runs_on(image.platform, platform)


builtins_list = list


def is_transport(reference: str) -> bool:
    """Whether it names a place rather than an image: "oci:/srv/layout:1"."""
    return reference.partition(":")[0] in TRANSPORTS
