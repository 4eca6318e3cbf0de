"""What no linter checks: lengths, names, markers of unfinished work, docstrings, swallowed errors."""

from __future__ import annotations

import ast
import re

import pytest

from tests.repo.sources import ROOT, Source, all_sources, package_sources

LONGEST_FUNCTION = 80
LONGEST_MODULE = 600
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "stuff"}
# Put together, so that this file does not find itself.
MARKERS = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX", "HA" + "CK")) + r")\b")


def find_long_functions(source: Source) -> list[str]:
    return [
        f"{source.path}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    ]


def find_swallowed(source: Source) -> list[str]:
    """Handlers of everything that do nothing, and bare ones."""
    found = []
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        everything = node.type is None or (
            isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
        )
        silent = all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body)
        if node.type is None or (everything and silent):
            found.append(f"{source.path}:{node.lineno}")
    return found


def find_stubs(source: Source) -> list[str]:
    """Functions that are not there yet."""
    return [
        f"{source.path}:{node.lineno}"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.unparse(node.exc)
    ]


CHECKS = {"long functions": find_long_functions, "swallowed errors": find_swallowed, "stubs": find_stubs}


@pytest.mark.parametrize("name", CHECKS)
def test_code(name: str) -> None:
    assert [line for source in all_sources() for line in CHECKS[name](source)] == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("long functions", "def f():\n" + "    x = 1\n" * 90),
        ("swallowed errors", "try:\n    f()\nexcept Exception:\n    pass"),
        ("swallowed errors", "try:\n    f()\nexcept:\n    g()"),
        ("stubs", "def f():\n    raise NotImplementedError"),
    ],
)
def test_a_fault_is_found(name: str, text: str) -> None:
    assert CHECKS[name](Source("x.py", "", text, ast.parse(text)))


def test_modules_say_what_they_are() -> None:
    assert [source.path for source in all_sources() if source.text.strip() and not ast.get_docstring(source.tree)] == []


def test_modules_are_short() -> None:
    assert [source.path for source in package_sources() if source.text.count("\n") > LONGEST_MODULE] == []


def test_names_mean_something() -> None:
    parts = [(source.path, part) for source in package_sources() for part in source.module.split(".")]
    assert [path for path, part in parts if part in BANNED_NAMES] == []
    classes = [
        f"{source.path} {node.name}"
        for source in package_sources()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Manager", "Handler", "Helper"))
    ]
    assert classes == []


def test_nothing_is_left_to_do() -> None:
    files = [path for pattern in ("*.c", "*.h", "*.md", "Makefile") for path in ROOT.glob(f"guest/{pattern}")]
    files += [ROOT / "Makefile", ROOT / "README.md", ROOT / "README.ja.md", *ROOT.glob("docs/*.md")]
    texts = [(source.path, source.text) for source in all_sources()]
    texts += [(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in files]
    assert [f"{path}: {match[0]}" for path, text in texts for match in MARKERS.finditer(text)] == []
