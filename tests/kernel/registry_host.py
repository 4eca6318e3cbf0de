"""Debian's docker-registry on a free loopback port, in each of the ways that people guard one."""

from __future__ import annotations

import base64
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PR_SET_PDEATHSIG = 1


class RealRegistry(NamedTuple):
    host: str  # 127.0.0.1:PORT
    directory: Path


class Authority(NamedTuple):
    """A certificate authority and what it has signed for 127.0.0.1 and localhost."""

    ca: Path
    certificate: Path
    key: Path


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def run(*command: str, **options: Any) -> str:
    """Run a program to its end; what it printed. A failure shows what it said."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def start_real_registry(directory: Path, **more: Any) -> Iterator[RealRegistry]:
    """A registry with its storage in `directory`; `more` are sections of its configuration ("auth", "tls")."""
    need("docker-registry")
    port = free_port()
    storage = directory / "storage"
    storage.mkdir(parents=True)
    http: dict[str, Any] = {"addr": f"127.0.0.1:{port}", "secret": "of a test"}
    if "tls" in more:
        http["tls"] = more.pop("tls")
    config = {
        "version": "0.1",
        "log": {"level": "warn"},
        "storage": {"filesystem": {"rootdirectory": str(storage)}, "delete": {"enabled": True}},
        "http": http,
        **more,
    }
    path = directory / "registry.yml"
    path.write_text(json.dumps(config))  # YAML has JSON in it
    log = directory / "registry.log"
    libc = ctypes.CDLL(None)
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={"PATH": os.environ["PATH"], "OTEL_TRACES_EXPORTER": "none"},
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        )
        try:
            _await_port(process, port, log)
            yield RealRegistry(f"127.0.0.1:{port}", storage)
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)


def password_file(directory: Path, user: str, password: str) -> dict[str, Any]:
    """The configuration for basic authentication."""
    need("htpasswd")
    path = directory / "htpasswd"
    path.write_text(run("htpasswd", "-nbBC", "4", user, password))
    return {"auth": {"htpasswd": {"realm": "test", "path": str(path)}}}


def make_authority(directory: Path) -> Authority:
    """A CA of our own with one certificate, by openssl(1)."""
    need("openssl")
    directory.mkdir(parents=True, exist_ok=True)
    ca, ca_key, certificate, key = (directory / name for name in ("ca.crt", "ca.key", "it.cert", "it.key"))
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    run(
        "openssl",
        "req",
        "-x509",
        *new_key,
        "-keyout",
        str(ca_key),
        "-out",
        str(ca),
        "-subj",
        "/CN=test CA",
        "-days",
        "1",
    )
    run(
        "openssl", "req", "-x509", *new_key, "-keyout", str(key), "-out", str(certificate), "-subj", "/CN=test",
        "-days", "1", "-CA", str(ca), "-CAkey", str(ca_key), "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost",
        "-addext", "basicConstraints=critical,CA:FALSE", "-addext", "extendedKeyUsage=serverAuth,clientAuth",
    )  # fmt: skip
    return Authority(ca, certificate, key)


def make_signer(directory: Path) -> tuple[Path, Callable[[dict[str, Any]], str]]:
    """A token server's certificate, and a function that signs claims as a JWT (RS256, RFC 7519) for docker-registry."""
    need("openssl")
    directory.mkdir(parents=True, exist_ok=True)
    key, certificate = directory / "token.key", directory / "token.crt"
    run(
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate),
        "-subj", "/CN=token", "-days", "1",
    )  # fmt: skip
    der = base64.b64encode(subprocess.run(
        ["openssl", "x509", "-in", str(certificate), "-outform", "DER"], capture_output=True, check=True, timeout=20
    ).stdout).decode()  # fmt: skip

    def encode(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    def sign(claims: dict[str, Any]) -> str:
        header = encode(json.dumps({"typ": "JWT", "alg": "RS256", "x5c": [der]}).encode())
        text = f"{header}.{encode(json.dumps(claims).encode())}"
        signature = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", str(key)],
            input=text.encode(), capture_output=True, check=True, timeout=20,
        ).stdout  # fmt: skip
        return f"{text}.{encode(signature)}"

    return certificate, sign
