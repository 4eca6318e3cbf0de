"""A mirror of Debian for installers, on this host's loopback: what its own package sources have, asked when it is asked.

A source that carries the packages of a release does not always carry all of its installer's ("udebs"). Each that an installer
would ask for, and that is not to be had, is another release's here: its index is then ours, and its Release file too, which
nobody has signed. What the installed system is made of comes from the source as it is, with its own signature.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from nagaya.images.sources.apt_sources import find_debian_sources
from nagaya.manager.installing import find_mirror

_WANTED = ("required", "important", "standard")
_TIMEOUT_S = 60.0
DIRECTORY = "/debian"


class Udeb(NamedTuple):
    name: str
    priority: str
    kernel: str
    path: str
    stanza: str


def parse_index(text: str) -> dict[str, Udeb]:
    """The stanzas of a Packages file, by name; of those for several kernels each has a name of its own."""
    found = {}
    for stanza in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if line[:1].isalpha() and ": " in line)
        name = fields["Package"]
        found[name] = Udeb(
            name, fields.get("Priority", ""), fields.get("Kernel-Version", ""), fields["Filename"], stanza
        )
    return found


class Mirror:
    """Of `suite`, what is missing there from `other`."""

    def __init__(self, suite: str, other: str, architecture: str) -> None:
        upstream = find_mirror(find_debian_sources(), suite)
        assert upstream is not None
        self._base = upstream.uri.rstrip("/")
        self._suites, self._architecture = (suite, other), architecture
        self._own: dict[str, bytes] = {}
        self.replaced: list[str] = []
        self.missing: list[str] = []  # what was asked for and not to be had

    def prepare(self, initramfs: str) -> None:
        """For the installer in that file, which has some of its parts already."""
        status = subprocess.run(
            ["bsdtar", "-x", "-O", "-f", initramfs, "var/lib/dpkg/status"], capture_output=True, text=True
        ).stdout
        installed = set(re.findall(r"^Package: (\S+)$", status, re.MULTILINE))
        kernels = {found[1] for name in installed if (found := re.fullmatch(r"kernel-image-(.+)-di", name))}
        assert kernels, status
        suite, other = self._suites
        place = f"main/debian-installer/binary-{self._architecture}/Packages"
        ours, others = (
            parse_index(gzip.decompress(self.fetch(f"dists/{each}/{place}.gz")).decode()) for each in (suite, other)
        )
        for name, udeb in ours.items():
            if udeb.priority not in _WANTED or name in installed or udeb.kernel not in ("", *kernels):
                continue
            if not self.has(udeb.path) and name in others and self.has(others[name].path):
                ours[name] = others[name]
                self.replaced.append(name)
        index = "".join(f"{udeb.stanza}\n\n" for udeb in ours.values()).encode()
        files = {place: index, f"{place}.gz": gzip.compress(index, mtime=0)}
        self._own = {f"dists/{suite}/{path}": data for path, data in files.items()}
        release = self.fetch(f"dists/{suite}/Release").decode()
        self._own[f"dists/{suite}/Release"] = _rewrite(release, place, files).encode()

    def fetch(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self._base}/{path}", timeout=_TIMEOUT_S) as answer:
            data: bytes = answer.read()
            return data

    def has(self, path: str) -> bool:
        try:
            request = urllib.request.Request(f"{self._base}/{path}", method="HEAD")
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S):
                return True
        except urllib.error.HTTPError:
            return False

    def answer(self, path: str) -> tuple[int, bytes]:
        if path in self._own:
            return 200, self._own[path]
        try:
            return 200, self.fetch(path)
        except urllib.error.HTTPError as error:
            return error.code, b""
        except OSError:
            return 502, b""

    @contextmanager
    def serve(self) -> Iterator[int]:
        """The port."""
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = self.path.removeprefix(DIRECTORY).lstrip("/")
                status, data = mirror.answer(path)
                if status != 200:
                    mirror.missing.append(path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

            do_HEAD = do_GET

            def log_message(self, format: str, *args: object) -> None:
                return

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _rewrite(release: str, place: str, files: dict[str, bytes]) -> str:
    """With the sums of our index, and without the other forms of it."""
    lines, kind = [], ""
    for line in release.splitlines():
        if not line.startswith(" "):
            kind = line.rstrip(":")
            if not line.startswith("Acquire-By-Hash"):
                lines.append(line)
        elif not line.split()[-1].startswith(place):
            lines.append(line)
        elif line.split()[-1] in files and kind in ("MD5Sum", "SHA256"):
            path = line.split()[-1]
            made = hashlib.new("md5" if kind == "MD5Sum" else "sha256", files[path]).hexdigest()
            lines.append(f" {made} {len(files[path])} {path}")
    return "\n".join(lines) + "\n"
