"""Real registries, and the tools that others use: digests must be equal whoever pushes and whoever pulls."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import select
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from nagaya.errors import NagayaError, NotFound, RemoteError
from nagaya.images.content import Blobs
from nagaya.images.manifest import Descriptor
from nagaya.images.progress import Silent
from nagaya.images.sources import open_sink, open_source
from nagaya.images.sources import registry as client
from nagaya.images.store import ImageStore
from tests.kernel.registry_host import (
    RealRegistry,
    make_authority,
    make_signer,
    need,
    password_file,
    run,
    start_real_registry,
)
from tests.unit.registry_double import Request, start_tokens
from tests.unit.sources_material import (
    OCI_INDEX,
    OCI_MANIFEST,
    Made,
    digest_of,
    layer_tar,
    make_image,
    make_index,
    named_layout,
    stored_digests,
    write_layout,
)

NOISE = random.Random(9).randbytes(3 << 20)
ONE = make_image(layer_tar({"big": NOISE}), layer_tar({"bin/x": b"#!/bin/sh\n"}))
TWO = make_image(layer_tar({"x": b"arm"}), architecture="arm64")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    with start_real_registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's credentials, mirrors or proxies but those of a test."""
    for name in ("REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


def push(host: str, name: str, made: Made, root: Path, *, insecure: bool = True) -> str:
    blobs = Blobs(str(root))
    for data in made.everything.values():
        blobs.put(data)
    sink = open_sink(f"{host}/{name}", insecure=insecure)
    descriptor = Descriptor(OCI_MANIFEST, made.digest, len(made.manifest))
    digest = sink.store(blobs, descriptor, names=(), progress=Silent())
    sink.close()
    return digest


def pull(host: str, name: str, root: Path, *, insecure: bool = True, platform: str = "") -> Descriptor:
    source = open_source(f"docker://{host}/{name}", insecure=insecure)
    return source.fetch(Blobs(str(root)), platform=platform, progress=Silent())


# -- with others


def test_skopeo_reads_what_we_push(plain: RealRegistry, tmp_path: Path) -> None:
    need("skopeo")
    assert push(plain.host, "ours/app:1", ONE, tmp_path / "a") == ONE.digest
    place = f"docker://{plain.host}/ours/app:1"
    seen = json.loads(run("skopeo", "inspect", "--tls-verify=false", place))
    assert seen["Digest"] == ONE.digest
    assert seen["Layers"] == [digest_of(layer) for layer in ONE.layers]
    run("skopeo", "copy", "--quiet", "--src-tls-verify=false", place, f"oci:{tmp_path}/oci:v")
    for digest, data in ONE.everything.items():
        assert (tmp_path / "oci/blobs/sha256" / digest[7:]).read_bytes() == data


def test_podman_pulls_and_loads_what_we_write(plain: RealRegistry, tmp_path: Path) -> None:
    need("podman")
    push(plain.host, "ours/podman:1", ONE, tmp_path / "a")
    sink = open_sink(str(tmp_path / "d.tar"), format="docker-archive")
    descriptor = Descriptor(OCI_MANIFEST, ONE.digest, len(ONE.manifest))
    sink.store(Blobs(str(tmp_path / "a")), descriptor, names=("loaded:1",), progress=Silent())
    sink.close()
    with tempfile.TemporaryDirectory(prefix="nagaya-podman-", dir="/tmp") as place:  # its paths have to be short
        podman = ("podman", "--root", f"{place}/p", "--runroot", f"{place}/r", "--storage-driver=vfs")
        pulled = run(*podman, "pull", "--quiet", "--tls-verify=false", f"{plain.host}/ours/podman:1").strip()
        assert f"sha256:{pulled}" == digest_of(ONE.config)
        assert json.loads(run(*podman, "image", "inspect", pulled))[0]["Digest"] == ONE.digest
        assert "loaded:1" in run(*podman, "load", "--quiet", "--input", str(tmp_path / "d.tar"))
        assert json.loads(run(*podman, "image", "inspect", "loaded:1"))[0]["Id"] == pulled


@pytest.mark.parametrize("format", ["oci", "v2s2"])
def test_we_pull_what_skopeo_pushes(plain: RealRegistry, tmp_path: Path, format: str) -> None:
    need("skopeo")
    layout = named_layout(tmp_path / "oci", {"v": ONE})
    place = f"docker://{plain.host}/theirs/{format}:1"
    run("skopeo", "copy", "--quiet", "--dest-tls-verify=false", "--format", format, f"oci:{layout}:v", place)
    theirs = json.loads(run("skopeo", "inspect", "--tls-verify=false", place))["Digest"]
    got = pull(plain.host, f"theirs/{format}:1", tmp_path / "store")
    assert got.digest == theirs
    again = pull(plain.host, f"theirs/{format}@{theirs}", tmp_path / "store")
    assert again == got
    if format == "oci":
        assert got.digest == ONE.digest
    else:
        assert "docker" in got.media_type
    sent = push_again(plain.host, f"ours/{format}:2", got, tmp_path / "store")
    assert sent == theirs, "a manifest in Docker's format goes back as it came"


def push_again(host: str, name: str, manifest: Descriptor, root: Path) -> str:
    sink = open_sink(f"{host}/{name}", insecure=True)
    digest = sink.store(Blobs(str(root)), manifest, names=(), progress=Silent())
    sink.close()
    return digest


def test_we_pick_the_platform_from_what_skopeo_pushes(plain: RealRegistry, tmp_path: Path) -> None:
    need("skopeo")
    index = make_index(
        [
            ONE.descriptor(platform={"os": "linux", "architecture": "amd64"}),
            TWO.descriptor(platform={"os": "linux", "architecture": "arm64", "variant": "v8"}),
        ]
    )
    entry = {"mediaType": OCI_INDEX, "digest": digest_of(index), "size": len(index)}
    blobs = {**ONE.everything, **TWO.everything, digest_of(index): index}
    layout = write_layout(tmp_path / "oci", blobs, make_index([entry]))
    place = f"docker://{plain.host}/theirs/multi:1"
    run("skopeo", "copy", "--quiet", "--all", "--dest-tls-verify=false", f"oci:{layout}", place)
    assert pull(plain.host, "theirs/multi:1", tmp_path / "a", platform="linux/arm64").digest == TWO.digest
    assert stored_digests(tmp_path / "a") == set(TWO.everything)
    assert pull(plain.host, "theirs/multi:1", tmp_path / "b", platform="linux/amd64").digest == ONE.digest


def test_skopeo_and_podman_read_our_archives(plain: RealRegistry, tmp_path: Path) -> None:
    need("skopeo")
    push(plain.host, "ours/archives:1", ONE, tmp_path / "a")
    descriptor = Descriptor(OCI_MANIFEST, ONE.digest, len(ONE.manifest))
    for format in ("oci-archive", "docker-archive", "oci"):
        target = tmp_path / f"made-{format}"
        sink = open_sink(str(target), format=format)
        sink.store(Blobs(str(tmp_path / "a")), descriptor, names=("app:1",), progress=Silent())
        sink.close()
        seen = json.loads(run("skopeo", "inspect", "--config", f"{format}:{target}:app:1"))
        assert seen == json.loads(ONE.config)
        if format != "docker-archive":
            assert json.loads(run("skopeo", "inspect", f"{format}:{target}:app:1"))["Digest"] == ONE.digest


def test_we_read_skopeos_archives(tmp_path: Path) -> None:
    need("skopeo")
    layout = named_layout(tmp_path / "oci", {"v": ONE})
    for format in ("oci-archive", "docker-archive"):
        run("skopeo", "copy", "--quiet", f"oci:{layout}:v", f"{format}:{tmp_path}/{format}.tar:app:1")
        source = open_source(f"{format}:{tmp_path}/{format}.tar:app:1")
        got = source.fetch(Blobs(str(tmp_path / format)), platform="", progress=Silent())
        assert digest_of(ONE.config) in stored_digests(tmp_path / format)
        assert format == "docker-archive" or got.digest == ONE.digest


# -- the whole way, through the store


def test_the_store_pulls_unpacks_and_pushes(plain: RealRegistry, tmp_path: Path) -> None:
    push(plain.host, "ours/whole:1", ONE, tmp_path / "a")
    store = ImageStore(str(tmp_path / "images"))
    image = store.pull(f"{plain.host}/ours/whole:1", insecure=True)
    assert image.digest == ONE.digest
    assert image.id == digest_of(ONE.config)
    top, bottom = store.layer_directories(image)
    assert Path(bottom, "big").read_bytes() == NOISE
    assert Path(top, "bin/x").read_bytes() == b"#!/bin/sh\n"
    assert store.push(image.id, f"{plain.host}/ours/copy:2", insecure=True) == ONE.digest
    assert pull(plain.host, "ours/copy:2", tmp_path / "b").digest == ONE.digest


def test_an_unknown_image_is_one_sentence(plain: RealRegistry, tmp_path: Path) -> None:
    push(plain.host, "ours/known:1", TWO, tmp_path / "a")
    for name in ("ours/known:2", "ours/unknown:1"):
        with pytest.raises(NotFound, match=f"no image '{plain.host}/{name}' on registry"):
            pull(plain.host, name, tmp_path / "b")


def test_a_blob_is_mounted_from_a_neighbour(plain: RealRegistry, tmp_path: Path) -> None:
    made = make_image(layer_tar({"mounted": NOISE[:50_000]}))
    push(plain.host, "mount/from:1", made, tmp_path / "a")
    notes: dict[str, str] = {}

    class Noting(Silent):
        def finish(self, key: str, note: str = "") -> None:
            notes[key] = note

    sink = open_sink(f"{plain.host}/mount/to:1", insecure=True)
    names = (f"{plain.host}/mount/from:1",)
    descriptor = Descriptor(OCI_MANIFEST, made.digest, len(made.manifest))
    sink.store(Blobs(str(tmp_path / "a")), descriptor, names=names, progress=Noting())
    assert set(notes.values()) == {"mounted"}
    assert pull(plain.host, "mount/to:1", tmp_path / "b").digest == made.digest


# -- connections that break


@contextmanager
def cutting_proxy(host: str, limits: list[int]) -> Iterator[tuple[str, list[int]]]:
    """A TCP proxy that cuts its n-th connection after `limits[n]` bytes of answers (0 = never). Yields what passed."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)
    address, _, port = host.partition(":")
    passed: list[int] = []
    ended = threading.Event()

    def carry(client_side: socket.socket, limit: int, number: int) -> None:
        with client_side, socket.create_connection((address, int(port))) as server_side:
            while not ended.is_set():
                for ready in select.select([client_side, server_side], [], [], 0.05)[0]:
                    data = ready.recv(16384)
                    if not data:
                        return
                    if ready is client_side:
                        server_side.sendall(data)
                        continue
                    if limit:
                        data = data[: limit - passed[number]]
                    client_side.sendall(data)
                    passed[number] += len(data)
                    if limit and passed[number] >= limit:
                        return

    threads: list[threading.Thread] = []

    def accept() -> None:
        while not ended.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            passed.append(0)
            limit = limits.pop(0) if limits else 0
            threads.append(threading.Thread(target=carry, args=(connection, limit, len(passed) - 1)))
            threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}", passed
    finally:
        ended.set()
        acceptor.join()
        for thread in threads:
            thread.join()
        listener.close()


def test_a_download_goes_on_after_cuts(plain: RealRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAUSE_S", 0.01)
    push(plain.host, "ours/cut:1", ONE, tmp_path / "a")
    with cutting_proxy(plain.host, [1_200_000, 900_000, 700_000]) as (host, passed):
        assert pull(host, "ours/cut:1", tmp_path / "b").digest == ONE.digest
    assert len(passed) >= 4
    whole = sum(len(data) for data in ONE.everything.values())
    assert whole < sum(passed) < whole + 400_000, "what had arrived was asked for again"
    assert stored_digests(tmp_path / "b") == set(ONE.everything)


# -- authentication


def keep(monkeypatch: pytest.MonkeyPatch, path: Path, host: str, pair: str) -> None:
    path.write_text(json.dumps({"auths": {host: {"auth": base64.b64encode(pair.encode()).decode()}}}))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(path))


def test_basic_authentication(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start_real_registry(tmp_path / "r", **password_file(tmp_path, "me", "sec:ret")) as registry:
        for attempt in (lambda: pull(registry.host, "app:1", tmp_path / "s"),
                        lambda: push(registry.host, "app:1", ONE, tmp_path / "s")):  # fmt: skip
            with pytest.raises(NagayaError) as caught:
                attempt()
            assert f"nagaya login {registry.host}" in caught.value.hint
        keep(monkeypatch, tmp_path / "auth.json", registry.host, "me:wrong")
        with pytest.raises(RemoteError, match="denies access"):
            pull(registry.host, "app:1", tmp_path / "s")
        keep(monkeypatch, tmp_path / "auth.json", registry.host, "me:sec:ret")
        assert push(registry.host, "app:1", ONE, tmp_path / "s") == ONE.digest
        assert pull(registry.host, "app:1", tmp_path / "t").digest == ONE.digest


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docker-registry's own token authentication: it checks signature, audience and what the token grants."""
    certificate, sign = make_signer(tmp_path)
    basic = "Basic " + base64.b64encode(b"me:secret").decode()
    with start_tokens() as tokens:

        def decide(request: Request) -> tuple[int, dict[str, Any]]:
            if "authorization" in request.headers and request.headers["authorization"] != basic:
                return 401, {}
            query = parse_qs(urlsplit(request.path).query)
            access = []
            for scope in query.get("scope", []):
                kind, name, actions = scope.split(":")
                allowed = {"pull", "push"} if request.headers.get("authorization") == basic else {"pull"}
                access.append({"type": kind, "name": name, "actions": sorted(set(actions.split(",")) & allowed)})
            now = int(time.time())
            claims = {
                "iss": "test", "sub": "me", "aud": query["service"][0], "access": access,
                "exp": now + 300, "nbf": now - 10, "iat": now, "jti": str(len(tokens.requests)),
            }  # fmt: skip
            return 200, {"token": sign(claims)}

        tokens.decide = decide
        auth = {"realm": tokens.url, "service": "registry", "issuer": "test", "rootcertbundle": str(certificate)}
        with start_real_registry(tmp_path / "r", auth={"token": auth}) as registry:
            with pytest.raises(RemoteError, match="denies access"):
                push(registry.host, "team/app:1", ONE, tmp_path / "s")
            keep(monkeypatch, tmp_path / "auth.json", registry.host, "me:secret")
            assert push(registry.host, "team/app:1", ONE, tmp_path / "s") == ONE.digest
            monkeypatch.delenv("REGISTRY_AUTH_FILE")
            assert pull(registry.host, "team/app:1", tmp_path / "t").digest == ONE.digest
            keep(monkeypatch, tmp_path / "auth.json", registry.host, "me:wrong")
            with pytest.raises(RemoteError, match="refuses the user name or the password"):
                pull(registry.host, "team/app:1", tmp_path / "u")


# -- TLS


def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = make_authority(tmp_path / "pki")
    other = make_authority(tmp_path / "other")
    tls = {"certificate": str(authority.certificate), "key": str(authority.key)}
    trusted = tmp_path / "certs.d"
    monkeypatch.setattr("nagaya.images.sources.connections.CERTIFICATES", (str(trusted),))
    with start_real_registry(tmp_path / "r", tls=tls) as registry:
        with pytest.raises(RemoteError) as caught:
            pull(registry.host, "app:1", tmp_path / "s", insecure=False)
        assert "certificate" in caught.value.message
        assert f"{registry.host}/ca.crt" in caught.value.hint
        folder = trusted / registry.host
        folder.mkdir(parents=True)
        (folder / "ca.crt").write_bytes(other.ca.read_bytes())
        with pytest.raises(RemoteError, match="certificate"):
            pull(registry.host, "app:1", tmp_path / "s", insecure=False)
        (folder / "ca.crt").write_bytes(authority.ca.read_bytes())
        assert push(registry.host, "app:1", ONE, tmp_path / "s", insecure=False) == ONE.digest
        assert pull(registry.host, "app:1", tmp_path / "t", insecure=False).digest == ONE.digest
        (folder / "ca.crt").unlink()
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
        assert pull(registry.host, "app:1", tmp_path / "u", insecure=False).digest == ONE.digest
        monkeypatch.delenv("SSL_CERT_FILE")
        # --insecure on loopback: TLS that nobody vouches for is as good as none.
        assert pull(registry.host, "app:1", tmp_path / "v", insecure=True).digest == ONE.digest
        (folder / "ca.crt").write_text("nonsense")
        with pytest.raises(NagayaError, match="cannot be used"):
            pull(registry.host, "app:1", tmp_path / "w", insecure=False)


def test_a_client_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = make_authority(tmp_path / "pki")
    tls = {
        "certificate": str(authority.certificate), "key": str(authority.key), "clientcas": [str(authority.ca)],
    }  # fmt: skip
    trusted = tmp_path / "certs.d"
    monkeypatch.setattr("nagaya.images.sources.connections.CERTIFICATES", (str(trusted),))
    with start_real_registry(tmp_path / "r", tls=tls) as registry:
        folder = trusted / registry.host
        folder.mkdir(parents=True)
        (folder / "ca.crt").write_bytes(authority.ca.read_bytes())
        with pytest.raises(RemoteError):
            push(registry.host, "app:1", ONE, tmp_path / "s", insecure=False)
        (folder / "client.cert").write_bytes(authority.certificate.read_bytes())
        (folder / "client.key").write_bytes(authority.key.read_bytes())
        assert push(registry.host, "app:1", ONE, tmp_path / "s", insecure=False) == ONE.digest


def test_digests_are_of_the_bytes(plain: RealRegistry, tmp_path: Path) -> None:
    """What the registry's own storage holds is what we had: nothing was compressed, cut or written anew on the way."""
    push(plain.host, "ours/bytes:1", ONE, tmp_path / "a")
    for digest in ONE.everything:
        hexadecimal = digest[7:]
        path = plain.directory / "docker/registry/v2/blobs/sha256" / hexadecimal[:2] / hexadecimal / "data"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == hexadecimal
