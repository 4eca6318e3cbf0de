"""Credentials for registries, from the files that Docker and the containers tools keep them in.

In the order of containers-auth.json(5): REGISTRY_AUTH_FILE alone when it is set, else $XDG_RUNTIME_DIR/containers/
auth.json (/run/containers/UID/auth.json without that variable), ~/.config/containers/auth.json, $DOCKER_CONFIG/config.json (default ~/.docker). The most specific key wins:
"host/team/app" before "host/team" before "host".
"""

from __future__ import annotations

import base64
import json
import os

from nagaya.errors import LaunchError
from nagaya.static import Any, NamedTuple

HUB = "docker.io"
HUB_KEYS = ("docker.io", "index.docker.io", "registry-1.docker.io")


class Credentials(NamedTuple):
    """A user and password, or an identity token to be changed for others (Docker's `<token>` user)."""

    user: str
    password: str
    identity_token: str = ""


def auth_files() -> list[str]:
    """The files to look in, first one first."""
    explicit = os.environ.get("REGISTRY_AUTH_FILE")
    if explicit:
        return [explicit]
    home = os.path.expanduser("~")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    config = os.environ.get("XDG_CONFIG_HOME") or f"{home}/.config"
    return [
        f"{runtime}/containers/auth.json" if runtime else f"/run/containers/{os.geteuid()}/auth.json",
        f"{config}/containers/auth.json",
        f"{os.environ.get('DOCKER_CONFIG') or f'{home}/.docker'}/config.json",
    ]


def find_credentials(host: str, repository: str) -> Credentials | None:
    """What is kept for a repository of a registry. A file that cannot be read or parsed is passed over."""
    for path in auth_files():
        try:
            with open(path, encoding="utf-8") as file:
                config = json.load(file)
        except (OSError, ValueError):
            continue
        if isinstance(config, dict):
            found = _look_in(config, host, repository)
            if found is not None:
                return found
    return None


def _look_in(config: dict[str, Any], host: str, repository: str) -> Credentials | None:
    hosts = HUB_KEYS if host in HUB_KEYS else (host,)
    helpers = config.get("credHelpers")
    for name in hosts:
        if isinstance(helpers, dict) and isinstance(helpers.get(name), str):
            return _ask_helper(helpers[name], name)
    auths = config.get("auths")
    if isinstance(auths, dict):
        entries = {normal_key(str(key)): value for key, value in auths.items()}
        for key in _keys(hosts, repository):
            found = _decode(entries.get(key))
            if found is not None:
                return found
    if isinstance(config.get("credsStore"), str):
        return _ask_helper(config["credsStore"], "https://index.docker.io/v1/" if host in HUB_KEYS else host)
    return None


def normal_key(key: str) -> str:
    """ "https://index.docker.io/v1/" and "host/team/" as "index.docker.io" and "host/team"."""
    for scheme in ("https://", "http://"):
        if key.startswith(scheme):
            key = key.removeprefix(scheme)
            for version in ("/v1", "/v2"):
                key = key.rstrip("/").removesuffix(version)
    return key.rstrip("/")


def _keys(hosts: tuple[str, ...], repository: str) -> list[str]:
    parts = repository.split("/")
    return [f"{host}/{'/'.join(parts[:count])}" for count in range(len(parts), 0, -1) for host in hosts] + list(hosts)


def _decode(entry: Any) -> Credentials | None:
    if not isinstance(entry, dict):
        return None
    token = entry.get("identitytoken")
    if isinstance(token, str) and token:
        return Credentials("<token>", "", token)
    try:
        user, mark, password = base64.b64decode(entry.get("auth") or "").decode().partition(":")
    except (ValueError, TypeError):
        return None
    if not mark:  # as old files have it
        user, password = str(entry.get("username") or ""), str(entry.get("password") or "")
    return Credentials(user, password.rstrip("\0")) if user else None


def _ask_helper(helper: str, key: str) -> Credentials | None:
    """docker-credential-HELPER get: the key on standard input, JSON on standard output. None when it has nothing."""
    import subprocess  # lazy: few have a helper

    if "/" in helper:
        return None
    command = f"docker-credential-{helper}"
    try:
        done = subprocess.run([command, "get"], input=key.encode(), capture_output=True, check=False, timeout=60)
    except OSError:
        return None  # many files name a helper that only another machine has, and most images are public
    except subprocess.TimeoutExpired:
        raise LaunchError(f"the credential helper '{command}' did not answer within 60 s", command=command) from None
    if done.returncode:
        return None
    try:
        data = json.loads(done.stdout)
        user, secret = str(data["Username"]), str(data["Secret"])
    except (ValueError, KeyError, TypeError):
        return None
    return Credentials("<token>", "", secret) if user == "<token>" else Credentials(user, secret)
