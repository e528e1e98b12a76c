"""What an evaluation found, as a table."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.table import Table

from .._commands import printable
from . import evaluation, retrieval
from .evaluation import BLOCK
from .measures import Estimate


def print_result(result: evaluation.Result, console: Console) -> None:
    """Print the tables of an evaluation."""
    table = Table(
        title=f"{printable(result.title, 60)} on {printable(result.text, 40)}: {result.tokens:,} "
        f"tokens scored, in {result.windows} windows of {result.context:,}",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("cache", overflow="fold")
    for heading in (
        "bits a\nvalue",
        "bytes,\nof f16",
        "perplex-\nity",
        "change,\n%",
        "KL,\nnats",
        "KL,\n99 %",
        "same\ntop, %",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for cache in (result.f16, *result.caches):
        exact = cache is result.f16
        rows = [(printable(cache.name, 40), cache.figures)]
        if cache.simulated is not None:
            rows.append(("  simulated", cache.simulated))
        for number, (name, figures) in enumerate(rows):
            bits = "" if cache.cold_bits is None or number else f"{cache.cold_bits:.2f}"
            table.add_row(
                name,
                bits,
                "" if number else f"{cache.f16_share:.1%}",
                f"{figures.perplexity.value:.3f}",
                "" if exact else show(figures.perplexity_change, 2, sign=True),
                "" if exact else show(figures.kl_mean, 5),
                "" if exact else show(figures.kl_99, 4),
                "" if exact else show(figures.same_top, 2, 100),
            )
    console.print(table)
    console.print(
        f"Below each figure its standard error, from {result.f16.figures.blocks} blocks of "
        f"{BLOCK} consecutive tokens. The first {result.prompt:,} tokens of a window are not "
        "scored; bits are the cold tier's, bytes all that a cache holds at a window's end.",
        highlight=False,
    )
    if any(cache.name.startswith("llama.cpp") for cache in result.caches):
        console.print(
            "llama.cpp's f16 cache is compared with mixedkv's, its other caches with its own f16 "
            "one; their bytes are those of their rows.",
            highlight=False,
        )


def print_retrieval(result: retrieval.Result, console: Console) -> None:
    """Print the table of a retrieval check."""
    runs = (result.f16, *result.caches)
    facts = 1 + max(answer.place for answer in result.f16.answers)
    table = Table(
        title=f"{printable(result.title, 60)} on {printable(result.text, 40)}: facts planted in "
        f"{result.f16.asked // facts} texts of {result.context:,} tokens",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("cache")
    for heading in ("found", "ln p of\nthe answer", "above f16's"):
        table.add_column(heading, justify="right")
    for place in range(facts):
        table.add_column(f"at\n{(place + 0.5) / facts:.0%}", justify="right")
    for run in runs:
        at_depth = [
            str(sum(answer.found for answer in run.answers if answer.place == place))
            for place in range(facts)
        ]
        table.add_row(
            printable(run.name, 40),
            f"{run.found} of {run.asked}",
            show(run.log_probability, 2),
            "" if run is result.f16 else show(run.change, 3, sign=True),
            *at_depth,
        )
    console.print(table)


def show(figure: Estimate, digits: int, factor: float = 1.0, *, sign: bool = False) -> str:
    """Write a figure with its standard error below it."""
    value = f"{factor * figure.value:{'+' if sign else ''}.{digits}f}"
    if math.isnan(figure.error):
        return value
    return f"{value}\n±{factor * figure.error:.{digits}f}"
