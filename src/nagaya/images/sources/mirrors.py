"""Mirrors of registries: our `registries.toml`, and the mirrors in containers-registries.conf(5).

    [mirrors]
    "docker.io" = ["https://mirror.example", "http://localhost:5000"]

in /etc/nagaya/ or $XDG_CONFIG_HOME/nagaya/ (the user's wins).
"""

from __future__ import annotations

import os

from nagaya.errors import IntegrityError, UsageError
from nagaya.images.sources.connections import is_loopback
from nagaya.images.sources.transport import Endpoint
from nagaya.static import Any

CONTAINERS = "/etc/containers/registries.conf"


def find_mirrors(host: str) -> list[Endpoint]:
    """The registry's mirrors in the order to try. Raises `UsageError` for one without TLS that is not on loopback."""
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    for path in (f"{config}/nagaya/registries.toml", "/etc/nagaya/registries.toml"):
        data = _load(path)
        if data is not None:
            unknown = set(data) - {"mirrors"}
            if unknown:
                raise UsageError(f"{path}: unknown key '{sorted(unknown)[0]}'", hint="it may have a table [mirrors]")
            return [_endpoint(host, url, path) for url in _texts(data.get("mirrors", {}), host, path)]
    return _containers_mirrors(host)


def _load(path: str) -> dict[str, Any] | None:
    import tomllib  # lazy: pulls only

    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}") from None


def _texts(table: Any, host: str, path: str) -> list[str]:
    found = table.get(host, []) if isinstance(table, dict) else None
    if not isinstance(found, list) or not all(isinstance(url, str) for url in found):
        raise IntegrityError(f"{path}: the mirrors of '{host}' are not a list of addresses")
    return found


def _endpoint(host: str, url: str, path: str) -> Endpoint:
    scheme, mark, rest = url.rstrip("/").partition("://")
    if not mark:
        scheme, rest = "https", url.rstrip("/")
    if scheme not in ("https", "http") or "/" in rest:
        raise UsageError(f"{path}: '{url}' is no mirror address", hint="for example https://mirror.example")
    if scheme == "http" and not is_loopback(rest):
        raise UsageError(f"{path}: the mirror '{url}' of '{host}' has no TLS and is not on loopback")
    return Endpoint(rest, f"{scheme}://{rest}", scheme == "http")


def _containers_mirrors(host: str) -> list[Endpoint]:
    data = _load(CONTAINERS) or {}
    registries = data.get("registry")
    for entry in registries if isinstance(registries, list) else []:
        if not isinstance(entry, dict) or host not in (entry.get("prefix"), entry.get("location")):
            continue
        mirrors = entry.get("mirror")
        found = []
        for mirror in mirrors if isinstance(mirrors, list) else []:
            location = mirror.get("location") if isinstance(mirror, dict) else None
            # Mirrors with a path rewrite names, and plain HTTP beyond loopback is not for us: passed over.
            if isinstance(location, str) and "/" not in location:
                insecure = bool(mirror.get("insecure")) and is_loopback(location)
                found.append(Endpoint(location, f"{'http' if insecure else 'https'}://{location}", insecure))
        return found
    return []
