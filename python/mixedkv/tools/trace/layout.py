"""Watching layouts: what a tensor looks like after each permute or conversion.

Off unless the logger ``mixedkv.tools.trace.layout`` is at DEBUG (`log_to_stderr`, the commands'
``--debug``): then every step from a model's tensors to a trace, and from a trace to the arithmetic,
logs the result's shape, strides, mean and std. A permutation keeps mean and std and changes the
strides; a wrong reading of memory shows in the std of a slice; a conversion keeps the shape.
"""

from __future__ import annotations

import logging
from typing import NamedTuple, TypeVar

import numpy as np

import mixedkv as mkv

from .stored import Rows, as_float32, data_of

logger = logging.getLogger("mixedkv.tools.trace.layout")


class Statistics(NamedTuple):
    """Of all finite values; NaN where there is none."""

    mean: float
    std: float
    min: float
    max: float


def statistics(array: Rows) -> Statistics:
    """Give mean, std, min and max of the values, without the masks' -inf."""
    values = as_float32(array).astype(np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return Statistics(*[float("nan")] * 4)
    return Statistics(
        float(values.mean()), float(values.std()), float(values.min()), float(values.max())
    )


R = TypeVar("R", bound=Rows)


def watched(what: str, array: R) -> R:
    """Give `array` back, after a line in the log if somebody watches."""
    if logger.isEnabledFor(logging.DEBUG):
        found = statistics(array)
        logger.debug(
            "[LAYOUT_DEBUG] %s: %s shape=%s strides=%s mean=%.6g std=%.6g",
            what,
            array.format if isinstance(array, mkv.QuantizedArray) else array.dtype,
            array.shape,
            data_of(array).strides,
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
