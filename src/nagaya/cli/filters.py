"""`--filter KEY=VALUE`: which machines, images, volumes and events a list shows. Pure functions on facts.

Values of one key are alternatives, keys must all match; labels must all match. As in Docker, a name is matched
anywhere and may be a regular expression, an id matches from its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nagaya.errors import UsageError
from nagaya.model.spec import DEFAULT_NETWORK
from nagaya.model.state import PHASES
from nagaya.static import NamedTuple

Filters = dict[str, list[str]]

MACHINE_KEYS = (
    "ancestor", "before", "exited", "id", "label", "name", "network", "since", "status", "type", "volume",
)  # fmt: skip
IMAGE_KEYS = ("before", "dangling", "label", "reference", "since")
VOLUME_KEYS = ("dangling", "label", "name")
NETWORK_KEYS = ("dangling", "driver", "id", "label", "name")
EVENT_KEYS = ("action", "event", "id", "image", "label", "machine", "name", "type", "volume")
_SYNONYMS = {"container": "machine"}


class MachineFacts(NamedTuple):
    """What machines are filtered by. `volumes`: names and sources of its mounts, and their targets."""

    id: str
    name: str
    type: str
    image: str
    image_id: str
    phase: str
    exit_code: int
    labels: Mapping[str, str]
    networks: tuple[str, ...]
    volumes: tuple[str, ...]
    created_ns: int


class ImageFacts(NamedTuple):
    id: str
    names: tuple[str, ...]
    labels: Mapping[str, str]
    created_ns: int


def parse_filters(texts: list[str], known: tuple[str, ...]) -> Filters:
    """KEY=VALUE flags by key. Raises `UsageError` for an unknown key."""
    filters: Filters = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip().lower()
        key = _SYNONYMS.get(key, key)
        if not equals:
            raise UsageError(f"--filter: '{text}' is not KEY=VALUE", hint="for example --filter status=exited")
        if key not in known:
            raise UsageError(f"--filter: unknown key '{key}'", hint=f"one of: {', '.join(sorted(known))}")
        filters.setdefault(key, []).append(value.strip())
    _check_values(filters)
    return filters


def _check_values(filters: Filters) -> None:
    for phase in filters.get("status", ()):
        if phase not in PHASES:
            raise UsageError(f"--filter: unknown status '{phase}'", hint=f"one of: {', '.join(PHASES)}")
    for text in filters.get("exited", ()):
        if not text.lstrip("-").isdigit():
            raise UsageError(f"--filter: 'exited={text}' is no exit status", hint="for example exited=137")
    for text in filters.get("dangling", ()):
        if text.lower() not in ("true", "false", "1", "0"):
            raise UsageError(f"--filter: dangling is true or false, not '{text}'")


def matches_machine(filters: Filters, facts: MachineFacts, *, created_ns_of: Callable[[str], int]) -> bool:
    """Whether a machine passes. `created_ns_of` gives the age of the machine that before= or since= names."""
    tests: dict[str, Callable[[str], bool]] = {
        "id": lambda value: facts.id.startswith(value),
        "name": lambda value: search(value.removeprefix("/"), facts.name),
        "type": lambda value: facts.type == value,
        "status": lambda value: facts.phase == value,
        "exited": lambda value: facts.phase == "exited" and facts.exit_code == int(value),
        "network": lambda value: value in facts.networks or (value == DEFAULT_NETWORK and "bridge" in facts.networks),
        "volume": lambda value: value in facts.volumes,
        "ancestor": lambda value: _is_image(value, facts.image, facts.image_id),
        "before": lambda value: facts.created_ns < created_ns_of(value),
        "since": lambda value: facts.created_ns > created_ns_of(value),
    }
    return _all(filters, tests) and matches_labels(filters.get("label", []), facts.labels)


def matches_image(filters: Filters, facts: ImageFacts, *, created_ns_of: Callable[[str], int]) -> bool:
    """Whether an image passes. An image without a name is dangling."""
    tests: dict[str, Callable[[str], bool]] = {
        "dangling": lambda value: (not facts.names) == (value.lower() in ("true", "1")),
        "reference": lambda value: any(matches_reference(value, name) for name in facts.names),
        "before": lambda value: facts.created_ns < created_ns_of(value),
        "since": lambda value: facts.created_ns > created_ns_of(value),
    }
    return _all(filters, tests) and matches_labels(filters.get("label", []), facts.labels)


def matches_volume(filters: Filters, name: str, labels: Mapping[str, str], *, used: bool) -> bool:
    """Whether a volume passes. One that no machine uses is dangling."""
    tests: dict[str, Callable[[str], bool]] = {
        "name": lambda value: search(value, name),
        "dangling": lambda value: (not used) == (value.lower() in ("true", "1")),
    }
    return _all(filters, tests) and matches_labels(filters.get("label", []), labels)


def matches_network(
    filters: Filters, name: str, id: str, driver: str, labels: Mapping[str, str], *, is_used: Callable[[str], bool]
) -> bool:
    """Whether a network passes. One that no machine is on is dangling."""
    tests: dict[str, Callable[[str], bool]] = {
        "name": lambda value: search(value, name),
        "id": lambda value: id.startswith(value),
        "driver": lambda value: driver == value,
        "dangling": lambda value: (not is_used(name)) == (value.lower() in ("true", "1")),
    }
    return _all(filters, tests) and matches_labels(filters.get("label", []), labels)


def matches_event(filters: Filters, kind: str, action: str, id: str, name: str, attributes: Mapping[str, str]) -> bool:
    """Whether an event passes. machine=, image= and volume= name the one that it is about, or (image=) is made of."""

    def about(wanted: str) -> Callable[[str], bool]:
        return lambda value: kind == wanted and (name == value or (len(value) >= 4 and id.startswith(value)))

    tests: dict[str, Callable[[str], bool]] = {
        "type": lambda value: kind == ("machine" if value == "container" else value),
        "event": lambda value: action == value,
        "action": lambda value: action == value,
        "id": lambda value: id.startswith(value),
        "name": lambda value: name == value,
        "machine": about("machine"),
        "volume": about("volume"),
        "image": lambda value: about("image")(value) or attributes.get("image") == value,
    }
    return _all(filters, tests) and matches_labels(filters.get("label", []), attributes)


def matches_labels(wanted: list[str], labels: Mapping[str, str]) -> bool:
    """Whether all of KEY or KEY=VALUE hold."""
    for text in wanted:
        key, equals, value = text.partition("=")
        if key not in labels or (equals and labels[key] != value):
            return False
    return True


def matches_reference(pattern: str, name: str) -> bool:
    """Docker's reference=: a shell pattern on "repository" or "repository:tag", with or without its registry."""
    from fnmatch import fnmatchcase  # lazy: few lists are filtered so

    repository = name.partition("@")[0]
    if ":" in repository.rpartition("/")[2] and ":" not in pattern.rpartition("/")[2]:
        repository = repository.rpartition(":")[0]
    parts = repository.split("/")
    return any(fnmatchcase("/".join(parts[at:]), pattern) for at in range(len(parts)))


def _all(filters: Filters, tests: Mapping[str, Callable[[str], bool]]) -> bool:
    return all(any(tests[key](value) for value in values) for key, values in filters.items() if key in tests)


def _is_image(wanted: str, image: str, image_id: str) -> bool:
    if wanted in (image, image_id):
        return True
    digits = wanted.removeprefix("sha256:")
    if len(digits) >= 4 and image_id.removeprefix("sha256:").startswith(digits):
        return True
    tagged = image if ":" in image.rpartition("/")[2] or "@" in image else f"{image}:latest"
    return matches_reference(wanted, tagged)


def search(pattern: str, text: str) -> bool:
    """Whether `pattern`, a regular expression, is found in `text`."""
    import re  # lazy: 2 ms

    try:
        return re.search(pattern, text) is not None
    except re.error as error:
        raise UsageError(f"--filter: '{pattern}' is not a regular expression: {error}") from None
