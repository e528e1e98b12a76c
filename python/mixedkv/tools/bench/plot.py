"""The figures of both benches as bars. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plan import Report
from .report import label

if TYPE_CHECKING:
    from .end_to_end import plan as whole

_COLOURS = {
    "mixedkv": "#1b6ca8",
    "ggml": "#d1495b",
    "torch": "#edae49",
    "onnxruntime": "#66a182",
    "openvino": "#8d6a9f",
    "gguf": "#9a9a9a",
    "memory": "#cccccc",
}


def save_plot(report: Report, path: Path) -> None:
    """Draw every cell as bars of the ratio to mixedkv, on a logarithmic axis, into a file.

    Raises
    ------
    ValueError
        For a kind of file that matplotlib does not write.
    """

    def draw(axes: Any, rows: Sequence[Any]) -> None:
        axes.barh(
            range(len(rows)),
            [row.ratio for row in rows],
            color=[_COLOURS[row.peer] for row in rows],
        )
        axes.set_xscale("log")
        axes.axvline(1.0, color="black", linewidth=0.8)
        for y, row in enumerate(rows):
            axes.text(row.ratio, y, f" {row.ratio:.2g}", va="center", fontsize=7)
        axes.margins(x=0.12)

    charts = []
    for table in report.tables:
        rows = [row for row in table.rows if row.ratio is not None and row.role != "part"]
        rows.sort(key=lambda row: (row.against or "", row.ratio or 0.0))
        charts.append((table.title, rows, [label(table, row) for row in rows]))
    words = "time by mixedkv's on the same kind of keys and math (right of 1: slower)"
    _save(path, charts, words, draw)


def save_whole(report: whole.Report, path: Path) -> None:
    """Draw the time of a decode step, attention's part and the rest, into a file.

    Raises
    ------
    ValueError
        For a kind of file that matplotlib does not write.
    """

    def draw(axes: Any, rows: Sequence[Any]) -> None:
        at = range(len(rows))
        attention, rest = [1e3 * row.attention for row in rows], [1e3 * row.rest for row in rows]
        axes.barh(at, attention, color=_COLOURS["mixedkv"], label="attention and cache")
        axes.barh(at, rest, left=attention, color=_COLOURS["memory"], label="everything else")
        for y, row in enumerate(rows):
            text = f" {row.tokens_per_second:.1f} tokens/s"
            axes.text(attention[y] + rest[y], y, text, va="center", fontsize=7)
        axes.margins(x=0.25)
        axes.legend(fontsize=7)

    charts = []
    for table in report.tables:
        rows = [row for row in table.rows if row.step is not None]
        title = f"{report.model['title']}: {table.title}"
        charts.append((title, rows, [row.name for row in rows]))
    _save(path, charts, "ms a decode step, medians", draw)


def _save(
    path: Path,
    charts: Sequence[tuple[str, Sequence[Any], Sequence[str]]],
    words: str,
    draw: Callable[[Any, Sequence[Any]], None],
) -> None:
    """Draw a chart for each (title, rows, their names) that has rows, and write them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    charts = [chart for chart in charts if chart[1]]
    columns = min(2, max(1, len(charts)))
    lines = max(1, -(-len(charts) // columns))
    tallest = max((len(rows) for _, rows, _ in charts), default=1)
    figure = Figure(figsize=(8 * columns, lines * (1.4 + 0.26 * tallest)), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (title, rows, names) in enumerate(charts, 1):
        axes = figure.add_subplot(lines, columns, index)
        draw(axes, rows)
        axes.set_yticks(range(len(rows)), names, fontsize=7)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(words, fontsize=7)
    figure.savefig(path)
