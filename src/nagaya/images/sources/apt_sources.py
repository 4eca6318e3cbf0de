"""The machine's own apt sources, as lines for mmdebstrap (sources.list(5)): Debian's archives only, no third party's."""

from __future__ import annotations

import os

from nagaya.static import NamedTuple

CODENAMES = frozenset(
    ("buster", "bullseye", "bookworm", "trixie", "forky", "sid", "unstable", "testing", "stable", "oldstable")
)
POCKETS = ("", "-updates", "-security")
ROLLING = ("sid", "unstable")
LISTS = "/var/lib/apt/lists"


class AptSource(NamedTuple):
    """One archive: `suites` with pockets ("bookworm-updates"), `options` as in a one-line entry."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    options: tuple[str, ...] = ()


def find_debian_sources(directory: str = "/etc/apt") -> list[AptSource]:
    """All Debian entries of sources.list and sources.list.d, in both formats."""
    found: list[AptSource] = []
    paths = [f"{directory}/sources.list"]
    try:
        paths += sorted(f"{directory}/sources.list.d/{name}" for name in os.listdir(f"{directory}/sources.list.d"))
    except FileNotFoundError:
        pass
    for path in paths:
        if not path.endswith((".list", ".sources")):
            continue
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read()
        except OSError:
            continue
        found += parse_deb822(text) if path.endswith(".sources") else parse_one_line(text)
    origins = find_origins()
    return [source for source in found if is_debian(source, origins)]


def parse_one_line(text: str) -> list[AptSource]:
    """`deb [options] uri suite component…` lines."""
    found = []
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if not words or words[0] != "deb":
            continue
        rest = words[1:]
        options: list[str] = []
        if rest and rest[0].startswith("["):
            while rest:
                word = rest.pop(0)
                options.append(word.strip("[]"))
                if word.endswith("]"):
                    break
        if len(rest) >= 2:
            found.append(AptSource(rest[0], (rest[1],), tuple(rest[2:]), tuple(option for option in options if option)))
    return found


def parse_deb822(text: str) -> list[AptSource]:
    """Stanzas of `Types: URIs: Suites: Components: Signed-By:`."""
    found = []
    for stanza in "\n".join(line for line in text.splitlines() if not line.startswith("#")).split("\n\n"):
        fields: dict[str, str] = {}
        key = ""
        for line in stanza.splitlines():
            if line[:1] in (" ", "\t"):
                fields[key] = f"{fields.get(key, '')}\n{line.strip()}"
            elif ":" in line:
                key, _, value = line.partition(":")
                key = key.strip().lower()
                fields[key] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false"):
            continue
        signed = fields.get("signed-by", "")
        # A key block within the stanza has no one-line form: the keyring that Debian installs knows Debian's archives.
        options = (f"signed-by={signed}",) if signed.startswith("/") else ()
        found += [
            AptSource(
                uri, tuple(fields.get("suites", "").split()), tuple(fields.get("components", "").split()), options
            )
            for uri in fields.get("uris", "").split()
        ]
    return found


def is_debian(source: AptSource, origins: dict[str, str] | None = None) -> bool:
    """Whether an entry is one of Debian's archives, or a mirror: its suites are Debian's, and it has the section main.

    Many a third party calls its own suite "stable" with a section "main". What the archive says of itself (`origins`,
    from `find_origins`) decides; before the first `apt-get update` nothing is known but whose keyring it is signed by.
    """
    if "main" not in source.components or not all(base_suite(suite) in CODENAMES for suite in source.suites):
        return False
    known = {(origins or {}).get(list_name(source.uri, suite), "") for suite in source.suites} - {""}
    if known:
        return known == {"Debian"}
    keys = [option.partition("=")[2] for option in source.options if option.startswith("signed-by=")]
    return all(os.path.basename(key).startswith("debian-archive-") for text in keys for key in text.split(","))


def list_name(uri: str, suite: str) -> str:
    """How apt's lists call an archive's suite: the URI without its scheme, "/" as "_" (apt's URItoFileName)."""
    place = uri.partition("://")[2].rpartition("@")[2].rstrip("/")
    return f"{place}/dists/{suite}".replace("_", "%5f").replace("/", "_")


def find_origins(directory: str = LISTS) -> dict[str, str]:
    """What each archive that apt knows calls its maker: `list_name` to the Release file's "Origin"."""
    return {name: fields["origin"] for name, fields in _releases(directory).items() if "origin" in fields}


def find_release_date(suite: str, directory: str = LISTS) -> int:
    """When Debian's archives for a suite were last made, as apt knows: seconds since 1970; 0 = it does not."""
    from email.utils import mktime_tz, parsedate_tz  # lazy: 15 ms

    dates = []
    for name, fields in _releases(directory).items():
        place = name.rpartition("_dists_")[2]
        parsed = parsedate_tz(fields.get("date", ""))
        if fields.get("origin") == "Debian" and base_suite(place) == suite and parsed is not None:
            dates.append(mktime_tz(parsed))
    return max(dates, default=0)


def _releases(directory: str) -> dict[str, dict[str, str]]:
    """The first fields of each (In)Release file, by its name without that ending."""
    found: dict[str, dict[str, str]] = {}
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return {}
    for name in names:
        stem, mark, kind = name.rpartition("_")
        if not mark or kind not in ("InRelease", "Release"):
            continue
        try:
            with open(f"{directory}/{name}", encoding="utf-8", errors="replace") as file:
                head = file.read(4096)
        except OSError:
            continue
        lines = (line.partition(":") for line in head.splitlines() if line[:1].isalpha())
        found[stem] = {key.lower(): value.strip() for key, _, value in lines}
    return found


def find_proxies() -> list[str]:
    """This machine's proxies for apt, as configuration lines: mmdebstrap's own apt does not read /etc/apt."""
    import subprocess  # lazy: 8 ms

    try:
        dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return []
    wanted = tuple(f"Acquire::{scheme}::Proxy" for scheme in ("http", "https"))
    return [line for line in dump.splitlines() if line.startswith(wanted) and not line.endswith(' "";')]


def base_suite(suite: str) -> str:
    """ "bookworm" for "bookworm-updates" and for "bookworm/updates"."""
    return suite.partition("/")[0].partition("-")[0]


def rewrite_suite(sources: list[AptSource], suite: str) -> list[str]:
    """The entries as `deb` lines for another suite, each archive with the pockets that it was used for."""
    lines: list[str] = []
    for source in sources:
        options = f"[{' '.join(source.options)}] " if source.options else ""
        for named in source.suites:
            pocket = named[len(base_suite(named)) :]
            if pocket not in POCKETS or (pocket and suite in ROLLING):
                continue
            line = f"deb {options}{source.uri} {suite}{pocket} {' '.join(source.components)}"
            if line not in lines:
                lines.append(line)
    return lines
