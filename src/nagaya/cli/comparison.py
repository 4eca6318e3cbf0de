"""How a comparison of types looks: as a table, as bars in a terminal, and as a picture."""

from __future__ import annotations

from nagaya.cli import table
from nagaya.errors import HostError, Unsupported
from nagaya.manager.advice import cost, costs, median
from nagaya.manager.comparing import BARE, MEASURES, Column, Comparison, Measure

BAR_CELLS = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"
_COLOURS = {"container": "#2a78b5", "kvm": "#d9742b", "emulated": "#7a5ba6"}


def render_table(comparison: Comparison, *, width: int) -> list[str]:
    """Lines: for each measure the medians, with what they cost beside the bare host, and below each from what to what."""
    rows = [["", *("bare host" if column.name == BARE else column.name for column in comparison.columns)]]
    for measure in MEASURES:
        rows.append([measure.title, *(_middle(measure, column) for column in comparison.columns)])
        rows.append(["", *(_spread(measure, column) for column in comparison.columns)])
    return table.render(rows, width=width)


def _middle(measure: Measure, column: Column) -> str:
    values = column.samples.get(measure.key)
    if not values:
        return "-"
    times = cost(column, measure.key)
    return format_figure(measure, median(values)) + (f" ({format_times(times)})" if times is not None else "")


def _spread(measure: Measure, column: Column) -> str:
    values = column.samples.get(measure.key)
    if not values:
        return ""
    return f"  {format_figure(measure, min(values))} .. {format_figure(measure, max(values))}, n={len(values)}"


def format_figure(measure: Measure, value: float) -> str:
    """ "1.31 s", "17 GB/s", "310 Msteps/s", "11.2 MiB"."""
    if measure.unit == "s":
        for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
            if value >= size:
                return f"{_digits(value / size)} {unit}"
        return f"{_digits(value / 1e-9)} ns"
    if measure.unit == "B" and not measure.rate:
        return f"{_digits(value / (1 << 20))} MiB"
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0)):
        if value >= size or not prefix:
            return f"{_digits(value / size)} {prefix}{measure.unit}/s"
    raise AssertionError("the last prefix takes all")


def format_times(times: float) -> str:
    return f"{_digits(times)}x"


def _digits(value: float) -> str:
    """Three digits, or all that are before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def render_bars(comparison: Comparison, *, unicode: bool) -> list[str]:
    """Lines: what each measure costs in each type, times the bare host, on a logarithmic scale that begins at 1x."""
    columns = [column for column in comparison.columns if column.name != BARE]
    found = {(m.key, c.name): times for m in MEASURES for c in columns if (times := cost(c, m.key)) is not None}
    most = max([2.0, *found.values()])
    title_cells, name_cells = max(len(m.title) for m in MEASURES), max(len(c.name) for c in columns)
    lines = ["How many times the bare host's time or memory (logarithmic; shorter is better):"]
    for measure in MEASURES:
        title = measure.title
        for column in columns:
            times = found.get((measure.key, column.name))
            text = "not measured" if times is None else f"{_bar(times, most, unicode=unicode)} {format_times(times)}"
            lines.append(f"{title:<{title_cells}}  {column.name:<{name_cells}}  {text}")
            title = ""
    return lines


def _bar(times: float, most: float, *, unicode: bool) -> str:
    import math  # lazy: one command draws

    eighths = max(1, round(8 * BAR_CELLS * math.log(max(times, 1.0)) / math.log(most)))
    if not unicode:
        return "#" * max(1, round(eighths / 8))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def require_plotting() -> None:
    """Raise `Unsupported` when no picture could be drawn: known before anything is measured."""
    try:
        import matplotlib.figure  # noqa: F401  (lazy: 0.3 s, for who asks for a picture)
    except ImportError:
        raise Unsupported(
            "a picture needs matplotlib",
            hint="pip install 'nagaya[plot]', or apt-get install python3-matplotlib; or leave --png away",
            finding="import matplotlib",
        ) from None


def write_picture(comparison: Comparison, path: str, *, title: str) -> None:
    """The same bars as a PNG, with a whisker from the lowest to the highest of the samples. Raises `HostError`."""
    from matplotlib.figure import Figure

    columns = [column for column in comparison.columns if column.name != BARE]
    figure = Figure(figsize=(10, 1.2 + 0.28 * len(MEASURES) * (len(columns) + 1)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / len(columns)
    for place, column in enumerate(columns):
        at, middle, low, high = [], [], [], []
        for row, measure in enumerate(MEASURES):
            found = costs(column, measure.key)
            if found:
                at.append(row + (place - (len(columns) - 1) / 2) * height)
                middle.append(median(found))
                low.append(middle[-1] - min(found))
                high.append(max(found) - middle[-1])
        axes.barh(
            at, [value - 1 for value in middle], height, left=1, xerr=(low, high), label=column.name,
            color=_COLOURS[column.name], error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#333333"},
        )  # fmt: skip
        for position, value, above in zip(at, middle, high, strict=True):
            axes.text(max(1, value + above) * 1.08, position, format_times(value), va="center", fontsize=8)
    axes.set_xscale("log")
    axes.axvline(1, color="#333333", linewidth=1)
    axes.set_yticks(range(len(MEASURES)), [measure.title for measure in MEASURES])
    axes.invert_yaxis()
    axes.set_xlim(right=axes.get_xlim()[1] * 2.5)
    axes.set_xlabel("times the bare host's time or memory (logarithmic; 1 = as the bare host)")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=len(columns))
    axes.grid(axis="x", linewidth=0.3)
    try:
        figure.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise HostError.from_os(error, f"cannot write the picture {path}") from None
