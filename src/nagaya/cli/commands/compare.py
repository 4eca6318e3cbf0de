"""`nagaya compare`."""

from __future__ import annotations

import os
import sys

from nagaya.cli import comparison, table, values
from nagaya.cli.context import Context
from nagaya.cli.flags import Command, Flag, Parsed
from nagaya.cli.listing import JSON, print_json
from nagaya.cli.progress import can_redraw
from nagaya.errors import UsageError
from nagaya.manager.advice import advise, costs
from nagaya.manager.comparing import MEASURES, Comparison, compare


def run(context: Context, parsed: Parsed) -> int:
    """Measure, show, and say what follows from it."""
    picture = parsed.text("png")
    if picture:
        comparison.require_plotting()
        directory = os.path.dirname(picture) or "."
        if not os.access(directory, os.W_OK | os.X_OK):
            raise UsageError(f"--png: nothing can be written in '{directory}'", hint="for example --png compare.png")
    starts = values.parse_integer(parsed.text("starts", "0"), "--starts", least=1) if parsed.given("starts") else 0
    image = parsed.words[0]
    notice = _Notice(quiet=parsed.switch("quiet"))
    try:
        found = compare(
            context.host, image, types=tuple(parsed.texts("type")), network=parsed.text("network", "bridge"),
            starts=starts, slow=parsed.switch("slow"), report=notice.show,
        )  # fmt: skip
    finally:
        notice.clear()
    if picture:
        comparison.write_picture(found, picture, title=f"'{image}' behind each wall, on {os.uname().nodename}")
    if parsed.switch("json"):
        print_json(_records(found))
    else:
        _print(found)
    return 0


def _print(found: Comparison) -> None:
    for line in comparison.render_table(found, width=table.terminal_width()):
        print(line)
    print()
    encoding = (sys.stdout.encoding or "").lower()
    for line in comparison.render_bars(found, unicode=encoding.startswith("utf")):
        print(line)
    for column in found.columns:
        for key, reason in column.missing.items():
            title = next(measure.title for measure in MEASURES if measure.key == key)
            print(f"{column.name}: {title} was not measured: {reason}")
    print()
    for line in advise(found):
        print(line)


def _records(found: Comparison) -> list[dict[str, object]]:
    records: list[dict[str, object]] = [
        {
            "type": column.name,
            "samples": column.samples,
            "host_beside": column.beside,
            "times_the_host": {measure.key: costs(column, measure.key) for measure in MEASURES if column.beside},
            "missing": column.missing,
        }
        for column in found.columns
    ]
    return records + [{"type": type_, "left_out": reason} for type_, reason in found.left_out.items()]


class _Notice:
    """What is being measured, in one line of standard error that is drawn over; nothing where that cannot be."""

    def __init__(self, *, quiet: bool) -> None:
        self._shown = not quiet and can_redraw()

    def show(self, text: str) -> None:
        if self._shown:
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


COMPARE = Command(
    run,
    usage="IMAGE",
    words=(1, 1),
    flags=(
        Flag("--type", "Measure this type (default: all that this host runs, and runs well)", value="TYPE", many=True),
        Flag("--slow", "Measure also what this host makes slow: kvm where KVM is a software one, ten minutes"),
        Flag("--net --network", "Network of the machines: bridge (default), none", value="NETWORK"),
        Flag("--starts", "How often to start each (default 3 to 10)", value="NUMBER"),
        Flag("--png", "Draw the bars into this file as well", value="FILE"),
        JSON,
        Flag("-q --quiet", "Do not say on standard error what is being measured"),
    ),
    about="Which type should I use? The image is started as each, and the same small programs measure inside each and,"
    " in turn, on the bare host. A figure is the median; below it are the lowest and the highest of n samples, and in"
    " brackets is how many times the bare host's time or memory it is. The image needs a shell, sh.",
    examples=(
        ("nagaya compare debian", ""),
        ("nagaya compare --type container --type emulated --png walls.png debian", ""),
        ("nagaya compare --slow debian", "all three, whatever this host's KVM is"),
    ),
)
