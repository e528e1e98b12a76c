"""Figures of a run against an f16 run on the same tokens, with standard errors.

Tokens that follow each other are not independent: a passage that is hard for a cache is hard for
many tokens. Standard errors therefore come from means over blocks of consecutive tokens, which
hardly know of each other (batch means); those of quantiles from drawing whole blocks with
replacement (a block bootstrap with a fixed seed).
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

F64: TypeAlias = NDArray[np.float64]

_ROWS = 128
"""Predictions at a time: a vocabulary is long."""
_DRAWS = 400


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error; NaN where there are too few blocks to tell."""

    value: float
    error: float


@dataclass(frozen=True)
class TokenFigures:
    """A stretch of consecutive tokens, one by one, [tokens] each.

    Attributes
    ----------
    loss
        -ln p of the token that followed, in nats.
    kl
        Kullback-Leibler divergence from the f16 run's distribution, in nats.
    same
        Whether the most likely token is the f16 run's.
    """

    loss: F64
    kl: F64
    same: NDArray[np.bool_]

    @staticmethod
    def join(parts: Sequence[TokenFigures]) -> TokenFigures:
        """Put stretches that follow each other together."""
        return TokenFigures(
            np.concatenate([part.loss for part in parts]),
            np.concatenate([part.kl for part in parts]),
            np.concatenate([part.same for part in parts]),
        )


@dataclass(frozen=True)
class Figures:
    """What a cache costs.

    Attributes
    ----------
    tokens, blocks
        Predictions compared, and the blocks that standard errors come from.
    perplexity
        exp of the mean loss.
    perplexity_change
        Percent above the f16 run's; its error is that of the difference, token by token.
    kl_mean, kl_99
        Mean and 99 % quantile of the divergence, in nats.
    same_top
        Share of the predictions whose most likely token is the f16 run's, 0 to 1.
    """

    tokens: int
    blocks: int
    perplexity: Estimate
    perplexity_change: Estimate
    kl_mean: Estimate
    kl_99: Estimate
    same_top: Estimate


def compare(reference: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> TokenFigures:
    """Compare logits of two runs.

    Parameters
    ----------
    reference, other
        [tokens, vocabulary]: of the f16 run and of another.
    targets
        int64 [tokens]: the tokens that followed.
    """
    parts = []
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, start + _ROWS)
        p, q = reference[rows].float(), other[rows].float()
        log_p, log_q = torch.log_softmax(p, 1), torch.log_softmax(q, 1)
        # Terms are good to a few 1e-6 of p; their sum must not lose more. What p rules out
        # (logit -inf) adds nothing, whatever q says.
        terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))
        parts.append(
            TokenFigures(
                -log_q.gather(1, targets[rows, None]).squeeze(1).double().numpy(),
                terms.sum(1, dtype=torch.float64).clamp(min=0).numpy(),
                (p.argmax(1) == q.argmax(1)).numpy(),
            )
        )
    return TokenFigures.join(parts)


def summarise(
    run: Sequence[TokenFigures], reference: Sequence[TokenFigures], block: int
) -> Figures:
    """Sum up a run.

    Parameters
    ----------
    run, reference
        Stretches of consecutive tokens, of a run and of the f16 run on the same tokens.
    block
        Tokens of a block. A stretch is cut into whole ones; what is left of it counts in the
        figures and not in their errors.
    """
    whole = TokenFigures.join(run)
    losses = [part.loss for part in run]
    changes = [part.loss - own.loss for part, own in zip(run, reference, strict=True)]
    kl_blocks = _blocks([part.kl for part in run], block)
    perplexity = math.exp(whole.loss.mean())
    ratio = math.exp(np.concatenate(changes).mean())

    def error(stretches: Sequence[F64]) -> float:
        return _mean_error(_blocks(stretches, block))

    return Figures(
        tokens=len(whole.loss),
        blocks=len(kl_blocks),
        perplexity=Estimate(perplexity, perplexity * error(losses)),
        perplexity_change=Estimate(100 * (ratio - 1), 100 * ratio * error(changes)),
        kl_mean=Estimate(float(whole.kl.mean()), _mean_error(kl_blocks)),
        kl_99=Estimate(float(np.quantile(whole.kl, 0.99)), _quantile_error(kl_blocks, 0.99)),
        same_top=Estimate(
            float(whole.same.mean()), error([part.same.astype(np.float64) for part in run])
        ),
    )


def mean(values: F64) -> Estimate:
    """Give the mean of values that are independent of each other."""
    return Estimate(float(values.mean()), _mean_error(values[:, None]))


def _blocks(stretches: Sequence[F64], block: int) -> F64:
    """Give [blocks, block]."""
    cut = [values[: len(values) // block * block].reshape(-1, block) for values in stretches]
    return np.concatenate(cut)


def _mean_error(blocks: F64) -> float:
    if len(blocks) < 2:
        return math.nan
    return float(blocks.mean(1).std(ddof=1) / math.sqrt(len(blocks)))


def _quantile_error(blocks: F64, share: float) -> float:
    if len(blocks) < 2:
        return math.nan
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(blocks), (_DRAWS, len(blocks)))
    return float(np.std([np.quantile(blocks[draw], share) for draw in drawn], ddof=1))
