"""Plain aligned columns, as wide as they must be and no wider than the terminal."""

from __future__ import annotations

import os

GAP = 3
LEAST = 8  # an elastic column is not cut below this


def render(rows: list[list[str]], *, width: int = 0, elastic: tuple[int, ...] = ()) -> list[str]:
    """Lines of `rows` (the first may be a heading). Over `width` cells (0 = no limit) the `elastic` columns give way."""
    if not rows:
        return []
    widths = [max(cells(row[column]) for row in rows) for column in range(len(rows[0]))]
    if width:
        _squeeze(widths, width, elastic)
    return [_line(row, widths) for row in rows]


def _squeeze(widths: list[int], width: int, elastic: tuple[int, ...]) -> None:
    while elastic and sum(widths) + GAP * (len(widths) - 1) > width:
        widest = max(elastic, key=lambda column: widths[column])
        if widths[widest] <= LEAST:
            return
        widths[widest] -= 1


def _line(row: list[str], widths: list[int]) -> str:
    parts = []
    for text, width in zip(row, widths, strict=True):
        text = cut(text, width)
        parts.append(text + " " * (width - cells(text)))
    return (" " * GAP).join(parts).rstrip()


def cells(text: str) -> int:
    """How many cells of a terminal `text` takes."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width  # lazy: most names are ASCII

    return sum(0 if combining(letter) else 2 if east_asian_width(letter) in "WF" else 1 for letter in text)


def cut(text: str, width: int) -> str:
    """`text` in at most `width` cells, with … where something was cut off."""
    if cells(text) <= width:
        return text
    while text and cells(text) > width - 1:
        text = text[:-1]
    return text + "…"


def terminal_width() -> int:
    """Columns of standard output; 0 when it is no terminal: then nothing is cut, so that scripts see all."""
    try:
        return os.get_terminal_size(1).columns
    except OSError:
        return 0
