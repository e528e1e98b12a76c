"""What the caches hand out: slots, rows, counters, errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core, formats
from ..quantized import QuantizedArray

CacheFull = _core.CacheFull


class StateFileError(Exception):
    """A state file can't be read, or does not fit the cache."""


@dataclass(frozen=True)
class Slot:
    """What :meth:`MixedKVCache.find_slot` found for a ubatch."""

    #: Tokens of the ubatch.
    num_tokens: int
    #: Tokens that will lie in hot at commit.
    num_hot: int
    #: Tokens of a ubatch longer than hot that go straight on to cold at commit.
    num_cold: int
    #: Older tokens moved to cold to make room.
    num_moved: int


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows of a layer and a tier as it stores them, or what they stand for, by position."""

    #: int64 [n].
    positions: NDArray[np.int64]
    #: [Hkv, n, D] in the tier's type: float32, float16, or a QuantizedArray (ggml's block order);
    #: where dequantised rows were asked for, float32.
    k: NDArray[Any] | QuantizedArray
    #: [Hkv, n, Dv] likewise.
    v: NDArray[Any] | QuantizedArray


def stored_rows(
    rows: tuple[NDArray[np.int64], NDArray[Any], NDArray[Any]], k_type: str, v_type: str
) -> StoredRows:
    """Return what the core exports of a tier whose keys and values are of these types."""
    positions, *arrays = rows
    k, v = (
        QuantizedArray(array, kind) if formats.info(kind).packed else array
        for array, kind in zip(arrays, (k_type, v_type), strict=True)
    )
    return StoredRows(positions, k, v)


@dataclass(frozen=True)
class CacheStats:
    """Counters of a cache. Tokens are cells in use; bytes are what is allocated."""

    hot_tokens: int
    cold_tokens: int
    hot_size: int
    cold_size: int
    #: Tokens ever committed.
    tokens_seen: int
    #: Tokens ever moved from hot to cold.
    moved: int
    #: Batches of moves.
    events: int
    #: Time spent on moves, mostly quantising.
    move_seconds: float
    hot_bytes: int
    cold_bytes: int
    #: What restore needs: a batch of moves; more while a slot that made more is pending.
    journal_bytes: int
    #: Cells, indices, plans.
    books_bytes: int
    #: Of a ubatch longer than hot, while it is pending.
    scratch_bytes: int
    #: What the tokens now in cold would take more in f16.
    bytes_saved: int

    @property
    def total_bytes(self) -> int:
        """Everything that the cache holds."""
        return (
            self.hot_bytes
            + self.cold_bytes
            + self.journal_bytes
            + self.books_bytes
            + self.scratch_bytes
        )


def full_message(stats: CacheStats, n: int, has_cold: bool) -> str:
    """Say that there is no room for n more tokens, and what room there is."""
    free = stats.hot_size - stats.hot_tokens
    if not has_cold:
        return f"no room for {n} tokens: {free} of {stats.hot_size} cells are free"
    return (
        f"no room for {n} tokens: hot has {free} of {stats.hot_size} cells free, cold "
        f"{stats.cold_size - stats.cold_tokens} of {stats.cold_size}"
    )
