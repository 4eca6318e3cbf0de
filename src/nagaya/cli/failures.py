"""Every failure as text on standard error: one sentence, one hint, never a traceback unless NAGAYA_DEBUG=1."""

from __future__ import annotations

import os
import sys

from nagaya.errors import HostError, LaunchError, NagayaError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def say(message: str, *, hint: str = "") -> None:
    """`nagaya: message`, and the hint below it. A standard error that is closed or full is no reason to fail."""
    text = f"nagaya: {printable(message)}\n"
    if hint:
        text += f"  hint: {printable(hint)}\n"
    try:
        sys.stdout.flush()  # what was printed before stands before the error, when both go to one place
    except (OSError, ValueError):
        pass  # that may be the very error that this tells of
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        return


def printable(text: str) -> str:
    """`text` without what could move the cursor or end the line: names in messages may be a guest's."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def warn(sentences: Sequence[str]) -> None:
    """Warnings that come with a result."""
    for sentence in sentences:
        say(f"warning: {sentence}")


def report(error: NagayaError, *, debug: bool) -> None:
    """An error of ours."""
    if debug:
        _print_traceback(error)
    say(error.message, hint=error.hint)
    if isinstance(error, LaunchError) and error.log_tail:
        for line in error.log_tail.splitlines()[-20:]:
            _write_line(f"  | {printable(line)}")


def report_os_error(error: OSError, *, debug: bool) -> None:
    """An `OSError` that no layer translated: still a sentence, by the same table of hints."""
    if debug:
        _print_traceback(error)
    translated = HostError.from_os(error, "the system refused an operation")
    say(translated.message, hint=translated.hint)


def report_defect(error: BaseException, argv: Sequence[str], *, debug: bool) -> None:
    """A defect of ours: a full report in a file, one sentence on the terminal."""
    if debug:
        _print_traceback(error)
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    path = _write_report(error, argv)
    where = (
        f"a report was written to {path}; please attach it to an issue" if path else "run it again with NAGAYA_DEBUG=1"
    )
    say(f"internal error: {reason.splitlines()[0]}", hint=where)


def _print_traceback(error: BaseException) -> None:
    import traceback  # lazy: for debugging only

    try:
        traceback.print_exception(error, file=sys.stderr)
    except (OSError, ValueError):
        return


def _write_line(line: str) -> None:
    try:
        sys.stderr.write(line + "\n")
    except (OSError, ValueError):
        return


def _write_report(error: BaseException, argv: Sequence[str]) -> str:
    """The path of a new file that only its owner can read, or "" when none could be written.

    The arguments are reduced to their flags' names: values (`-e TOKEN=…`) may be secrets.
    """
    import platform
    import tempfile
    import traceback

    from nagaya import __version__

    shown = [word if not word.startswith("-") and at == 0 else word.partition("=")[0] for at, word in enumerate(argv)
             if at == 0 or word.startswith("-")]  # fmt: skip
    text = (
        f"nagaya {__version__}, Python {platform.python_version()}, {platform.platform()}\n"
        f"command and flags: {shown}\n\n{''.join(traceback.format_exception(error))}"
    )
    try:
        fd, path = tempfile.mkstemp(prefix="nagaya-error-", suffix=".txt")
        with os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return ""
    return path
