"""How a command prints a list: a table, ids only (-q), JSON (--json) or a template (--format)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from nagaya.cli import table
from nagaya.cli.flags import Flag, Parsed
from nagaya.cli.template_functions import Row
from nagaya.errors import UsageError
from nagaya.static import NamedTuple

FORMAT = Flag(
    "--format", "A Go template such as '{{.ID}} {{.Names}}', 'table …' with headings, or json", value="FORMAT"
)
JSON = Flag("--json", "Print one JSON array")
QUIET = Flag("-q --quiet", "Print ids only")
NO_TRUNC = Flag("--no-trunc", "Do not shorten anything")
FILTER = Flag("-f --filter", "Show only what matches", value="KEY=VALUE", many=True)


class Layout(NamedTuple):
    """A table: `columns` are field names in order, `headings` what stands over any field, `elastic` what may be cut."""

    columns: tuple[str, ...]
    headings: dict[str, str]
    elastic: tuple[str, ...] = ()


def print_json(data: object) -> None:
    """One JSON document, indented, in UTF-8."""
    import json  # lazy: 5 ms, and most lists are for people

    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def print_rows(rows: Sequence[Row], layout: Layout, *, format: str, no_trunc: bool = False) -> None:
    """By --format's value: "" or "table" is the table, "json" an object a line, else a template."""
    if format in ("", "table"):
        _print_table([[str(row[name]) for name in layout.columns] for row in rows], layout, no_trunc=no_trunc)
    elif format == "json":
        import json  # lazy: as above

        for row in rows:
            sys.stdout.write(json.dumps(row, separators=(",", ":"), ensure_ascii=False) + "\n")
    elif format.startswith(("table ", "table\t")):
        _print_template_table(rows, layout, format[len("table") :].lstrip(" \t"))
    else:
        from nagaya.cli.template import Template  # lazy: a plain list needs none

        template = Template(format)
        for row in rows:
            sys.stdout.write(template.render(row) + "\n")


def _print_table(rows: list[list[str]], layout: Layout, *, no_trunc: bool) -> None:
    heading = [layout.headings[name] for name in layout.columns]
    elastic = tuple(layout.columns.index(name) for name in layout.elastic)
    width = 0 if no_trunc else table.terminal_width()
    for line in table.render([heading, *rows], width=width, elastic=elastic):
        sys.stdout.write(line + "\n")


def _print_template_table(rows: Sequence[Row], layout: Layout, text: str) -> None:
    from nagaya.cli.template import Template  # lazy: as above

    template = Template(text)
    heading = Row((name, layout.headings.get(name, name.upper())) for name in (rows[0] if rows else layout.headings))
    heading.labels = _HeadingLabels()
    lines = [template.render(row).split("\t") for row in [heading, *rows]]
    most = max(len(line) for line in lines)
    for line in table.render([line + [""] * (most - len(line)) for line in lines]):
        sys.stdout.write(line + "\n")


class _HeadingLabels(dict[str, str]):
    """`.Label "com.example.tier"` in the heading's line is the heading of that column."""

    def get(self, key: str, default: object = None) -> str:
        return key.rpartition(".")[2]


def print_list(
    parsed: Parsed,
    layout: Layout,
    *,
    rows: Callable[[], Sequence[Row]],
    records: Callable[[], Sequence[dict[str, object]]],
    ids: Callable[[], Sequence[str]],
) -> None:
    """What the flags ask for, of a list command that has -q, --json, --format and --no-trunc. Only that is computed."""
    format = parsed.text("format")
    if parsed.switch("json") and (format or parsed.switch("quiet")):
        raise UsageError("--json excludes --format and -q", hint="use one of them")
    if parsed.switch("json"):
        print_json(list(records()))
    elif parsed.switch("quiet") and not format:
        for text in ids():
            sys.stdout.write(text + "\n")
    else:
        print_rows(rows(), layout, format=format, no_trunc=parsed.switch("no-trunc"))
