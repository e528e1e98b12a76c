"""Pictures of what a cache did. Needs matplotlib, from the extra ``mixedkv[demo]``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")  # a file is all that is wanted, whatever display there may be

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

if TYPE_CHECKING:
    from mixedkv.integrations.transformers import Occupancy

HOT = "#d1495b"
COLD = "#2e6f95"
INK = "#2b2d33"
FAINT = "#8a8f99"


def plot_occupancy(
    history: Sequence[Occupancy],
    path: Path,
    *,
    hot_size: int,
    trigger: int | None = None,
    title: str = "Cache occupancy",
    subtitle: str = "",
) -> None:
    """Draw a cache's tiers over the steps of a generation, into a file (.png, .svg, .pdf).

    Three panels over the tokens seen: the tokens in both tiers, the hot tier alone at its own
    scale, and the tokens that each step moved.

    Parameters
    ----------
    history
        One point a step, the prefill first.
    hot_size
        Size of the hot tier.
    trigger
        Hot tokens above which tokens move; drawn where given.
    title, subtitle
        Drawn as they are, dollar signs too.

    Raises
    ------
    ValueError
        The history is empty, or the file's suffix is none that matplotlib writes.
    OSError
        The file can't be written.
    """
    if not history:
        raise ValueError("the history is empty: was it recorded?")
    seen = np.array([point.tokens_seen for point in history])
    hot = np.array([point.hot for point in history])
    cold = np.array([point.cold for point in history])
    moved = np.diff(np.array([0] + [point.moved for point in history]))

    with styled():
        figure, (whole, tier, moves) = plt.subplots(
            3, 1, figsize=(10, 8), sharex=True, height_ratios=(3.2, 2.2, 1.3), layout="constrained"
        )
        prompt = int(seen[0])
        whole.fill_between(seen, 0, cold, color=COLD, alpha=0.85, linewidth=0, step="post")
        whole.fill_between(seen, cold, cold + hot, color=HOT, alpha=0.9, linewidth=0, step="post")
        whole.set_ylim(0, (cold + hot).max() * 1.12)
        whole.set_ylabel("tokens held")
        middle = seen[len(seen) // 2]
        whole.text(
            middle, cold[len(seen) // 2] / 2, "cold, Q4_0", color="white", ha="center", va="center"
        )
        whole.annotate(
            "hot, f16",
            (middle, (cold + hot)[len(seen) // 2]),
            (0, 4),
            textcoords="offset points",
            color=HOT,
            ha="center",
            va="bottom",
        )

        tier.fill_between(seen, 0, hot, color=HOT, alpha=0.18, linewidth=0, step="post")
        tier.step(seen, hot, where="post", color=HOT, linewidth=1.4)
        tier.axhline(hot_size, color=FAINT, linewidth=0.9)
        _label(tier, hot_size, f"size {hot_size}")
        if trigger is not None:
            tier.axhline(trigger, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
            _label(tier, trigger, f"trigger {trigger}")
        tier.set_ylim(0, hot_size * 1.15)
        tier.set_ylabel("hot tokens")

        steps = moved[1:]
        at = seen[1:][steps > 0]
        moves.vlines(at, 0, steps[steps > 0], color=COLD, linewidth=2.2)
        moves.plot(at, steps[steps > 0], "o", color=COLD, markersize=4.5)
        moves.set_ylim(0, max(int(steps.max(initial=1)), 1) * 1.35)
        moves.set_ylabel("moved to cold")
        moves.set_xlabel("tokens seen")
        moves.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        moves.text(
            0.0,
            0.98,
            f"the prompt of {prompt:,} tokens moved {moved[0]:,} of them in one step",
            transform=moves.transAxes,
            fontsize=9,
            color=FAINT,
            va="top",
        )
        for axes in (whole, tier):
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        for axes in (whole, tier, moves):
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.margins(x=0)
        figure.align_ylabels()
        whole.set_title(title, loc="left", fontsize=14, fontweight="bold", pad=24, parse_math=False)
        whole.text(
            0,
            1.03,
            subtitle,
            transform=whole.transAxes,
            fontsize=10,
            color=FAINT,
            va="bottom",
            parse_math=False,
        )
        save(figure, path)


def styled() -> AbstractContextManager[None]:
    """Draw in the tools' style for a while."""
    style: dict[Any, Any] = {"font.size": 10.5, "axes.linewidth": 0.8, "axes.edgecolor": FAINT}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    style |= {"xtick.color": FAINT, "ytick.color": FAINT}
    for name in ("axes.labelcolor", "text.color", "xtick.labelcolor", "ytick.labelcolor"):
        style[name] = INK
    return plt.rc_context(style)


def save(figure: Figure, path: Path) -> None:
    """Write a figure, and let it go."""
    try:
        figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)


def _label(axes: Axes, height: float, text: str) -> None:
    axes.annotate(
        text,
        (1, height),
        (-4, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=9,
        color=FAINT,
    )
