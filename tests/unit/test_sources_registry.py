"""The registry client against a registry that misbehaves (registry_double.py)."""

from __future__ import annotations

import base64
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from nagaya.errors import IntegrityError, NagayaError, NotFound, RemoteError, Unsupported, UsageError
from nagaya.images.content import Blobs
from nagaya.images.manifest import Descriptor
from nagaya.images.progress import Progress, Silent
from nagaya.images.references import parse_reference
from nagaya.images.sources import bare_sources, open_sink, open_source
from tests.unit.registry_double import Registry, Request, Tokens, serving, start_registry, start_tokens
from tests.unit.sources_material import (
    OCI_INDEX,
    OCI_MANIFEST,
    Heard,
    Made,
    digest_of,
    layer_tar,
    make_image,
    make_index,
    partial_files,
    stored_digests,
)

NOISE = random.Random(7).randbytes(2 << 20)  # does not compress: the layer is as long
ONE = make_image(layer_tar({"big": NOISE}), layer_tar({"y": b"two"}))
BIG = digest_of(ONE.layers[0])
SMALL = digest_of(ONE.layers[1])
SIZE = len(ONE.layers[0])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def registry() -> Iterator[Registry]:
    with start_registry() as started:
        started.add("team/app", ONE)
        yield started


@pytest.fixture
def tokens() -> Iterator[Tokens]:
    with start_tokens() as started:
        yield started


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's credentials, mirrors or proxies but those of a test."""
    for name in ("REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nagaya.images.sources.registry.PAUSE_S", 0.01)
    monkeypatch.setattr("nagaya.images.sources.transport.PAUSE_S", 0.01)


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    """Downloads run in threads: none of them may outlive its pull, however that ended."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 3
    while left := [
        t.name
        for t in threading.enumerate()
        if t not in before and t.name != "connect" and "process_request" not in t.name
    ]:
        assert time.monotonic() < deadline, f"threads that stayed: {left}"
        time.sleep(0.01)


def pull(
    registry: Registry, root: Path, name: str = "team/app:1", *, platform: str = "", progress: Progress | None = None
) -> Descriptor:
    source = open_source(f"docker://{registry.host}/{name}", insecure=True)
    return source.fetch(Blobs(str(root)), platform=platform, progress=progress or Silent())


# -- pulling


def test_pulls_an_image_as_it_is(registry: Registry, root: Path) -> None:
    heard = Heard()
    got = pull(registry, root, progress=heard)
    assert got == Descriptor(OCI_MANIFEST, ONE.digest, len(ONE.manifest))
    assert stored_digests(root) == set(ONE.everything)
    assert Blobs(str(root)).read(ONE.digest) == ONE.manifest
    assert heard.started[BIG] == SIZE
    assert heard.reached[BIG] == SIZE
    assert {BIG, SMALL} <= heard.finished.keys()
    accepted = registry.asked("GET", "/manifests/")[0].headers["accept"]
    for wanted in (OCI_MANIFEST, OCI_INDEX, "vnd.docker.distribution.manifest.v2", "manifest.list.v2"):
        assert wanted in accepted


def test_what_is_there_is_not_fetched_again(registry: Registry, root: Path) -> None:
    pull(registry, root)
    registry.requests.clear()
    pull(registry, root)
    assert not registry.asked("GET", "/blobs/")


def test_pulls_by_digest(registry: Registry, root: Path) -> None:
    assert pull(registry, root, f"team/app@{ONE.digest}").digest == ONE.digest
    registry.manifests[("team/app", ONE.digest)] = (OCI_MANIFEST, ONE.manifest + b" ")
    with pytest.raises(IntegrityError):
        pull(registry, root, f"team/app@{ONE.digest}")


def test_an_index_picks_the_platform(registry: Registry, root: Path) -> None:
    other = make_image(layer_tar({"x": b"arm"}), architecture="arm64")
    registry.add("team/app", other, "arm")
    index = make_index(
        [
            ONE.descriptor(platform={"os": "linux", "architecture": "amd64"}),
            other.descriptor(platform={"os": "linux", "architecture": "arm64", "variant": "v8"}),
            ONE.descriptor(platform={"os": "unknown", "architecture": "unknown"}),
        ]
    )
    registry.put("team/app", "multi", OCI_INDEX, index)
    assert pull(registry, root, "team/app:multi", platform="linux/arm64").digest == other.digest
    assert stored_digests(root) >= set(other.everything)
    assert BIG not in stored_digests(root)
    assert pull(registry, root, "team/app:multi", platform="linux/amd64").digest == ONE.digest
    assert pull(registry, root, f"team/app@{digest_of(index)}", platform="linux/arm64").digest == other.digest
    with pytest.raises(NotFound, match="linux/s390x") as caught:
        pull(registry, root, "team/app:multi", platform="linux/s390x")
    assert "linux/arm64" in caught.value.hint


@pytest.mark.parametrize("name", ["team/app:missing", "other:1", f"team/app@sha256:{'0' * 64}"])
def test_an_unknown_image_is_one_sentence(registry: Registry, root: Path, name: str) -> None:
    with pytest.raises(NotFound) as caught:
        pull(registry, root, name)
    assert name in caught.value.message
    assert registry.host in caught.value.message
    assert not caught.value.message.endswith(".")
    assert stored_digests(root) == set()


def test_downloads_run_side_by_side(registry: Registry, root: Path) -> None:
    layers = [layer_tar({f"f{number}": bytes([number]) * 5000}) for number in range(6)]
    registry.add("many", make_image(*layers))
    registry.delay_s = 0.2
    pull(registry, root, "many:1")
    assert 2 <= registry.busiest <= 8


def test_a_layer_that_is_named_twice_is_fetched_once(registry: Registry, root: Path) -> None:
    layer = layer_tar({"x": NOISE[:100_000]})
    made = make_image(layer, layer)
    registry.add("twice", made)
    pull(registry, root, "twice:1")
    assert registry.sent[digest_of(made.layers[0])] == len(made.layers[0])


# -- connections that break


def test_a_broken_download_goes_on_where_it_was(registry: Registry, root: Path) -> None:
    registry.breaks[BIG] = [SIZE // 3, SIZE // 3]
    assert pull(registry, root).digest == ONE.digest
    assert registry.sent[BIG] == SIZE, "not a byte was sent twice"
    asked = [request.headers.get("range", "") for request in registry.asked("GET", BIG)]
    assert asked == ["", f"bytes={SIZE // 3}-", f"bytes={SIZE // 3 * 2}-"]
    assert partial_files(root) == []


def test_a_download_that_was_given_up_goes_on_in_the_next_pull(registry: Registry, root: Path) -> None:
    registry.breaks[BIG] = [SIZE // 2] + [0] * 40
    with pytest.raises(NagayaError) as caught:
        pull(registry, root)
    assert isinstance(caught.value, RemoteError | IntegrityError)
    assert BIG not in stored_digests(root)
    registry.breaks.clear()
    pull(registry, root)
    assert registry.sent[BIG] == SIZE, "not a byte was sent twice"
    assert stored_digests(root) == set(ONE.everything)
    assert partial_files(root) == []


def test_a_server_that_cannot_resume_begins_anew(registry: Registry, root: Path) -> None:
    registry.ranges = False
    registry.breaks[BIG] = [SIZE // 3]
    pull(registry, root)
    assert stored_digests(root) == set(ONE.everything)


@pytest.mark.timeout(60)
def test_a_server_that_always_breaks_is_given_up(registry: Registry, root: Path) -> None:
    registry.breaks[BIG] = [0] * 1000
    began = time.monotonic()
    with pytest.raises((RemoteError, IntegrityError)):
        pull(registry, root)
    assert time.monotonic() - began < 30
    assert len(registry.asked("GET", BIG)) < 20


def test_a_stale_partial_file_with_other_content_is_no_trap(registry: Registry, root: Path) -> None:
    """What an interrupted download left may be damaged: the second attempt must work."""
    partial = root / "partial" / BIG.replace(":", "-")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(1000))
    pull(registry, root)
    assert stored_digests(root) == set(ONE.everything)
    assert partial_files(root) == []


def test_a_part_that_begins_elsewhere_is_not_taken(registry: Registry, root: Path) -> None:
    registry.breaks[BIG] = [SIZE // 2]
    registry.shifts = True
    pull(registry, root)
    assert stored_digests(root) == set(ONE.everything)


@pytest.mark.timeout(20)
def test_a_failure_does_not_wait_for_what_hangs(registry: Registry, root: Path) -> None:
    """One layer is refused while another's server has fallen silent: the user is told at once."""
    registry.hangs.add(BIG)
    registry.bodies[SMALL] = bytes(len(ONE.layers[1]))
    began = time.monotonic()
    try:
        with pytest.raises(IntegrityError, match="does not match its digest"):
            pull(registry, root)
        assert time.monotonic() - began < 3
    finally:
        registry.release.set()


PULL = """
import sys
from nagaya.images.content import Blobs
from nagaya.images.progress import Silent
from nagaya.images.sources import open_source
host, root = sys.argv[1:]
open_source(f"docker://{host}/team/app:1", insecure=True).fetch(Blobs(root), platform="", progress=Silent())
"""


@pytest.mark.timeout(40)
def test_ctrl_c_does_not_wait_for_what_hangs(registry: Registry, root: Path) -> None:
    import signal

    registry.hangs.add(BIG)
    command = [sys.executable, "-c", PULL, registry.host, str(root)]
    puller = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 15
        while not registry.asked("GET", BIG):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
        puller.send_signal(signal.SIGINT)
        assert puller.wait(10) == -signal.SIGINT, "it hangs with the server, which says nothing for 30 s"
    finally:
        registry.release.set()
        puller.kill()
        puller.wait()


# -- answers that lie


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "body",
    [ONE.layers[0] + b"!", ONE.layers[0] * 2, bytes(SIZE), b"", ONE.layers[0][:-1]],
    ids=["longer", "twice", "other", "empty", "shorter"],
)
def test_a_blob_that_is_not_what_was_promised_is_refused(registry: Registry, root: Path, body: bytes) -> None:
    registry.bodies[BIG] = body
    with pytest.raises((IntegrityError, RemoteError)):
        pull(registry, root)
    assert BIG not in stored_digests(root)
    assert ONE.digest not in stored_digests(root), "the manifest comes last: it stands for a complete image"
    registry.bodies.clear()
    pull(registry, root)
    assert stored_digests(root) == set(ONE.everything)


@pytest.mark.timeout(30)
def test_a_blob_without_an_end_is_cut_off(registry: Registry, root: Path) -> None:
    registry.endless.add(SMALL)
    with pytest.raises((IntegrityError, RemoteError)):
        pull(registry, root)
    assert registry.sent[SMALL] < 16 << 20
    assert SMALL not in stored_digests(root)


@pytest.mark.timeout(30)
def test_a_manifest_without_an_end_is_cut_off(registry: Registry, root: Path) -> None:
    registry.endless.add("1")
    with pytest.raises((IntegrityError, RemoteError)):
        pull(registry, root)
    assert registry.sent["manifest"] < 40 << 20
    assert stored_digests(root) == set()


def test_a_compressed_answer_is_not_unfolded(registry: Registry, root: Path) -> None:
    """Content-Encoding would turn a gzip layer into something else, and is a way to send a bomb."""
    registry.bodies[SMALL] = ONE.layers[1]
    pull(registry, root)
    for request in registry.asked("GET", "/blobs/"):
        assert request.headers.get("accept-encoding", "identity") in ("identity", "")


@pytest.mark.parametrize(
    ("media_type", "data", "error"),
    [
        (
            "application/vnd.docker.distribution.manifest.v1+prettyjws",
            b'{"schemaVersion": 1, "fsLayers": []}',
            Unsupported,
        ),
        ("text/html", b"<html>log in to the hotel's network</html>", IntegrityError),
        (OCI_MANIFEST, b"", IntegrityError),
        (OCI_MANIFEST, b"[" * 50_000, IntegrityError),
        (OCI_INDEX, ONE.manifest, IntegrityError),
    ],
    ids=["schema1", "html", "empty", "deep", "wrong-type"],
)
def test_a_document_that_is_no_manifest(
    registry: Registry, root: Path, media_type: str, data: bytes, error: type[NagayaError]
) -> None:
    registry.put("team/app", "odd", media_type, data)
    with pytest.raises((error, RemoteError)):
        pull(registry, root, "team/app:odd")
    assert stored_digests(root) == set()


def test_a_registry_that_says_another_digest_is_refused(registry: Registry, root: Path) -> None:
    registry.always.append(("/nothing", 0, {}))
    registry.manifests[("team/app", ONE.digest)] = (OCI_MANIFEST, b"{}")
    with pytest.raises(IntegrityError):
        pull(registry, root, f"team/app@{ONE.digest}")


# -- statuses


def test_too_many_requests_are_waited_for(registry: Registry, root: Path) -> None:
    registry.statuses += [("/manifests/", 429, {"Retry-After": "1"}), (BIG, 503, {})]
    began = time.monotonic()
    pull(registry, root)
    assert time.monotonic() - began >= 0.9
    assert stored_digests(root) == set(ONE.everything)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("status", [429, 500, 503, 418])
def test_a_status_that_stays_is_told(registry: Registry, root: Path, status: int) -> None:
    registry.always.append(("/manifests/", status, {"Retry-After": "3600"}))
    began = time.monotonic()
    with pytest.raises(RemoteError) as caught:
        pull(registry, root)
    assert time.monotonic() - began < 25
    assert str(status) in caught.value.message or "too many" in caught.value.message.lower()


# -- redirections


def test_a_redirection_to_another_host_gets_no_credentials(
    registry: Registry, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(monkeypatch, tmp_path, registry.host, "me:secret")
    registry.basic = "me:secret"
    seen: list[dict[str, str]] = []

    class Storage(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            return

        def do_GET(self) -> None:
            seen.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(200)
            self.send_header("Content-Length", str(SIZE))
            self.end_headers()
            self.wfile.write(ONE.layers[0])

    with serving(Storage) as storage:
        registry.redirects[BIG] = f"http://127.0.0.1:{storage.server_address[1]}/store/x?signature=1"
        pull(registry, root)
    assert len(seen) == 1
    assert "authorization" not in seen[0]
    assert stored_digests(root) == set(ONE.everything)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "location", ["", "/v2/team/app/blobs/{digest}", "file:///etc/passwd", "gopher://x", "http://[", "//"]
)
def test_a_redirection_that_leads_nowhere_is_refused(registry: Registry, root: Path, location: str) -> None:
    registry.redirects[BIG] = location.format(digest=BIG)
    with pytest.raises(RemoteError):
        pull(registry, root)
    assert len(registry.asked("GET", BIG)) < 60


# -- registries that cannot be asked


def test_a_closed_port_is_told_at_once(root: Path) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{reserved.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(RemoteError) as caught:
            open_source(f"docker://{host}/app", insecure=True).fetch(Blobs(str(root)), platform="", progress=Silent())
    assert time.monotonic() - began < 3
    assert host in caught.value.message
    assert "refused" in caught.value.message.lower()
    for noise in ("HTTPConnectionPool", "Max retries", "object at 0x", "Errno"):
        assert noise not in caught.value.message


def test_a_name_that_does_not_resolve_is_told_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    began = time.monotonic()
    with pytest.raises(RemoteError) as caught:
        open_source("docker://registry.invalid/app").fetch(Blobs(str(root)), platform="", progress=Silent())
    assert time.monotonic() - began < 3
    assert "registry.invalid" in caught.value.message
    for noise in ("HTTPSConnectionPool", "Max retries", "object at 0x", "Errno"):
        assert noise not in caught.value.message


@pytest.mark.timeout(30)
def test_a_host_that_swallows_everything_is_given_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A firewall that drops: sixteen addresses, one after the other, must not take sixteen times as long."""
    monkeypatch.setattr("nagaya.images.sources.connections.REACH_S", 0.4)
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for filler in (first, second):  # a full backlog drops the next ones
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        address = (socket.AF_INET, socket.SOCK_STREAM, 6, "", full.getsockname())
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [address] * 16)
        began = time.monotonic()
        with pytest.raises(RemoteError, match="no connection in time"):
            fetch_from("registry.example/app", root)
        assert time.monotonic() - began < 2


def test_plain_http_needs_insecure(registry: Registry, root: Path) -> None:
    source = open_source(f"docker://{registry.host}/team/app:1")
    with pytest.raises(RemoteError) as caught:
        source.fetch(Blobs(str(root)), platform="", progress=Silent())
    assert "--insecure" in caught.value.hint
    assert stored_digests(root) == set()


def test_insecure_is_for_loopback() -> None:
    for host in ("registry.example", "192.0.2.1:5000", "localhost.example:5000", "127.0.0.1.example"):
        with pytest.raises(UsageError):
            source = open_source(f"docker://{host}/app", insecure=True)
            source.fetch(Blobs("/nonexistent"), platform="", progress=Silent())


def test_opening_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("connected"))
    for source in (open_source("registry.example/app"), *bare_sources(parse_reference("debian"))):
        assert source.label


def test_bare_names_try_the_registry_before_a_bootstrap() -> None:
    labels = [source.label for source in bare_sources(parse_reference("debian:12"))]
    assert len(labels) == 2
    assert "docker.io/library/debian:12" in labels[0]
    assert "mmdebstrap" in labels[1]
    assert len(bare_sources(parse_reference("busybox"))) == 2
    for text in ("alpine", "team/debian", "localhost:5000/debian", f"debian@{ONE.digest}"):
        assert len(bare_sources(parse_reference(text))) == 1


# -- credentials


def keep(monkeypatch: pytest.MonkeyPatch, directory: Path, key: str, pair: str, **more: str) -> Path:
    """An auth file that REGISTRY_AUTH_FILE names."""
    path = directory / "auth.json"
    path.write_text(json.dumps({"auths": {key: entry(pair, **more)}}))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(path))
    return path


def entry(pair: str, **more: str) -> dict[str, str]:
    return {"auth": base64.b64encode(pair.encode()).decode(), **more}


def test_without_credentials_it_says_how_to_log_in(registry: Registry, root: Path) -> None:
    registry.basic = "me:secret"
    with pytest.raises(NagayaError) as caught:
        pull(registry, root)
    assert registry.host in caught.value.message
    assert f"nagaya login {registry.host}" in caught.value.hint


def test_refused_credentials_are_told_and_not_shown(
    registry: Registry, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.basic = "me:secret"
    keep(monkeypatch, tmp_path, registry.host, "me:swordfish")
    with pytest.raises(NagayaError) as caught:
        pull(registry, root)
    assert "swordfish" not in caught.value.message + caught.value.hint
    assert len(registry.requests) < 6


def test_where_credentials_are_looked_for(
    registry: Registry, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of containers-auth.json(5), and Docker's file behind it."""
    registry.basic = "me:secret"
    runtime, home, docker = tmp_path / "run", tmp_path / "home", tmp_path / "docker"
    files = {
        "runtime": runtime / "containers" / "auth.json",
        "docker": docker / "config.json",
        "home": home / ".docker" / "config.json",
    }
    monkeypatch.setenv("HOME", str(home))
    for name, path in files.items():
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"auths": {registry.host: entry("me:secret")}}))
        monkeypatch.delenv("DOCKER_CONFIG", raising=False)
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        if name == "runtime":
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
        if name == "docker":
            monkeypatch.setenv("DOCKER_CONFIG", str(docker))
        assert pull(registry, root).digest == ONE.digest, name
        path.unlink()
    keep(monkeypatch, tmp_path, registry.host, "me:secret")
    files["home"].write_text(json.dumps({"auths": {registry.host: entry("other:wrong")}}))
    assert pull(registry, root).digest == ONE.digest, "REGISTRY_AUTH_FILE comes first"


@pytest.mark.parametrize("key", ["{host}", "http://{host}", "https://{host}/v1/", "{host}/team", "{host}/team/app"])
def test_how_an_auth_file_may_name_a_registry(
    registry: Registry, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    registry.basic = "me:secret"
    keep(monkeypatch, tmp_path, key.format(host=registry.host), "me:secret")
    assert pull(registry, root).digest == ONE.digest


def test_the_longest_key_wins_and_a_neighbours_is_not_used(
    registry: Registry, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.basic = "me:secret"
    path = keep(monkeypatch, tmp_path, registry.host, "other:wrong")
    auths = {
        registry.host: entry("a:b"),
        f"{registry.host}/team": entry("c:d"),
        f"{registry.host}/team/app": entry("me:secret"),
        f"{registry.host}/team/ap": entry("e:f"),
        f"{registry.host}0": entry("g:h"),
    }
    path.write_text(json.dumps({"auths": auths}))
    pull(registry, root)
    sent = {request.headers["authorization"] for request in registry.requests if "authorization" in request.headers}
    assert sent == {"Basic " + base64.b64encode(b"me:secret").decode()}


def test_no_host_is_sent_what_is_anothers(
    registry: Registry, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(monkeypatch, tmp_path, "registry.example", "me:secret")
    registry.basic = "me:secret"
    with pytest.raises(NagayaError):
        pull(registry, root)
    assert not [request for request in registry.requests if "authorization" in request.headers]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"auths": 5}', '{"auths": {"HOST": {"auth": "!"}}}', '{"auths": {"HOST": 1}}']
)
def test_a_damaged_auth_file_is_one_sentence_or_passed_over(
    registry: Registry, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = keep(monkeypatch, tmp_path, registry.host, "a:b")
    path.write_text(text.replace("HOST", registry.host))
    try:
        assert pull(registry, root).digest == ONE.digest
    except NagayaError as error:
        assert str(path) in error.message


def helper_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / "docker-credential-double"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")


@pytest.mark.parametrize("style", ["credHelpers", "credsStore"])
def test_a_credential_helper_is_asked(
    registry: Registry, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, style: str
) -> None:
    registry.basic = "me:secret"
    helper_program(
        tmp_path,
        monkeypatch,
        f'read server; test "$1 $server" = "get {registry.host}" || exit 1\n'
        'echo \'{"ServerURL": "x", "Username": "me", "Secret": "secret"}\'',
    )
    path = keep(monkeypatch, tmp_path, "unused", "a:b")
    config = {"credHelpers": {registry.host: "double"}} if style == "credHelpers" else {"credsStore": "double"}
    path.write_text(json.dumps(config))
    assert pull(registry, root).digest == ONE.digest


@pytest.mark.parametrize("script", ["echo credentials not found in native keychain; exit 1", "echo '{'", "exit 3"])
def test_a_helper_without_credentials_does_not_stop_a_public_image(
    registry: Registry, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    helper_program(tmp_path, monkeypatch, script)
    path = keep(monkeypatch, tmp_path, "unused", "a:b")
    path.write_text(json.dumps({"credsStore": "double"}))
    try:
        assert pull(registry, root).digest == ONE.digest
    except NagayaError as error:  # a helper that broke may be told; one that has nothing may not
        assert "docker-credential-double" in error.message
        assert "not found in native" not in script


# -- tokens


def guard(registry: Registry, tokens: Tokens, token: str = "t1") -> None:
    registry.realm, registry.token = tokens.url, token
    tokens.decide = lambda request: (200, {"token": registry.token, "expires_in": 300})


def test_a_token_is_fetched_once_and_used(registry: Registry, root: Path, tokens: Tokens) -> None:
    guard(registry, tokens)
    pull(registry, root)
    assert len(tokens.requests) == 1
    query = parse_qs(urlsplit(tokens.requests[0].path).query)
    assert query["scope"] == ["repository:team/app:pull"]
    assert query["service"] == ["double"]
    assert "authorization" not in tokens.requests[0].headers


def test_the_password_goes_to_the_token_server_alone(
    registry: Registry, root: Path, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard(registry, tokens)
    keep(monkeypatch, tmp_path, registry.host, "me:secret")
    pull(registry, root)
    basic = "Basic " + base64.b64encode(b"me:secret").decode()
    assert [request.headers.get("authorization") for request in tokens.requests] == [basic]
    assert not [request for request in registry.requests if request.headers.get("authorization") == basic]


def test_access_token_is_as_good_as_token(registry: Registry, root: Path, tokens: Tokens) -> None:
    guard(registry, tokens)
    tokens.decide = lambda request: (200, {"access_token": "t1"})
    pull(registry, root)


def test_an_identity_token_is_exchanged(
    registry: Registry, root: Path, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """distribution's OAuth2 way: POST with grant_type=refresh_token."""
    guard(registry, tokens)
    keep(monkeypatch, tmp_path, registry.host, "<token>:", identitytoken="long-lived")

    def decide(request: Request) -> tuple[int, dict[str, object]]:
        form = parse_qs(request.body.decode())
        good = request.method == "POST" and form.get("refresh_token") == ["long-lived"]
        good = good and form.get("grant_type") == ["refresh_token"] and form.get("service") == ["double"]
        good = good and form.get("scope") == ["repository:team/app:pull"]
        return (200, {"access_token": "t1"}) if good else (401, {})

    tokens.decide = decide
    pull(registry, root)


def test_a_token_that_runs_out_in_the_middle_is_renewed(registry: Registry, root: Path, tokens: Tokens) -> None:
    guard(registry, tokens)
    heard = Heard()

    class Changer(Heard):
        def start(self, key: str, label: str, total_bytes: int) -> None:
            registry.token = "t2"

    pull(registry, root, progress=Changer())
    assert 2 <= len(tokens.requests) <= 6
    assert stored_digests(root) == set(ONE.everything)
    assert heard.steps == []


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_token_server_that_refuses(registry: Registry, root: Path, tokens: Tokens, status: int) -> None:
    guard(registry, tokens)
    tokens.decide = lambda request: (status, {"errors": []})
    with pytest.raises(NagayaError) as caught:
        pull(registry, root)
    assert not isinstance(caught.value, IntegrityError)
    assert len(tokens.requests) < 12


@pytest.mark.parametrize("answer", [{}, {"token": 5}, {"token": ""}, {"token": "a\r\nX-Evil: 1"}])
def test_a_token_that_is_none(registry: Registry, root: Path, tokens: Tokens, answer: dict[str, object]) -> None:
    guard(registry, tokens)
    tokens.decide = lambda request: (200, answer)
    with pytest.raises(NagayaError):
        pull(registry, root)
    assert not [request for request in registry.requests if "x-evil" in request.headers]


@pytest.mark.timeout(30)
def test_a_token_that_never_helps_ends(registry: Registry, root: Path, tokens: Tokens) -> None:
    guard(registry, tokens)
    tokens.decide = lambda request: (200, {"token": "never right"})
    with pytest.raises(NagayaError):
        pull(registry, root)
    assert len(registry.requests) < 12


@pytest.mark.timeout(30)
@pytest.mark.parametrize("realm", ["", "file:///etc/passwd", "http://192.0.2.1/token", "nonsense", "http://["])
def test_a_token_server_that_may_not_be_told_a_password(
    registry: Registry, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, realm: str
) -> None:
    """Without TLS a password leaves this host to nobody, whatever the registry names."""
    registry.realm = realm or " "
    keep(monkeypatch, tmp_path, registry.host, "me:secret")
    began = time.monotonic()
    with pytest.raises(RemoteError):
        pull(registry, root)
    assert time.monotonic() - began < 4, "it has tried to connect"


# -- pushing


def in_store(root: Path, made: Made) -> Descriptor:
    blobs = Blobs(str(root))
    for data in made.everything.values():
        blobs.put(data)
    return Descriptor(OCI_MANIFEST, made.digest, len(made.manifest))


def push(registry: Registry, root: Path, name: str, made: Made, progress: Progress | None = None) -> str:
    descriptor = in_store(root, made)
    sink = open_sink(f"{registry.host}/{name}", insecure=True)
    digest = sink.store(Blobs(str(root)), descriptor, names=("local:1",), progress=progress or Silent())
    sink.close()
    return digest


NEW = make_image(layer_tar({"new": NOISE[: 1 << 20]}), layer_tar({"z": b"small"}), ONE.plain[1])


def test_pushes_an_image_as_it_is(registry: Registry, root: Path, tmp_path: Path) -> None:
    heard = Heard()
    assert push(registry, root, "team/new:2", NEW, heard) == NEW.digest
    assert registry.manifests[("team/new", "2")] == (OCI_MANIFEST, NEW.manifest)
    assert {digest: registry.blobs[digest] for digest in NEW.blobs} == NEW.blobs
    puts = registry.asked("PUT")
    assert "/manifests/" in puts[-1].path, "the manifest comes last"
    assert len([request for request in puts if "/manifests/" in request.path]) == 1
    assert set(NEW.blobs) <= heard.finished.keys()
    assert pull(registry, tmp_path / "back", "team/new:2").digest == NEW.digest


def test_a_blob_that_the_registry_has_is_not_sent(registry: Registry, root: Path) -> None:
    push(registry, root, "team/app:2", NEW)
    sent = b"".join(request.body for request in registry.requests if request.method in ("PUT", "PATCH", "POST"))
    assert ONE.layers[1] not in sent
    registry.requests.clear()
    push(registry, root, "team/app:3", NEW)
    assert not [r for r in registry.requests if r.method in ("POST", "PATCH") or "uploads" in r.path]
    assert ("team/app", "3") in registry.manifests


def test_pushing_asks_for_the_right_to(registry: Registry, root: Path, tokens: Tokens) -> None:
    guard(registry, tokens)
    push(registry, root, "team/new:2", NEW)
    scopes = {scope for r in tokens.requests for scope in parse_qs(urlsplit(r.path).query)["scope"]}
    assert any("push" in scope and scope.startswith("repository:team/new:") for scope in scopes)
    assert len(tokens.requests) <= 3


def test_a_push_that_is_refused_says_how_to_log_in(registry: Registry, root: Path) -> None:
    registry.basic = "me:secret"
    with pytest.raises(NagayaError) as caught:
        push(registry, root, "team/new:2", NEW)
    assert "login" in caught.value.hint


def test_a_blob_of_a_neighbour_is_mounted(registry: Registry, root: Path) -> None:
    """The image's other name says where the registry has its blobs (distribution specification, "Mounting a blob")."""
    push(registry, root, "team/new:2", NEW)
    registry.requests.clear()
    registry.hides_blobs = True  # in the other repository
    sink = open_sink(f"{registry.host}/other/new:2", insecure=True)
    descriptor = in_store(root, NEW)
    names = ("local:1", f"{registry.host}/team/new:2")
    assert sink.store(Blobs(str(root)), descriptor, names=names, progress=Silent()) == NEW.digest
    assert len(registry.asked("POST", "mount=")) == len(NEW.blobs)
    assert not registry.asked("PUT", "uploads")
    assert ("other/new", "2") in registry.manifests


def test_a_token_for_mounting_is_one_for_both_repositories(registry: Registry, root: Path, tokens: Tokens) -> None:
    guard(registry, tokens)
    names = (f"{registry.host}/team/new:2",)
    sink = open_sink(f"{registry.host}/other/new:2", insecure=True)
    sink.store(Blobs(str(root)), in_store(root, NEW), names=names, progress=Silent())
    scopes = parse_qs(urlsplit(tokens.requests[0].path).query)["scope"]
    assert scopes == ["repository:other/new:pull,push", "repository:team/new:pull"]
    assert len(tokens.requests) == 1


@pytest.mark.parametrize("status", [202, 401, 403, 404, 405])
def test_a_registry_that_does_not_mount_gets_the_bytes(registry: Registry, root: Path, status: int) -> None:
    registry.mounts = status
    sink = open_sink(f"{registry.host}/other/new:2", insecure=True)
    names = (f"{registry.host}/team/new:2",)
    assert sink.store(Blobs(str(root)), in_store(root, NEW), names=names, progress=Silent()) == NEW.digest
    assert {digest: registry.blobs[digest] for digest in NEW.blobs} == NEW.blobs


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("part", "status"), [("/blobs/uploads/", 403), ("/uploads-of-mine/", 500), ("/manifests/2", 400)]
)
def test_a_push_that_fails_tells_what_the_registry_said(registry: Registry, root: Path, part: str, status: int) -> None:
    registry.always.append((part, status, {}))
    with pytest.raises(NagayaError) as caught:
        push(registry, root, "team/new:2", NEW)
    assert "told to" in caught.value.message or str(status) in caught.value.message
    assert ("team/new", "2") not in registry.manifests


def test_an_upload_that_fails_once_is_tried_again(registry: Registry, root: Path) -> None:
    registry.statuses.append(("/blobs/uploads/", 503, {}))
    assert push(registry, root, "team/new:2", NEW) == NEW.digest


def test_an_upload_location_elsewhere_gets_no_credentials(
    registry: Registry, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registry may hand uploads to a storage; that is another host, which gets no Authorization."""
    keep(monkeypatch, tmp_path, registry.host, "me:secret")
    registry.basic = "me:secret"
    with start_registry() as storage:
        storage.uploads["7"] = b""
        location = f"http://{storage.host}/v2/x/uploads-of-mine/7?state=a%2Fb"
        registry.always.append(("/blobs/uploads/", 202, {"Location": location}))
        try:
            push(registry, root, "team/new:2", NEW)
        except NagayaError:
            pass  # refusing to go elsewhere is allowed as well
        assert not [request for request in storage.requests if "authorization" in request.headers]


MEASURE = """
import resource, sys
from nagaya.images.content import Blobs
from nagaya.images.progress import Silent
from nagaya.images.sources import open_sink, open_source
host, root = sys.argv[1:]
blobs = Blobs(root)
open_source(f"docker://{host}/small:1", insecure=True).fetch(blobs, platform="", progress=Silent())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
manifest = open_source(f"docker://{host}/huge:1", insecure=True).fetch(blobs, platform="", progress=Silent())
sink = open_sink(f"{host}/copy:1", insecure=True)
sink.store(blobs, manifest, names=(), progress=Silent())
sink.close()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_stays_small_for_large_blobs(registry: Registry, root: Path) -> None:
    """A blob is streamed both ways: what is big on the wire is never whole in memory."""
    huge = make_image(layer_tar({"huge": NOISE * 16}))
    registry.add("small", make_image(layer_tar({"x": NOISE[:100_000]})))
    registry.add("huge", huge)
    command = [sys.executable, "-c", MEASURE, registry.host, str(root)]
    grown = int(subprocess.run(command, capture_output=True, check=True, timeout=60, text=True).stdout)
    assert grown < 16 << 10, f"{grown} KiB for a layer of {len(huge.layers[0]) >> 10} KiB"


# -- mirrors and proxies


def mirrors(tmp_path: Path, text: str) -> None:
    path = tmp_path / "xdg_config_home" / "nagaya" / "registries.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def fetch_from(text: str, root: Path, heard: Heard | None = None) -> Descriptor:
    return open_source(text).fetch(Blobs(str(root)), platform="", progress=heard or Silent())


def test_a_mirror_is_asked_in_the_place_of_its_registry(registry: Registry, root: Path, tmp_path: Path) -> None:
    mirrors(tmp_path, f'[mirrors]\n"registry.example" = ["http://{registry.host}"]\n')
    assert fetch_from("registry.example/team/app:1", root).digest == ONE.digest


def test_dockers_hub_is_mirrored_under_its_own_name(registry: Registry, root: Path, tmp_path: Path) -> None:
    registry.add("library/debian", ONE, "12")
    mirrors(tmp_path, f'[mirrors]\n"docker.io" = ["http://{registry.host}"]\n')
    assert fetch_from("debian:12", root).digest == ONE.digest


def test_the_next_mirror_is_tried_and_then_the_registry(registry: Registry, root: Path, tmp_path: Path) -> None:
    with socket.socket() as reserved, start_registry() as empty:
        reserved.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{reserved.getsockname()[1]}"
        listed = f'["http://{dead}", "http://{empty.host}", "http://{registry.host}"]'
        mirrors(tmp_path, f'[mirrors]\n"registry.example" = {listed}\n')
        heard = Heard()
        assert fetch_from("registry.example/team/app:1", root, heard).digest == ONE.digest
        assert [dead in heard.steps[0], empty.host in heard.steps[1]] == [True, True]
        assert empty.asked("GET", "/v2/team/app/manifests/1")
    mirrors(tmp_path, f'[mirrors]\n"{registry.host}" = ["http://{dead}"]\n')
    source = open_source(f"docker://{registry.host}/team/app:1", insecure=True)
    assert source.fetch(Blobs(str(root)), platform="", progress=Silent()).digest == ONE.digest


@pytest.mark.parametrize(
    "text",
    [
        "[mirrors",
        "[mirror]\n",
        '[mirrors]\n"registry.example" = "x"\n',
        '[mirrors]\n"registry.example" = ["http://mirror.example"]\n',
        '[mirrors]\n"registry.example" = ["ftp://localhost"]\n',
        '[mirrors]\n"registry.example" = ["https://localhost/path"]\n',
    ],
)
def test_a_wrong_list_of_mirrors_is_told(root: Path, tmp_path: Path, text: str) -> None:
    mirrors(tmp_path, text)
    with pytest.raises((UsageError, IntegrityError), match=r"registries\.toml"):
        fetch_from("registry.example/app", root)


def test_a_proxy_is_used_and_told_its_password(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []

    class Proxy(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            return

        def do_CONNECT(self) -> None:
            seen.append((self.path, self.headers.get("Proxy-Authorization", "")))
            self.send_error(403)

    with serving(Proxy) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:p%40ss@127.0.0.1:{proxy.server_address[1]}")
        with pytest.raises(RemoteError) as caught:
            fetch_from("registry.example/app", root)
        assert "p%40ss" not in caught.value.message + caught.value.hint
        basic = "Basic " + base64.b64encode(b"me:p@ss").decode()
        assert set(seen) == {("registry.example:443", basic)}
        monkeypatch.setenv("NO_PROXY", "registry.example")
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: (_ for _ in ()).throw(socket.gaierror(-2, "no")))
        with pytest.raises(RemoteError):
            fetch_from("registry.example/app", root)
    assert len(seen) <= 4


def test_loopback_needs_no_proxy(registry: Registry, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert pull(registry, root).digest == ONE.digest
