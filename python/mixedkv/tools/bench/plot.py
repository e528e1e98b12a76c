"""The figures as bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .plan import Report, Row, Table

__all__ = ["bar_charts", "save_plot"]

_COLOURS = {
    "mixedkv": "#1b6ca8",
    "ggml": "#d1495b",
    "torch": "#edae49",
    "onnxruntime": "#66a182",
    "openvino": "#8d6a9f",
    "gguf": "#9a9a9a",
    "memory": "#cccccc",
}


def _bars(table: Table) -> list[Row]:
    rows = [row for row in table.rows if row.ratio is not None and row.role != "part"]
    return sorted(rows, key=lambda row: (row.against or "", row.ratio or 0.0))


def bar_charts(bars: Sequence[int]) -> tuple[Any, list[Any]]:
    """Return a figure of matplotlib's and its charts, each with room for that many bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(2, max(1, len(bars)))
    lines = max(1, -(-len(bars) // columns))
    tallest = max(bars, default=1)
    figure = Figure(figsize=(8 * columns, lines * (1.4 + 0.26 * tallest)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(lines, columns, i + 1) for i in range(len(bars))]


def save_plot(report: Report, path: Path) -> None:
    """Draw every cell as bars of the ratio to mixedkv, on a logarithmic axis, into a file.

    Raises
    ------
    ImportError
        Without matplotlib.
    ValueError
        For a kind of file that matplotlib does not write.
    """
    tables = [table for table in report.tables if _bars(table)]
    figure, charts = bar_charts([len(_bars(table)) for table in tables])
    for axes, table in zip(charts, tables, strict=True):
        rows = _bars(table)
        names = [f"{row.role}  {row.name}" if table.task == "convert" else row.name for row in rows]
        ratios = [row.ratio or 0.0 for row in rows]
        at = range(len(rows))
        axes.barh(at, ratios, color=[_COLOURS[row.peer] for row in rows])
        axes.set_yticks(at, names, fontsize=7)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.axvline(1.0, color="black", linewidth=0.8)
        for y, ratio in zip(at, ratios, strict=True):
            axes.text(ratio, y, f" {ratio:.2g}", va="center", fontsize=7)
        threads = f"{table.threads} thread{'s' if table.threads > 1 else ''}"
        subject = (
            f"{table.kv_len} rows of {table.shape.head_dim}"
            if table.task == "convert"
            else f"{table.shape}, kv {table.kv_len}"
        )
        axes.set_title(f"{table.task}: {subject}, {threads}", fontsize=9)
        axes.set_xlabel(
            "time by mixedkv's on the same kind of keys and math (right of 1: slower)", fontsize=7
        )
        axes.margins(x=0.12)
    figure.savefig(path)
