"""Pictures of a verification. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from .._commands import printable
from ..plots import COLD, HOT, save, styled
from .verify import Verification

_LEAST_ERROR = 1e-9
_MOST_TITLE = 90


def plot_verification(result: Verification, path: Path, *, passed: bool) -> None:
    """Draw error by step and layer, and how attention spreads over the tiers, into a file.

    Parameters
    ----------
    result
        With entropies (``verify(..., entropy=True)``).
    path
        Ends in what matplotlib writes: .png, .svg, .pdf.
    passed
        The verdict that stands in the title: of all that was asked, a reference included.

    Raises
    ------
    OSError
        The file can't be written.
    """
    layers = sorted({step.layer for step in result.steps})
    steps = sorted({step.step for step in result.steps})
    shape = (len(layers), len(steps))
    error, hot, cold, share = (np.full(shape, np.nan) for _ in range(4))
    for one in result.steps:
        at = layers.index(one.layer), steps.index(one.step)
        error[at] = min(max(one.torch_f32.relative, _LEAST_ERROR), 1e3)
        if one.entropy is not None:
            hot[at] = np.nan if one.entropy.hot is None else one.entropy.hot
            cold[at] = np.nan if one.entropy.cold is None else one.entropy.cold
            share[at] = one.entropy.cold_share
    has_cold = bool(np.nansum(share) > 0)
    with styled():
        figure, (map_axes, entropy_axes) = plt.subplots(
            1, 2, figsize=(12, 5.2), layout="constrained", width_ratios=(1.15, 1)
        )
        image = map_axes.imshow(
            error, aspect="auto", cmap="viridis", norm=LogNorm(), interpolation="nearest"
        )
        map_axes.set_xticks(range(len(steps)), [str(step) for step in steps])
        shown = range(0, len(layers), max(1, len(layers) // 15))
        map_axes.set_yticks(list(shown), [str(layers[index]) for index in shown])
        map_axes.set_xlabel("step")
        map_axes.set_ylabel("layer")
        map_axes.set_title("Error against PyTorch f32, norm over norm", loc="left", fontsize=11.5)
        figure.colorbar(image, ax=map_axes, pad=0.02)
        for one in result.steps:
            if not one.passed:
                map_axes.plot(
                    steps.index(one.step), layers.index(one.layer), "x", color=HOT, markersize=9
                )

        def mean_by_layer(values: Any) -> Any:
            known = ~np.isnan(values)
            sums = np.where(known, values, 0.0).sum(1)
            return np.where(known.any(1), sums / np.maximum(known.sum(1), 1), np.nan)

        entropy_axes.plot(layers, mean_by_layer(hot), "o-", color=HOT, markersize=4, label="hot")
        if has_cold:
            entropy_axes.plot(
                layers, mean_by_layer(cold), "o-", color=COLD, markersize=4, label="cold"
            )
            after = share[:, np.nansum(share, 0) > 0]
            other = entropy_axes.twinx()
            other.bar(layers, 100 * mean_by_layer(after), color=COLD, alpha=0.15, width=0.8)
            other.set_ylim(0, 100)
            other.set_ylabel("bars: share of the weight on cold keys, %")
        entropy_axes.set_ylim(bottom=0)
        entropy_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        entropy_axes.set_xlabel("layer")
        entropy_axes.set_ylabel("entropy within the tier, nats")
        entropy_axes.set_title("How attention spreads, by tier", loc="left", fontsize=11.5)
        entropy_axes.legend(frameon=False, loc="upper right")
        header = result.trace.header
        title = f"{header.model}, {header.cache} cache" if header else result.trace.path.name
        # A model or a file may have any name: it is drawn as it is, and not read as a formula.
        figure.suptitle(
            f"{printable(title, _MOST_TITLE)}: {'PASS' if passed else 'FAIL'}",
            x=0.01,
            ha="left",
            fontsize=14,
            fontweight="bold",
            parse_math=False,
        )
        save(figure, path)
