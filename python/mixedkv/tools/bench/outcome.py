"""What a command does with a finished report."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import typer
from rich.console import Console

from mixedkv.tools._commands import naming

__all__ = ["deliver"]


class _Report(Protocol):
    @property
    def wrong(self) -> Sequence[str]: ...

    def as_json(self) -> dict[str, Any]: ...


R = TypeVar("R", bound=_Report)


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
