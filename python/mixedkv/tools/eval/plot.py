"""Bits of a cold value against what they cost. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from .._commands import printable
from ..plots import COLD, FAINT, HOT, save, styled
from .evaluation import Result

LEAST_KL = 1e-7
"""What is drawn for a divergence of nothing, on a logarithmic axis."""


def save_plot(result: Result, path: Path) -> None:
    """Draw bits a cold value against mean KL divergence with its standard error, into a file.

    Raises
    ------
    ValueError
        The file's suffix is none that matplotlib writes.
    OSError
        The file can't be written.
    """
    with styled():
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        for cache in result.caches:
            if cache.cold_bits is None:
                continue
            kl, error = cache.figures.kl_mean.value, cache.figures.kl_mean.error
            y = max(kl, LEAST_KL)
            axes.errorbar(
                cache.cold_bits, y, yerr=min(error, 0.9 * y), fmt="o", color=COLD, capsize=3
            )
            if cache.simulated is not None:
                simulated = max(cache.simulated.kl_mean.value, LEAST_KL)
                axes.plot(cache.cold_bits, simulated, "x", color=HOT)
            axes.annotate(
                printable(cache.name, 40),
                (cache.cold_bits, y),
                (6, 4),
                textcoords="offset points",
                fontsize=9,
                parse_math=False,
            )
        axes.set_yscale("log")
        axes.grid(True, which="major", axis="y", color=FAINT, alpha=0.25)
        axes.margins(x=0.15, y=0.15)
        axes.set_xlabel("bits a cold value")
        axes.set_ylabel("KL divergence from f16, nats a token")
        axes.set_title(
            f"{printable(result.title, 60)} on {printable(result.text, 40)}, "
            f"{result.tokens:,} tokens, context {result.context:,}",
            loc="left",
            parse_math=False,
        )
        save(figure, path)
