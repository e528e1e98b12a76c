"""Rows of keys and values as a trace holds them, in any format of `mixedkv.formats`.

Floats are numpy's, rows of every other format a `mixedkv.QuantizedArray`; for short, bytes (uint8)
are Q4_0.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import mixedkv as mkv

Rows: TypeAlias = NDArray[Any] | mkv.QuantizedArray

_FLOATS = {"float32": "f32", "float16": "f16"}


def typed(rows: Rows) -> Rows:
    """Give rows whose type says what their bytes mean."""
    if isinstance(rows, np.ndarray) and rows.dtype == np.uint8:
        return mkv.QuantizedArray(rows, "q4_0")
    return rows


def format_of(rows: Rows) -> mkv.formats.Format:
    """Give the format of rows; KeyError with the dtype where they are of none."""
    rows = typed(rows)
    if isinstance(rows, mkv.QuantizedArray):
        return mkv.formats.info(rows.format)
    return mkv.formats.info(_FLOATS[rows.dtype.name])


def in_blocks(rows: Rows) -> bool:
    """Whether values share scales, so that kernels for them round queries and weights."""
    return format_of(rows).block_values > 1


def data_of(rows: Rows) -> NDArray[Any]:
    """Give rows as they lie in memory: floats, or bytes."""
    array: NDArray[Any] = rows.data if isinstance(rows, mkv.QuantizedArray) else rows
    return array


def as_float32(rows: Rows) -> NDArray[np.float32]:
    """Give the values of rows."""
    rows = typed(rows)
    if isinstance(rows, mkv.QuantizedArray):
        values: NDArray[np.float32] = rows.dequantize()
        return values
    return np.asarray(rows, np.float32)


def of_format(data: NDArray[Any], like: Rows) -> Rows:
    """Give data, floats or bytes, the format of other rows."""
    like = typed(like)
    return mkv.QuantizedArray(data, like.format) if isinstance(like, mkv.QuantizedArray) else data


def copied(rows: Rows) -> Rows:
    """Give a copy in C order."""
    return of_format(np.array(data_of(rows), order="C"), rows)


def zeros(rows: Rows, shape: tuple[int, ...]) -> Rows:
    """Give rows of zeros, of the format and width of others; `shape` is without the width."""
    data = data_of(rows)
    return of_format(np.zeros((*shape, data.shape[-1]), data.dtype), rows)


def same_bits(a: Rows, b: Rows) -> bool:
    """Whether two rows are of one format, and the same in every bit."""
    if format_of(a) != format_of(b):
        return False
    return bool(data_of(a).tobytes() == data_of(b).tobytes())


def converted(rows: Rows, name: str, *, fit_scales: bool = False) -> Rows:
    """Give what a cache makes of rows that it stores in a format, or that move there.

    `fit_scales` is the cache's option; of formats without a choice of scales it changes nothing.

    Raises ValueError where they hold what such rows can't be made of.
    """
    rows = typed(rows)
    if format_of(rows).name == name:
        return rows
    if name in mkv.formats.packed():
        fit = fit_scales and mkv.formats.info(name).fits
        return mkv.quantize(as_float32(rows), name, fit_scales=fit)
    with np.errstate(over="ignore"):
        return as_float32(rows).astype(np.float32 if name == "f32" else np.float16)
