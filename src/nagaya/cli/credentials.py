"""Keeping and forgetting registry credentials, in the files (and helpers) that Docker and containers tools share.

REGISTRY_AUTH_FILE (containers-auth.json(5)) when it is set, else DOCKER_CONFIG/config.json, else
~/.docker/config.json. A credential helper that the file names for a registry ("credHelpers", "credsStore") gets the
secret instead of the file. Source: docs.docker.com "docker login", and the docker-credential-helpers protocol.
"""

from __future__ import annotations

import base64
import json
import os
from typing import NamedTuple

from nagaya.errors import HostError, IntegrityError, LaunchError, NotFound

HUB = "docker.io"
_HUB_KEY = "https://index.docker.io/v1/"
_HUB_NAMES = ("docker.io", "index.docker.io", "registry-1.docker.io", "https://index.docker.io/v1/")


class Kept(NamedTuple):
    """Where a secret is: a file's path, or a helper's name."""

    place: str
    plain: bool  # anybody who can read the file can read the secret


def auth_file() -> str:
    """The file that credentials are written to."""
    explicit = os.environ.get("REGISTRY_AUTH_FILE")
    if explicit:
        return explicit
    directory = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    return f"{directory}/config.json"


def registry_key(registry: str) -> str:
    """How the file names a registry: its host and port; Docker Hub has a name of its own."""
    if registry in _HUB_NAMES:
        return _HUB_KEY
    for scheme in ("https://", "http://"):
        registry = registry.removeprefix(scheme)
    return registry.rstrip("/").partition("/")[0]


def check(registry: str, user: str, password: str, *, insecure: bool) -> None:
    """Let the registry check them. Raises `UsageError` when it refuses, `RemoteError` when it cannot be asked."""
    from nagaya.cli import registry_check  # lazy: urllib costs 30 ms

    key = registry_key(registry)
    registry_check.check("registry-1.docker.io" if key == _HUB_KEY else key, user, password, insecure=insecure)


def keep(registry: str, user: str, password: str) -> Kept:
    """Store credentials, replacing earlier ones. Raises `HostError`, `IntegrityError` (bad file), `LaunchError`."""
    path, key = auth_file(), registry_key(registry)
    config = _load(path)
    helper = _helper(config, key)
    if helper:
        _ask_helper(helper, "store", json.dumps({"ServerURL": key, "Username": user, "Secret": password}))
        return Kept(f"docker-credential-{helper}", plain=False)
    auths = _table(config, "auths")
    auths[key] = {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}
    config["auths"] = auths
    _store(path, config)
    return Kept(path, plain=True)


def forget(registry: str) -> Kept:
    """Remove credentials. Raises `NotFound` when there are none."""
    path, key = auth_file(), registry_key(registry)
    config = _load(path)
    helper = _helper(config, key)
    if helper:
        _ask_helper(helper, "erase", key)
        return Kept(f"docker-credential-{helper}", plain=False)
    auths = _table(config, "auths")
    if auths.pop(key, None) is None:
        raise NotFound(f"no credentials for '{registry}' are kept in {path}")
    config["auths"] = auths
    _store(path, config)
    return Kept(path, plain=True)


def _helper(config: dict[str, object], key: str) -> str:
    name = _table(config, "credHelpers").get(key) or config.get("credsStore") or ""
    if not isinstance(name, str) or "/" in name:
        raise IntegrityError(f"{auth_file()} names a credential helper that is no name")
    return name


def _table(config: dict[str, object], key: str) -> dict[str, object]:
    value = config.get(key)
    return dict(value) if isinstance(value, dict) else {}


def _load(path: str) -> dict[str, object]:
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise HostError.from_os(error, "cannot read the credentials") from None
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise IntegrityError(f"{path} is not a JSON object", hint="repair it, or move it away")
    return config


def _store(path: str, config: dict[str, object]) -> None:
    """Replace the file in one step; only its owner may read it."""
    path = os.path.realpath(path)  # a dotfile that is a link stays one
    partial = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                json.dump(config, file, indent="\t")
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise HostError.from_os(error, "cannot keep the credentials") from None


def _ask_helper(helper: str, verb: str, text: str) -> None:
    import subprocess  # lazy: few have a helper

    command = f"docker-credential-{helper}"
    try:
        done = subprocess.run([command, verb], input=text.encode(), capture_output=True, check=False)
    except FileNotFoundError:
        raise NotFound(
            f"the credential helper '{command}' is not installed", hint=f"install it, or remove it from {auth_file()}"
        ) from None
    if done.returncode:
        said = (done.stdout + done.stderr).decode(errors="replace").strip()
        raise LaunchError(f"{command} {verb} failed", command=command, status=done.returncode, log_tail=said)
