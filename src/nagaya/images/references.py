"""Image names: `[REGISTRY/]REPOSITORY[:TAG][@DIGEST]`, by the grammar of the distribution specification.

Short names stay short here (`debian:latest`); `canonical` spells out what Docker's registry makes of them.
"""

from __future__ import annotations

from nagaya.errors import IntegrityError, UsageError
from nagaya.static import NamedTuple

DOCKER_HUB = "docker.io"
_LOWER = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")
_WORD = _LOWER | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_TAG = _WORD | frozenset(".-")


class Reference(NamedTuple):
    """A parsed name. `registry` is "" for a short name; `tag` is "" only when a digest was given instead."""

    registry: str
    repository: str
    tag: str
    digest: str

    def __str__(self) -> str:
        return self.name + (f"@{self.digest}" if self.digest else "")

    @property
    def name(self) -> str:
        """Without the digest: "debian:latest", "localhost:5000/team/app:2"."""
        return self.familiar + (f":{self.tag}" if self.tag else "")

    @property
    def familiar(self) -> str:
        """Registry and repository as people write them: Docker Hub's own name and `library/` are left out."""
        return f"{self.registry}/{self.repository}" if self.registry else self.repository

    @property
    def host(self) -> str:
        """The registry to ask: "docker.io" for a short name."""
        return self.registry or DOCKER_HUB

    @property
    def path(self) -> str:
        """The repository as its registry calls it: "library/debian" for "debian"."""
        if self.host == DOCKER_HUB and "/" not in self.repository:
            return f"library/{self.repository}"
        return self.repository

    @property
    def canonical(self) -> str:
        """ "docker.io/library/debian:latest"."""
        text = f"{self.host}/{self.path}"
        return text + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")

    @property
    def is_bare(self) -> bool:
        """Whether it is a word alone, as `debian` or `debian:12`: those have bootstrap sources."""
        return not self.registry and "/" not in self.repository


def parse_reference(text: str) -> Reference:
    """Parse and check a name; the tag defaults to `latest`. Raises `UsageError`."""
    rest, mark, digest = text.partition("@")
    if mark:
        _check_digest(text, digest)
    first, slash, path = rest.partition("/")
    registry = ""
    if slash and ("." in first or ":" in first or first == "localhost" or first.lower() != first):
        registry, rest = first, path
        _check_registry(text, registry)
    repository, colon, tag = rest.partition(":")
    if colon and not (tag and len(tag) <= 128 and tag[0] in _WORD and _TAG.issuperset(tag)):
        raise _malformed(text, f"'{tag}' is no tag", "a tag has letters, digits, '_', '.' and '-', at most 128")
    if registry in (DOCKER_HUB, "index.docker.io", "registry-1.docker.io"):
        registry = ""
    if not registry and repository.startswith("library/") and repository.count("/") == 1:
        repository = repository[len("library/") :]
    _check_repository(text, repository)
    return Reference(registry, repository, tag or ("" if digest else "latest"), digest)


def normalise(text: str) -> str:
    """The local name for what a user wrote: "debian" → "debian:latest". Raises `UsageError`; a digest has no place."""
    reference = parse_reference(text)
    if reference.digest:
        raise UsageError(f"'{text}' names a digest where a name is to be given", hint="for example app:1.0")
    return reference.name


def _check_repository(text: str, repository: str) -> None:
    """path-component [/ path-component]…; alpha-numeric [separator alpha-numeric]…; separators . _ __ and dashes."""
    if not repository:
        raise _malformed(text, "it has no repository", "for example debian:12 or localhost:5000/team/app")
    if len(repository) > 255:
        raise _malformed(text, "the repository is longer than 255 characters", "")
    for part in repository.split("/"):
        if not _is_component(part):
            if part.lower() != part and _is_component(part.lower()):
                raise _malformed(text, "the repository must be lower case", f"did you mean '{text.lower()}'?")
            raise _malformed(
                text,
                f"'{part}' is no part of a name",
                "parts have a-z and 0-9 with single '.', '_', '__' or '-' between",
            )


def _is_component(part: str) -> bool:
    if not part or part[0] not in _LOWER or part[-1] not in _LOWER:
        return False
    separator = ""
    for character in part:
        if character in _LOWER:
            if separator and separator not in (".", "_", "__") and separator.strip("-"):
                return False
            separator = ""
        else:
            separator += character
            if character not in "._-":
                return False
    return True


def _check_registry(text: str, registry: str) -> None:
    host, colon, port = registry.rpartition(":") if not registry.endswith("]") else (registry, "", "")
    if not colon:
        host, port = registry, ""
    if colon and not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise _malformed(text, f"'{port}' is no port", "for example localhost:5000/app")
    if host.startswith("[") and host.endswith("]"):
        good = len(host) > 3 and set(host[1:-1].lower()) <= set("0123456789abcdef:.")
    else:
        good = bool(host) and all(
            label and label.isascii() and label.replace("-", "").isalnum() and label[0] != "-" and label[-1] != "-"
            for label in host.split(".")
        )
    if not good:
        raise _malformed(text, f"'{host}' is no registry host", "for example registry.example.com/team/app")


def _check_digest(text: str, digest: str) -> None:
    from nagaya.images.manifest import check_digest  # lazy: few names have a digest

    try:
        check_digest(digest)
    except IntegrityError:
        raise _malformed(text, f"'{digest[:80]}' is no digest", "a digest is sha256: and 64 digits of 0-9a-f") from None


def _malformed(text: str, reason: str, hint: str) -> UsageError:
    return UsageError(f"'{_printable(text)}' is not an image name: {_printable(reason)}", hint=_printable(hint))


def _printable(text: str) -> str:
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 160 else text[:160] + "…"
