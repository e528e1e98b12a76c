"""The figures of an end-to-end run as bars."""

from __future__ import annotations

from pathlib import Path

from ..plot import bar_charts
from .plan import Report, Row, Table
from .report import subject

__all__ = ["save_plot"]

_ATTENTION, _REST = "#1b6ca8", "#cccccc"


def _bars(table: Table) -> list[Row]:
    return [row for row in table.rows if row.step is not None]


def save_plot(report: Report, path: Path) -> None:
    """Draw the time of a decode step, attention's part and the rest, into a file.

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
        at = range(len(rows))
        attention = [1e3 * (row.attention or 0.0) for row in rows]
        rest = [1e3 * (row.rest or 0.0) for row in rows]
        axes.barh(at, attention, color=_ATTENTION, label="attention and cache")
        axes.barh(at, rest, left=attention, color=_REST, label="everything else")
        axes.set_yticks(at, [row.name for row in rows], fontsize=7)
        axes.invert_yaxis()
        for y, row in enumerate(rows):
            text = f" {row.tokens_per_second or 0.0:.1f} tokens/s"
            axes.text(attention[y] + rest[y], y, text, va="center", fontsize=7)
        axes.set_title(f"{report.model['title']}: {subject(table)}", fontsize=9)
        axes.set_xlabel("ms a decode step, medians", fontsize=7)
        axes.margins(x=0.25)
        axes.legend(fontsize=7)
    figure.savefig(path)
