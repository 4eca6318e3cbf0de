"""`docker://`: pull from and push to registries (OCI distribution specification 1.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from urllib.parse import urlencode

import urllib3

from nagaya.errors import IntegrityError, NotFound, RemoteError, UsageError
from nagaya.images.content import Blobs, BlobWriter
from nagaya.images.manifest import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    Descriptor,
    Manifest,
    compute_digest,
    is_index,
    parse_config,
    parse_index,
    parse_manifest,
    select_platform,
    verify_digest,
)
from nagaya.images.progress import Progress
from nagaya.images.references import Reference, parse_reference
from nagaya.images.sources.connections import explain
from nagaya.images.sources.copy import short_digest
from nagaya.images.sources.mirrors import find_mirrors
from nagaya.images.sources.transport import Endpoint, Transport, Unreachable, open_endpoint
from nagaya.static import BinaryIO

PARALLEL = 3
ATTEMPTS = 6  # in a row that bring nothing new
PAUSE_S = 0.25  # after the first of them; then twice as long each time
PAUSE_MAX_S = 4.0
CHUNK = 256 << 10
NEIGHBOURS_MAX = 2  # repositories that a blob may be mounted from
ACCEPT = ", ".join((*MANIFEST_TYPES, *INDEX_TYPES))


class RegistrySource:
    """An image in a registry, tried at its mirrors first."""

    def __init__(self, reference: Reference, *, insecure: bool = False) -> None:
        self._reference = reference
        self._own = open_endpoint(reference.host, insecure=insecure)
        self.label = f"registry {reference.canonical}"

    def fetch(self, blobs: Blobs, *, platform: str, progress: Progress) -> Descriptor:
        """See `Source.fetch`."""
        for mirror in find_mirrors(self._reference.host):
            try:
                return _Pull(self._reference, mirror, blobs, progress).run(platform)
            except (RemoteError, NotFound) as problem:
                progress.step(f"mirror {mirror.base}: {problem.message}")
        return _Pull(self._reference, self._own, blobs, progress).run(platform)


class _Pull:
    """One pull from one endpoint."""

    def __init__(self, reference: Reference, endpoint: Endpoint, blobs: Blobs, progress: Progress) -> None:
        self._reference = reference
        self._transport = Transport(endpoint, reference.path, actions="pull")
        self._blobs = blobs
        self._progress = progress

    def run(self, platform: str) -> Descriptor:
        try:
            return self._run(platform)
        finally:
            self._transport.close()

    def _run(self, platform: str) -> Descriptor:
        reference = self._reference
        raw, media_type = self._fetch_manifest(reference.digest or reference.tag)
        digest = reference.digest or compute_digest(raw)
        verify_digest(raw, digest, f"the manifest of {reference}")
        chosen = False
        if is_index(media_type, raw):
            descriptor = select_platform(parse_index(raw), platform)
            raw, media_type = self._fetch_manifest(descriptor.digest)
            digest, chosen = descriptor.digest, True
        manifest = parse_manifest(raw, digest=digest, media_type=media_type)
        self._fetch_blob(manifest.config)
        if platform and not chosen:
            found = parse_config(self._blobs.read(manifest.config.digest)).platform
            select_platform((Descriptor(manifest.media_type, digest, len(raw), platform=found),), platform)
        self._fetch_layers(manifest)
        self._blobs.put(raw)  # last: it stands for an image that is complete
        return Descriptor(manifest.media_type, digest, len(raw))

    def _fetch_manifest(self, what: str) -> tuple[bytes, str]:
        host = self._transport.endpoint.host
        missing = f"there is no image '{self._reference}' on registry '{host}'"
        response = self._transport.request("GET", f"manifests/{what}", headers={"Accept": ACCEPT}, missing=missing)
        return self._transport.read(response), response.headers.get("Content-Type", "")

    def _fetch_layers(self, manifest: Manifest) -> None:
        unique = {layer.digest: layer for layer in manifest.layers}
        _side_by_side(self._fetch_blob, unique.values(), self._transport, "pull")

    def _fetch_blob(self, descriptor: Descriptor) -> None:
        """Download one blob, going on from where an earlier attempt (of ours, or of a killed pull) ended."""
        key = descriptor.digest
        self._progress.start(key, short_digest(key), descriptor.size)
        found = 0
        try:
            with self._blobs.writer(key, descriptor.size) as writer:
                if writer.complete:
                    self._progress.finish(key, "already here")
                    return
                found = writer.offset
                _Download(self._transport, self._reference, writer, self._progress).run()
        except IntegrityError:
            if not found or self._blobs.has(key):
                raise
            # What lay here from an earlier pull was bad, and is deleted by now: nobody's fault but this disk's.
            with self._blobs.writer(key, descriptor.size) as writer:
                if not writer.complete:
                    _Download(self._transport, self._reference, writer, self._progress).run()
        self._progress.finish(key)


class _Download:
    """The bytes of one blob, over as many connections as it takes."""

    def __init__(self, transport: Transport, reference: Reference, writer: BlobWriter, progress: Progress) -> None:
        self._transport = transport
        self._writer = writer
        self._progress = progress
        self._path = f"blobs/{writer.digest}"
        self._host = transport.endpoint.host
        self._missing = f"registry '{self._host}' lacks a blob of {reference} ({writer.digest})"
        self._ranges = True

    def run(self) -> None:
        """Raises `RemoteError` after `ATTEMPTS` in a row that got no further, `IntegrityError` for a wrong length."""
        writer = self._writer
        furthest, failures = writer.offset, 0
        while writer.offset < writer.size:
            try:
                self._stream()
                problem = "the connection ended early"
            except urllib3.exceptions.HTTPError as error:
                problem = explain(error)
            except Unreachable as error:
                if not writer.offset:
                    raise
                problem = error.message
            if writer.offset >= writer.size:
                return
            # Not merely more than before: one that starts again each time would otherwise never be given up.
            failures = 1 if writer.offset > furthest else failures + 1
            furthest = max(furthest, writer.offset)
            if failures >= ATTEMPTS:
                raise RemoteError(
                    f"registry '{self._host}' broke off after {writer.offset} of {writer.size} bytes: {problem}",
                    hint="pull again: it goes on from there",
                )
            self._transport.pause(min(PAUSE_S * 2 ** (failures - 1), PAUSE_MAX_S))

    def _stream(self) -> None:
        """One answer's worth."""
        writer = self._writer
        headers = {"Range": f"bytes={writer.offset}-"} if writer.offset and self._ranges else {}
        response = self._transport.request("GET", self._path, headers=headers, missing=self._missing, accept=(416,))
        try:
            if response.status == 206 and not self._continues(response):
                self._ranges = False
                return
            if response.status != 206:  # it sends everything, or has nothing there
                writer.restart()
                self._ranges = self._ranges and response.status != 416
            if response.status == 416:
                return
            self._check_length(response)
            while data := response.read(CHUNK):
                writer.write(data)
                self._progress.advance(writer.digest, writer.offset)
        finally:
            if writer.offset < writer.size:
                response.close()
            self._transport.discard(response)

    def _continues(self, response: urllib3.BaseHTTPResponse) -> bool:
        """Whether a 206 begins where it was asked to (RFC 9110, 14.4)."""
        unit, _, span = response.headers.get("Content-Range", "").partition(" ")
        return unit == "bytes" and span.partition("-")[0] == str(self._writer.offset)

    def _check_length(self, response: urllib3.BaseHTTPResponse) -> None:
        """Refuse a wrong length before its bytes come. The header is a stranger's: it may be missing or no number."""
        text = response.headers.get("Content-Length", "")
        if text.isascii() and text.isdigit() and self._writer.offset + int(text[:20]) != self._writer.size:
            raise IntegrityError(
                f"registry '{self._host}' has {self._writer.offset + int(text[:20])} bytes as the blob"
                f" {self._writer.digest}, which is to be {self._writer.size} bytes long"
            )


class RegistrySink:
    """Pushes to a registry: blobs that it lacks, then the manifest, byte by byte as it is here."""

    def __init__(self, reference: Reference, *, insecure: bool = False) -> None:
        if reference.digest:
            raise UsageError(
                f"'{reference}' names a digest; a push needs a tag", hint="for example localhost:5000/app:1.0"
            )
        self._reference = reference
        self._endpoint = open_endpoint(reference.host, insecure=insecure)
        self.label = f"registry {reference.canonical}"

    def store(self, blobs: Blobs, manifest: Descriptor, *, names: tuple[str, ...], progress: Progress) -> str:
        """See `Sink.store`. The reference says where it goes; `names` tell where the registry may have its blobs."""
        raw = blobs.read(manifest.digest)
        if is_index(manifest.media_type, raw):
            raise UsageError("an index cannot be pushed as one image")
        parsed = parse_manifest(raw, digest=manifest.digest, media_type=manifest.media_type)
        neighbours = self._neighbours(names)
        also = tuple(f"repository:{other}:pull" for other in neighbours)
        transport = Transport(self._endpoint, self._reference.path, actions="pull,push", also=also)
        push = _Push(transport, blobs, neighbours, progress)
        parts = {part.digest: part for part in (*parsed.layers, parsed.config)}
        try:
            _side_by_side(push.send, parts.values(), transport, "push")
            path, headers = f"manifests/{self._reference.tag}", {"Content-Type": parsed.media_type}
            response = transport.request("PUT", path, headers=headers, body=raw)
            transport.discard(response)
        finally:
            transport.close()
        theirs = response.headers.get("Docker-Content-Digest", manifest.digest)
        if theirs != manifest.digest:
            raise IntegrityError(f"the registry took the manifest as {theirs[:80]}, but it is {manifest.digest}")
        return manifest.digest

    def _neighbours(self, names: tuple[str, ...]) -> list[str]:
        """Other repositories of the same registry that the image came from or went to, by its names."""
        known = [parse_reference(name) for name in names]
        found = [other.path for other in known if other.host == self._reference.host]
        return [path for path in dict.fromkeys(found) if path != self._reference.path][:NEIGHBOURS_MAX]

    def close(self, *, failed: bool = False) -> None:
        """See `Sink.close`: a registry has no half of anything, its manifest comes last."""


class _Push:
    """Blobs on their way to one repository."""

    def __init__(self, transport: Transport, blobs: Blobs, neighbours: list[str], progress: Progress) -> None:
        self._transport = transport
        self._blobs = blobs
        self._neighbours = neighbours
        self._progress = progress

    def send(self, part: Descriptor) -> None:
        """Bring one blob there, unless it is, by the cheapest way that works."""
        self._progress.start(part.digest, short_digest(part.digest), part.size)
        there = self._transport.request("HEAD", f"blobs/{part.digest}", accept=(404,))
        self._transport.discard(there)
        if there.status != 404:
            self._progress.finish(part.digest, "already there")
            return
        location = self._mount(part)
        if location is None:
            self._progress.finish(part.digest, "mounted")
            return
        place = self._transport.follow(self._transport.url("blobs/uploads/"), location)
        target = f"{place}{'&' if '?' in place else '?'}{urlencode({'digest': part.digest})}"
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(part.size)}
        with self._blobs.open(part.digest) as stream:
            body = _Watched(stream, part, self._progress)
            self._transport.discard(self._transport.request("PUT", target, headers=headers, body=body))
        self._progress.finish(part.digest)

    def _mount(self, part: Descriptor) -> str | None:
        """Where to upload a blob to; None when the registry took it over from another of its repositories.

        A registry that cannot or may not mount begins an upload in its place, or refuses ("Mounting a blob").
        """
        for other in self._neighbours:
            query = urlencode({"mount": part.digest, "from": other})
            response = self._transport.request("POST", f"blobs/uploads/?{query}", body=b"", accept=(401, 403, 404, 405))
            self._transport.discard(response)
            if response.status == 201:
                return None
            if response.status == 202:
                return response.headers.get("Location", "")
        response = self._transport.request("POST", "blobs/uploads/", body=b"")
        self._transport.discard(response)
        return response.headers.get("Location", "")


def _side_by_side(
    work: Callable[[Descriptor], None], parts: Iterable[Descriptor], transport: Transport, name: str
) -> None:
    """Do `work` for each part, `PARALLEL` at once. The first failure (or Ctrl-C) ends the others at once."""
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix=name) as pool:
        futures = [pool.submit(work, part) for part in parts]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            # The one that failed, not those that were ended for it: they come later, and nobody has looked.
            failed = [future for future in futures if future.done() and future.exception() is not None]
            for future in failed or futures:
                future.result()
        except BaseException:
            transport.cancel()
            for future in futures:
                future.cancel()
            raise


class _Watched:
    """A file that tells how much of it was read."""

    def __init__(self, stream: BinaryIO, part: Descriptor, progress: Progress) -> None:
        self._stream = stream
        self._part = part
        self._progress = progress
        self._done = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._done += len(data)
        self._progress.advance(self._part.digest, self._done)
        return data

    def seek(self, where: int) -> None:
        self._stream.seek(where)
        self._done = where
