"""How much a cache costs in quality: figures on logits.

Logits are arrays [tokens, vocabulary] (numpy arrays or torch CPU tensors) of two runs over the
same tokens: row i of both predicts the same next token from the same tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64: TypeAlias = NDArray[np.float64]

_CHUNK = 64
"""Rows at a time: a vocabulary is long, and float64 copies of all rows would be large."""


@dataclass(frozen=True)
class Fidelity:
    """How one run's predictions compare with a reference run's on the same tokens.

    Attributes
    ----------
    tokens
        Number of predictions compared.
    kl_mean, kl_max
        Kullback-Leibler divergence of the run's distribution from the reference's, in nats: the
        mean over the predictions, and the largest.
    top1
        Share of the predictions whose most likely token is the reference's, 0 to 1.
    """

    tokens: int
    kl_mean: float
    kl_max: float
    top1: float


def compare_logits(reference: Any, other: Any) -> Fidelity:
    """Compare the logits of two runs over the same tokens.

    Parameters
    ----------
    reference, other
        [tokens, vocabulary], at least one token.

    Raises
    ------
    ValueError
        The shapes differ or are not of two dimensions.
    """
    divergence = kl_divergence(reference, other)
    if not len(divergence):
        raise ValueError("there is no prediction to compare: logits have 0 rows")
    return Fidelity(
        tokens=len(divergence),
        kl_mean=float(divergence.mean()),
        kl_max=float(divergence.max()),
        top1=float(same_top_token(reference, other).mean()),
    )


def kl_divergence(reference: Any, other: Any) -> F64:
    """Give KL(reference || other) of each row, in nats: sum p (ln p - ln q)."""
    found = []
    for p, q in _chunks(reference, other):
        log_p, log_q = _log_softmax(p), _log_softmax(q)
        probability = np.exp(log_p)
        # A token that p rules out (logit -inf) adds nothing, whatever q says.
        with np.errstate(invalid="ignore"):
            terms = np.where(probability > 0, probability * (log_p - log_q), 0.0)
        # Rounding may leave a hair below zero where the rows are equal.
        found.append(np.maximum(terms.sum(axis=1), 0.0))
    return np.concatenate(found) if found else np.zeros(0)


def same_top_token(reference: Any, other: Any) -> NDArray[np.bool_]:
    """Tell for each row whether both runs find the same token most likely."""
    found = [p.argmax(axis=1) == q.argmax(axis=1) for p, q in _chunks(reference, other)]
    return np.concatenate(found) if found else np.zeros(0, bool)


def negative_log_likelihood(logits: Any, tokens: ArrayLike) -> F64:
    """Give -ln p of each actual next token, in nats.

    Parameters
    ----------
    logits
        [tokens, vocabulary].
    tokens
        [tokens] int: the token that followed, for each row.
    """
    targets = np.asarray(tokens)
    if targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(
            f"tokens must be integers of one dimension, got {targets.dtype} {targets.shape}"
        )
    found = []
    start = 0
    for chunk, _ in _chunks(logits, logits):
        stop = start + len(chunk)
        if stop > len(targets):
            break
        rows = np.arange(len(chunk))
        found.append(-_log_softmax(chunk)[rows, targets[start:stop]])
        start = stop
    if start != len(targets) or start != len(logits):
        raise ValueError(f"logits have {len(logits)} rows for {len(targets)} tokens")
    return np.concatenate(found) if found else np.zeros(0)


def perplexity(logits: Any, tokens: ArrayLike) -> float:
    """Give exp of the mean negative log-likelihood of the actual next tokens."""
    losses = negative_log_likelihood(logits, tokens)
    if not len(losses):
        raise ValueError("perplexity of 0 tokens")
    return math.exp(float(losses.mean()))


def _chunks(a: Any, b: Any) -> Iterator[tuple[F64, F64]]:
    for name, array in (("reference", a), ("other", b)):
        if len(array.shape) != 2:
            raise ValueError(f"{name} must be [tokens, vocabulary], got {tuple(array.shape)}")
    if tuple(a.shape) != tuple(b.shape):
        raise ValueError(f"logits have shapes {tuple(a.shape)} and {tuple(b.shape)}")
    for start in range(0, len(a), _CHUNK):
        rows = slice(start, start + _CHUNK)
        yield _float64(a[rows]), _float64(b[rows])


def _float64(array: Any) -> F64:
    if hasattr(array, "detach"):  # torch; numpy knows no bfloat16
        array = array.detach().float().numpy()
    return np.asarray(array, np.float64)


def _log_softmax(logits: F64) -> F64:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: F64 = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
