"""Requests to one registry endpoint: authorization, redirects, patience with what passes, bounded answers."""

from __future__ import annotations

import json
import threading
from urllib.parse import urljoin

import urllib3

from nagaya.errors import NotFound, RemoteError, UsageError
from nagaya.images.sources.connections import CERTIFICATES, Connections, explain, is_loopback, split_url
from nagaya.images.sources.registry_auth import Credentials
from nagaya.images.sources.tokens import Authorizer, answer_challenge
from nagaya.static import Any, NamedTuple

REDIRECTS_MAX = 5
ANSWER_MAX = 8 << 20
DISCARD_MAX = 64 << 10
ATTEMPTS = 4
PAUSE_S = 0.3  # before the second attempt; then twice as long each time
RETRY_AFTER_MAX_S = 15.0  # a registry that wants a longer pause gets none: the user is told


class Endpoint(NamedTuple):
    """A registry's address: `host` as in names, `base` the URL before /v2/. `insecure`: without TLS, or not checked."""

    host: str
    base: str
    insecure: bool = False


class Unreachable(RemoteError):
    """No answer at all: a download that has begun may try again."""


class _Passing(Exception):
    """An answer that will be another one soon."""

    def __init__(self, error: RemoteError, after_s: float | None = None) -> None:
        self.error = error
        self.after_s = after_s


def open_endpoint(host: str, *, insecure: bool) -> Endpoint:
    """The registry's own endpoint. Raises `UsageError` for `insecure` with a registry that is not on loopback."""
    if insecure and not is_loopback(host):
        raise UsageError(
            f"--insecure is for registries on loopback, not for '{host}'",
            hint=f"put the registry's CA into {CERTIFICATES[0]}/{host}/ca.crt",
        )
    address = "registry-1.docker.io" if host == "docker.io" else host
    return Endpoint(host, f"{'http' if insecure else 'https'}://{address}", insecure)


class Transport:
    """Requests to one endpoint, for one repository. Threads may share it.

    `actions` are what its token is to allow: "pull" or "pull,push"; `also` are scopes of other repositories.
    """

    def __init__(self, endpoint: Endpoint, repository: str, *, actions: str, also: tuple[str, ...] = ()) -> None:
        self.endpoint = endpoint
        self.base = endpoint.base
        self._repository = repository
        self._connections = Connections(verify=not endpoint.insecure)
        scopes = (f"repository:{repository}:{actions}", *also)
        self._authorizer = Authorizer(endpoint.host, repository, scopes, self._connections)
        self._cancelled = threading.Event()
        self._answered = False

    def url(self, path: str) -> str:
        return f"{self.base}/v2/{self._repository}/{path}"

    def cancel(self) -> None:
        """End every request that is under way, from another thread; they and all later ones raise `RemoteError`."""
        self._cancelled.set()
        self._connections.abort()

    def close(self) -> None:
        """The work is done: close the connections."""
        self._connections.close()

    def pause(self, seconds: float) -> None:
        """Wait. Raises `RemoteError` when the work is cancelled meanwhile."""
        if self._cancelled.wait(seconds):
            raise RemoteError("it was given up, because another part of it failed")

    def request(
        self,
        method: str,
        path: str,
        *,
        headers: dict[str, str] | None = None,
        body: Any = None,
        missing: str = "",
        accept: tuple[int, ...] = (),
    ) -> urllib3.BaseHTTPResponse:
        """One request, with its token and redirects; the answer's body is not read yet.

        `path` is below the repository, or a whole URL. `body` is bytes, or a file with `seek`. `missing` says what a
        404 means (`NotFound`); statuses in `accept` come back as they are. An overloaded registry (429, 5xx) is asked
        again, `ATTEMPTS` times in all. Raises `RemoteError`, and its child `Unreachable` when there is no answer.
        """
        for attempt in range(ATTEMPTS):
            try:
                return self._ask(method, path, headers or {}, body, missing, accept)
            except _Passing as passing:
                wait_s = PAUSE_S * 2**attempt if passing.after_s is None else passing.after_s
                if attempt == ATTEMPTS - 1 or wait_s > RETRY_AFTER_MAX_S or self._cancelled.is_set():
                    raise passing.error from None
                self.pause(wait_s)
                if hasattr(body, "seek"):
                    body.seek(0)
        raise AssertionError("the last attempt raises or returns")

    def ping(self, credentials: Credentials) -> int:
        """The status of /v2/ with these credentials, not those that are kept; no redirect is followed.

        Raises `RemoteError`, and its child `Refused` when the registry's token server says no.
        """
        try:
            response = self._send_ping("")
            if response.status == 401:
                challenge = response.headers.get("WWW-Authenticate", "")
                self.discard(response)
                header = answer_challenge(
                    challenge,
                    self.endpoint.host,
                    scopes=(),
                    credentials=credentials,
                    connections=self._connections,
                )
                response = self._send_ping(header)
        except _Passing as passing:
            raise passing.error from None
        self.discard(response)
        return response.status

    def _send_ping(self, authorization: str) -> urllib3.BaseHTTPResponse:
        for _ in range(2):
            response = self._send("GET", f"{self.base}/v2/", {}, None, authorization)
            if response is not None:
                return response
        raise AssertionError("it turns to TLS once")

    def read(self, response: urllib3.BaseHTTPResponse) -> bytes:
        """The whole body of a small answer."""
        return read_answer(response, self.endpoint.host)

    def discard(self, response: urllib3.BaseHTTPResponse) -> None:
        """Done with an answer: its connection is kept when little is left of the body, and closed otherwise."""
        discard_answer(response)

    def _ask(
        self, method: str, path: str, headers: dict[str, str], body: Any, missing: str, accept: tuple[int, ...]
    ) -> urllib3.BaseHTTPResponse:
        url = path if "://" in path else self.url(path)
        renewed = False
        for _ in range(REDIRECTS_MAX + 2):
            authorization = self._authorizer.header if self._is_own(url) else ""
            response = self._send(method, url, headers, body, authorization)
            if response is None:  # it speaks TLS after all
                url = url.replace("http://", "https://", 1)
                continue
            if response.status == 401 and not renewed and self._is_own(url):
                renewed = True
                challenge = response.headers.get("WWW-Authenticate", "")
                self.discard(response)
                self._authorizer.answer(challenge, refused=authorization)
                if hasattr(body, "seek"):
                    body.seek(0)
                continue
            if response.status in (301, 302, 303, 307, 308) and method in ("GET", "HEAD"):
                self.discard(response)
                url = self.follow(url, response.headers.get("Location", ""))
                continue
            return self._judge(response, method, missing, accept)
        raise RemoteError(f"registry '{self.endpoint.host}' redirects in a circle")

    def _is_own(self, url: str) -> bool:
        """Whether a URL is the registry itself: a storage host that it redirects to must not see its token."""
        return url.startswith(f"{self.base}/")

    def follow(self, url: str, location: str) -> str:
        """Where a `Location` leads from `url`. Raises `RemoteError` for a step from TLS to none, and out of HTTP."""
        try:
            target = urljoin(url, location)
        except ValueError:
            target = location
        parts = split_url(target)
        if parts.scheme != "https" and not (self.base.startswith("http:") and is_loopback(parts.netloc)):
            raise RemoteError(f"registry '{self.endpoint.host}' redirects to '{target[:100]}', which has no TLS")
        return target

    def _send(
        self, method: str, url: str, headers: dict[str, str], body: Any, authorization: str
    ) -> urllib3.BaseHTTPResponse | None:
        """One request as it is. None: an insecure registry that wants TLS was found out, and `base` is changed."""
        extra = {"Authorization": authorization} if authorization else {}
        try:
            response = self._connections.request(
                method,
                url,
                headers={"User-Agent": "nagaya", "Accept-Encoding": "identity", **headers, **extra},
                body=body,
            )
        except urllib3.exceptions.ProtocolError as error:
            if self._turn_to_tls(url):
                return None
            raise _Passing(self._unreachable(url, error)) from None
        except urllib3.exceptions.SSLError as error:
            hint = f"put its CA into {CERTIFICATES[0]}/{self.endpoint.host}/ca.crt"
            if is_loopback(self.endpoint.host):
                hint += ", or use --insecure"
            raise RemoteError(
                f"no trusted connection to registry '{split_url(url).netloc}': {explain(error)}", hint=hint
            ) from None
        except urllib3.exceptions.HTTPError as error:
            raise self._unreachable(url, error) from None
        if response.status == 400 and self._turn_to_tls(url):
            self.discard(response)
            return None
        self._answered = True
        return response

    def _turn_to_tls(self, url: str) -> bool:
        """Go's and nginx's servers answer plain HTTP on a TLS port with 400, others hang up."""
        if self._answered or not self.endpoint.insecure or not url.startswith("http://"):
            return False
        self.base = self.base.replace("http://", "https://", 1)
        return True

    def _unreachable(self, url: str, error: Exception) -> Unreachable:
        hint = "check its name, the network, and HTTPS_PROXY"
        if is_loopback(self.endpoint.host):
            hint = "is it running?" if self.endpoint.insecure else "a registry on loopback without TLS needs --insecure"
        return Unreachable(f"cannot reach registry '{split_url(url).netloc}': {explain(error)}", hint=hint)

    def _judge(
        self, response: urllib3.BaseHTTPResponse, method: str, missing: str, accept: tuple[int, ...]
    ) -> urllib3.BaseHTTPResponse:
        status = response.status
        if 200 <= status < 300 or status in accept:
            return response
        after = response.headers.get("Retry-After", "")
        said = first_error(self.read(response)) if method != "HEAD" else ""
        self.discard(response)
        host = self.endpoint.host
        if status == 404 and missing:
            raise NotFound(missing, hint="check the name and the tag")
        if status in (401, 403):
            hint = f"log in with 'nagaya login {host}'; a private or misspelt name looks the same to a registry"
            raise RemoteError(f"registry '{host}' denies access to {self._repository}{said}", hint=hint)
        if status == 429:
            error = RemoteError(
                f"too many requests to registry '{host}' (status 429){said}", hint="try again later, or log in"
            )
        else:
            error = RemoteError(f"registry '{host}' answered with status {status}{said}", hint="try again later")
        if status == 429 or status in (500, 502, 503, 504):
            raise _Passing(error, float(after) if after.isascii() and after.isdigit() else None)
        raise error


def read_answer(response: urllib3.BaseHTTPResponse, host: str) -> bytes:
    """The whole body of a small answer. Raises `RemoteError` when it breaks off, or is beyond `ANSWER_MAX`."""
    try:
        data = response.read(ANSWER_MAX + 1)
    except urllib3.exceptions.HTTPError as error:
        response.close()
        raise RemoteError(f"registry '{host}' broke off: {explain(error)}", hint="try again") from None
    if len(data) > ANSWER_MAX:
        response.close()
        raise RemoteError(f"registry '{host}' answers with more than {ANSWER_MAX} bytes")
    response.release_conn()
    return data


def discard_answer(response: urllib3.BaseHTTPResponse) -> None:
    """A connection with an unread answer in it cannot be used again: read a short rest, else close it."""
    try:
        if len(response.read(DISCARD_MAX + 1)) > DISCARD_MAX:
            response.close()
    except urllib3.exceptions.HTTPError:
        response.close()
    response.release_conn()


def first_error(raw: bytes) -> str:
    """What the registry says in its error document (distribution specification, "Error codes"), in brackets."""
    try:
        error = json.loads(raw)["errors"][0]
        message = error.get("message") or error["code"]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return ""
    return f" ({message[:200]})" if isinstance(message, str) and message.isprintable() else ""
