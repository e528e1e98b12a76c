"""Tables of an end-to-end run, for people."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from ..report import (
    duration,
    narrow_table,
    number,
    print_absent,
    print_machine,
    render_faster,
    render_load,
)
from .plan import Report, Row, Table

__all__ = ["print_report", "render_table", "subject"]

_Column = tuple[str, Callable[[Row], str]]

_DECODE: tuple[_Column, ...] = (
    ("tok/s", lambda row: number(row.tokens_per_second, ".1f")),
    ("ratio", lambda row: number(row.ratio, ".2f")),
    ("step", lambda row: duration(row.step)),
    ("attention", lambda row: duration(row.attention)),
    ("rest", lambda row: duration(row.rest)),
    ("KL", lambda row: number(row.kl, ".1e")),
    ("top-1", lambda row: "" if row.top1 is None else f"{100 * row.top1:.0f} %"),
)
_PREFILL: tuple[_Column, ...] = (
    ("ratio", lambda row: number(row.prefill_ratio, ".2f")),
    ("time", lambda row: duration(row.prefill)),
    ("attention", lambda row: duration(row.prefill_attention)),
    ("rest", lambda row: duration(row.prefill_rest)),
)


def subject(table: Table) -> str:
    """Return a cell in words."""
    return f"context {table.context}, {_threads(table)}"


def _threads(table: Table) -> str:
    return f"{table.threads} thread{'s' if table.threads > 1 else ''}"


def _render(title: str, columns: tuple[_Column, ...], table: Table) -> RichTable:
    rich = narrow_table(title)
    rich.add_column("contender", no_wrap=True)
    for name, _ in columns:
        rich.add_column(name, justify="right", no_wrap=True)
    for row in table.rows:
        style = "red" if row.problem else "bold" if row.peer == "mixedkv" else ""
        rich.add_row(row.name, *(show(row) for _, show in columns), style=style)
    return rich


def render_table(table: Table) -> RenderableType:
    """Return a cell's tables for the terminal."""
    turns = f"{table.rounds} rounds of {table.steps} steps"
    parts: list[RenderableType] = [
        _render(f"decode: {subject(table)} ({turns})", _DECODE, table),
        _render(
            f"prefill: {table.prompt} tokens, {_threads(table)} "
            f"({table.prefill_rounds} round{'s' if table.prefill_rounds != 1 else ''})",
            _PREFILL,
            table,
        ),
    ]
    parts += [Text(f"{row.name}: {row.problem}", style="red") for row in table.rows if row.problem]
    parts += render_faster(table.faster, "decode")
    parts += render_faster(table.prefill_faster, "prefill")
    return Group(*parts, *render_load(table.others_load))


def print_report(report: Report, console: Console) -> None:
    """Print everything: machine, tables, and who was not there."""
    print_machine(report.machine, report.peers, console)
    model = report.model
    console.print(
        f"{model['title']}: {model['parameters'] / 1e6:.0f} M parameters in {model['dtype']}"
    )
    console.print(
        "ratio: the contender's time by that of mixedkv's mixed cache, median over the rounds; "
        "above 1, mixedkv is faster. attention: with the cache's storing, quantising and "
        "dequantising."
    )
    for table in report.tables:
        console.print()
        console.print(render_table(table))
    console.print()
    print_absent(report.absent, report.wrong, console)
