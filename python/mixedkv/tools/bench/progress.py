"""What a user sees while it runs."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["RichProgress"]


class RichProgress:
    """Two bars on stderr: tables, and what goes on within one."""

    def __init__(self, console: Console, tables: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            # Redrawn by hand between turns: a thread that draws would take time from them.
            auto_refresh=False,
        )
        self._tables = self._progress.add_task("tables", total=tables)
        self._step = self._progress.add_task("", total=100)
        self._begun = 0

    def __enter__(self) -> RichProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def cell(self, title: str) -> None:
        """Note that a cell begins."""
        self._progress.update(self._tables, completed=self._begun, description=title)
        self._begun += 1
        self._progress.refresh()

    def doing(self, what: str, share: float) -> None:
        """Note a step within the cell, and how much of it is done."""
        self._progress.update(self._step, completed=round(100 * share), description=what)
        self._progress.refresh()
