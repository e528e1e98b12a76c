"""How far two arrays are from one another: element by element and by norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GRADES = ((0.0, "same bits"), (1e-6, "excellent"), (2e-5, "good"), (1e-3, "fair"), (1e-2, "poor"))


@dataclass(frozen=True)
class Difference:
    """`got` against `want`, computed in float64.

    Attributes
    ----------
    max, mean
        Of the absolute differences of elements.
    rms
        Root mean square of the differences.
    relative
        Norm of the difference over the norm of `want`; the norm itself where that is 0.
    nmse
        Its square.
    cosine
        Of the angle between both, as long vectors; 1 where both are zero.
    scale
        Largest absolute value of `want`.
    elements, not_finite
        How many there are, and how many of them are finite in one and NaN or infinite in the
        other; the figures are inf then. (Which of NaN and the infinities comes out hangs on the
        order of sums: inf - inf.)
    """

    max: float
    mean: float
    rms: float
    relative: float
    nmse: float
    cosine: float
    scale: float
    elements: int
    not_finite: int = 0

    @property
    def grade(self) -> str:
        """The relative error in a word; tolerances, not grades, decide verdicts."""
        if self.scale == 0 and self.max == 0:
            return "all zero"  # agrees, and says nothing of the arithmetic
        for bound, grade in _GRADES:
            if self.relative <= bound:
                return grade
        return "wrong"


def difference(got: NDArray[Any], want: NDArray[Any]) -> Difference:
    """Compare arrays of the same shape.

    Raises
    ------
    ValueError
        The shapes differ.
    """
    if got.shape != want.shape:
        raise ValueError(f"shapes {got.shape} and {want.shape} can't be compared")
    a = np.asarray(got, np.float64).ravel()
    b = np.asarray(want, np.float64).ravel()
    odd = ~(np.isfinite(a) & np.isfinite(b))
    if odd.any():
        differing = np.isfinite(a[odd]) | np.isfinite(b[odd])
        if differing.any():
            inf = math.inf
            return Difference(inf, inf, inf, inf, inf, 0.0, inf, a.size, int(differing.sum()))
        a, b = a[~odd], b[~odd]
    if not a.size:
        return Difference(0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0)
    d = np.abs(a - b)
    norm, own = float(np.linalg.norm(b)), float(np.linalg.norm(a))
    error = float(np.linalg.norm(d))
    relative = error / norm if norm > 0 else error
    cosine = float(a @ b) / (norm * own) if norm > 0 and own > 0 else float(norm == own)
    return Difference(
        max=float(d.max()),
        mean=float(d.mean()),
        rms=error / math.sqrt(a.size),
        relative=relative,
        nmse=relative * relative,
        cosine=min(cosine, 1.0),
        scale=float(np.abs(b).max()),
        elements=a.size,
    )


LEAST_SHARE = 0.1
"""Of what a row would be if nothing cancelled: errors are held against no less than that."""


@dataclass(frozen=True)
class RowErrors:
    """Where an output is worst. A row is one head of one query.

    An error is relative: norm of the difference over the norm of what is wanted, or over
    `LEAST_SHARE` of what it would be if nothing cancelled, where that is more.

    Attributes
    ----------
    head, head_relative
        The head with the largest error over all its queries.
    row_query, row_head, row_relative
        The row with the largest error.
    """

    head: int
    head_relative: float
    row_query: int
    row_head: int
    row_relative: float


def row_errors(
    got: NDArray[Any],
    want: NDArray[Any],
    magnitude: NDArray[Any] | None = None,
) -> RowErrors:
    """Compare outputs [n, Hq, Dv] head by head and row by row.

    Parameters
    ----------
    magnitude
        The same weights over absolute values [n, Hq, Dv]; None: nothing is taken to cancel.
    """
    a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        error = _row_norms(a, b)
        size = np.linalg.norm(np.where(np.isfinite(b), b, 0.0), axis=2)
        if magnitude is not None:
            whole = np.linalg.norm(np.where(np.isfinite(magnitude), magnitude, 0.0), axis=2)
            size = np.maximum(size, LEAST_SHARE * whole)
        rows = np.where(error > 0, error / size, 0.0)
        of_heads, size_of_heads = np.linalg.norm(error, axis=0), np.linalg.norm(size, axis=0)
        heads = np.where(of_heads > 0, of_heads / size_of_heads, 0.0)
    head = int(heads.argmax())
    query, row_head = (int(index) for index in np.unravel_index(rows.argmax(), rows.shape))
    return RowErrors(head, float(heads[head]), query, row_head, float(rows[query, row_head]))


def _row_norms(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the norms of the rows' differences; where both are not finite, they are the same."""
    d = np.where((a == b) | ~(np.isfinite(a) | np.isfinite(b)), 0.0, a - b)
    norms: NDArray[np.float64] = np.linalg.norm(np.nan_to_num(d, nan=np.inf), axis=2)
    return norms
