"""Arguments of the caches: checked, and brought to what the core takes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import formats
from .._arrays import Array, shown
from ..quantized import QuantizedArray, rows_of


def integer(value: int, name: str) -> int:
    """Return value as an int; TypeError and ValueError name it."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    number = int(value)
    if not -(2**62) < number < 2**62:
        raise ValueError(f"{name} is out of range: {number}")
    return number


def positive(value: int, name: str) -> int:
    """Return value as an int of 1 or more; TypeError and ValueError name it."""
    number = integer(value, name)
    if number < 1 or number > 2**40:
        raise ValueError(f"{name} must be from 1 to 2**40, got {number}")
    return number


def positive_or_none(value: int | None, name: str) -> int | None:
    """Return None, or value as :func:`positive` does."""
    return None if value is None else positive(value, name)


def kv_type(value: str, name: str) -> str:
    """Return the name of a format of keys or values; TypeError and ValueError name it."""
    return formats.find(value, name, formats.available()).name


def layers(
    layer_filter: Callable[[int], bool] | Iterable[int] | None, num_layers: int
) -> list[bool]:
    """Return for each layer whether it is held; an empty list for all."""
    if layer_filter is None:
        return []
    if callable(layer_filter):
        held = [bool(layer_filter(layer)) for layer in range(num_layers)]
    else:
        held = [False] * num_layers
        for layer in _listed(layer_filter):
            if isinstance(layer, (bool, np.bool_)) or not isinstance(layer, (int, np.integer)):
                raise TypeError(
                    "layer_filter must be a callable or layer indices, got "
                    f"{shown(layer)} among them"
                )
            if not 0 <= layer < num_layers:
                raise ValueError(
                    f"layer_filter must hold layers from 0 to {num_layers - 1}, got {layer}"
                )
            held[layer] = True
    if not any(held):
        raise ValueError("layer_filter must let one layer through at least, got none")
    return held


def _listed(layer_filter: object) -> list[Any]:
    if isinstance(layer_filter, Iterable) and not isinstance(layer_filter, (str, bytes)):
        with contextlib.suppress(TypeError):  # an array without axes says that it is iterable
            return list(layer_filter)
    raise TypeError(f"layer_filter must be a callable or layer indices, got {shown(layer_filter)}")


def int_array(values: Sequence[int] | Array, name: str) -> NDArray[np.int64]:
    """Return values as contiguous int64 [n]."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a sequence of ints ({error})") from None
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold ints, got {array.dtype}")
    if array.size and array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} is out of range: {array.max()}")
    return np.ascontiguousarray(array, np.int64)


def owners(
    seq_id: Sequence[int | Iterable[int]] | Array, n: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each token's owners begin, [n + 1], and all owners."""
    if not hasattr(seq_id, "__len__"):
        raise TypeError(f"seq_id must be a sequence, got {shown(seq_id)}")
    if len(seq_id) != n:
        raise ValueError(f"seq_id must have one entry a token, {n}, got {len(seq_id)}")
    if isinstance(seq_id, np.ndarray) or not any(
        isinstance(owner, (set, frozenset, list, tuple)) for owner in seq_id
    ):
        return np.arange(n + 1, dtype=np.int64), int_array(seq_id, "seq_id")
    begin = [0]
    ids: list[int] = []
    for i, owner in enumerate(seq_id):
        owners = list(owner) if isinstance(owner, (set, frozenset, list, tuple)) else [owner]
        if not owners:
            raise ValueError(f"seq_id[{i}] must hold one sequence at least, got {owner!r}")
        ids.extend(sorted(integer(one, f"seq_id[{i}]") for one in owners))
        begin.append(len(ids))
    return np.array(begin, np.int64), np.array(ids, np.int64)


def new_rows(x: Array | QuantizedArray, name: str) -> tuple[NDArray[Any], formats.Format]:
    """Return rows to be stored as the core takes them, and their format; TypeError names them."""
    rows, kind = rows_of(x, name)
    if kind.name == "q4_0" and not isinstance(x, QuantizedArray):
        raise TypeError(
            f"{name} must be float32, float16, bfloat16 (torch) or a QuantizedArray, which says "
            "what its bytes mean, got uint8"
        )
    return rows, kind
