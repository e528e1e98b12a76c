"""Options and manners that the three commands share."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

EXTRA = "trace"
"""Of mixedkv: brings what the commands need."""

Debug = Annotated[
    bool,
    typer.Option(
        "--debug", help="Log shape, strides, mean and std after each permute or conversion."
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")
]


def watch_layouts(wanted: bool) -> None:
    """Let the layout log speak."""
    if wanted:
        from mixedkv.tools.trace import layout

        layout.log_to_stderr()


def progress_bars(console: Console) -> Progress:
    """Give progress bars that leave nothing behind, and show nothing where nobody watches."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def parse_layers(text: str) -> tuple[int, ...] | None:
    """Read 'all' (None) or '0,3-5'."""
    if text == "all":
        return None
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:\s*-\s*(\d{1,5}))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise typer.BadParameter(
                f"must be layers such as 0 or 0,5,29 or 3-7, or all; got {text!r}",
                param_hint="--layer",
            )
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))
