"""The system that a whole machine gets at its first start: the installer, and the answers to its questions."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from nagaya.errors import HostError, NagayaError, NotFound, Unsupported, UsageError
from nagaya.images.progress import Progress
from nagaya.images.sources.apt_package import Archive, extract
from nagaya.images.sources.apt_sources import AptSource, base_suite, find_debian_sources, find_proxies, rewrite_suite
from nagaya.images.sources.bootstrap import DEBIAN_ARCHITECTURES, NUMBERS, SUITES, host_suite, require_port
from nagaya.manager.hardware import InstallOptions
from nagaya.model.spec import MachineSpec
from nagaya.static import NamedTuple
from nagaya.storage.disk_images import installer_cache
from nagaya.storage.disk_images.installer import INITRAMFS, KERNEL, InstallerFiles, put_into
from nagaya.storage.disk_images.installer_cache import Kept
from nagaya.storage.disk_images.installer_source import check_kernel, take_from_directory, take_from_disc
from nagaya.storage.disk_images.preseed import Answers, Mirror, make_preseed, split_mirror
from nagaya.storage.disk_images.seed import read_key
from nagaya.storage.workplace import open_workplace

DEBIAN = "debian"
_FRESH_S = 24 * 3600.0
"""An installer in the cache is used for so long without a look at whether its archive has a newer one."""


class Installer(NamedTuple):
    """One that is at hand. `suite` "" = that of its disc."""

    files: InstallerFiles
    suite: str = ""


@contextmanager
def open_installer(
    source: str, *, directory: str, architecture: str, platform: str, progress: Progress
) -> Iterator[Installer]:
    """The installer that `source` names. What is copied from a disc lies in a directory below `directory` for so long.

    Raises `NotFound`, `Unsupported`, `IntegrityError`, `UsageError`, `LaunchError`, `HostError`.
    """
    name, _, tag = source.partition(":")
    if name == DEBIAN and "/" not in tag:
        suite = NUMBERS.get(tag, tag) or host_suite()
        wanted = _name_package(suite, platform)
        with installer_cache.open_cache() as cache:  # locked: nobody removes it while it is copied
            kept = _find_kept(wanted, cache, architecture, progress)
            yield Installer(kept.files, suite)
        return
    path = os.path.realpath(source)
    if os.path.isdir(path):
        yield Installer(take_from_directory(path, architecture=architecture))
        return
    if not os.path.exists(path):
        raise NotFound(f"there is no installer '{source}'", hint="name an ISO file, a directory, or debian[:SUITE]")
    with open_workplace(directory) as place:
        yield Installer(take_from_disc(path, place, architecture=architecture))


class _Wanted(NamedTuple):
    """Debian's own package of an installer, and the directory in it."""

    suite: str
    package: str
    inside: str


def _name_package(suite: str, platform: str) -> _Wanted:
    number = next((number for number, name in NUMBERS.items() if name == suite), "")
    if suite not in SUITES:
        raise UsageError(f"there is no Debian '{suite}'", hint="for example debian:bookworm")
    if not number:
        raise Unsupported(f"the installer of '{suite}' is in no package", hint="name a release, as debian:bookworm")
    name = DEBIAN_ARCHITECTURES[platform]
    require_port(suite, name)
    inside = f"usr/lib/debian-installer/images/{number}/{name}/text/debian-installer/{name}"
    return _Wanted(suite, f"debian-installer-{number}-netboot-{name}", inside)


def _find_kept(wanted: _Wanted, cache: str, architecture: str, progress: Progress) -> Kept:
    """It, from the cache; fetched where the archive has another one by now: its parts would not fit an older one's kernel."""
    kept = installer_cache.find(wanted.package)
    if kept is not None and time.time_ns() - kept.record.asked_ns < _FRESH_S * 1e9:
        installer_cache.note_use(kept, asked=False)
        return kept
    lines = [line for line in rewrite_suite(find_debian_sources(), wanted.suite) if f" {wanted.suite} " in f"{line} "]
    if not lines and kept is None:
        raise Unsupported(
            "this host's apt has no Debian sources to take an installer from",
            hint="name its ISO file, or add a 'deb' line to /etc/apt/sources.list",
        )
    progress.step(f"the installer of debian {wanted.suite} for {architecture}")
    with open_workplace(cache) as place:
        try:
            archive = Archive(lines, place)
            candidate = archive.find(wanted.package)
        except NagayaError as error:
            if kept is None:
                raise
            progress.step(f"cannot look for a newer one ({error}); taking the one of {_day(kept.record.asked_ns)}")
            installer_cache.note_use(kept, asked=False)
            return kept
        if kept is not None and kept.record.digest == candidate.digest:
            installer_cache.note_use(kept, asked=True)
            return kept
        made = f"{place}/made"
        try:
            os.mkdir(made, 0o700)
            package = archive.download(wanted.package)
            extract(package, {f"{wanted.inside}/{part}": f"{made}/{part}" for part in (KERNEL, INITRAMFS)})
        except OSError as error:
            raise HostError.from_os(error, "cannot unpack the installer") from None
        check_kernel(f"{made}/{KERNEL}", architecture=architecture)
        record = installer_cache.Record(
            wanted.package, candidate.version, wanted.suite, architecture, candidate.digest, "", "", 0, 0, 0
        )
        return installer_cache.keep(cache, made, record)


def _day(time_ns: int) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(time_ns / 1e9))


def give_installer(directory: str, spec: MachineSpec, options: InstallOptions | None, installer: Installer) -> None:
    """Put it into the machine's directory, with all the answers, and the keys of those who may log in as root."""
    assert options is not None and spec.hardware is not None and spec.hardware.seed is not None
    answers = plan_answers(options, installer, hostname=spec.hostname, compat=spec.hardware.compat)
    put_into(directory, installer.files, answers, (read_key(directory), *spec.hardware.seed.ssh_keys))


def plan_answers(options: InstallOptions, installer: Installer, *, hostname: str, compat: bool) -> bytes:
    """The whole file of answers. Raises `UsageError` where there is nowhere to get packages from."""
    mirror = find_mirror(find_debian_sources(), installer.suite)
    if mirror is None and not installer.files.disc and b"mirror/" not in options.preseed:
        raise UsageError(
            "this host's apt has no Debian sources that an installer could use, and there is no disc",
            hint="say where packages come from in a file of your own: --preseed FILE with mirror/http/hostname",
        )
    disk = "/dev/sda" if compat else "/dev/vda"
    return make_preseed(Answers(_plain(hostname), disk, mirror), options.preseed)


def _plain(hostname: str) -> str:
    """As an installer takes it, without a question (RFC 1123): letters, digits and hyphens."""
    text = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in hostname.partition(".")[0])
    return text.strip("-")[:63].rstrip("-") or "debian"


def find_mirror(sources: list[AptSource], suite: str) -> Mirror | None:
    """Where this host has its packages from, as an installer asks for it; None where that is not to be had over HTTP."""
    uris = {"": "", "-security": ""}
    for source in sources:
        for named in source.suites:
            pocket = named[len(base_suite(named)) :].replace("/updates", "-security")
            try:
                split_mirror(source.uri)
            except NagayaError:
                continue
            if pocket in uris and not uris[pocket]:
                uris[pocket] = source.uri
    if not uris[""]:
        return None
    scheme = split_mirror(uris[""])[0]
    return Mirror(uris[""], suite, uris["-security"], find_proxy(find_proxies(), scheme))


def find_proxy(lines: list[str], scheme: str) -> str:
    """Out of apt's configuration: `Acquire::http::Proxy "http://…";`."""
    for line in lines:
        key, _, value = line.partition(" ")
        if key.lower() == f"acquire::{scheme}::proxy":
            found = value.strip().rstrip(";").strip('"')
            return "" if found.upper() == "DIRECT" else found
    return ""
