"""Answering a registry's challenge: basic authentication, or a token from the server that it names.

Source: distribution.github.io, "Registry authentication: token authentication" and its "OAuth2"; RFC 7235, RFC 7617.
"""

from __future__ import annotations

import base64
import json
import threading
from urllib.parse import urlencode

import urllib3

from nagaya.errors import RemoteError
from nagaya.images.sources.connections import Connections, explain, is_loopback, split_url
from nagaya.images.sources.registry_auth import Credentials, find_credentials

TOKEN_MAX = 64 << 10
ANSWER_MAX = 1 << 20


class Refused(RemoteError):
    """The token server does not want these credentials."""


class Authorizer:
    """The `Authorization` header for one repository of one registry; `header` is "" until it was challenged."""

    def __init__(self, host: str, repository: str, scopes: tuple[str, ...], connections: Connections) -> None:
        self.header = ""
        self._host = host
        self._repository = repository
        self._scopes = scopes
        self._connections = connections
        self._lock = threading.Lock()

    def answer(self, challenge: str, *, refused: str) -> None:
        """Find the header that a 401's `WWW-Authenticate` wants. `refused` is the header that was not good enough.

        Several threads may be refused at once: the first one fetches the token for all. Raises `RemoteError`.
        """
        with self._lock:
            if self.header != refused:
                return
            self.header = answer_challenge(
                challenge,
                self._host,
                scopes=self._scopes,
                credentials=find_credentials(self._host, self._repository),
                connections=self._connections,
            )


def answer_challenge(
    challenge: str,
    host: str,
    *,
    scopes: tuple[str, ...],
    credentials: Credentials | None,
    connections: Connections,
) -> str:
    """The header for a challenge; "" when it wants a password and there is none. Raises `RemoteError`."""
    scheme, _, rest = challenge.partition(" ")
    if not scheme:  # a 401 that does not say what it wants
        return ""
    if scheme.lower() == "basic":
        return basic(credentials) if credentials is not None else ""
    if scheme.lower() != "bearer":
        raise RemoteError(f"registry '{host}' wants a log-in of an unknown kind: '{ascii(scheme[:40])[1:-1]}'")
    fields = _fields(rest)
    realm = fields.get("realm", "")
    parts = split_url(realm)
    if parts.scheme != "https" and not (is_loopback(parts.netloc) and is_loopback(host)):
        raise RemoteError(f"registry '{host}' names a token server without TLS, which is told nothing: {realm[:100]}")
    token = _fetch_token(realm, fields.get("service", ""), scopes, host, credentials, connections)
    return f"Bearer {token}"


def basic(credentials: Credentials) -> str:
    return "Basic " + base64.b64encode(f"{credentials.user}:{credentials.password}".encode()).decode()


def _fields(text: str) -> dict[str, str]:
    from urllib.request import parse_http_list, parse_keqv_list

    try:
        return {name.lower(): value for name, value in parse_keqv_list(parse_http_list(text)).items()}
    except (ValueError, IndexError):
        return {}


def _fetch_token(
    realm: str,
    service: str,
    scopes: tuple[str, ...],
    host: str,
    credentials: Credentials | None,
    connections: Connections,
) -> str:
    headers = {"User-Agent": "nagaya"}
    try:
        if credentials is not None and credentials.identity_token:
            form = {
                "grant_type": "refresh_token",
                "client_id": "nagaya",
                "service": service,
                "scope": " ".join(scopes),
                "refresh_token": credentials.identity_token,
            }
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            response = connections.request("POST", realm, body=urlencode(form).encode(), headers=headers)
        else:
            query = [("service", service), *(("scope", scope) for scope in scopes)]
            if credentials is not None:
                headers["Authorization"] = basic(credentials)
                query.append(("account", credentials.user))
            mark = "&" if "?" in realm else "?"
            response = connections.request("GET", f"{realm}{mark}{urlencode(query)}", headers=headers)
        status, raw = response.status, response.read(ANSWER_MAX)
        response.close()
    except urllib3.exceptions.HTTPError as error:
        where = split_url(realm).netloc
        raise RemoteError(f"cannot reach '{where}', the token server of '{host}': {explain(error)}") from None
    if status in (401, 403):
        who = "the user name or the password" if credentials is not None else "an access without a log-in"
        raise Refused(f"registry '{host}' refuses {who}", hint=f"log in with 'nagaya login {host}'")
    if status != 200:
        raise RemoteError(f"the token server of '{host}' answered with status {status}", hint="try again later")
    return _parse_token(raw, host)


def _parse_token(raw: bytes, host: str) -> str:
    try:
        data = json.loads(raw)
        token = data.get("token") or data.get("access_token")
    except (ValueError, AttributeError, RecursionError):
        token = None
    good = isinstance(token, str) and 0 < len(token) <= TOKEN_MAX and token.isascii()
    if not good or not token.isprintable() or " " in token:  # it becomes a header: no line ends
        raise RemoteError(f"the token server of '{host}' answered without a token")
    return str(token)
