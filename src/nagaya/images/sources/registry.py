"""`docker://`: pull from and push to registries (OCI distribution specification 1.1)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Event
from urllib.parse import urlencode, urljoin

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
from nagaya.images.references import Reference
from nagaya.images.sources.copy import short_digest
from nagaya.images.sources.mirrors import find_mirrors
from nagaya.images.sources.transport import Endpoint, Transport, explain, open_endpoint

PARALLEL = 3
ATTEMPTS = 6
CHUNK = 256 << 10
ACCEPT = ", ".join((*MANIFEST_TYPES, *INDEX_TYPES))


class RegistrySource:
    """An image in a registry, tried at its mirrors first."""

    def __init__(self, reference: Reference, *, insecure: bool = False) -> None:
        self._reference = reference
        self._own = open_endpoint(reference.host, insecure=insecure)
        self.label = f"registry {reference.canonical}"

    def fetch(self, blobs: Blobs, *, platform: str, progress: Progress) -> Descriptor:
        """See `Source.fetch`."""
        endpoints = [*find_mirrors(self._reference.host), self._own]
        for endpoint in endpoints:
            try:
                return _Pull(self._reference, endpoint, blobs, progress).run(platform)
            except (RemoteError, NotFound) as problem:
                if endpoint is self._own:
                    raise
                progress.step(f"mirror {endpoint.base}: {problem.message}")
        raise AssertionError("the registry itself is the last endpoint")


class _Pull:
    """One pull from one endpoint."""

    def __init__(self, reference: Reference, endpoint: Endpoint, blobs: Blobs, progress: Progress) -> None:
        self._reference = reference
        self._transport = Transport(endpoint, reference.path, actions="pull")
        self._blobs = blobs
        self._progress = progress
        self._cancelled = Event()

    def run(self, platform: str) -> Descriptor:
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
        self._blobs.put(raw)
        return Descriptor(manifest.media_type, digest, len(raw))

    def _fetch_manifest(self, what: str) -> tuple[bytes, str]:
        host = self._transport.endpoint.host
        missing = f"there is no image '{self._reference}' on registry '{host}'"
        response = _patiently(
            lambda: self._transport.request(
                "GET", self._transport.url(f"manifests/{what}"), headers={"Accept": ACCEPT}, missing=missing
            ),
            self._cancelled,
        )
        return self._transport.read(response), response.headers.get("Content-Type", "")

    def _fetch_layers(self, manifest: Manifest) -> None:
        unique = {layer.digest: layer for layer in manifest.layers}
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="pull") as pool:
            futures = [pool.submit(self._fetch_blob, layer) for layer in unique.values()]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                self._cancelled.set()
                for future in futures:
                    future.cancel()
                raise

    def _fetch_blob(self, descriptor: Descriptor) -> None:
        """Download one blob, going on from where an earlier attempt (of ours, or of a killed pull) ended."""
        key = descriptor.digest
        self._progress.start(key, short_digest(key), descriptor.size)
        with self._blobs.writer(key, descriptor.size) as writer:
            if writer.complete:
                self._progress.finish(key, "already here")
                return
            self._download(writer, descriptor)
        self._progress.finish(key)

    def _download(self, writer: BlobWriter, descriptor: Descriptor) -> None:
        failures = 0
        while writer.offset < descriptor.size or (descriptor.size == 0 and not failures):
            before = writer.offset
            try:
                self._stream(writer, descriptor)
                if descriptor.size == 0:
                    return
                problem = f"the connection ended after {writer.offset} of {descriptor.size} bytes"
            except urllib3.exceptions.HTTPError as error:
                problem = explain(error)
            if writer.offset >= descriptor.size:
                return
            failures = 1 if writer.offset > before else failures + 1
            if failures >= ATTEMPTS:
                raise RemoteError(
                    f"registry '{self._transport.endpoint.host}' broke off: {problem}",
                    hint="pull again: it goes on from there",
                )
            self._pause(failures)

    def _stream(self, writer: BlobWriter, descriptor: Descriptor) -> None:
        headers = {"Range": f"bytes={writer.offset}-"} if writer.offset else {}
        url = self._transport.url(f"blobs/{descriptor.digest}")
        missing = f"registry '{self._transport.endpoint.host}' lacks a blob of {self._reference} ({descriptor.digest})"
        response = _patiently(
            lambda: self._transport.request("GET", url, headers=headers, missing=missing, accept=(416,)),
            self._cancelled,
        )
        try:
            if response.status != 206:  # it sends everything, or cannot begin there
                writer.restart()
            if response.status == 416:
                return
            while data := response.read(CHUNK):
                if self._cancelled.is_set():
                    raise RemoteError("the pull was given up")
                writer.write(data)
                self._progress.advance(descriptor.digest, writer.offset)
        finally:
            # An answer that was not read to its end would be taken for the next one's: close, do not reuse.
            if writer.offset >= descriptor.size:
                response.release_conn()
            else:
                response.close()

    def _pause(self, failures: int) -> None:
        if self._cancelled.wait(min(0.2 * 2**failures, 5.0)):
            raise RemoteError("the pull was given up")


def _patiently(
    ask: Callable[[], urllib3.BaseHTTPResponse], cancelled: Event, *, attempts: int = 4
) -> urllib3.BaseHTTPResponse:
    """Ask again, with growing pauses, while the registry is overloaded (429, 5xx); anything else is final."""
    for attempt in range(attempts):
        try:
            return ask()
        except RemoteError as problem:
            passing = "slow down" in problem.message or "status 5" in problem.message
            if not passing or attempt == attempts - 1 or cancelled.wait(0.3 * 2**attempt):
                raise
    raise AssertionError("the last attempt raises")


class RegistrySink:
    """Pushes to a registry: blobs that it lacks, then the manifest, byte by byte as it is here."""

    def __init__(self, reference: Reference, *, insecure: bool = False) -> None:
        if reference.digest:
            raise UsageError(
                f"'{reference}' names a digest; a push needs a tag", hint="for example localhost:5000/app:1.0"
            )
        self._reference = reference
        self._transport = Transport(
            open_endpoint(reference.host, insecure=insecure), reference.path, actions="pull,push"
        )
        self.label = f"registry {reference.canonical}"

    def store(self, blobs: Blobs, manifest: Descriptor, *, names: tuple[str, ...], progress: Progress) -> str:
        """See `Sink.store`. `names` do not matter: the reference says where it goes."""
        raw = blobs.read(manifest.digest)
        if is_index(manifest.media_type, raw):
            raise UsageError("an index cannot be pushed as one image")
        parsed = parse_manifest(raw, digest=manifest.digest, media_type=manifest.media_type)
        parts = {part.digest: part for part in (*parsed.layers, parsed.config)}
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="push") as pool:
            for future in [pool.submit(self._push_blob, blobs, part, progress) for part in parts.values()]:
                future.result()
        url = self._transport.url(f"manifests/{self._reference.tag}")
        response = self._transport.request("PUT", url, headers={"Content-Type": parsed.media_type}, body=raw)
        self._transport.read(response)
        theirs = response.headers.get("Docker-Content-Digest", manifest.digest)
        if theirs != manifest.digest:
            raise IntegrityError(f"the registry took the manifest as {theirs}, but it is {manifest.digest}")
        return manifest.digest

    def _push_blob(self, blobs: Blobs, part: Descriptor, progress: Progress) -> None:
        progress.start(part.digest, short_digest(part.digest), part.size)
        there = self._transport.request("HEAD", self._transport.url(f"blobs/{part.digest}"), accept=(404,))
        there.release_conn()
        if there.status != 404:
            progress.finish(part.digest, "already there")
            return
        started = self._transport.request("POST", self._transport.url("blobs/uploads/"), body=b"")
        self._transport.read(started)
        place = urljoin(self._transport.url("blobs/uploads/"), started.headers.get("Location", ""))
        mark = "&" if "?" in place else "?"
        target = f"{place}{mark}{urlencode({'digest': part.digest})}"
        with blobs.open(part.digest) as stream:
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(part.size)}
            body = _Watched(stream, part, progress)
            self._transport.read(self._transport.request("PUT", target, headers=headers, body=body))
        progress.finish(part.digest)

    def close(self, *, failed: bool = False) -> None:
        """See `Sink.close`: a registry has no half of anything, its manifest comes last."""


class _Watched:
    """A file that tells how much of it was read."""

    def __init__(self, stream: object, part: Descriptor, progress: Progress) -> None:
        self._stream = stream
        self._part = part
        self._progress = progress
        self._done = 0

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(size)  # type: ignore[attr-defined]
        self._done += len(data)
        self._progress.advance(self._part.digest, self._done)
        return data

    def seek(self, where: int) -> None:
        self._stream.seek(where)  # type: ignore[attr-defined]
        self._done = where
