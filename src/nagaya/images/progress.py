"""How long work on images tells what it is doing. The CLI draws it; a library user may ignore it."""

from __future__ import annotations

from nagaya.static import Protocol


class Progress(Protocol):
    """Receives what happens. Calls may come from several threads at once (parallel downloads)."""

    def step(self, text: str) -> None:
        """One line: "local image", "trying registry …", "using bootstrap source mmdebstrap"."""

    def start(self, key: str, label: str, total_bytes: int) -> None:
        """Something of `total_bytes` (0 = unknown) begins to arrive; `key` names it in the calls that follow."""

    def advance(self, key: str, done_bytes: int) -> None:
        """So much of it is here by now (absolute, not an increment)."""

    def finish(self, key: str, note: str = "") -> None:
        """It is complete; `note` says so in a word, such as "already here"."""


class Silent:
    """A `Progress` for callers who want none."""

    def step(self, text: str) -> None:
        return

    def start(self, key: str, label: str, total_bytes: int) -> None:
        return

    def advance(self, key: str, done_bytes: int) -> None:
        return

    def finish(self, key: str, note: str = "") -> None:
        return
