"""What was found out about this host."""

from __future__ import annotations

from nagaya.static import NamedTuple

OK, LIMITED, MISSING = "ok", "limited", "missing"


class Finding(NamedTuple):
    """`how` it was found out, and what `follows` for the user."""

    topic: str
    status: str
    found: str
    how: str
    follows: str
