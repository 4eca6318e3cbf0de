"""The READMEs: short, alike in both languages, and true where a test can tell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nagaya.cli import catalog
from tests.repo.sources import ROOT

WORDS_IN_THREE_MINUTES = 3 * 250
DOCUMENTS = [ROOT / "README.md", ROOT / "README.ja.md", *sorted(ROOT.glob("docs/*.md"))]


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```|^\|.*$|<!--.*?-->", "", text, flags=re.MULTILINE | re.DOTALL)


def test_three_minutes() -> None:
    assert len(prose((ROOT / "README.md").read_text(encoding="utf-8")).split()) <= WORDS_IN_THREE_MINUTES


def test_set_up_is_two_commands() -> None:
    first = code_blocks((ROOT / "README.md").read_text(encoding="utf-8"))[0]
    assert first.split("\n") == ["make demo", "make test", ""]


def test_both_languages_show_the_same() -> None:
    english, japanese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ja.md"))
    assert code_blocks(english) == code_blocks(japanese)
    assert len(re.findall(r"^## ", english, flags=re.MULTILINE)) == len(
        re.findall(r"^## ", japanese, flags=re.MULTILINE)
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    assert [target for target in targets if not (document.parent / target).exists()] == []


def test_commands_that_are_shown_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = {
        line.split()[1] for block in code_blocks(text) for line in block.splitlines() if line.startswith("nagaya ")
    }
    assert shown and shown <= {*catalog.MACHINES, *catalog.IMAGES, *catalog.HOST, *catalog.GROUPS}


def test_make_targets_that_are_shown_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    shown = {
        target
        for document in DOCUMENTS
        for target in re.findall(r"`make ([a-z]+)", document.read_text(encoding="utf-8"))
    }
    assert shown <= targets
