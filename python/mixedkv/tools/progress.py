"""How far a tool is: one protocol for all of them, and bars on stderr that follow it.

rich is imported when bars are made: tools can be called without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

_MOST_COUNTED = 1_000_000
"""Steps up to which they are counted one by one; more are bytes."""


class Progress(Protocol):
    """Someone to tell how far a tool is."""

    def phase(self, title: str, total: int | None = None) -> None:
        """Begin a phase of `total` steps; None: nobody knows."""

    def at(self, done: float, total: float, what: str = "") -> None:
        """Be at step `done` of `total` of the phase, doing `what`."""


class Silent:
    """A Progress that tells nobody."""

    def phase(self, title: str, total: int | None = None) -> None:
        """Do nothing."""

    def at(self, done: float, total: float, what: str = "") -> None:
        """Do nothing."""


SILENT: Progress = Silent()


class Bars:
    """Progress as bars.

    Parameters
    ----------
    phases
        How many there will be: a bar of its own counts them.
    keep
        Each phase has a bar that stays; else one serves all, leaves nothing behind, shows nothing
        where nobody watches, and is drawn in no thread of its own, which would take time from what
        is timed.
    """

    def __init__(self, console: Console, *, phases: int | None = None, keep: bool = False) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            SpinnerColumn,
            Task,
            TextColumn,
            TimeElapsedColumn,
        )
        from rich.text import Text

        class Counts(ProgressColumn):
            """Bytes for what is fetched, steps for what is computed, nothing where nobody knows."""

            def render(self, task: Task) -> Text:
                """Give this task's count."""
                if task.total is None:
                    return Text()
                return (size if task.total > _MOST_COUNTED else steps).render(task)

        size, steps = DownloadColumn(), MofNCompleteColumn()
        self._keep = keep
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            Counts(),
            TimeElapsedColumn(),
            console=console,
            transient=not keep,
            disable=not keep and not console.is_terminal,
            auto_refresh=keep,
        )
        self._whole = None if phases is None else self._bars.add_task("", total=phases)
        self._begun = 0
        self._task: TaskID | None = None

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None and self._keep:
            self._finish()
        self._bars.stop()

    def phase(self, title: str, total: int | None = None) -> None:
        """Begin a phase."""
        if self._whole is not None:
            self._bars.update(self._whole, description=title, completed=self._begun)
            self._begun += 1
        if self._keep:
            self._finish()
        if self._keep or self._task is None:
            self._task = self._bars.add_task(title, total=total)
        else:
            self._bars.reset(self._task, description=title, total=total)

    def at(self, done: float, total: float, what: str = "") -> None:
        """Move the bar."""
        assert self._task is not None, "no phase has begun"
        words: dict[str, Any] = {"description": what} if what else {}
        self._bars.update(self._task, completed=done, total=total, **words)
        if not self._keep:
            self._bars.refresh()

    def _finish(self) -> None:
        if self._task is None:
            return
        total = self._bars.tasks[-1].total or 1
        self._bars.update(self._task, completed=total, total=total)
