"""Whether a registry accepts a user's password: the distribution specification's /v2/ with its two ways to log in.

The registry and the token server that it names are strangers: a password goes to nobody without TLS, except on
loopback with --insecure.
Source: distribution.github.io "Registry authentication: token authentication"; RFC 7617.
"""

from __future__ import annotations

import base64
import urllib.error
import urllib.parse
import urllib.request
from typing import NamedTuple

from nagaya.errors import RemoteError, UsageError

TIMEOUT_S = 30.0


class Answer(NamedTuple):
    status: int
    challenge: str  # WWW-Authenticate, "" when there is none


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirection would carry the Authorization header to wherever the answer says."""

    def redirect_request(self, *arguments: object, **named: object) -> None:
        return None


def check(host: str, user: str, password: str, *, insecure: bool) -> None:
    """Raises `UsageError` when the registry refuses the credentials, `RemoteError` when it cannot be asked."""
    loopback = _is_loopback(host)
    if insecure and not loopback:
        raise UsageError(f"--insecure is for registries on loopback, not for '{host}'")
    base = f"{'http' if insecure else 'https'}://{host}"
    answer = _get(f"{base}/v2/", "")
    if answer.status == 401:
        scheme, _, rest = answer.challenge.partition(" ")
        basic = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        if scheme.lower() == "bearer":
            answer = _get(_token_url(rest, user, insecure=insecure), basic)
        else:
            answer = _get(f"{base}/v2/", basic)
        if answer.status in (401, 403):
            raise UsageError(f"registry '{host}' refused the user name or the password")
    if answer.status != 200:
        raise RemoteError(f"registry '{host}' answered with status {answer.status}", hint="is it a container registry?")


def _get(url: str, authorization: str) -> Answer:
    request = urllib.request.Request(url, headers={"Authorization": authorization} if authorization else {})
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=TIMEOUT_S) as response:
            return Answer(response.status, "")
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers.get("WWW-Authenticate", ""))
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        where = urllib.parse.urlsplit(url).netloc
        raise RemoteError(
            f"cannot reach registry '{where}': {reason}", hint="check its name, the network, and HTTPS_PROXY"
        ) from None


def _token_url(parameters: str, user: str, *, insecure: bool) -> str:
    fields = dict(urllib.request.parse_keqv_list(urllib.request.parse_http_list(parameters)))
    realm = urllib.parse.urlsplit(fields.get("realm", ""))
    if realm.scheme != "https" and not (insecure and realm.scheme == "http" and _is_loopback(realm.netloc)):
        raise RemoteError("the registry names a token server without TLS, which gets no password")
    query = urllib.parse.urlencode({"account": user, "service": fields.get("service", "")})
    return urllib.parse.urlunsplit((realm.scheme, realm.netloc, realm.path, query, ""))


def _is_loopback(host: str) -> bool:
    name = urllib.parse.urlsplit(f"//{host}").hostname or ""
    return name in ("localhost", "::1") or (name.startswith("127.") and name.replace(".", "").isdigit())
