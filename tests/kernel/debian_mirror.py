"""A mirror of Debian for installers, on this host's loopback: what its own package sources have, asked when it is asked.

A source that carries the packages of a release does not always carry all parts of its installer ("udebs"). Those that an
installer would ask for, and that are not to be had, are made here of the packages that they are the small form of. The index
of udebs is then ours, and its Release file too, which nobody has signed. What the installed system is made of comes from the
source as it is, with its own signature.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

from nagaya.images.sources.apt_package import Archive
from nagaya.images.sources.apt_sources import find_debian_sources, rewrite_suite
from nagaya.manager.installing import find_mirror

_WANTED = ("required", "important", "standard")
_TIMEOUT_S = 60.0
DIRECTORY = "/debian"


class Udeb(NamedTuple):
    name: str
    priority: str
    kernel: str
    depends: tuple[str, ...]
    path: str
    stanza: str


def parse_index(text: str) -> dict[str, Udeb]:
    """The stanzas of a Packages file, by name; of those for several kernels each has a name of its own."""
    found = {}
    for stanza in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if line[:1].isalpha() and ": " in line)
        name = fields["Package"]
        depends = tuple(re.findall(r"[a-z0-9][a-z0-9+.-]+(?= *(?:\(|,|\||$))", fields.get("Depends", "")))
        found[name] = Udeb(
            name, fields.get("Priority", ""), fields.get("Kernel-Version", ""), depends, fields["Filename"], stanza
        )
    return found


# What udebs are made of where the source has none: files of packages, and where they belong.
_PARTS = {
    "e2fsprogs-udeb": ("e2fsprogs", "libext2fs2t64", "libcom-err2", "libss2"),
    "libmount1-udeb": ("libmount1",),
}
_MODULES = re.compile(
    r"kernel/(fs/(ext4|jbd2|fat|nls|isofs|fuse|efivarfs|mbcache)|lib|crypto|arch/x86/crypto"
    r"|drivers/(block|scsi|ata|cdrom|md|virtio|char/virtio_console))\b"
)


class Mirror:
    """Of one suite. `place` is where udebs are made."""

    def __init__(self, suite: str, architecture: str, place: Path) -> None:
        sources = find_debian_sources()
        upstream = find_mirror(sources, suite)
        assert upstream is not None
        self._base = upstream.uri.rstrip("/")
        self._lines = [line for line in rewrite_suite(sources, suite) if f" {suite} " in line]
        self._suite, self._architecture, self._place = suite, architecture, place
        self._own: dict[str, bytes] = {}
        self.made: list[str] = []  # the udebs that are ours
        self.missing: list[str] = []  # what was asked for and not to be had

    def prepare(self, initramfs: str) -> None:
        """For the installer in that file, which has some of its parts already. Takes minutes."""
        status = subprocess.run(
            ["bsdtar", "-x", "-O", "-f", initramfs, "var/lib/dpkg/status"], capture_output=True, text=True
        ).stdout
        installed = set(re.findall(r"^Package: (\S+)$", status, re.MULTILINE))
        (kernel,) = {found[1] for name in installed if (found := re.fullmatch(r"kernel-image-(.+)-di", name))}
        place = f"main/debian-installer/binary-{self._architecture}/Packages"
        ours = parse_index(gzip.decompress(self.fetch(f"dists/{self._suite}/{place}.gz")).decode())
        wanted = [name for name, udeb in ours.items() if udeb.priority in _WANTED and udeb.kernel in ("", kernel)]
        if not any(udeb.kernel == kernel and self.has(udeb.path) for udeb in ours.values()):
            names = {re.sub(r"-modules-.*-di", "-modules", name) for name, udeb in ours.items() if udeb.kernel}
            ours |= self._make(f"made-modules-{kernel}-di", (f"linux-image-{kernel}",), kernel, tuple(sorted(names)))
        seen = set(installed)
        while wanted:
            name = wanted.pop()
            if name in seen or name not in ours:
                continue
            seen.add(name)
            if ours[name].path not in self._own and not self.has(ours[name].path):
                ours |= self._make(name, _PARTS.get(name, ()))  # the others are for file systems that nobody asks for
            wanted += ours[name].depends
        index = "".join(f"{udeb.stanza}\n\n" for udeb in ours.values()).encode()
        files = {place: index, f"{place}.gz": gzip.compress(index, mtime=0)}
        self._own |= {f"dists/{self._suite}/{path}": data for path, data in files.items()}
        release = self.fetch(f"dists/{self._suite}/Release").decode()
        self._own[f"dists/{self._suite}/Release"] = _rewrite(release, place, files).encode()

    def _make(
        self, name: str, packages: tuple[str, ...], kernel: str = "", provides: tuple[str, ...] = ()
    ) -> dict[str, Udeb]:
        """A udeb with what an installer needs of `packages`, for it and in the index."""
        tree = self._place / name
        (tree / "DEBIAN").mkdir(parents=True)
        for package in packages:
            work = self._place / package
            archive = Archive(self._lines, str(work))
            archive.find(package)
            deb = archive.download(package)
            subprocess.run(["dpkg-deb", "-x", deb, work / "x"], check=True)
            for path in (work / "x").rglob("*"):
                inside = str(path.relative_to(work / "x"))
                if "modules/" in inside:
                    target = inside if _MODULES.search(inside) else ""
                elif ".so." in inside:
                    target = f"usr/lib/{path.name}"
                else:
                    target = inside if "sbin/" in inside or inside.startswith("etc/mke2fs") else ""
                if target and not path.is_dir():
                    (tree / target).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, tree / target, follow_symlinks=False)
            shutil.rmtree(work)
        fields = {
            "Package": name, "Version": "9:1", "Architecture": self._architecture, "Maintainer": "nobody <root@localhost>",
            "Section": "debian-installer", "Priority": "standard", "Description": "made for this test",
        }  # fmt: skip
        if kernel:
            fields |= {"Kernel-Version": kernel, "Provides": ", ".join(provides)}
            (tree / "DEBIAN/postinst").write_text("#!/bin/sh\ndepmod -a || true\n")
            (tree / "DEBIAN/postinst").chmod(0o755)
        control = "".join(f"{key}: {value}\n" for key, value in fields.items())
        (tree / "DEBIAN/control").write_text(control)
        made = self._place / f"{name}.udeb"
        subprocess.run(
            ["dpkg-deb", "--root-owner-group", "-Zxz", "-b", tree, made], check=True, stdout=subprocess.DEVNULL
        )
        shutil.rmtree(tree)
        data, path = made.read_bytes(), f"pool/made/{name}.udeb"
        self._own[path] = data
        self.made.append(name)
        sums = f"MD5sum: {hashlib.md5(data).hexdigest()}\nSHA256: {hashlib.sha256(data).hexdigest()}"
        stanza = f"{control}Filename: {path}\nSize: {len(data)}\n{sums}"
        return {name: Udeb(name, "standard", kernel, (), path, stanza)}

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
