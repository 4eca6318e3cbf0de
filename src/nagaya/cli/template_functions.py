"""The functions that a `--format` template may call, and how Go prints values."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence


class Row(dict[str, object]):
    """A line of a list, by Docker's field names; `labels` is what `.Label "key"` looks into."""

    labels: Mapping[str, str] = {}


def show(value: object) -> str:
    """As Go's %v: true, <no value>, [a b], map[a:1]."""
    if value is None:
        return "<no value>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return "map[" + " ".join(f"{key}:{show(value[key])}" for key in sorted(value, key=str)) + "]"
    if isinstance(value, (list, tuple)):
        return "[" + " ".join(show(item) for item in value) + "]"
    return str(value)


def truth(value: object) -> bool:
    """What Go takes for true: not zero, not empty."""
    return bool(value)


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _index(value: object, *keys: object) -> object:
    for key in keys:
        if isinstance(value, Mapping):
            value = value.get(str(key), "")
        elif isinstance(value, (list, tuple, str)):
            at = int(str(key))
            if not 0 <= at < len(value):
                raise ValueError(f"index {at} is out of range: there are {len(value)}")
            value = value[at]
        else:
            raise TypeError(f"{show(value)!r} cannot be indexed")
    return value


def _join(values: object, separator: object = "") -> str:
    if isinstance(values, str) and isinstance(separator, (list, tuple)):
        values, separator = separator, values  # {{.List | join ","}} and {{join .List ","}} are both about
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"'join' needs a list, not {show(values)!r}")
    return str(separator).join(show(item) for item in values)


def _split(text: object, separator: object) -> list[str]:
    return str(text).split(str(separator)) if str(separator) else list(str(text))


def _slice(value: object, *bounds: object) -> object:
    if not isinstance(value, (str, list, tuple)):
        raise TypeError(f"{show(value)!r} cannot be sliced")
    first, last = ([int(str(bound)) for bound in bounds] + [0, len(value)][len(bounds) :])[:2]
    if not 0 <= first <= last <= len(value):
        raise ValueError(f"slice bounds {first}:{last} are out of range")
    return value[first:last]


def _length(value: object) -> int:
    if isinstance(value, (str, Sequence, Mapping)):
        return len(value)
    raise TypeError(f"{show(value)!r} has no length")


def _printf(template: object, *values: object) -> str:
    """%s %v %q %d %f %x %c %t and %% with Go's (that is C's) flags, widths and precisions."""
    import re

    rest = list(values)

    def one(found: re.Match[str]) -> str:
        flags, verb = found[1], found[2]
        if verb == "%":
            return "%"
        if not rest:
            return f"%!{verb}(MISSING)"
        value = rest.pop(0)
        if verb == "q":
            return f"%{flags}s" % json.dumps(show(value), ensure_ascii=False)
        if verb in "dxXoc":
            return f"%{flags}{verb}" % int(str(value))
        if verb in "feg":
            return f"%{flags}{verb}" % float(str(value))
        return f"%{flags}s" % show(value)

    text = re.sub(r"%([-+ #0]*\d*(?:\.\d+)?)([a-zA-Z%])", one, str(template))
    return text + "".join(f"%!(EXTRA {show(value)})" for value in rest)


def _print(*values: object) -> str:
    return "".join(show(value) for value in values)


def _println(*values: object) -> str:
    return " ".join(show(value) for value in values) + "\n"


def _eq(value: object, *others: object) -> bool:
    return any(value == other or show(value) == show(other) for other in others)


def _compare(value: object, other: object) -> int:
    if isinstance(value, (int, float)) and isinstance(other, (int, float)):
        return (value > other) - (value < other)
    return (str(value) > str(other)) - (str(value) < str(other))


def _and(*values: object) -> object:
    return next((value for value in values if not truth(value)), values[-1])


def _or(*values: object) -> object:
    return next((value for value in values if truth(value)), values[-1])


def _truncate(text: object, length: object) -> str:
    return str(text)[: int(str(length))]


def _pad(text: object, before: object, after: object) -> str:
    return " " * int(str(before)) + show(text) + " " * int(str(after)) if show(text) else ""


FUNCTIONS: dict[str, Callable[..., object]] = {
    "and": _and,
    "eq": _eq,
    "ge": lambda a, b: _compare(a, b) >= 0,
    "gt": lambda a, b: _compare(a, b) > 0,
    "index": _index,
    "join": _join,
    "json": _json,
    "le": lambda a, b: _compare(a, b) <= 0,
    "len": _length,
    "lower": lambda text: show(text).lower(),
    "lt": lambda a, b: _compare(a, b) < 0,
    "ne": lambda a, b: not _eq(a, b),
    "not": lambda value: not truth(value),
    "or": _or,
    "pad": _pad,
    "print": _print,
    "printf": _printf,
    "println": _println,
    "slice": _slice,
    "split": _split,
    "title": lambda text: show(text).title(),
    "truncate": _truncate,
    "upper": lambda text: show(text).upper(),
}
