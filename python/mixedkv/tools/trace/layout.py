"""Watching layouts: what a tensor looks like after each permute or conversion.

Off unless the logger ``mixedkv.tools.trace.layout`` is at DEBUG (`log_to_stderr`, the commands'
``--debug``): then every step from a model's tensors to a trace, and from a trace to the arithmetic,
logs the result's shape, strides, mean and std. A permutation keeps mean and std and changes the
strides; a wrong reading of memory shows in the std of a slice; a conversion keeps the shape.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import mixedkv as mkv

logger = logging.getLogger("mixedkv.tools.trace.layout")


class Statistics(NamedTuple):
    """Of all finite values; NaN where there is none."""

    mean: float
    std: float
    min: float
    max: float


def as_float32(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Give float32 values: of floats, or of Q4_0 rows (uint8)."""
    if rows.dtype == np.uint8:
        values: NDArray[np.float32] = mkv.dequantize_q4_0(np.ascontiguousarray(rows))
        return values
    return np.asarray(rows, np.float32)


def statistics(array: NDArray[Any]) -> Statistics:
    """Give mean, std, min and max of the values, without the masks' -inf."""
    values = as_float32(array).astype(np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return Statistics(*[float("nan")] * 4)
    return Statistics(
        float(values.mean()), float(values.std()), float(values.min()), float(values.max())
    )


def watched(what: str, array: NDArray[Any]) -> NDArray[Any]:
    """Give `array` back, after a line in the log if somebody watches."""
    if logger.isEnabledFor(logging.DEBUG):
        found = statistics(array)
        logger.debug(
            "[LAYOUT_DEBUG] %s: %s shape=%s strides=%s mean=%.6g std=%.6g",
            what,
            array.dtype,
            array.shape,
            array.strides,
            found.mean,
            found.std,
        )
    return array


def log_to_stderr() -> None:
    """Let the layout log speak, on stderr."""
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.DEBUG)
