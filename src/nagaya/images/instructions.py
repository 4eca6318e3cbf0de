"""Changes to an image's config in the words of a Dockerfile, as `commit --change` and `import --change` take them."""

from __future__ import annotations

import json

from nagaya.errors import UsageError
from nagaya.static import Any

INSTRUCTIONS = ("CMD", "ENTRYPOINT", "ENV", "EXPOSE", "LABEL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR")


def apply_instructions(config: dict[str, Any], changes: tuple[str, ...]) -> None:
    """Change `config` (the `config` object of an image's config blob). Raises `UsageError`."""
    for change in changes:
        word, _, rest = change.strip().partition(" ")
        word, rest = word.upper(), rest.strip()
        if word not in INSTRUCTIONS:
            raise UsageError(f"'{change}' begins with no instruction that a change can have", hint=_hint())
        if not rest:
            raise UsageError(f"'{change}' says nothing after {word}", hint="for example 'CMD [\"sh\"]'")
        if "\0" in rest:
            raise UsageError(f"a change with a NUL byte: {word}")
        _apply(config, word, rest)


def check_instructions(changes: tuple[str, ...]) -> None:
    """Raise `UsageError` now rather than after minutes of packing."""
    apply_instructions({}, changes)


def _apply(config: dict[str, Any], word: str, rest: str) -> None:
    if word == "CMD":
        config["Cmd"] = _parse_command(word, rest)
    elif word == "ENTRYPOINT":
        config["Entrypoint"] = _parse_command(word, rest)
        config.pop("Cmd", None)  # as Docker: an image's Cmd was meant for its old entrypoint
    elif word == "ENV":
        _set_environment(config, _parse_pairs(word, rest))
    elif word == "LABEL":
        config["Labels"] = {**(config.get("Labels") or {}), **dict(_parse_pairs(word, rest))}
    elif word == "EXPOSE":
        ports = [_parse_port(port) for port in rest.split()]
        config["ExposedPorts"] = {**(config.get("ExposedPorts") or {}), **{port: {} for port in ports}}
    elif word == "VOLUME":
        paths = _parse_command(word, rest) if rest.startswith("[") else rest.split()
        config["Volumes"] = {**(config.get("Volumes") or {}), **{_absolute(word, path): {} for path in paths}}
    elif word == "WORKDIR":
        before = config.get("WorkingDir") or "/"
        config["WorkingDir"] = rest if rest.startswith("/") else f"{before.rstrip('/')}/{rest}"
    elif word == "USER":
        config["User"] = rest
    else:
        config["StopSignal"] = rest


def _parse_command(word: str, rest: str) -> list[str]:
    """A JSON array of strings, or a line for the shell."""
    if not rest.startswith("["):
        return ["/bin/sh", "-c", rest]
    try:
        data = json.loads(rest)
    except ValueError:
        data = None
    if not isinstance(data, list) or not all(isinstance(part, str) for part in data):
        raise UsageError(f"{word}: '{rest}' is no JSON array of strings", hint=f'for example {word} ["sleep", "60"]')
    return data


def _parse_pairs(word: str, rest: str) -> list[tuple[str, str]]:
    """`KEY=VALUE …` with shell's quoting, or the old form `KEY VALUE`."""
    import shlex  # lazy: 2 ms

    first = rest.split(None, 1)
    if "=" not in first[0]:
        if len(first) < 2:
            raise UsageError(f"{word}: '{rest}' is not KEY=VALUE", hint=f"for example {word} key=value")
        return [(first[0], first[1])]
    try:
        parts = shlex.split(rest)
    except ValueError as error:
        raise UsageError(f"{word}: '{rest}' has an open quotation ({error})") from None
    pairs = []
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise UsageError(f"{word}: '{part}' is not KEY=VALUE", hint=f"for example {word} key=value")
        pairs.append((key, value))
    return pairs


def _set_environment(config: dict[str, Any], pairs: list[tuple[str, str]]) -> None:
    merged = dict(pair.partition("=")[::2] for pair in config.get("Env") or [])
    merged.update(pairs)
    config["Env"] = [f"{key}={value}" for key, value in merged.items()]


def _parse_port(text: str) -> str:
    number, _, protocol = text.partition("/")
    protocol = (protocol or "tcp").lower()
    if protocol not in ("tcp", "udp", "sctp") or not all(
        end.isascii() and end.isdigit() and 0 < int(end[:6]) < 65536 for end in number.split("-", 1)
    ):
        raise UsageError(f"EXPOSE: '{text}' is no port", hint="for example EXPOSE 80 or EXPOSE 53/udp")
    return f"{number}/{protocol}"


def _absolute(word: str, path: str) -> str:
    if not path.startswith("/"):
        raise UsageError(f"{word}: '{path}' is not an absolute path")
    return path


def _hint() -> str:
    return f"one of: {', '.join(INSTRUCTIONS)}"
