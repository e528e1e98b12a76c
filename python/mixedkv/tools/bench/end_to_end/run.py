"""From options to a printed report."""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mixedkv.tools import models, texts
from mixedkv.tools._commands import quiet_transformers

from ..outcome import deliver
from ..progress import RichProgress
from . import contenders as field
from . import plan as plans
from .plot import save_plot
from .report import print_report

__all__ = ["end_to_end"]


def end_to_end(
    plan: plans.Plan,
    *,
    model: str | None,
    peers: Sequence[str],
    hot_size: int,
    json: bool,
    plot: Path | None,
) -> None:
    """Load a model, run a plan with it, and print what was found.

    Raises
    ------
    models.ModelError
        The model could not be fetched or loaded.
    ValueError
        The plan does not fit the model.
    typer.Exit
        With status 1 where mixedkv was wrong.
    """
    import mixedkv.integrations.transformers as mkt

    quiet_transformers()
    mkt.register()
    errors = Console(stderr=True)
    with errors.status("loading the model") as status:

        def fetching(done: int, total: int) -> None:
            status.update(f"fetching the model: {done / 2**20:.0f} of {total / 2**20:.0f} MiB")

        loaded = models.load(model, progress=fetching)
        ids = _tokens(loaded.tokenizer, plan, plans.positions_of(loaded.model))
        field.check_memory(loaded.model.config, ids.shape[1], hot_size)
        contenders = field.gather(loaded.model.config, peers, hot_size)
    with RichProgress(errors, len(plan.contexts) * len(plan.threads)) as progress:
        report = plans.run(plan, loaded.title, loaded.model, ids, contenders, progress)
    deliver(report, show=print_report, draw=save_plot, json=json, plot=plot, errors=errors)


def _tokens(tokenizer: Any, plan: plans.Plan, positions: int) -> Any:
    """Return prose as long as a plan needs, [1, n]: repeated where it is too short."""
    prompts = [plan.prompt(context, positions) for context in plan.contexts]
    needed = max(prompts) + plan.fed
    ids = tokenizer(texts.library_prose(), return_tensors="pt").input_ids
    return ids.repeat(1, -(-needed // ids.shape[1]))[:, :needed]
