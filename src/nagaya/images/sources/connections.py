"""TCP, TLS and proxies for registries: pools of connections to whatever hosts one pull has to talk to."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Callable
from urllib.parse import SplitResult, urlsplit
from weakref import WeakSet

import urllib3

from nagaya.errors import RemoteError, UsageError
from nagaya.static import Any

CONNECT_S, READ_S = 5.0, 30.0
REACH_S = 7.0  # name, all its addresses and TLS together: a big registry has sixteen addresses
BLOCK = 128 << 10
CERTIFICATES = ("/etc/containers/certs.d", "/etc/docker/certs.d")


def is_loopback(host: str) -> bool:
    """Whether a HOST[:PORT] is this very machine."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name in ("localhost", "::1") or (name.startswith("127.") and name.replace(".", "").isdigit())


def split_url(url: str) -> SplitResult:
    """A stranger's URL in its parts. Raises `RemoteError` for what is none."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:  # brackets that do not match, a port that is no number
        pass
    raise RemoteError(f"a registry sent an address that is none: {ascii(url[:100])[1:-1]!r}")


class Connections:
    """Connections of one pull or push. Threads may share it."""

    def __init__(self, *, verify: bool = True) -> None:
        self.verify = verify
        self._pools: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._live: WeakSet[Any] = WeakSet()
        self._aborted = False

    def request(self, method: str, url: str, *, headers: dict[str, str], body: Any = None) -> urllib3.BaseHTTPResponse:
        """One request; the answer's body is not read, and neither redirected nor decoded. Raises urllib3's errors."""
        response: urllib3.BaseHTTPResponse = self._pool(url).request(
            method, url, headers=headers, body=body, redirect=False, retries=False, preload_content=False,
            decode_content=False,
        )  # fmt: skip
        return response

    def abort(self) -> None:
        """End every connection now, from another thread: whoever waits in one gets an error."""
        with self._lock:
            self._aborted = True
            for connection in list(self._live):
                self._cut(connection)

    def close(self) -> None:
        """Close what is kept for a next request."""
        with self._lock:
            for pool in self._pools.values():
                pool.clear()
            self._pools.clear()

    def _cut(self, connection: Any) -> None:
        sock = connection.sock
        if sock is not None:
            try:
                # Not SSLSocket's own shutdown, which takes the TLS state away from under the thread that reads.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except OSError:
                pass  # it is closed already

    def _note(self, connection: Any) -> None:
        with self._lock:
            self._live.add(connection)
            if self._aborted:
                self._cut(connection)

    def _pool(self, url: str) -> Any:
        parts = split_url(url)
        key = f"{parts.scheme}://{parts.netloc}"
        with self._lock:
            if key not in self._pools:
                self._pools[key] = self._make_pool(parts.scheme, parts.netloc)
            return self._pools[key]

    def _make_pool(self, scheme: str, host: str) -> Any:
        from urllib.request import getproxies, proxy_bypass

        options: dict[str, Any] = {
            "timeout": urllib3.Timeout(connect=CONNECT_S, read=READ_S),
            "maxsize": 4,
            "num_pools": 4,
            "blocksize": BLOCK,
        }
        if scheme == "https":
            options["ssl_context"] = trust(host, verify=self.verify)
        proxy = getproxies().get(scheme)
        manager: Any
        if proxy and not is_loopback(host) and not proxy_bypass(host):
            manager = _open_proxy(proxy, options)
        else:
            manager = urllib3.PoolManager(**options)
        manager.pool_classes_by_scheme = {
            "http": _noting(urllib3.HTTPConnectionPool, self._note),
            "https": _noting(urllib3.HTTPSConnectionPool, self._note, silent=not self.verify),
        }
        return manager


def _noting(pool: Any, note: Any, *, silent: bool = False) -> Any:
    """A pool class whose connections tell when they are open."""

    class Connection(pool.ConnectionCls):  # type: ignore[misc]
        def connect(self) -> None:
            _within(REACH_S, super().connect, self)
            if silent:
                self.is_verified = True  # --insecure was asked for: urllib3 would warn on the terminal
            note(self)

    class Pool(pool):  # type: ignore[misc]
        ConnectionCls = Connection

    return Pool


def _within(seconds: float, connect: Callable[[], None], connection: Any) -> None:
    """Connect, or raise `ConnectTimeoutError`. In a thread, because nothing else ends a resolver that waits."""
    ended: list[BaseException | None] = []
    late = threading.Event()

    def work() -> None:
        try:
            connect()
            ended.append(None)
        except BaseException as error:
            ended.append(error)
        if late.is_set():
            connection.close()

    worker = threading.Thread(target=work, name="connect", daemon=True)
    worker.start()
    worker.join(seconds)
    if not ended:
        late.set()
        raise urllib3.exceptions.ConnectTimeoutError(connection, "no connection in time")
    if ended[0] is not None:
        raise ended[0]


def _open_proxy(proxy: str, options: dict[str, Any]) -> Any:
    from urllib.parse import unquote

    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    headers = None
    if parts.username:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers = urllib3.make_headers(proxy_basic_auth=login)
    try:
        return urllib3.ProxyManager(parts.geturl(), proxy_headers=headers, **options)
    except (ValueError, urllib3.exceptions.HTTPError):
        where = parts.netloc.rpartition("@")[2]
        raise UsageError(f"'{where}' is no proxy", hint="HTTPS_PROXY is to be http://HOST:PORT") from None


def trust(host: str, *, verify: bool = True) -> ssl.SSLContext:
    """The system's trust, and the registry's own certificates (containers-certs.d(5)): *.crt, and *.cert with *.key."""
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
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
            raise UsageError(f"a certificate in {folder} cannot be used: {explain(error)}") from None
    return context


def explain(error: BaseException) -> str:
    """The reason inside urllib3's nested errors, in a few words."""
    chain: list[BaseException] = []
    inner: BaseException | None = error
    while inner is not None and inner not in chain:
        chain.append(inner)
        nested = [getattr(inner, "reason", None), *inner.args, inner.__cause__]
        inner = next((part for part in nested if isinstance(part, BaseException)), None)
    for part in reversed(chain):
        if isinstance(part, ssl.SSLCertVerificationError):
            return part.verify_message.rstrip(".")
        if isinstance(part, ssl.SSLError):
            reason = getattr(part, "reason", "") or str(part)
            return str(reason).lower().replace("_", " ")
        if isinstance(part, urllib3.exceptions.ConnectTimeoutError):
            return "no connection in time"
        if isinstance(part, TimeoutError | urllib3.exceptions.ReadTimeoutError):
            return f"no answer within {READ_S:.0f} s"
        if isinstance(part, urllib3.exceptions.IncompleteRead):
            return "the connection ended early"
        if isinstance(part, OSError) and part.strerror:
            return part.strerror
    return str(chain[-1]).rpartition("> ")[2] or type(chain[-1]).__name__
