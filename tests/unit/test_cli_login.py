"""`login` and `logout`: the files that other tools share, and a registry on loopback that checks."""

from __future__ import annotations

import base64
import io
import json
import os
import stat
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nagaya.cli import main
from nagaya.errors import IntegrityError, LaunchError, NotFound, RemoteError, UsageError
from nagaya.images.sources import registry_login
from nagaya.images.sources.registry_auth import find_credentials

GOOD = "Basic " + base64.b64encode(b"me:secret").decode()


class Registry(ThreadingHTTPServer):
    """Wants basic authentication at /basic…, tokens elsewhere. `asked` are the (path, Authorization) that came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.challenge = ""
        self.asked: list[tuple[str, str]] = []

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Registry)
        given = self.headers.get("Authorization", "")
        server.asked.append((self.path, given))
        if self.path == "/v2/" and server.challenge == "redirect":
            self.send_response(302)
            self.send_header("Location", f"http://{server.host}/elsewhere")
        elif given in (GOOD, "Bearer t") or not server.challenge:
            self.send_response(200)
        else:
            self.send_response(401)
            self.send_header("WWW-Authenticate", server.challenge)
        body = b'{"token": "t"}' if self.path.startswith("/token") else b""
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        return


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Registry()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    return tmp_path / "docker" / "config.json"


def _login(registry: Registry, monkeypatch: pytest.MonkeyPatch, password: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(password + "\n"))
    return main(["login", "--insecure", "-u", "me", "--password-stdin", registry.host])


@pytest.mark.parametrize("kind", ["basic", "bearer"])
def test_login_checks_and_keeps(
    registry: Registry, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    registry.challenge = (
        'Basic realm="r"' if kind == "basic" else f'Bearer realm="http://{registry.host}/token",service="a,b"'
    )
    assert _login(registry, monkeypatch, "wrong") == 2
    assert "refused" in capsys.readouterr().err
    assert not file.exists()
    assert _login(registry, monkeypatch, "secret") == 0
    assert json.loads(file.read_text()) == {"auths": {registry.host: {"auth": GOOD.removeprefix("Basic ")}}}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "secret" not in capsys.readouterr().out
    paths = {path.partition("?")[0] for path, given in registry.asked if given.startswith("Basic")}
    assert paths == ({"/v2/"} if kind == "basic" else {"/token"})
    assert main(["logout", registry.host]) == 0
    assert json.loads(file.read_text()) == {"auths": {}}
    assert main(["logout", registry.host]) == 1


def test_what_else_is_in_the_file_stays(file: Path) -> None:
    file.parent.mkdir()
    file.write_text('{"psFormat": "x", "auths": {"a": {"auth": "b"}}}')
    registry_login.keep("registry.example/team", "u", "p")
    config = json.loads(file.read_text())
    assert config["psFormat"] == "x"
    assert set(config["auths"]) == {"a", "registry.example"}
    assert os.listdir(file.parent) == ["config.json"]


def test_a_link_stays_a_link(file: Path, tmp_path: Path) -> None:
    file.parent.mkdir()
    (tmp_path / "real.json").write_text("{}")
    file.symlink_to(tmp_path / "real.json")
    registry_login.keep("x.example", "u", "p")
    assert file.is_symlink()
    assert "x.example" in (tmp_path / "real.json").read_text()


def test_the_containers_file_comes_first(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    assert registry_login.keep("docker.io", "u", "p") == (str(tmp_path / "auth.json"), True)
    assert list(json.loads((tmp_path / "auth.json").read_text())["auths"]) == ["https://index.docker.io/v1/"]


def test_it_is_kept_where_a_pull_would_find_it(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """podman's file is read before Docker's: a stale entry there would hide the new one."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    podmans = tmp_path / "containers" / "auth.json"
    podmans.parent.mkdir()
    podmans.write_text('{"auths": {"x.example": {"auth": "b2xkOm9sZA=="}, "docker.io": {}, "y.example/team": {}}}')
    assert registry_login.keep("x.example", "me", "secret").place == str(podmans)
    assert find_credentials("x.example", "app") == ("me", "secret", "")
    assert registry_login.keep("docker.io", "me", "secret").place == str(podmans)
    assert find_credentials("docker.io", "library/debian") == ("me", "secret", "")
    assert registry_login.keep("y.example", "me", "secret").place == str(file)
    assert registry_login.forget("https://x.example/").place == str(podmans)
    assert set(json.loads(podmans.read_text())["auths"]) == {"https://index.docker.io/v1/", "y.example/team"}


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_damaged_file_is_left_alone(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(IntegrityError):
        registry_login.keep("x.example", "u", "p")
    assert file.read_text() == text


def test_a_credential_helper_gets_the_secret(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = tmp_path / "docker-credential-fake"
    helper.write_text(
        f'#!/bin/sh\n{{ echo "$1"; cat; }} >> {tmp_path}/said\n[ "$1" = store ] || {{ echo no >&2; exit 1; }}\n'
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    file.parent.mkdir()
    file.write_text('{"credHelpers": {"x.example": "fake"}}')
    assert registry_login.keep("x.example", "u", "p") == ("docker-credential-fake", False)
    said = (tmp_path / "said").read_text().partition("\n")
    assert (said[0], json.loads(said[2])["Secret"]) == ("store", "p")
    with pytest.raises(LaunchError) as caught:
        registry_login.forget("x.example")
    assert caught.value.log_tail == "no"
    file.write_text('{"credsStore": "missing"}')
    with pytest.raises(NotFound, match="docker-credential-missing"):
        registry_login.keep("x.example", "u", "p")
    file.write_text('{"credsStore": "../../bin/sh"}')
    with pytest.raises(IntegrityError):
        registry_login.keep("x.example", "u", "p")


def test_a_password_goes_nowhere_without_tls(registry: Registry) -> None:
    with pytest.raises(UsageError, match="for registries on loopback"):
        registry_login.check("registry.example", "u", "p", insecure=True)
    registry.challenge = 'Bearer realm="http://token.example/x"'
    with pytest.raises(RemoteError, match="without TLS"):
        registry_login.check(registry.host, "u", "p", insecure=True)
    assert [given for _, given in registry.asked] == [""]


def test_a_redirection_is_not_followed(registry: Registry) -> None:
    registry.challenge = "redirect"
    with pytest.raises(RemoteError, match="status 302"):
        registry_login.check(registry.host, "u", "p", insecure=True)
    assert [path for path, _ in registry.asked] == ["/v2/"]


def test_a_registry_that_is_not_there(registry: Registry) -> None:
    with pytest.raises(RemoteError, match="cannot reach registry"):
        registry_login.check("127.0.0.1:1", "u", "p", insecure=True)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["login", "-u", "a:b", "-p", "x"], "without ':'"),
        (["login", "-u", "a", "-p", "x", "--password-stdin"], "exclude each other"),
        (["login", "x.example"], "there is no user name"),
        (["login", "-u", "a", "x.example"], "no terminal to ask for the password"),
    ],
)
def test_what_is_missing(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: list[str], text: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(argv) == 2
    assert text in capsys.readouterr().err
