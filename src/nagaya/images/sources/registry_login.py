"""Checking, keeping and forgetting registry credentials, in the files (and helpers) that Docker and containers share.

They go where the registry's entry is already, in the order of `registry_auth`, and else to REGISTRY_AUTH_FILE when it
is set, or Docker's config.json. A credential helper that the file names for a registry ("credHelpers", "credsStore")
gets the secret instead of the file. Source: "docker login", and the docker-credential-helpers protocol.
"""

from __future__ import annotations

import base64
import json
import os

from nagaya.errors import HostError, IntegrityError, LaunchError, NotFound, RemoteError, UsageError
from nagaya.images.sources.registry_auth import HUB, HUB_KEYS, Credentials, auth_files, normal_key
from nagaya.static import NamedTuple

HUB_KEY = "https://index.docker.io/v1/"


class Kept(NamedTuple):
    """Where a secret is: a file's path, or a helper's name."""

    place: str
    plain: bool  # anybody who can read the file can read the secret


def registry_host(registry: str) -> str:
    """The host of what a user calls a registry: "https://registry.example/v2/" → "registry.example"."""
    host = normal_key(registry).partition("/")[0]
    return HUB if host in HUB_KEYS else host


def check(registry: str, user: str, password: str, *, insecure: bool) -> None:
    """Let the registry check them. Raises `UsageError` when it refuses, `RemoteError` when it cannot be asked."""
    from nagaya.images.sources.tokens import Refused  # lazy: urllib3 costs 30 ms
    from nagaya.images.sources.transport import Transport, open_endpoint

    host = registry_host(registry)
    transport = Transport(open_endpoint(host, insecure=insecure), "", actions="")
    try:
        status = transport.ping(Credentials(user, password))
    except Refused:
        status = 401
    finally:
        transport.close()
    if status in (401, 403):
        raise UsageError(f"registry '{host}' refused the user name or the password")
    if status != 200:
        raise RemoteError(f"registry '{host}' answered with status {status}", hint="is it a container registry?")


def keep(registry: str, user: str, password: str) -> Kept:
    """Store credentials, replacing earlier ones. Raises `HostError`, `IntegrityError` (bad file), `LaunchError`."""
    host = registry_host(registry)
    path = _find_file(host)
    config, key = _load(path), _file_key(host)
    helper = _helper(config, host, path)
    if helper:
        _ask_helper(helper, "store", json.dumps({"ServerURL": key, "Username": user, "Secret": password}), path)
        return Kept(f"docker-credential-{helper}", plain=False)
    auths = {known: value for known, value in _table(config, "auths").items() if not _is_for(known, host)}
    auths[key] = {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}
    _store(path, {**config, "auths": auths})
    return Kept(path, plain=True)


def forget(registry: str) -> Kept:
    """Remove credentials. Raises `NotFound` when there are none."""
    host = registry_host(registry)
    path = _find_file(host)
    config = _load(path)
    helper = _helper(config, host, path)
    if helper:
        _ask_helper(helper, "erase", _file_key(host), path)
        return Kept(f"docker-credential-{helper}", plain=False)
    auths = _table(config, "auths")
    left = {known: value for known, value in auths.items() if not _is_for(known, host)}
    if len(left) == len(auths):
        raise NotFound(f"no credentials for '{registry}' are kept in {path}")
    _store(path, {**config, "auths": left})
    return Kept(path, plain=True)


def _file_key(host: str) -> str:
    return HUB_KEY if host == HUB else host


def _is_for(key: str, host: str) -> bool:
    known = normal_key(key)
    return known == host or (host == HUB and known in HUB_KEYS)


def _find_file(host: str) -> str:
    """The first file that has an entry for the registry, as a pull would find it; else the last one, Docker's."""
    files = auth_files()
    for path in files[:-1]:
        try:
            if any(_is_for(key, host) for key in _table(_load(path), "auths")):
                return path
        except (HostError, IntegrityError):
            continue  # a pull passes it over, too
    return files[-1]


def _helper(config: dict[str, object], host: str, path: str) -> str:
    helpers = {normal_key(key): name for key, name in _table(config, "credHelpers").items()}
    name = helpers.get(host) or config.get("credsStore") or ""
    if not isinstance(name, str) or "/" in name:
        raise IntegrityError(f"{path} names a credential helper that is no name")
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
    except (ValueError, RecursionError):
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


def _ask_helper(helper: str, verb: str, text: str, path: str) -> None:
    import subprocess  # lazy: few have a helper

    command = f"docker-credential-{helper}"
    try:
        done = subprocess.run([command, verb], input=text.encode(), capture_output=True, check=False)
    except FileNotFoundError:
        raise NotFound(
            f"the credential helper '{command}' is not installed", hint=f"install it, or remove it from {path}"
        ) from None
    if done.returncode:
        said = (done.stdout + done.stderr).decode(errors="replace").strip()
        raise LaunchError(f"{command} {verb} failed", command=command, status=done.returncode, log_tail=said)
