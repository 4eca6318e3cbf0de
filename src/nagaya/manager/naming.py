"""Machine names: what is allowed, and what a machine is called when nobody says."""

from __future__ import annotations

import os

from nagaya.errors import UsageError

_FIRST = (
    "amber", "azure", "brisk", "calm", "cedar", "clear", "crimson", "dusky", "early", "fair", "fleet", "fresh", "gentle",
    "golden", "green", "hardy", "hazel", "indigo", "ivory", "keen", "lively", "lucid", "mellow", "merry", "misty",
    "noble", "olive", "pale", "placid", "plain", "prime", "quick", "quiet", "rapid", "ready", "rosy", "russet", "sandy",
    "serene", "sharp", "silver", "sleek", "smart", "snowy", "solid", "steady", "still", "sunny", "swift", "tidy",
    "tranquil", "vivid", "warm", "wild", "windy", "wise", "young", "zesty",
)  # fmt: skip
_SECOND = (
    "acorn", "alder", "aster", "badger", "bamboo", "beacon", "birch", "brook", "camellia", "carp", "cedar", "clover",
    "crane", "curlew", "dove", "egret", "fern", "finch", "fox", "gate", "hare", "harbor", "heron", "ibis", "iris",
    "jay", "kite", "lantern", "lark", "lotus", "maple", "marten", "moss", "oak", "orchid", "otter", "owl", "pebble",
    "persimmon", "pine", "plover", "plum", "quail", "reed", "robin", "roof", "sparrow", "spruce", "swallow", "tanuki",
    "teal", "thrush", "tiger", "trout", "veranda", "well", "willow", "wren",
)  # fmt: skip
_ALLOWED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
MAX_LENGTH = 63


def check_name(name: str, what: str = "machine") -> str:
    """Answers `name`. Raises `UsageError` unless it is letters, digits, `_`, `.`, `-`, beginning with a letter or digit."""
    if not name or len(name) > MAX_LENGTH or not name[0].isalnum() or not _ALLOWED.issuperset(name):
        raise UsageError(
            f"'{name}' is not a valid {what} name",
            hint=f"use letters, digits, '_', '.' and '-', beginning with a letter or digit, at most {MAX_LENGTH}",
        )
    return name


def generate_name(attempt: int) -> str:
    """A readable name; from the fourth attempt on with a number, so that it ends on a crowded host."""
    a, b, c = os.urandom(3)
    name = f"{_FIRST[a % len(_FIRST)]}-{_SECOND[b % len(_SECOND)]}"
    return f"{name}-{c}{attempt}" if attempt > 3 else name
