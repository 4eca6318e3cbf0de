"""HTTP to one registry endpoint: TLS, proxies, tokens, redirects, bounded answers. urllib3 does the protocol."""

from __future__ import annotations

import os
import ssl
from typing import Any, NamedTuple
from urllib.parse import urlencode, urljoin, urlsplit

import urllib3

from nagaya.errors import NotFound, RemoteError, UsageError
from nagaya.images.sources.registry_auth import Credentials, find_credentials

CONNECT_S, READ_S = 5.0, 60.0
REDIRECTS_MAX = 5
ANSWER_MAX = 8 << 20
CERTIFICATES = ("/etc/containers/certs.d", "/etc/docker/certs.d")


class Endpoint(NamedTuple):
    """A registry's address: `host` as in names, `base` the URL before /v2/."""

    host: str
    base: str
    insecure: bool = False


def is_loopback(host: str) -> bool:
    """Whether a HOST[:PORT] is this very machine."""
    name = urlsplit(f"//{host}").hostname or ""
    return name in ("localhost", "::1") or (name.startswith("127.") and name.replace(".", "").isdigit())


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
    """Requests to one endpoint, for one repository."""

    def __init__(self, endpoint: Endpoint, repository: str, *, actions: str) -> None:
        self.endpoint = endpoint
        self._repository = repository
        self._scope = f"repository:{repository}:{actions}"
        self._authorization = ""
        self._pools: dict[str, Any] = {}

    def url(self, path: str) -> str:
        return f"{self.endpoint.base}/v2/{self._repository}/{path}"

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: dict[str, str] | None = None,
        body: Any = None,
        missing: str = "",
        accept: tuple[int, ...] = (),
    ) -> urllib3.BaseHTTPResponse:
        """One request with its token and redirects; the answer's body is not read yet.

        `missing` names what a 404 means (`NotFound`); statuses in `accept` come back as they are. Raises `RemoteError`.
        """
        asked = False
        for _ in range(REDIRECTS_MAX + 2):
            response = self._send(method, url, headers or {}, body)
            if response.status == 401 and not asked:
                asked = True
                challenge = response.headers.get("WWW-Authenticate", "")
                response.release_conn()
                self._authorization = self._authorize(challenge)
                if hasattr(body, "seek"):
                    body.seek(0)
                continue
            if response.status in (301, 302, 303, 307, 308) and method in ("GET", "HEAD"):
                target = urljoin(url, response.headers.get("Location", ""))
                response.release_conn()
                self._check_redirect(target)
                url = target
                continue
            return self._judge(response, method, missing, accept)
        raise RemoteError(f"registry '{self.endpoint.host}' redirects in a circle")

    def read(self, response: urllib3.BaseHTTPResponse) -> bytes:
        """The whole body of a small answer."""
        try:
            data = response.read(ANSWER_MAX + 1)
        except urllib3.exceptions.HTTPError as error:
            raise RemoteError(
                f"registry '{self.endpoint.host}' broke off: {explain(error)}", hint="try again"
            ) from None
        finally:
            response.release_conn()
        if len(data) > ANSWER_MAX:
            raise RemoteError(f"registry '{self.endpoint.host}' answers with more than {ANSWER_MAX} bytes")
        return data

    def _send(self, method: str, url: str, headers: dict[str, str], body: Any) -> urllib3.BaseHTTPResponse:
        own = urlsplit(url).netloc == urlsplit(self.endpoint.base).netloc
        # A redirect to a storage host must not see the registry's token.
        extra = {"Authorization": self._authorization} if self._authorization and own else {}
        try:
            response: urllib3.BaseHTTPResponse = self._pool(url).request(
                method, url, headers={"User-Agent": "nagaya", **headers, **extra}, body=body,
                redirect=False, retries=False, preload_content=False, decode_content=False,
            )  # fmt: skip
            return response
        except urllib3.exceptions.SSLError as error:
            hint = f"put its CA into {CERTIFICATES[0]}/{self.endpoint.host}/ca.crt"
            if is_loopback(self.endpoint.host):
                hint += ", or use --insecure for plain HTTP"
            raise RemoteError(
                f"registry '{self.endpoint.host}' cannot be trusted: {explain(error)}", hint=hint
            ) from None
        except urllib3.exceptions.HTTPError as error:
            hint = "check its name, the network, and HTTPS_PROXY"
            if is_loopback(self.endpoint.host) and not self.endpoint.insecure:
                hint = "a registry on loopback without TLS needs --insecure"
            raise RemoteError(f"cannot reach registry '{urlsplit(url).netloc}': {explain(error)}", hint=hint) from None

    def _pool(self, url: str) -> Any:
        parts = urlsplit(url)
        key = f"{parts.scheme}://{parts.netloc}"
        if key not in self._pools:
            self._pools[key] = _make_pool(parts.scheme, parts.netloc)
        return self._pools[key]

    def _check_redirect(self, target: str) -> None:
        parts = urlsplit(target)
        plain = parts.scheme == "http" and self.endpoint.base.startswith("http:") and is_loopback(parts.netloc)
        if parts.scheme != "https" and not plain:
            raise RemoteError(f"registry '{self.endpoint.host}' redirects to {target[:100]}, which is not safe")

    def _judge(
        self, response: urllib3.BaseHTTPResponse, method: str, missing: str, accept: tuple[int, ...]
    ) -> urllib3.BaseHTTPResponse:
        status = response.status
        if 200 <= status < 300 or status in accept:
            return response
        said = "" if method == "HEAD" else _first_error(self.read(response))
        response.release_conn()
        host = self.endpoint.host
        if status == 404 and missing:
            raise NotFound(missing, hint="check the name and the tag")
        if status in (401, 403):
            hint = f"log in with 'nagaya login {host}'; a private or misspelt name looks the same to a registry"
            raise RemoteError(f"registry '{host}' denies access to {self._repository}{said}", hint=hint)
        if status == 429:
            raise RemoteError(f"registry '{host}' asks to slow down{said}", hint="try again later, or log in")
        raise RemoteError(f"registry '{host}' answered with status {status}{said}", hint="try again later")

    # -- tokens (distribution specification, "Registry authentication")

    def _authorize(self, challenge: str) -> str:
        from urllib.request import parse_http_list, parse_keqv_list

        scheme, _, rest = challenge.partition(" ")
        credentials = find_credentials(self.endpoint.host, self._repository)
        if scheme.lower() == "basic":
            if credentials is None:
                return ""
            return _basic(credentials)
        if scheme.lower() != "bearer":
            raise RemoteError(f"registry '{self.endpoint.host}' wants an unknown kind of log-in: {scheme[:40]!r}")
        try:
            fields = parse_keqv_list(parse_http_list(rest))
        except (ValueError, IndexError):
            fields = {}
        realm = fields.get("realm", "")
        parts = urlsplit(realm)
        if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.netloc)):
            raise RemoteError(f"registry '{self.endpoint.host}' names a token server without TLS: {realm[:100]}")
        return "Bearer " + self._fetch_token(realm, fields.get("service", ""), credentials)

    def _fetch_token(self, realm: str, service: str, credentials: Credentials | None) -> str:
        import json

        pool = self._pool(realm)
        query = {"service": service, "scope": self._scope}
        options = {"redirect": False, "retries": False, "preload_content": False}
        try:
            if credentials is not None and credentials.identity_token:
                form = {
                    **query,
                    "grant_type": "refresh_token",
                    "client_id": "nagaya",
                    "refresh_token": credentials.identity_token,
                }
                headers = {"Content-Type": "application/x-www-form-urlencoded"}
                response = pool.request("POST", realm, body=urlencode(form), headers=headers, **options)
            else:
                headers = {"Authorization": _basic(credentials)} if credentials else {}
                response = pool.request("GET", f"{realm}?{urlencode(query)}", headers=headers, **options)
        except urllib3.exceptions.HTTPError as error:
            raise RemoteError(f"cannot reach the token server of '{self.endpoint.host}': {explain(error)}") from None
        raw = self.read(response)
        if response.status in (401, 403):
            raise RemoteError(
                f"registry '{self.endpoint.host}' refuses the user name or the password",
                hint=f"log in with 'nagaya login {self.endpoint.host}'",
            )
        try:
            data = json.loads(raw)
            token = data.get("token") or data.get("access_token")
        except (ValueError, AttributeError):
            token = None
        if response.status != 200 or not isinstance(token, str):
            raise RemoteError(f"the token server of '{self.endpoint.host}' answered with status {response.status}")
        return token


def _basic(credentials: Credentials) -> str:
    import base64

    return "Basic " + base64.b64encode(f"{credentials.user}:{credentials.password}".encode()).decode()


def _make_pool(scheme: str, host: str) -> Any:
    from urllib.request import getproxies, proxy_bypass

    options: dict[str, Any] = {
        "timeout": urllib3.Timeout(connect=CONNECT_S, read=READ_S),
        "maxsize": 4,
        "num_pools": 4,
    }
    if scheme == "https":
        options["ssl_context"] = _tls(host)
    proxy = getproxies().get(scheme)
    if proxy and not is_loopback(host) and not proxy_bypass(host):
        return urllib3.ProxyManager(proxy, **options)
    return urllib3.PoolManager(**options)


def _tls(host: str) -> ssl.SSLContext:
    """The system's trust, and the registry's own certificates (containers-certs.d(5))."""
    context = ssl.create_default_context()
    for directory in CERTIFICATES:
        folder = f"{directory}/{host}"
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        try:
            for name in names:
                if name.endswith(".crt"):
                    context.load_verify_locations(f"{folder}/{name}")
                elif name.endswith(".cert"):
                    context.load_cert_chain(f"{folder}/{name}", f"{folder}/{name.removesuffix('.cert')}.key")
        except (OSError, ssl.SSLError) as error:
            raise UsageError(f"a certificate in {folder} cannot be used: {error}") from None
    return context


def explain(error: Exception) -> str:
    """The short reason inside urllib3's nested errors."""
    inner: Any = error
    while True:
        deeper = getattr(inner, "reason", None) or (inner.args[-1] if getattr(inner, "args", ()) else None)
        if not isinstance(deeper, Exception):
            break
        inner = deeper
    if isinstance(inner, OSError) and inner.strerror:
        return str(inner.strerror)
    text = str(inner)
    return text.rpartition(": ")[2] if text.startswith(("<", "HTTP")) else text


def _first_error(raw: bytes) -> str:
    """What the registry says in its error document, if it has one."""
    import json

    try:
        message = json.loads(raw)["errors"][0]["message"]
    except (ValueError, KeyError, IndexError, TypeError):
        return ""
    return f" ({message[:200]})" if isinstance(message, str) and message.isprintable() else ""
