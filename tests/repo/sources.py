"""The project's own files, as the tests of this directory look at them."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "nagaya"


class Source(NamedTuple):
    """One Python file: its path below the checkout, its dotted name (a package's is that of its directory), its tree."""

    path: str
    module: str
    text: str
    tree: ast.Module


def read_source(path: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts) if path.is_relative_to(PACKAGE) else ""
    return Source(str(path.relative_to(ROOT)), module.removesuffix(".__init__"), text, ast.parse(text))


@functools.cache
def package_sources() -> tuple[Source, ...]:
    return tuple(read_source(path) for path in sorted(PACKAGE.rglob("*.py")))


@functools.cache
def all_sources() -> tuple[Source, ...]:
    others = [path for name in ("tests", "benches") for path in sorted((ROOT / name).rglob("*.py"))]
    return package_sources() + tuple(read_source(path) for path in [*others, ROOT / "setup.py"])


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import of ours, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "nagaya")
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "nagaya.RELATIVE"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nagaya":
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
