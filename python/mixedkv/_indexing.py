"""Indices, shapes and axes of rows that lie in whole blocks: checked, as numpy and torch take them.

An array of rows is indexed like its values, all but the last axis, which stays whole.
"""

from __future__ import annotations

import math
import operator
import sys
from typing import Any

import numpy as np

from ._arrays import Array, is_tensor, shown


def take(data: Array, index: Any, shape: tuple[int, ...]) -> Array:
    """Return the part of data [..., bytes] that an index over its values' shape names.

    A view where numpy has one; of a torch tensor, which has no negative strides, a copy where a
    slice goes backwards.
    """
    parts = whole_rows(index, shape)
    if not is_tensor(data):
        return data[parts]
    torch = sys.modules["torch"]
    taken: list[Any] = []
    axis = 0
    for part in parts:
        one = part
        if isinstance(part, (list, np.ndarray)) or is_tensor(part):
            one = _places(part, torch)
        elif isinstance(part, slice):
            start, stop, step = part.indices(data.shape[axis])
            if step < 0:
                places = range(start, stop, step)
                forward = slice(places[-1], places[0] + 1, -step) if places else slice(0, 0)
                here = (*[slice(None)] * axis, forward)
                data = data[here].flip(axis)
                one = slice(None)
        taken.append(one)
        axis += axes_of(part)
    return data[tuple(taken)]


def _places(part: Any, torch: Any) -> Any:
    """Return an array of an index as a tensor: torch takes uint8 for a mask, and few other ints."""
    places = part if is_tensor(part) else torch.from_numpy(np.array(part))
    if places.dtype == torch.bool or places.is_floating_point() or places.is_complex():
        return places if places.numel() or not isinstance(part, list) else places.long()
    return places.to(torch.int64)


def whole_rows(index: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Return an index over all axes that takes the last one whole, or raise IndexError."""
    parts = index if isinstance(index, tuple) else (index,)
    taken = sum(axes_of(part) for part in parts)
    dots = [i for i, part in enumerate(parts) if part is Ellipsis]
    if len(dots) > 1:
        raise IndexError("an index can only have a single ellipsis ('...')")
    if taken > len(shape):
        raise IndexError(f"too many indices: {taken} for {len(shape)} axes")
    at = dots[0] if dots else len(parts)
    full = (*parts[:at], *[slice(None)] * (len(shape) - taken), *parts[at + len(dots) :])
    last = full[-1] if full else None
    whole = isinstance(last, slice) and last.indices(shape[-1]) == (0, shape[-1], 1)
    if not whole:
        raise IndexError(
            "the last axis of a QuantizedArray holds whole blocks and can't be indexed: index the "
            f"others, or dequantize() first; got {index!r} for shape {shape}"
        )
    return (*full[:-1], slice(None))


def axes_of(part: Any) -> int:
    """Return how many axes a part of an index takes."""
    if part is None or part is Ellipsis:
        return 0
    if isinstance(part, (bool, np.bool_)):
        raise IndexError("a bool is no index of a QuantizedArray; use an array of bools")
    if isinstance(part, list):
        part = np.asarray(part)
    is_mask = str(getattr(part, "dtype", "")) in ("bool", "torch.bool")
    return int(part.ndim) if is_mask else 1


def listed(values: tuple[Any, ...], name: str) -> list[int]:
    """Return what ``f(1, 2)`` or ``f((1, 2))`` was called with as ints."""
    all_in_one = len(values) == 1 and hasattr(values[0], "__iter__")
    return [whole(value, name) for value in (values[0] if all_in_one else values)]


def whole(value: Any, name: str) -> int:
    """Return value as an int; TypeError names it."""
    if not isinstance(value, (bool, np.bool_, str)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be an int, got {shown(value)}")


def new_shape(wanted: list[int], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape, in values, that one of this shape is to have: -1 may stand for one axis."""
    width = shape[-1]
    if not wanted or wanted[-1] not in (width, -1):
        raise ValueError(
            f"the last axis must stay {width}: it holds whole blocks; got {tuple(wanted)}"
        )
    known = math.prod(extent for extent in wanted if extent != -1)
    size = math.prod(shape)
    full = list(wanted)
    if wanted.count(-1) == 1 and known > 0 and size % known == 0:
        full[wanted.index(-1)] = size // known
    if min(full) < 0 or math.prod(full) != size:
        raise ValueError(f"shape {shape} can't be reshaped into {tuple(wanted)}")
    if full[-1] != width:
        raise ValueError(f"a shape {tuple(wanted)} would change the last axis, {width}")
    return tuple(full)


def place(axis: int, ndim: int) -> int:
    """Return an axis as counted from 0."""
    at = axis + ndim if axis < 0 else axis
    if not 0 <= at < ndim:
        raise ValueError(f"axis {axis} is out of range for {ndim} axes")
    return at
