"""A registry on loopback that can be told to misbehave: OCI distribution specification 1.1 over http.server.

Not a substitute for a real registry (tests/kernel/test_registry.py has one): it does what real ones do rarely.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from tests.unit.sources_material import OCI_MANIFEST, Made, digest_of

MANIFEST = re.compile(r"/v2/(?P<name>.+)/manifests/(?P<tag>[^/]+)")
BLOB = re.compile(r"/v2/(?P<name>.+)/blobs/(?P<digest>sha256:[0-9a-f]{64})")
START = re.compile(r"/v2/(?P<name>.+)/blobs/uploads/")
UPLOAD = re.compile(r"/v2/(?P<name>.+)/uploads-of-mine/(?P<id>[0-9]+)")


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes


class Registry:
    """What it has, what it shall do wrong, and what it was asked."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}  # (repository, tag or digest)
        self.requests: list[Request] = []
        self.sent: dict[str, int] = {}  # bytes of each blob that went out, all answers together
        self.uploads: dict[str, bytes] = {}
        self.port = 0
        # -- misbehaviour
        self.breaks: dict[str, list[int]] = {}  # digest -> after how many bytes the next answers break off
        self.ranges = True  # False: Range is ignored
        self.bodies: dict[str, bytes] = {}  # digest -> what is sent in its place
        self.endless: set[str] = set()  # digests (or manifest tags) whose answers never end
        self.redirects: dict[str, str] = {}  # digest -> Location
        self.statuses: list[tuple[str, int, dict[str, str]]] = []  # (part of the path, status, headers): once each
        self.always: list[tuple[str, int, dict[str, str]]] = []
        self.delay_s = 0.0  # before each blob
        self.busy = 0
        self.busiest = 0
        # -- authentication
        self.basic = ""  # "user:password" that is wanted
        self.realm = ""  # of the token server; "" = basic
        self.token = ""  # that is wanted; may change in the middle
        self.answer_header = True  # Docker-Content-Digest
        self.shifts = False  # a 206 begins one byte later than it was asked to
        self.hangs: set[str] = set()  # digests whose answers stop in the middle, until `release`
        self.release = threading.Event()
        self.mounts = 201  # status of a request to mount
        self.hides_blobs = False  # HEAD finds none

    def add(self, name: str, made: Made, tag: str = "1") -> None:
        self.blobs.update(made.blobs)
        for key in (tag, made.digest):
            self.manifests[(name, key)] = (OCI_MANIFEST, made.manifest)

    def put(self, name: str, tag: str, media_type: str, data: bytes) -> None:
        for key in (tag, digest_of(data)):
            self.manifests[(name, key)] = (media_type, data)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def asked(self, method: str, part: str = "") -> list[Request]:
        with self.lock:
            return [request for request in self.requests if request.method == method and part in request.path]


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    registry: Registry
    timeout = 10
    disable_nagle_algorithm = True  # headers and body are two writes: 40 ms each time else

    def log_message(self, *arguments: object) -> None:
        return

    def _serve(self) -> None:
        try:
            body = self._read_body()
            headers = {name.lower(): value for name, value in self.headers.items()}
            with self.registry.lock:
                self.registry.requests.append(Request(self.command, self.path, headers, body))
            if self._misbehave() or not self._authorized():
                return
            self._route(urlsplit(self.path).path, body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _misbehave(self) -> bool:
        with self.registry.lock:
            for rule in self.registry.statuses:
                if rule[0] in self.path:
                    self.registry.statuses.remove(rule)
                    break
            else:
                rule = next((rule for rule in self.registry.always if rule[0] in self.path), ("", 0, {}))
        if not rule[1]:
            return False
        self._answer(rule[1], b'{"errors":[{"code":"UNKNOWN","message":"told to"}]}', rule[2])
        return True

    def _authorized(self) -> bool:
        registry = self.registry
        given = self.headers.get("Authorization", "")
        if registry.realm:
            if given == f"Bearer {registry.token}":
                return True
            match = re.match(r"/v2/(.+)/(?:manifests|blobs|uploads-of-mine)/", self.path)
            action = "pull" if self.command in ("GET", "HEAD") else "pull,push"
            scope = f',scope="repository:{match[1]}:{action}"' if match else ""
            challenge = f'Bearer realm="{registry.realm}",service="double"{scope}'
        elif registry.basic:
            if given == "Basic " + base64.b64encode(registry.basic.encode()).decode():
                return True
            challenge = 'Basic realm="double"'
        else:
            return True
        self._answer(401, b'{"errors":[{"code":"UNAUTHORIZED","message":"no"}]}', {"WWW-Authenticate": challenge})
        return False

    def _route(self, path: str, body: bytes) -> None:
        if path == "/v2/":
            self._answer(200, b"{}")
        elif found := UPLOAD.fullmatch(path):
            self._upload(found["name"], found["id"], body)
        elif found := START.fullmatch(path):
            self._start_upload(found["name"], body)
        elif found := MANIFEST.fullmatch(path):
            self._manifest(found["name"], found["tag"], body)
        elif found := BLOB.fullmatch(path):
            self._blob(found["digest"])
        else:
            self._error(404, "UNSUPPORTED")

    # -- pulling

    def _manifest(self, name: str, tag: str, body: bytes) -> None:
        if self.command == "PUT":
            for part in re.findall(rb"sha256:[0-9a-f]{64}", body):
                if part.decode() not in self.registry.blobs:
                    self._error(400, "MANIFEST_BLOB_UNKNOWN")
                    return
            self.registry.put(name, tag, self.headers["Content-Type"], body)
            self._answer(201, b"", {"Docker-Content-Digest": digest_of(body), "Location": self.path})
            return
        if tag in self.registry.endless:
            self._pour(OCI_MANIFEST)
            return
        found = self.registry.manifests.get((name, tag))
        if found is None:
            self._error(404, "MANIFEST_UNKNOWN")
            return
        headers = {"Docker-Content-Digest": digest_of(found[1])} if self.registry.answer_header else {}
        self._answer(200, found[1], headers, media_type=found[0])

    def _blob(self, digest: str) -> None:
        registry = self.registry
        data = registry.bodies.get(digest, registry.blobs.get(digest))
        if data is None:
            self._error(404, "BLOB_UNKNOWN")
        elif self.command == "HEAD":
            self._answer(404 if registry.hides_blobs else 200, data)
        elif digest in registry.redirects:
            self._answer(307, b"", {"Location": registry.redirects[digest]})
        elif digest in registry.endless:
            self._pour("application/octet-stream", digest)
        else:
            with registry.lock:
                registry.busy += 1
                registry.busiest = max(registry.busiest, registry.busy)
            try:
                time.sleep(registry.delay_s)
                self._send_blob(digest, data)
            finally:
                with registry.lock:
                    registry.busy -= 1

    def _send_blob(self, digest: str, data: bytes) -> None:
        start, status, headers = 0, 200, {}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.registry.ranges:
            start, status = int(asked[1]), 206
            if start >= len(data):
                self._answer(416, b"")
                return
            start += self.registry.shifts
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        rest = data[start:]
        with self.registry.lock:
            planned = self.registry.breaks.get(digest)
            limit = planned.pop(0) if planned else len(rest)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        part = rest[:limit]
        if digest in self.registry.hangs:
            self.wfile.write(part[:1000])
            self.registry.release.wait(30)
        self.wfile.write(part)
        with self.registry.lock:
            self.registry.sent[digest] = self.registry.sent.get(digest, 0) + len(part)
        if limit < len(rest):
            self.close_connection = True

    def _pour(self, media_type: str, key: str = "manifest") -> None:
        """An answer without an end, at most 64 MiB of it; counted."""
        self.send_response(200)
        self.send_header("Content-Type", media_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        chunk = b" " * 65536
        for _ in range(1024):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            with self.registry.lock:
                self.registry.sent[key] = self.registry.sent.get(key, 0) + len(chunk)
        self.wfile.write(b"0\r\n\r\n")

    # -- pushing

    def _start_upload(self, name: str, body: bytes) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if "mount" in query and self.registry.mounts >= 400:
            self._error(self.registry.mounts, "UNSUPPORTED")
            return
        if "mount" in query and query["mount"][0] in self.registry.blobs and self.registry.mounts == 201:
            self._answer(201, b"", {"Location": f"/v2/{name}/blobs/{query['mount'][0]}"})
            return
        if "digest" in query and body:
            self._finish_upload(name, query["digest"][0], body)
            return
        with self.registry.lock:
            identity = str(len(self.registry.uploads) + 1)
            self.registry.uploads[identity] = b""
        # Absolute, and with a query of its own: real registries do both.
        location = f"http://{self.headers['Host']}/v2/{name}/uploads-of-mine/{identity}?state=a%2Fb"
        self._answer(202, b"", {"Location": location, "Range": "0-0"})

    def _upload(self, name: str, identity: str, body: bytes) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if query.get("state") != ["a/b"] or identity not in self.registry.uploads:
            self._error(400, "BLOB_UPLOAD_INVALID")
            return
        with self.registry.lock:
            self.registry.uploads[identity] += body
            whole = self.registry.uploads[identity]
        if self.command == "PUT":
            self._finish_upload(name, query["digest"][0], whole)
            return
        location = f"/v2/{name}/uploads-of-mine/{identity}?state=a%2Fb"
        self._answer(202, b"", {"Location": location, "Range": f"0-{len(whole) - 1}"})

    def _finish_upload(self, name: str, digest: str, data: bytes) -> None:
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
            self._error(400, "DIGEST_INVALID")
            return
        self.registry.blobs[digest] = data
        self._answer(201, b"", {"Location": f"/v2/{name}/blobs/{digest}", "Docker-Content-Digest": digest})

    # --

    def _error(self, status: int, code: str) -> None:
        body = {"errors": [{"code": code, "message": code.lower().replace("_", " "), "detail": None}]}
        self._answer(status, json.dumps(body).encode())

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, *, media_type: str = "application/json"
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        return  # a client that hangs up is what these tests are about


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler], *, address: str = "127.0.0.1") -> Iterator[Server]:
    """An HTTP server in a thread, on a free port."""
    server = Server((address, 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def start_registry() -> Iterator[Registry]:
    registry = Registry()
    handler = type("Answers", (_Answers,), {"registry": registry})
    with serving(handler) as server:
        registry.port = server.server_address[1]
        yield registry


class Tokens:
    """A token server: what it was asked, and how it decides."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.decide: Callable[[Request], tuple[int, dict[str, Any]]] = lambda request: (200, {"token": "t"})
        self.url = ""


@contextmanager
def start_tokens() -> Iterator[Tokens]:
    tokens = Tokens()

    class Answers(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            return

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, self.path, headers, body)
            tokens.requests.append(request)
            status, answer = tokens.decide(request)
            raw = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST = _serve

    with serving(Answers) as server:
        tokens.url = f"http://127.0.0.1:{server.server_address[1]}/token"
        yield tokens
