"""What both benches print and draw, for people."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from .._commands import naming
from . import results
from .plan import Report, Row, Table
from .results import Faster, count

if TYPE_CHECKING:
    from .end_to_end import plan as whole

#: CPUs busy with other things from which on a table says so.
_BUSY = 0.15

R = TypeVar("R", bound=results.Report[Any])
Column = tuple[str, Callable[[Any], str]]


def deliver(
    report: R,
    *,
    show: Callable[[R, Console], None],
    draw: Callable[[R, Path], None],
    json: bool,
    plot: Path | None,
    errors: Console,
) -> None:
    """Print a report as tables or as JSON, and draw it where a plot is asked for.

    Raises
    ------
    typer.Exit
        With status 1 where mixedkv was wrong.
    """
    if json:
        typer.echo(json_module.dumps(report.as_json(), indent=2))
    else:
        show(report, Console())
    if plot is not None:
        with naming(plot):
            draw(report, plot)
        errors.print(f"plot: {plot}")
    if report.wrong:
        if json:
            for line in report.wrong:
                errors.print(f"WRONG: {line}")
        raise typer.Exit(1)


# --- what both have -------------------------------------------------------------------------------


def duration(seconds: float | None) -> str:
    """Return a time with three digits and its unit."""
    if seconds is None:
        return "-"
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 1000:
            form = ".3g" if seconds * factor < 100 else ".0f"
            return f"{seconds * factor:{form}} {unit}"
    return f"{seconds:.2f} s"


def number(value: float | None, form: str) -> str:
    """Return a figure in a format, nothing for None."""
    return "" if value is None else format(value, form)


def _billions(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.1f}"


def _render(
    title: str,
    columns: Sequence[Column],
    groups: Iterable[Iterable[results.Row]],
    style: Callable[[Any], str],
    left: int = 1,
) -> RichTable:
    """Return a table of rows that makes do with 80 columns; its first `left` columns are words."""
    rich = RichTable(
        title=title, title_justify="left", box=box.SIMPLE, padding=(0, 0), pad_edge=False
    )
    for index, (name, _) in enumerate(columns):
        rich.add_column(name, justify="left" if index < left else "right", no_wrap=True)
    for group in groups:
        for row in group:
            rich.add_row(*(show(row) for _, show in columns), style=style(row))
        rich.add_section()
    return rich


def _style(row: results.Row) -> str:
    return "red" if row.problem else "bold" if row.peer == "mixedkv" else ""


def _below(table: results.Table[Any], *faster: tuple[str, Sequence[Faster]]) -> Iterator[Text]:
    """Yield the lines below a table: who was faster than mixedkv, and whether others were busy."""
    for where, ones in faster:
        if ones:
            names = "; ".join(f"{one.name} ({one.ratio:.2f} of {one.against})" for one in ones)
            yield Text(f"faster than mixedkv{where}: {names}")
    if table.others_load is not None and table.others_load > _BUSY:
        yield Text(
            f"other processes kept {table.others_load:.1f} CPUs busy meanwhile: not to be relied "
            "on",
            style="yellow",
        )


def _print(
    report: results.Report[Any],
    console: Console,
    above: Sequence[str],
    render: Callable[[Any], RenderableType],
    below: Sequence[str] = (),
) -> None:
    """Print everything: machine, tables, and who was not there and why."""
    machine = report.machine
    console.print(
        f"mixedkv {machine['mixedkv']} ({machine['isa']}) on {machine['cpu']}, "
        f"{machine['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in report.peers.items())
    )
    for line in above:
        console.print(line)
    for table in report.tables:
        console.print()
        console.print(render(table))
    console.print()
    for line in below:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    for name, reason in report.absent.items():
        console.print(f"absent: {name}: {reason}", style="yellow", soft_wrap=True, markup=False)
    for line in report.wrong:
        console.print(f"WRONG: {line}", style="bold red", soft_wrap=True, markup=False)


# --- attention and conversion ---------------------------------------------------------------------


def label(table: Table, row: Row) -> str:
    """Return a row's name, behind the kind of a conversion."""
    kind = table.task == "convert" and row.role != "roof"
    return f"{row.role}  {row.name}" if kind else row.name


def _groups(table: Table) -> Iterator[list[Row]]:
    """Yield the rows that belong together: each format and its like, the rest."""
    if table.task == "convert":
        kinds = list(dict.fromkeys(row.role for row in table.rows))
        yield from ([row for row in table.rows if row.role == kind] for kind in kinds)
        return
    race = [row for row in table.rows if row.role == "race" and row.against]
    for against in dict.fromkeys(row.against for row in race):
        yield [row for row in race if row.against == against]
    yield [row for row in table.rows if row.role in ("mixed", "part")]
    yield [row for row in table.rows if row.role == "roof"]
    yield [row for row in table.rows if row.role == "race" and not row.against]


def render_table(table: Table) -> RenderableType:
    """Return a table for the terminal."""
    if table.skipped:
        return Text(f"{table.title}: skipped, {table.skipped}", style="yellow")
    columns: list[Column] = [("contender", lambda row: label(table, row))]
    if table.task != "convert":
        columns.append(("math", lambda row: row.arithmetic or ""))
    left = len(columns)
    columns += [
        ("best", lambda row: row.problem or duration(row.best)),
        ("median", lambda row: "" if row.problem else duration(row.median)),
        ("ratio", lambda row: number(row.ratio, ".2f")),
    ]
    if table.task == "prefill":
        columns.append(("GFLOP/s", lambda row: _billions(row.flops)))
    else:
        columns.append((" GB/s", lambda row: _billions(row.bytes_per_second)))
    if table.task == "decode":
        columns.append(("read", lambda row: number(row.share_of_read, ".0%")))
    columns.append(
        (
            "error",
            lambda row: "" if row.problem else number(row.error, ".1e") if row.error != 0 else "0",
        )
    )
    rich = _render(
        f"{table.title} ({table.rounds} rounds)",
        columns,
        _groups(table),
        lambda row: "dim" if row.role in ("part", "roof") and not row.problem else _style(row),
        left,
    )
    parts = [
        Text(f"f16 and {name} tiers against the sum of their parts: {100 * (over - 1):+.1f} %")
        for name, over in table.mixed_over_parts.items()
    ]
    return Group(rich, *parts, *_below(table, ("", table.faster)))


def _who_was_faster(tables: Sequence[Table]) -> list[str]:
    """Return one line over all tables; none where mixedkv was compared with nobody."""
    others = [
        [row.ratio for row in table.rows if row.peer not in ("mixedkv", "memory")]
        for table in tables
    ]
    raced = sum(any(ratio is not None for ratio in ratios) for ratios in others)
    if not raced:
        return []
    ahead = [table for table in tables if table.faster]
    names = dict.fromkeys(one.name for table in ahead for one in table.faster)
    return [
        f"faster than mixedkv in {len(ahead)} of {raced} tables: "
        + (", ".join(names) if names else "nobody")
    ]


def print_report(report: Report, console: Console) -> None:
    """Print a report of attention and conversion."""
    above = (
        "ratio: the contender's time by that of mixedkv's cache on keys of its kind and in its "
        "arithmetic (math), or else in f32; median over the rounds; above 1, mixedkv is faster."
    )
    below = [*_who_was_faster(report.tables), *(f"note: {note}" for note in report.notes)]
    _print(report, console, [above], render_table, below)


# --- end to end -----------------------------------------------------------------------------------

_DECODE: tuple[Column, ...] = (
    ("contender", lambda row: str(row.name)),
    ("tok/s", lambda row: number(row.tokens_per_second, ".1f")),
    ("ratio", lambda row: number(row.ratio, ".2f")),
    ("step", lambda row: duration(row.step)),
    ("attention", lambda row: duration(row.attention)),
    ("rest", lambda row: duration(row.rest)),
    ("KL", lambda row: number(row.kl, ".1e")),
    ("top-1", lambda row: "" if row.top1 is None else f"{100 * row.top1:.0f} %"),
)
_PREFILL: tuple[Column, ...] = (
    ("contender", lambda row: str(row.name)),
    ("ratio", lambda row: number(row.prefill_ratio, ".2f")),
    ("time", lambda row: duration(row.prefill)),
    ("attention", lambda row: duration(row.prefill_attention)),
    ("rest", lambda row: duration(row.prefill_rest)),
)


def render_whole(table: whole.Table) -> RenderableType:
    """Return the tables of an end-to-end cell for the terminal."""
    decode = f"decode: {table.title} ({table.rounds} rounds of {table.steps} steps)"
    prefill = (
        f"prefill: {table.prompt} tokens, {count(table.threads, 'thread')} "
        f"({count(table.prefill_rounds, 'round')})"
    )
    return Group(
        _render(decode, _DECODE, [table.rows], _style),
        _render(prefill, _PREFILL, [table.rows], _style),
        *(Text(f"{row.name}: {row.problem}", style="red") for row in table.rows if row.problem),
        *_below(table, (" in decode", table.faster), (" in prefill", table.prefill_faster)),
    )


def print_whole(report: whole.Report, console: Console) -> None:
    """Print an end-to-end report."""
    model = report.model
    above = (
        f"{model['title']}: {model['parameters'] / 1e6:.0f} M parameters in {model['dtype']}",
        "ratio: the contender's time by that of mixedkv's mixed cache, median over the rounds; "
        "above 1, mixedkv is faster. attention: with the cache's storing, quantising and "
        "dequantising.",
    )
    _print(report, console, above, render_whole)
