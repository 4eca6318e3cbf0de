"""How a long build looks on a terminal and elsewhere."""

from __future__ import annotations

import pytest

from nagaya.cli import build_progress
from nagaya.cli.build_progress import Line, Lines, Quiet, open_build_progress


def test_which_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert type(open_build_progress(quiet=False)) is Line
    assert type(open_build_progress(quiet=True)) is Quiet
    monkeypatch.setenv("TERM", "dumb")
    assert type(open_build_progress(quiet=False)) is Lines


def test_lines_say_now_and_then_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    monkeypatch.setattr(build_progress.time, "monotonic", lambda: now_s)
    lines = Lines()
    lines.step("compiling")
    for done in range(1, 61):
        now_s += 1.0
        lines.count(done, 60, "a.o")
    lines.close()
    assert capsys.readouterr().err.splitlines() == ["compiling", *(f"{n} of about 60 files" for n in (20, 40, 60))]


def test_a_bar_is_redrawn_and_goes_away(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(build_progress.time, "monotonic", lambda: now_s)
    monkeypatch.setattr(build_progress, "terminal_size", lambda: (50, 24))
    line = Line()
    line.step("compiling")
    line.count(1, 4, "a.o")
    line.count(2, 4, "b.o")  # too soon
    now_s += 1
    line.count(2, 4, "a/name/that/is/longer/than/the/terminal/is/wide.o")
    line.close()
    line.close()
    assert capsys.readouterr().err == (
        "compiling\n"
        "\r\x1b[K[######------------------] 1/4 a.o"
        "\r\x1b[K[############------------] 2/4 a/name/that/is/lon"
        "\r\x1b[K"
    )


def test_names_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    line = Line()
    line.count(1, 1, "a\x1b[2J.o")
    assert "\x1b[2J" not in capsys.readouterr().err
