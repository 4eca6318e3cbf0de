"""Unpacked layers: `layers/HEX`, one directory for each diff id, in overlayfs's form.

A layer is unpacked into `HEX.tmp` and renamed when it is whole, checked and on the disk, so that a directory without
the ending is complete. flock on `HEX.lock` makes two processes do the work once; whoever holds it may sweep what a
killed one left.
"""

from __future__ import annotations

import json
import os

from nagaya.errors import HostError, IntegrityError, NagayaError
from nagaya.images.content import Blobs
from nagaya.images.locks import Lock
from nagaya.images.progress import Progress
from nagaya.kernel.reflink import sync_file_system
from nagaya.static import NamedTuple

TEMPORARY = ".tmp"


class LayerFacts(NamedTuple):
    """What `HEX.json` keeps of a layer."""

    size_bytes: int  # of its files' contents
    entries: int


class Layers:
    """The layers below `root` (the store's images directory). Making one touches nothing."""

    def __init__(self, root: str) -> None:
        self.directory = f"{root}/layers"

    def path(self, diff_id: str) -> str:
        """Where the layer is, or would be."""
        return f"{self.directory}/{diff_id.partition(':')[2]}"

    def has(self, diff_id: str) -> bool:
        return os.path.isdir(self.path(diff_id))

    def facts(self, diff_id: str) -> LayerFacts:
        """Its size; zeros when that is not known."""
        try:
            with open(f"{self.path(diff_id)}.json", "rb") as stream:
                data = json.load(stream)
            return LayerFacts(int(data["size_bytes"]), int(data["entries"]))
        except (OSError, ValueError, KeyError, TypeError):
            return LayerFacts(0, 0)

    def unpack(self, blobs: Blobs, blob: str, diff_id: str, progress: Progress) -> None:
        """Unpack the layer in `blob`, if it is not there yet.

        Raises `IntegrityError` (hostile, damaged, or another diff id), `HostError`, `NotFound`; leaves nothing then.
        """
        if self.has(diff_id):
            return
        target = self.path(diff_id)
        with Lock(f"{target}.lock", remove=True):
            if self.has(diff_id):
                return
            found = self._unpack_to(f"{target}{TEMPORARY}", blobs, blob, progress, diff_id=diff_id)
            assert found == diff_id

    def unpack_new(self, blobs: Blobs, blob: str, progress: Progress) -> str:
        """Unpack a layer whose diff id nobody knows yet; answers it."""
        staging = f"{self.directory}/new-{blob.partition(':')[2]}"
        with Lock(f"{staging}.lock", remove=True):
            return self._unpack_to(f"{staging}{TEMPORARY}", blobs, blob, progress)

    def _unpack_to(self, staging: str, blobs: Blobs, blob: str, progress: Progress, *, diff_id: str = "") -> str:
        from nagaya.storage.tree import remove_tree  # lazy: only who unpacks

        what = f"layer {(diff_id or blob).partition(':')[2][:12]}"
        try:
            remove_tree(staging)
            os.mkdir(staging, 0o755)
            os.chmod(staging, 0o755)
            try:
                return self._fill(staging, blobs, blob, progress, diff_id)
            finally:
                remove_tree(staging)
        except IntegrityError as error:
            raise IntegrityError(f"{what}: {error.message}", hint=error.hint) from None
        except NagayaError:
            raise
        except OSError as error:
            raise HostError.from_os(error, f"cannot unpack {what}") from None

    def _fill(self, staging: str, blobs: Blobs, blob: str, progress: Progress, diff_id: str) -> str:
        from nagaya.images.streams import TarStream  # lazy: 4 ms
        from nagaya.images.unpack import unpack_layer

        key = f"unpack {blob}"
        with blobs.open(blob) as source, TarStream(source, like=diff_id or "sha256:") as stream:
            progress.start(key, f"unpacking {(diff_id or blob).partition(':')[2][:12]}", blobs.size(blob))
            stream.on_chunk(lambda done: progress.advance(key, done))
            unpacked = unpack_layer(iter(stream), staging)
            found = stream.diff_id
        if diff_id and found != diff_id:
            raise IntegrityError(f"its content does not match its diff id: expected {diff_id}, found {found}")
        target = self.path(found)
        _write_facts(f"{target}.json", LayerFacts(unpacked.size_bytes, unpacked.entries))
        sync_file_system(staging)  # one wait for all files of a layer, where fsync would wait for each
        try:
            os.rename(staging, target)
        except OSError:
            if not os.path.isdir(target):  # one of an unknown diff id was there already
                raise
        progress.finish(key)
        return found


def _write_facts(path: str, facts: LayerFacts) -> None:
    from nagaya.storage.records import store  # lazy

    store(path, facts)
