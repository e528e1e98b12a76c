"""Tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from .plan import Faster, Report, Row, Table

__all__ = [
    "duration",
    "narrow_table",
    "number",
    "print_absent",
    "print_machine",
    "print_report",
    "render_faster",
    "render_load",
    "render_table",
]

#: CPUs busy with other things from which on a table says so.
_BUSY = 0.15


def duration(seconds: float | None) -> str:
    """Return a time with three digits and its unit."""
    if seconds is None:
        return "-"
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 1000:
            return (
                f"{seconds * factor:.3g} {unit}"
                if seconds * factor < 100
                else (f"{seconds * factor:.0f} {unit}")
            )
    return f"{seconds:.2f} s"


def number(value: float | None, form: str) -> str:
    """Return a figure in a format, nothing for None."""
    return "" if value is None else format(value, form)


def _title(table: Table) -> str:
    threads = f"{table.threads} thread{'s' if table.threads > 1 else ''}"
    if table.task == "decode":
        return f"decode: {table.shape}, kv {table.kv_len}, {threads}"
    if table.task == "prefill":
        return (
            f"prefill: {table.shape}, {table.qo_len} causal queries, kv {table.kv_len}, {threads}"
        )
    return f"conversion: {table.kv_len} rows of {table.shape.head_dim}, {threads}"


def _style(row: Row) -> str:
    if row.problem:
        return "red"
    if row.role in ("part", "roof"):
        return "dim"
    return "bold" if row.peer == "mixedkv" else ""


def render_faster(faster: Sequence[Faster], task: str = "") -> list[RenderableType]:
    """Return the line that names who was faster than mixedkv, where somebody was."""
    if not faster:
        return []
    names = "; ".join(f"{one.name} ({one.ratio:.2f} of {one.against})" for one in faster)
    return [Text(f"faster than mixedkv{task and f' in {task}'}: {names}")]


def _groups(table: Table) -> Iterator[list[Row]]:
    """Yield the rows that belong together: f16 and its like, Q4_0 and its like, the rest."""
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


def narrow_table(title: str) -> RichTable:
    """Return an empty table that makes do with 80 columns."""
    return RichTable(
        title=title, title_justify="left", box=box.SIMPLE, padding=(0, 0), pad_edge=False
    )


def render_load(others_load: float | None) -> list[RenderableType]:
    """Return the line that says that other processes were busy, where they were."""
    if others_load is None or others_load <= _BUSY:
        return []
    return [
        Text(
            f"other processes kept {others_load:.1f} CPUs busy meanwhile: not to be relied on",
            style="yellow",
        )
    ]


def render_table(table: Table) -> RenderableType:
    """Return a table for the terminal."""
    if table.skipped:
        return Text(f"{_title(table)}: skipped, {table.skipped}", style="yellow")
    rich = narrow_table(f"{_title(table)} ({table.rounds} rounds)")
    rich.add_column("contender", no_wrap=True)
    if table.task != "convert":
        rich.add_column("math", no_wrap=True)
    for name in ("best", "median", "ratio"):
        rich.add_column(name, justify="right", no_wrap=True)
    if table.task == "prefill":
        rich.add_column("GFLOP/s", justify="right", no_wrap=True)
    else:
        rich.add_column(" GB/s", justify="right", no_wrap=True)
    if table.task == "decode":
        rich.add_column("read", justify="right", no_wrap=True)
    rich.add_column("error", justify="right", no_wrap=True)
    for rows in _groups(table):
        for row in rows:
            name = f"{row.role}  {row.name}" if table.task == "convert" else row.name
            if row.role == "roof":
                name = row.name
            first = [name] if table.task == "convert" else [name, row.arithmetic or ""]
            if row.problem:
                rich.add_row(*first, row.problem, style=_style(row))
                continue
            speed = row.flops if table.task == "prefill" else row.bytes_per_second
            cells = [*first, duration(row.best), duration(row.median)]
            cells += [number(row.ratio, ".2f"), number(speed and speed / 1e9, ".1f")]
            if table.task == "decode":
                share = row.share_of_read
                cells.append("" if share is None else f"{100 * share:.0f}%")
            cells.append(number(row.error, ".1e") if row.error else "0" if row.error == 0 else "")
            rich.add_row(*cells, style=_style(row))
        rich.add_section()
    below: list[RenderableType] = []
    if table.mixed_over_parts is not None:
        change = 100 * (table.mixed_over_parts - 1)
        below.append(Text(f"both tiers against the sum of their parts: {change:+.1f} %"))
    return Group(rich, *below, *render_faster(table.faster), *render_load(table.others_load))


def print_machine(machine: dict[str, Any], peers: dict[str, str], console: Console) -> None:
    """Print where a run took place and who took part."""
    console.print(
        f"mixedkv {machine['mixedkv']} ({machine['isa']}) on {machine['cpu']}, "
        f"{machine['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in peers.items())
    )


def print_absent(absent: dict[str, str], wrong: list[str], console: Console) -> None:
    """Print who was not there and why, and what mixedkv got wrong."""
    for name, reason in absent.items():
        console.print(f"absent: {name}: {reason}", style="yellow", soft_wrap=True, markup=False)
    for line in wrong:
        console.print(f"WRONG: {line}", style="bold red", soft_wrap=True, markup=False)


def _who_was_faster(tables: Sequence[Table]) -> list[str]:
    """Return one line over all tables; none where mixedkv was compared with nobody."""
    raced = [
        table
        for table in tables
        if any(
            row.ratio is not None and row.peer not in ("mixedkv", "memory") for row in table.rows
        )
    ]
    if not raced:
        return []
    ahead = [table for table in raced if table.faster]
    names = dict.fromkeys(one.name for table in ahead for one in table.faster)
    return [
        f"faster than mixedkv in {len(ahead)} of {len(raced)} tables: "
        + (", ".join(names) if names else "nobody")
    ]


def print_report(report: Report, console: Console) -> None:
    """Print everything: machine, tables, notes, and who was not there."""
    print_machine(report.machine, report.peers, console)
    console.print(
        "ratio: the contender's time by that of mixedkv's cache on keys of its kind and in its "
        "arithmetic (math), or else in f32; median over the rounds; above 1, mixedkv is faster."
    )
    for table in report.tables:
        console.print()
        console.print(render_table(table))
    console.print()
    for line in _who_was_faster(report.tables):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True)
    print_absent(report.absent, report.wrong, console)
