"""What a MixedCache tells those who watch it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

import mixedkv as mkv


class Occupancy(NamedTuple):
    """One point of a cache's history, taken when a step is committed."""

    tokens_seen: int
    hot: int
    cold: int
    moved: int


class Observation(NamedTuple):
    """One attention of one layer, as it was computed; for `MixedCache.observer`.

    The tensors are the model's own: copy what is to be kept. `native` is in the midst of the step,
    so that ``native.export_rows(place, row)`` gives the very keys and values that were attended
    (rotated ones where the cache was made with ``rotate=True``; query and out are as the model has
    them, and so are rows that are exported with ``dequantize=True``).

    Attributes
    ----------
    layer
        The model's layer.
    first, width, rows
        The step's columns are [first, first + width) of each of `rows` rows.
    query
        [rows, query heads, queries, head_dim]: the last `queries` columns.
    out
        [rows, queries, query heads, head_dim of V].
    native, place
        The native cache, and the index that the keys' layer has there.
    kept
        Which of the rows * width columns are stored (the others are padding); None for all.
    options
        Of `mixedkv.MixedKVCache.attend`.
    """

    layer: int
    first: int
    width: int
    rows: int
    query: torch.Tensor
    out: torch.Tensor
    native: mkv.MixedKVCache
    place: int
    kept: torch.Tensor | None
    options: dict[str, Any]


def added_up(all_stats: list[mkv.CacheStats]) -> mkv.CacheStats:
    """Return the counters of native caches that hold the same tokens: bytes and seconds of all."""
    added = {
        field.name: sum(getattr(stats, field.name) for stats in all_stats)
        for field in dataclasses.fields(all_stats[0])
        if field.name.endswith("bytes") or field.name in ("move_seconds", "bytes_saved")
    }
    return dataclasses.replace(all_stats[0], **added)
