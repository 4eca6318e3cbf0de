"""The machine's own apt sources, as lines for mmdebstrap (sources.list(5)): Debian's archives only, no third party's."""

from __future__ import annotations

import os
from typing import NamedTuple

CODENAMES = frozenset(
    ("buster", "bullseye", "bookworm", "trixie", "forky", "sid", "unstable", "testing", "stable", "oldstable")
)
POCKETS = ("", "-updates", "-security")
ROLLING = ("sid", "unstable")


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
    return [source for source in found if is_debian(source)]


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


def is_debian(source: AptSource) -> bool:
    """Whether an entry is one of Debian's archives: its suites are Debian's, and it has the component main."""
    return "main" in source.components and all(base_suite(suite) in CODENAMES for suite in source.suites)


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
